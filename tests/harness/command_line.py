"""The command line and the settings of a run, checked before vLLM is imported.

Each complaint is one line: the option or variable, its value, what is accepted.
"""

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fixtures.cases import AttnCase
from fixtures.cases.strategies import profile
from fixtures.cases.tables import TIERS
from tests.harness import ledger
from tests.harness.environment import has_xfv1, not_installed
from tests.harness.loading import named
from tests.harness.wording import did_you_mean, one_line, shown

ROOT = Path(__file__).resolve().parents[2]
CONFORMANCE = ROOT / "tests" / "conformance"
DEFAULT = "xfv1"
# With these options of pytest's a session runs no test.
LOOKING = ("collectonly", "setupplan", "showfixtures", "show_fixtures_per_test", "cacheshow")

# A name in an expression of -k or -m, as pytest reads it, and what may stand between names.
NAME = r"[\w:+\-.\[\]\\/]+"
OPERATORS = ("and", "or", "not", "True", "False")


def candidate_name(config: pytest.Config) -> str:
    """The name that --candidate gives, or the default."""
    given: list[str] = config.getoption("--candidate")
    return given[-1] if given else DEFAULT


def runs_tests(config: pytest.Config) -> bool:
    """Whether the session runs tests, in place of listing something."""
    return not any(getattr(config.option, name, False) for name in LOOKING)


def conforms(path: Path) -> bool:
    """Whether a file or folder belongs to the conformance tests."""
    return path.resolve().is_relative_to(CONFORMANCE)


def includes_conformance(config: pytest.Config) -> bool:
    """Whether conformance tests are among those that the command line names."""
    paths = [(config.invocation_params.dir / path).resolve() for path, _ in _arguments(config)]
    return any(conforms(path) or CONFORMANCE.is_relative_to(path) for path in paths)


def tier(config: pytest.Config, device_type: str) -> str:
    """The tier that -m chooses; without -m the device's, or any if a test's id names a case."""
    chosen: str = config.option.markexpr
    if chosen or any("[" in name for _, name in _arguments(config)):
        return chosen
    return "gpu" if device_type == "cuda" else "cpu"


def _arguments(config: pytest.Config) -> list[tuple[str, str]]:
    """Files and folders that are run, each with the name of a test in it or nothing."""
    return [(path, name) for path, _, name in (arg.partition("::") for arg in config.args)]


@functools.cache
def extra_cases(ids: tuple[str, ...]) -> dict[str, AttnCase]:
    """Cases by their ids.

    Raises:
        CaseError: for an id that is no case's.
    """
    return {text: AttnCase.from_id(text) for text in ids}


def _read_models(config: pytest.Config) -> None:
    """Read the models of --hf-config.

    `model_cases` is then the ids of their cases, and `model_lines` says what was read.
    """
    option = config.option
    option.model_cases, option.model_lines = [], []
    if not option.hf_config:
        return
    try:
        from tests.harness.models import read_cases
    except ImportError as error:
        # The suite tests other candidates without xfv1, which reads models.
        raise ValueError(f"expected xfv1 to be importable: {error}") from error
    cases, lines = read_cases(option.hf_config, int(option.tensor_parallel_size))
    option.model_cases, option.model_lines = [case.id for case in cases], lines


def check(config: pytest.Config) -> None:
    """Check the settings and all options but the report's folder.

    Raises:
        pytest.UsageError: in one line.
    """
    option = config.option
    checks: list[tuple[str, Callable[[], Any]]] = [
        ("", _check_settings),
        ("", profile),
        ("", lambda: _check_installed(config)),
        ("", lambda: _check_values(config)),
        ("", lambda: _check_selection(config)),
        ("", lambda: named(candidate_name(config))),
        ("--case: ", lambda: extra_cases(tuple(option.case))),
        ("--hf-config: ", lambda: _read_models(config)),
        ("--ledger: ", lambda: ledger.load_ledger(Path(option.ledger))),
    ]
    for where, read in checks:
        try:
            read()
        except ValueError as error:
            raise pytest.UsageError(one_line(f"{where}{error}")) from error


def _check_settings() -> None:
    """xfv1's own, if it is there: other candidates can be tested without it."""
    if has_xfv1():
        from xfv1 import settings

        settings.check()


def _check_values(config: pytest.Config) -> None:
    option = config.option
    for name, values, accepted in (
        ("--candidate", option.candidate, "xfv1 or package.module:Class"),
        ("--case", option.case, "a case's id"),
        ("--hf-config", option.hf_config, "a config.json, or the folder that holds it"),
        ("--report", [option.report], "a folder"),
        ("--ledger", [option.ledger], "a file"),
    ):
        if "" in values:
            raise ValueError(f"{name}=: expected {accepted}")
    if not re.fullmatch(r"[1-9]\d{0,3}", option.tensor_parallel_size):
        given = shown(option.tensor_parallel_size)
        raise ValueError(f"--tensor-parallel-size={given}: expected a whole number from 1 to 9999")
    if option.tensor_parallel_size != "1" and not option.hf_config:
        raise ValueError("--tensor-parallel-size: expected --hf-config too")
    if len(set(option.candidate)) > 1:
        raise ValueError(f"--candidate={shown(option.candidate)}: expected one")


def _check_installed(config: pytest.Config) -> None:
    if includes_conformance(config) and (line := not_installed("vllm")):
        raise ValueError(line)


def _check_selection(config: pytest.Config) -> None:
    """Check paths, -k and -m: pytest finds an error there late, and workers do not report it."""
    for path, _ in _arguments(config):
        if not (config.option.pyargs or os.path.exists(config.invocation_params.dir / path)):
            raise ValueError(f"{path}: no such file or folder: expected tests/conformance")
    _check_expression("-k", config.option.keyword)
    # A marker may have arguments in brackets.
    if "=" not in config.option.markexpr:
        _check_expression("-m", config.option.markexpr)
        _check_markers(config)


def _check_expression(option: str, text: str) -> None:
    form = re.sub(NAME, lambda name: name[0] if name[0] in OPERATORS else "x", text)
    try:
        if not re.fullmatch(r"[\w\s()]*", form):
            raise SyntaxError
        compile(form.strip() or "x", option, "eval")
    except SyntaxError as error:
        accepted = "names with and, or, not and brackets"
        raise ValueError(f"{option} {shown(text)}: expected {accepted}") from error


def _check_markers(config: pytest.Config) -> None:
    """A word that is no marker selects nothing."""
    expression: str = config.option.markexpr
    lines: list[str] = config.getini("markers")
    known = [re.split(r"\W", line, maxsplit=1)[0] for line in lines]
    for word in re.findall(NAME, expression):
        if word not in (*OPERATORS, *known):
            near, tiers = did_you_mean(word, known), ", ".join(TIERS)
            raise ValueError(
                f"-m {shown(expression)}: no marker {word}{near}, the tiers are {tiers}"
            )
