"""Data flows one way through the harness, from a case to the report.

case -> inputs -> truth and candidate -> comparison -> report
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HARNESS = "tests.harness"
# A module imports modules of lower floors alone; the lowest floor is the first.
FLOORS: tuple[set[str], ...] = (
    {"wording"},
    # About a process, a run or a file.
    {"environment", "ledger", "models", "output", "provenance", "rocm", "samples"}
    | {"settings", "summary", "watchdog"},
    # The words that the other floors have in common.
    {"loading", "promises", "verdicts"},
    {"batch", "budget", "memory", "record"},
    {"server", "truth"},
    {"refusals"},
    {"compare", "driver"},
    {"trial"},
    {"command_line", "options"},
    {"report"},
)
# The two sides that a comparison brings together: neither knows the other.
CANDIDATE = {"batch", "driver", "loading", "refusals", "server"}
TRUTH = {"budget", "truth"}
MODULES = sorted(path.stem for path in (ROOT / "tests" / "harness").glob("[!_]*.py"))
CONFORMANCE = sorted(path.stem for path in (ROOT / "tests" / "conformance").glob("test_*.py"))


def imported(source: str) -> Iterator[tuple[str, str]]:
    """Each module that a source imports, anywhere in it, with the name taken from it or nothing."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "expected no relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)


def rooms(source: str) -> set[str]:
    """The harness's modules that a source imports."""
    found = set()
    for module, name in imported(source):
        if module == HARNESS:
            found.add(name)
        elif module.startswith(f"{HARNESS}."):
            found.add(module.removeprefix(f"{HARNESS}.").partition(".")[0])
    return found


def packages(source: str) -> set[str]:
    """The top-level packages that a source imports."""
    return {module.partition(".")[0] for module, _ in imported(source)}


def _source(folder: str, module: str) -> str:
    return (ROOT / "tests" / folder / f"{module}.py").read_text()


def test_every_module_has_a_floor_of_its_own() -> None:
    placed = [name for floor in FLOORS for name in floor]
    assert sorted(placed) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_lower_floors_alone(module: str) -> None:
    own = next(at for at, floor in enumerate(FLOORS) if module in floor)
    lower: set[str] = set().union(*FLOORS[:own])
    assert rooms(_source("harness", module)) <= lower


@pytest.mark.parametrize("module", sorted(CANDIDATE | TRUTH))
def test_the_candidate_and_the_truth_do_not_know_each_other(module: str) -> None:
    other = TRUTH if module in CANDIDATE else CANDIDATE
    assert not rooms(_source("harness", module)) & other


def test_the_comparison_calls_neither_candidate_nor_reference() -> None:
    source = _source("harness", "compare")
    assert not rooms(source) & CANDIDATE
    assert not packages(source) & {"reference", "vllm", "xfv1"}


@pytest.mark.parametrize("module", ["record", "report"])
def test_the_report_knows_verdicts_alone(module: str) -> None:
    assert not rooms(_source("harness", module)) & (CANDIDATE | TRUTH | {"compare", "memory"})


@pytest.mark.parametrize("module", MODULES)
def test_the_reference_is_the_truths_and_vllm_the_candidates(module: str) -> None:
    used = packages(_source("harness", module))
    assert "reference" not in used or module in TRUTH
    # `environment` registers models with vLLM.
    assert "vllm" not in used or module in CANDIDATE | {"environment"}


@pytest.mark.parametrize("module", CONFORMANCE)
def test_truth_comes_into_a_conformance_test_as_a_fixture(module: str) -> None:
    taken = {name for of, name in imported(_source("conformance", module)) if of.endswith("truth")}
    assert taken <= {"Truth"}
    assert "budget" not in rooms(_source("conformance", module))


def test_imports_are_found_wherever_they_are() -> None:
    source = """
import vllm.config
import tests.harness.server
from tests.harness import ledger, truth as oracle
def f():
    from tests.harness.driver import drive
    from reference.paged import store
"""
    assert rooms(source) == {"server", "ledger", "truth", "driver"}
    assert packages(source) == {"vllm", "tests", "reference"}
