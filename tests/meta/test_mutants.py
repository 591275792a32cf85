"""The report of generated faults is of the source as it is, and a few of them are run again.

After a change of what is mutated: python -m tests.museum.mutants --json tests/museum/mutants.json
"""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.museum.mutate import Mutant, MutantError, Without, mutants_of
from tests.museum.targets import TARGETS, chosen, explained, generated

ROOT = Path(__file__).parents[2]
REPORT: dict[str, Any] = json.loads((ROOT / "tests" / "museum" / "mutants.json").read_text())
RUN = "run: python -m tests.museum.mutants --new --json tests/museum/mutants.json"
LEAST_RATE = 0.98
# Run again here, of each file in turn.
SAMPLE = 12


def test_report_is_of_the_source_as_it_is() -> None:
    """Every mutant that would be run is in it, and no other."""
    now = {mutant.id for target in TARGETS for mutant in chosen(target)}
    then = {result["id"] for result in REPORT["results"]}
    assert now == then, f"{RUN}\nnew: {sorted(now - then)[:5]}\ngone: {sorted(then - now)[:5]}"


def test_nearly_all_are_noticed_and_the_rest_explained() -> None:
    survivors = {r["id"] for r in REPORT["results"] if r["verdict"] == "survived"}
    noticed = {r["id"] for r in REPORT["results"]} - survivors
    # Reasons there are for more: what is run is a sample.
    assert explained().keys() <= {mutant.id for of in TARGETS for mutant in generated(of)}
    assert survivors <= explained().keys()
    assert not noticed & explained().keys()
    assert REPORT["rate"] >= LEAST_RATE
    assert REPORT["mutants"] >= 250


def test_some_are_noticed_again() -> None:
    """The source as it is passes what they are asked, and each of them fails it.

    In a process of its own: Triton has to be told of its interpreter before it is imported.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.museum.mutants", "--sample", str(SAMPLE)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert len(done.stdout.splitlines()) >= SAMPLE


# The generator.


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def made(source: str, *without: Without) -> list[Mutant]:
        (tmp_path / "mutated.py").write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(tmp_path)
        return mutants_of("mutated", without)

    return made


def _changes(mutants: list[Mutant]) -> set[str]:
    return {mutant.id.partition(": ")[2] for mutant in mutants}


@pytest.mark.parametrize(
    ("body", "changes"),
    [
        ("a < b", {"a < b -> a <= b"}),
        ("a - b", {"a - b -> a + b", "a - b -> b - a"}),
        ("a + b", {"a + b -> a - b", "a + b -> a"}),
        ("a * b", {"a * b -> a", "a * b -> b"}),
        ("a & b", {"a & b -> a", "a & b -> b"}),
        ("-(-a // b)", {"-(-a // b) -> a // b", "-a // b -> -a", "-a -> a"}),
        ("a[b:]", {"a[b:] -> a[:]", "a[b:] -> a[b + 1:]"}),
        ("a.stride(0)", {"a.stride(0) -> a.stride(1)"}),
        ("min(a, b)", {"min(a, b) -> max(a, b)"}),
        ("tl.where(a, b, a)", {"tl.where(a, b, a) -> tl.where(a, a, b)", "tl.where(a, b, a) -> b"}),
        ("tl.load(a, mask=b)", {"tl.load(a, mask=b) -> tl.load(a)"}),
        ("tl.store(a, b, a)", {"tl.store(a, b, a) -> tl.store(a, b)"}),
        ("b(a.k_scale)", {"b(a.k_scale) -> b(a.v_scale)"}),
        ("a if b else 2", {"a if b else 2 -> a if not b else 2", "a if b else 2 -> a if b else 3"}),
    ],
)
def test_each_kind_of_change_is_made(made: Any, body: str, changes: set[str]) -> None:
    assert _changes(made(f"def f(a, b):\n    return {body}\n")) == changes


def test_statements_are_lost_where_all_names_stay(made: Any) -> None:
    source = "def f(a):\n    for b in a:\n        c = b\n        a = b\n        print(c)\n"
    assert _changes(made(source)) == {"a = b -> pass", "print(c) -> pass"}


def test_words_types_and_guards_are_left_alone(made: Any) -> None:
    assert not made(
        '''
        def f(a: int = 1 + 1, *, b: "list[0]" = 2) -> "tuple[1, 2]":
            """Returns 1 + 1."""
            assert a < 1
            if a > 2:
                raise ValueError(f"{a + 1}")
            debug.check(a + 1)
            return "a" + "b"

        def not_supported_reasons(a):
            return a < 1
        '''
    )


def test_ids_survive_what_is_changed_elsewhere(made: Any) -> None:
    """Not by line, and not by how many come before in another function or of another form."""
    one = made("def f(a, b):\n    return a < b\n")
    other = made("def e(a):\n    return a < 1\n\n\ndef f(a, b):\n    c = a + 1\n    return a < b\n")
    assert {m.id for m in one} < {m.id for m in other}
    assert len({m.id for m in other}) == len(other)


def test_every_mutant_is_another() -> None:
    mutants = mutants_of("xfv1.kernels.paged.device")
    assert len({mutant.source for mutant in mutants}) == len(mutants)
    assert len({mutant.id for mutant in mutants}) == len(mutants)


def test_an_exclusion_that_excludes_nothing_is_an_error(made: Any) -> None:
    source = "def f(a, b):\n    c = a < b\n    return a - b\n"
    assert _changes(made(source, Without("mutated", "f", "why", "c = *"))) == {
        "a - b -> a + b",
        "a - b -> b - a",
    }
    with pytest.raises(MutantError, match="excludes nothing"):
        made(source, Without("mutated", "g", "why"))
