"""The benchmarks measure xfv1 where there is no GPU, so that they work where there is one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def written_by(folder: Path, name: str, *options: str) -> Any:
    path = folder / "result.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", f"--json={path}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())


def test_kernels(tmp_path: Path) -> None:
    options = ("--device=cpu", "--rows=decode", "--match=1x", "--peers", "--ops", "--rounds=1")
    rows = written_by(tmp_path, "kernels", *options)["rows"].values()
    assert rows
    assert all(row["contenders"]["xfv1"]["us"] > 0 for row in rows), rows


def test_builder(tmp_path: Path) -> None:
    options = ("--device=cpu", "--backends=xfv1", "--requests=2", "--calls=4")
    rows = written_by(tmp_path, "builder", *options)["rows"]
    assert [row["kind"] for row in rows] == ["decode", "mixed"]
    for row in rows:
        assert all(row[name] > 0 for name in ("build_us", "first_layer_us", "next_layer_us")), row
