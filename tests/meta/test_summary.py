"""Does the summary of a run keep what matters of its results?"""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness.summary import WORST, main, summary

pytestmark = pytest.mark.cpu

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def row(test: str, status: str, share: float | None = None) -> dict[str, Any]:
    return {"test": test, "case": f"{test}-case", "status": status, "share": share, "reason": "why"}


ROWS = [
    *(row("test_output", "passed", share / 100) for share in range(30)),
    row("test_poison", "known"),
    row("test_poison", "refused"),
]
RAW = json.dumps({"candidate": "xfv1", "seconds": 3.0, "results": ROWS}).encode()


def test_facts_counts_failures_and_worst_rows_stay() -> None:
    found = summary(RAW)
    assert (found["candidate"], found["seconds"]) == ("xfv1", 3.0)
    assert "results" not in found
    assert found["tests"] == {
        "test_output": {"passed": 30},
        "test_poison": {"known": 1, "refused": 1},
    }
    assert found["not_passed"] == ROWS[-2:]
    assert [one["share"] for one in found["worst"]] == [n / 100 for n in range(29, 29 - WORST, -1)]
    assert found["raw_sha256"] == hashlib.sha256(RAW).hexdigest()


def test_a_compressed_file_is_read_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json.gz"
    path.write_bytes(gzip.compress(RAW))
    assert main([str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == summary(RAW)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]", b'{"results": [1]}', b"\xff"])
def test_another_file_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        main([str(path)])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert f"results={str(path)!r}: expected a run's results.json" in last


def test_runs_that_are_kept_are_summaries() -> None:
    """The rows of 8,800 tests do not belong in a repository."""
    kept = {path.name: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    runs = {name: run for name, run in kept.items() if {"tier", "coverage"} <= run.keys()}
    assert {"h100-vllm-0.26.0.json", "h100-vllm-0.33.0.json"} <= runs.keys()
    assert {name: len(run.get("results", ())) for name, run in runs.items()} == {
        # The property test alone, once in each of its parts.
        **dict.fromkeys(runs, 0),
        "properties-h100.json": 100,
    }
