"""Runs of the suite, one after another in one process of its own: vLLM is imported once.

A command is a line of a shell in words: environment variables come first, as NAME=value.
"""

import itertools
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
ASSIGNMENT = r"[A-Z_0-9]+=.*"
END = "== exit status of run {}: {}, vLLM imported: {} =="
SCRIPT = f"""
import json, os, re, sys
import pytest
for number, command in enumerate(json.loads(sys.argv[1])):
    settings = dict(word.split("=", 1) for word in command if re.fullmatch({ASSIGNMENT!r}, word))
    os.environ.update(settings)
    status = pytest.main(command[len(settings):])
    for name in settings:
        del os.environ[name]
    end = {END!r}.format(number, int(status), "vllm" in sys.modules)
    print("\\n" + end, flush=True)
"""


@dataclass(frozen=True)
class Run:
    """What a run said: its exit status, its output, and the folder of its reports.

    vllm: whether its process had imported vLLM by its end.
    """

    status: int
    output: str
    folder: Path
    vllm: bool = True

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
    """What pytest does with each of these commands; reports go to folders of this one.

    Modules in the folder itself can be imported.
    """
    folders = [folder / str(number) for number in range(len(commands))]
    done = _python(
        "-c",
        SCRIPT,
        json.dumps([_with_report(at, *c) for c, at in zip(commands, folders, strict=True)]),
        path=folder,
    )
    parts = re.split(re.escape(END).replace(r"\{\}", r"(\w+)"), done.stdout)
    # Output, number, status and whether vLLM is imported of each run by turns, then what is left.
    assert parts[1::4] == [str(number) for number in range(len(commands))], done.stdout
    runs = zip(parts[0::4], parts[2::4], parts[3::4], folders, strict=False)
    return [Run(int(status), output, at, vllm == "True") for output, status, vllm, at in runs]


def run_once(folder: Path, *command: str, cwd: Path = ROOT) -> Run:
    """What `python -m pytest` does with this command; modules in the folder can be imported."""
    done = _python("-m", "pytest", *_with_report(folder, *command), cwd=cwd, path=folder)
    return Run(done.returncode, done.stdout, folder)


def without_settings(words: Sequence[str]) -> list[str]:
    """A command without the environment variables that come first."""
    return list(itertools.dropwhile(re.compile(ASSIGNMENT).fullmatch, words))


def _with_report(folder: Path, *command: str) -> list[str]:
    """The command, with its report in a folder unless it says where that goes."""
    settings = [word for word in command if re.fullmatch(ASSIGNMENT, word)]
    options = [f"--report={folder}", "-p", "no:cacheprovider"]
    return [*settings, *options, *command[len(settings) :]]


def _python(
    *arguments: str, cwd: Path = ROOT, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    # A worker of xdist must not pass for one in what it starts.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    folders = (str(path or ""), os.environ.get("PYTHONPATH", ""))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=own | {"PYTHONPATH": os.pathsep.join(filter(None, folders))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="backslashreplace",
        timeout=600,
        check=False,
    )
