"""A run puts on record the environment variables that can change its verdicts."""

import ast
import configparser
import json
import shlex
from pathlib import Path

import pytest

from tests.harness.settings import FOLDERS, assignments, changes_verdicts, settings
from tests.meta.runs import CASE, SMALL, WRONG, run_suite, without_settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "name",
    [
        "XFV1_OPS",
        "XFV1_CPU",
        "XFV1_DEBUG",
        "TRITON_INTERPRET",
        "VLLM_BATCH_INVARIANT",
        "VLLM_KV_CACHE_LAYOUT",
        "HYPOTHESIS_PROFILE",
    ],
)
def test_a_setting_is_on_record_if_it_is_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(name, raising=False)
    assert name not in settings()
    for value in ("1", "a b", ""):
        monkeypatch.setenv(name, value)
        assert settings()[name] == value


@pytest.mark.parametrize("name", ["PATH", "VLLM_API_KEY", "VLLM_LOGGING_LEVEL", *FOLDERS])
def test_what_changes_no_verdict_is_not_on_record(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "given")
    assert name not in settings()


def _read(path: Path) -> set[str]:
    """The names that a file looks up in os.environ."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "os.environ.get":
            name = node.args[0]
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            name = node.slice
        else:
            continue
        if isinstance(name, ast.Constant):
            found.add(str(name.value))
    return found


def test_every_variable_that_the_backend_and_the_fixtures_read_is_listed() -> None:
    read = {
        name
        for folder in ("xfv1", "fixtures", "reference", "tests/site")
        for path in (ROOT / folder).rglob("*.py")
        for name in _read(path)
    }
    assert {"XFV1_OPS", "TRITON_INTERPRET", "HYPOTHESIS_PROFILE"} <= read
    # xfv1 hands PYTHONPATH on to the process that reads a model.
    assert {name for name in read if not changes_verdicts(name)} == {"PYTHONPATH"}


def test_every_variable_by_which_tox_restricts_the_processor_is_listed() -> None:
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    lines = tox["testenv:self-avx2"]["set_env"].strip().splitlines()
    names = {line.partition("=")[0].strip() for line in lines if not line.startswith("#")}
    assert {name for name in names if not changes_verdicts(name)} == {"PYTHONPATH"}


def test_assignments_are_words_of_a_shell() -> None:
    values = {"XFV1_OPS": "torch,triton", "ONE": "a b", "NONE": "", "QUOTED": "it's $HOME"}
    line = " ".join(assignments(values))
    assert line.startswith("XFV1_OPS=torch,triton ")
    assert dict(word.split("=", 1) for word in shlex.split(line)) == values


def test_the_line_that_reruns_a_failure_begins_with_the_settings(tmp_path: Path) -> None:
    """The failure comes again by this line alone, in a process without these settings."""
    given = ("HYPOTHESIS_PROFILE=nightly", "XFV1_DEBUG=1")
    command = (*SMALL, f"--candidate={WRONG}:NewestKeyLost")
    (run,) = run_suite(tmp_path, (*given, *command))
    assert run.status == 1
    recorded = run.results["settings"]
    assert recorded.items() >= {"HYPOTHESIS_PROFILE": "nightly", "XFV1_DEBUG": "1"}.items()
    (line,) = [line for line in run.output.splitlines() if line.startswith("rerun: ")]
    words = shlex.split(line.removeprefix("rerun: "))
    assert set(given) <= set(words[: words.index("pytest")])
    assert without_settings(words) == ["pytest", command[-1], f"--case={CASE}"]
    (again,) = run_suite(tmp_path / "again", [word for word in words if word != "pytest"])
    assert again.statuses == run.statuses
    assert again.results["settings"] == recorded
    assert json.loads((run.folder / "results.json").read_text())["complete"]
