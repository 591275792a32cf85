"""Runs of the suite, one after another in one process of its own: vLLM is imported once."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# A case of a tenth of a second, whose two requests attend to 32 and 40 keys.
CASE = "small_decode-h8kv2-gqa-head64-block16-fp16"
SMALL = ("tests/conformance", f"--case={CASE}")
WRONG = "tests.meta.candidates"
END = "== exit status of run {}: {} =="
SCRIPT = f"""
import json, sys
import pytest
for number, arguments in enumerate(json.loads(sys.argv[1])):
    status = pytest.main(arguments)
    print("\\n" + {END!r}.format(number, int(status)), flush=True)
"""


@dataclass(frozen=True)
class Run:
    """What a run said: its exit status, its output, and the folder of its reports."""

    status: int
    output: str
    folder: Path

    @property
    def errors(self) -> list[str]:
        """The lines that begin as a command's own errors do."""
        return [line for line in self.output.splitlines() if line.startswith("ERROR: ")]

    @property
    def results(self) -> dict[str, Any]:
        """results.json."""
        content: dict[str, Any] = json.loads((self.folder / "results.json").read_text())
        return content

    @property
    def statuses(self) -> dict[str, str]:
        """By test, passed, refused, known or failed."""
        return {result["test"]: result["status"] for result in self.results["results"]}

    @property
    def counts(self) -> Counter[str]:
        return Counter(self.results["counts"])


def run_suite(folder: Path, *commands: Sequence[str]) -> list[Run]:
    """What pytest does with each of these arguments; reports go to folders of this one."""
    folders = [folder / str(number) for number in range(len(commands))]
    arguments = [
        [*command, "-p", "no:cacheprovider", f"--report={at}", f"--junitxml={at}/junit.xml"]
        for command, at in zip(commands, folders, strict=True)
    ]
    done = _python("-c", SCRIPT, json.dumps(arguments))
    parts = re.split(re.escape(END).replace(r"\{\}", r"(\d+)"), done.stdout)
    # Output, number and status of each run by turns, then what is left.
    assert parts[1::3] == [str(number) for number in range(len(commands))], done.stdout
    return [
        Run(int(status), output, at)
        for output, status, at in zip(parts[0::3], parts[2::3], folders, strict=False)
    ]


def run_once(folder: Path, *command: str) -> Run:
    """What `python -m pytest` does with these arguments."""
    reports = (f"--report={folder}", f"--junitxml={folder}/junit.xml")
    done = _python("-m", "pytest", *command, "-p", "no:cacheprovider", *reports)
    return Run(done.returncode, done.stdout, folder)


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    # A worker of xdist must not pass for one in what it starts.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
