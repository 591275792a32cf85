"""The plain backend passes what the cpu tier asks, and needs neither xfv1 nor the reference."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fixtures.cases.tables import Row, rows
from tests.harness.loading import load_candidate
from tests.museum.kill import KINDS, PASSED, applies, asked_in, attempt
from tests.museum.plain import Plain

ROOT = Path(__file__).parents[2]
TIERS = ("smoke", "cpu")
CPU_ROWS = [row for row in rows() if row.tier in TIERS]
# All of them run by: pytest --candidate=tests.museum.plain:Plain -m cpu
ONE_IN = 4
# As in a checkout without xfv1: importing it raises ModuleNotFoundError.
WITHOUT_XFV1 = "import sys; sys.modules['xfv1'] = None; "


def _kinds(row: Row) -> list[str]:
    """The tests that the cpu tier asks of a row's case."""
    return [kind for kind in KINDS if applies(kind, row.case) and asked_in(kind, row) in TIERS]


@pytest.mark.parametrize("row", CPU_ROWS[::ONE_IN], ids=lambda row: row.case.id)
def test_it_passes_what_the_cpu_tier_asks_of_a_case(row: Row) -> None:
    assert _kinds(row)
    for kind in _kinds(row):
        made = attempt(Plain, kind, row.case)
        assert made.outcome == PASSED, f"{kind}: {made.message}"


def test_the_cpu_tier_asks_every_kind_of_test() -> None:
    counts = Counter(kind for row in CPU_ROWS for kind in _kinds(row))
    assert counts.keys() == KINDS.keys()
    assert counts["output"] == counts["cache"] == len(CPU_ROWS)


def test_it_is_a_candidate_by_its_name() -> None:
    assert load_candidate("tests.museum.plain:Plain") is Plain


def _python(program: str, *arguments: str) -> str:
    """The output of a program that imports no xfv1 and ends well."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_XFV1 + program, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_matrix_runs_where_xfv1_cannot_be_imported(tmp_path: Path) -> None:
    said = _python(
        "import pytest; sys.exit(pytest.main(sys.argv[1:]))",
        "--candidate=tests.museum.plain:Plain",
        f"--report={tmp_path}",
        "-p",
        "no:cacheprovider",
        "-m",
        "smoke",
        "tests/conformance",
    )
    assert "85 passed, 0 refused, 0 known, 0 failed" in said


def test_the_museum_runs_where_xfv1_cannot_be_imported() -> None:
    program = "from tests.museum.kill import main; sys.exit(main(sys.argv[1:]))"
    assert "2 of 2 faults killed" in _python(program, "WindowIgnored", "NeverStores")
