"""The covering arrays cover all that they claim to, and the count of it can say otherwise."""

import dataclasses
import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from fixtures.cases import ATTENTION, DTYPES, KV_DTYPES, KV_LAYOUTS, LOGITS, AttnCase
from fixtures.cases.covering import (
    DATA,
    STRENGTHS,
    coverage,
    coverage_line,
    covering_cases,
    covering_rows,
    possible_combinations,
    violated,
)
from fixtures.cases.generate import MOST, effective, extended, generate, still_valid, write
from fixtures.cases.scenarios import SCENARIOS
from fixtures.cases.space import (
    AXES,
    BY_NAME,
    MODEL,
    Axis,
    Constraint,
    Model,
    Row,
    Rule,
    Value,
    case_of,
    settled,
)
from fixtures.cases.tables import rows
from tests.museum.reference_faults import REFERENCE_FAULTS

PLAIN: Row = {axis.name: axis.choices[0] for axis in MODEL.axes}


def _model(*sizes: int) -> Model:
    """Axes a, b, ... of so many values each, where the last of a excludes the last of b."""
    axes = tuple(
        Axis(name, tuple(Value(f"{name}{n}", "made up") for n in range(size)))
        for name, size in zip("abcdef", sizes, strict=False)
    )
    last = tuple(axis.choices[-1] for axis in axes)
    excluded = Constraint("a or b", ("a", "b"), lambda a, b: (a, b) != last[:2], "made up")
    return Model(axes, (excluded,))


def _all_rows(model: Model) -> list[Row]:
    every = (dict(zip(model.names, row, strict=True)) for row in product(*model.factors.values()))
    return [row for row in every if not violated(row, model)]


# What is committed.


@pytest.mark.parametrize("tier", STRENGTHS)
def test_every_combination_is_in_a_row(tier: str) -> None:
    found = coverage(covering_rows(tier), STRENGTHS[tier])
    assert found.uncovered == ()
    assert found.covered == found.valid > 0


def test_every_two_values_are_in_a_row_where_both_have_an_effect() -> None:
    found = coverage(covering_rows("cpu"), 2, effective=True)
    assert found.uncovered == ()
    assert found.covered == found.valid > 0


def test_nearly_every_three_values_are_in_a_row_where_all_have_an_effect() -> None:
    """All of them would take a tenth more rows, each for one batch, head size and layout."""
    found = coverage(covering_rows("gpu"), 3, effective=True)
    assert found.covered > 0.995 * found.valid
    assert len(covering_rows("gpu")) <= MOST["gpu"]


def test_two_values_that_never_both_have_an_effect_are_these() -> None:
    """Decodes and single tokens have nothing ahead, one key has all the weight, one KV head has no
    order."""
    possible, able = (possible_combinations(MODEL, 2, only) for only in (False, True))
    found = set()
    for axes in possible:
        for at in np.argwhere(possible[axes] & ~able[axes]):
            one, other = (MODEL.axes[a].choices[i] for a, i in zip(axes, at, strict=True))
            found.add((one, other))
    windows = ("1", "block-1", "block", "block+1", "37")
    decodes = ("edge_decode", "decode33", "deep_decode", "single_token")
    layouts = ("LBHNC", "BLHNC", "BHLNC", "LHBNC")
    assert found == {
        *product(["single_token"], windows),
        *product(["single_token", "1"], [True]),
        *product([*decodes, "1"], ["noncausal"]),
        *product(["8/1", "32/1", "64/1"], layouts),
    }


# By axis, the fault that a value without effect cannot be told from.
FAULTS = {
    "window": "window_ignored",
    "softcap": "softcap_dropped",
    "alibi": "alibi_shifted",
    "attention": "made_causal",
}


@pytest.mark.parametrize("effect", MODEL.effects, ids=lambda effect: effect.name)
def test_a_value_has_an_effect_where_its_fault_shows(effect: Rule) -> None:
    """Of every row: what says whether a fault changes the output says the same of the value."""
    axis = effect.axes[0]
    shown = set()
    for row in covering_rows("gpu"):
        case = case_of(row)
        shows = effect.allows(*(row[name] for name in effect.axes))
        if axis == "kv_layout":
            assert shows == (_places(case) not in _others(case)), row
        elif row[axis] not in (PLAIN[axis], "beyond", "encoder", "cross"):
            assert shows == REFERENCE_FAULTS[FAULTS[axis]].shows(case), row
        else:
            assert shows
        shown.add(shows)
    assert shown == {False, True}


def _places(case: AttnCase) -> tuple[int, ...]:
    """How far apart in memory two neighbours along each axis lie, where the axis has two."""
    sizes = {"L": 2, "B": 3, "H": case.num_kv_heads, "N": case.block_size, "C": 2 * case.head_size}
    inner = {axis: case.kv_layout[at + 1 :] for at, axis in enumerate(case.kv_layout)}
    return tuple(math.prod(sizes[a] for a in inner[x]) if sizes[x] > 1 else 0 for x in "LBHNC")


def _others(case: AttnCase) -> set[tuple[int, ...]]:
    """The same of the layouts that come before the case's own."""
    before = KV_LAYOUTS[: KV_LAYOUTS.index(case.kv_layout)]
    return {_places(case.replace(kv_layout=layout)) for layout in before}


def test_every_row_is_a_case_of_its_own() -> None:
    cases = covering_cases("gpu")
    assert len({case.id for case in cases}) == len(cases) == len(covering_rows("gpu"))


def test_no_row_breaks_a_constraint() -> None:
    broken = {str(row): violated(row) for row in covering_rows("gpu")}
    assert not any(broken.values())


def test_tiers_nest() -> None:
    within, whole = covering_rows("cpu"), covering_rows("gpu")
    assert whole[: len(within)] == within
    assert len(whole) > len(within)


def test_every_value_has_a_reason_and_is_there_once() -> None:
    for axis in MODEL.axes:
        assert len(set(map(repr, axis.choices))) == len(axis.choices) > 1, axis.name
        assert all(len(value.why) > 5 for value in axis.values), axis.name
    assert len(set(MODEL.names)) == len(MODEL.names)
    assert set(MODEL.factors["batch"]) <= set(SCENARIOS)
    # The space describes what a case accepts, and what the tables use.
    words = {"dtype": DTYPES, "kv_dtype": KV_DTYPES, "kv_layout": KV_LAYOUTS}
    words |= {"attention": ATTENTION, "logits": LOGITS}
    assert {name: BY_NAME[name].every for name in words} == words
    for axis in AXES:
        assert all(len(value.why) > 5 for value in axis.values), axis.name
        if not axis.fields:
            assert {getattr(row.case, axis.name) for row in rows()} == set(axis.every), axis.name


@pytest.mark.parametrize("constraint", MODEL.constraints, ids=lambda c: c.name)
def test_every_constraint_has_a_reason_and_excludes_something(constraint: Constraint) -> None:
    assert len(constraint.why) > 20
    allowed = [
        constraint.allows(*values)
        for values in product(*(MODEL.factors[a] for a in constraint.axes))
    ]
    assert any(allowed) and not all(allowed)
    assert constraint.allows(*(PLAIN[axis] for axis in constraint.axes)), "a plain row is excluded"
    for values in product(*(MODEL.factors[a] for a in constraint.axes)):
        row = {**PLAIN, **dict(zip(constraint.axes, values, strict=True))}
        assert not violated(settled(row)), "what gives way does not help"
    others = tuple(c for c in MODEL.constraints if c is not constraint)
    strength = len(constraint.axes)
    without = coverage([], strength, Model(MODEL.axes, others)).valid
    assert without > coverage([], strength).valid, "the other constraints exclude the same"


def test_a_plain_row_is_a_plain_case() -> None:
    case = case_of(PLAIN)
    assert case.id == "edge_decode-h8kv2-gqa-head64-block16-fp16"


def test_windows_and_padding_become_numbers() -> None:
    def window(word: str, block_size: int) -> int | None:
        return case_of({**PLAIN, "window": word, "block_size": block_size}).sliding_window

    words = MODEL.factors["window"]
    assert words == ("none", "1", "block-1", "block", "block+1", "37", "beyond")
    assert [window(str(word), 64) for word in words] == [None, 1, 63, 64, 65, 37, 4096]
    longest = max(max(SCENARIOS[str(batch)].seq_lens) for batch in MODEL.factors["batch"])
    assert longest < 4096, "beyond is not beyond every context"
    graph, tokens = (case_of({**PLAIN, "padding": word}) for word in ("graph", "tokens"))
    assert graph.pad_reqs > 0 and graph.pad_tokens > 0
    assert tokens.pad_reqs == 0 and tokens.pad_tokens > 0


# What counts them.


def test_a_combination_counts_where_each_of_its_values_has_an_effect() -> None:
    """b1 has one beside c0 alone, and a matters to nobody."""
    model = _model(2, 2, 2)
    only_c0 = Constraint("b", ("b", "c"), lambda b, c: (b, c) != ("b1", "c1"), "made up")
    model = dataclasses.replace(model, constraints=(), effects=(only_c0,))
    rows: list[Row] = [{"a": "a0", "b": "b1", "c": "c1"}]
    assert coverage(rows, 2, model).covered == 3
    found = coverage(rows, 2, model, effective=True)
    # Not (b1, c1), which nobody counts, nor (a0, b1), which another row could have; but (a0, c1).
    assert (found.covered, found.valid) == (1, 3 * 4 - 1)
    assert {"a": "a0", "b": "b1"} in list(found.uncovered)
    rows = effective(rows, 2, model)
    assert coverage(rows, 2, model, effective=True).uncovered == ()
    assert len(effective(rows[:1], 2, model, most=2)) == 2


@pytest.mark.parametrize("strength", [1, 2, 3, 4])
@pytest.mark.parametrize("sizes", [(2, 3, 2, 2), (3, 2, 4, 2, 2)])
def test_possible_is_what_some_row_could_hold(sizes: tuple[int, ...], strength: int) -> None:
    """By brute force: all rows there are cover exactly what counts as possible."""
    model = _model(*sizes)
    rows = _all_rows(model)
    held = {
        tuple((name, row[name]) for name in names)
        for row in rows
        for names in _choose(model.names, strength)
    }
    found = coverage(rows, strength, model)
    assert found.valid == found.covered == len(held)
    assert len(possible_combinations(model, strength)) == len(list(_choose(model.names, strength)))


def test_possible_sees_what_constraints_exclude_together() -> None:
    """a1 needs b1 and b1 needs c1, so a1 with c0 is impossible, though no constraint says so."""
    axes = _model(2, 2, 2).axes
    implies = (
        Constraint("a1 needs b1", ("a", "b"), lambda a, b: a != "a1" or b == "b1", "made up"),
        Constraint("b1 needs c1", ("c", "b"), lambda c, b: b != "b1" or c == "c1", "made up"),
    )
    model = Model(axes, implies)
    assert len(_all_rows(model)) == 4
    missing = [dict(row) for row in coverage([], 2, model).uncovered]
    assert {"a": "a1", "c": "c1"} in missing
    assert {"a": "a1", "c": "c0"} not in missing
    assert coverage(_all_rows(model), 2, model).uncovered == ()


def _choose(names: tuple[str, ...], count: int) -> list[tuple[str, ...]]:
    picked = product((False, True), repeat=len(names))
    return [
        tuple(name for name, take in zip(names, taken, strict=True) if take)
        for taken in picked
        if sum(taken) == count
    ]


def test_a_missing_combination_is_named() -> None:
    rows = covering_rows("cpu")
    first, *others = rows
    found = coverage(others, 2)
    assert found.covered == found.valid - len(found.uncovered) < found.valid
    assert found.uncovered, "the first row is not needed"
    for missing in found.uncovered:
        assert len(missing) == 2
        assert all(first[axis] == value for axis, value in missing.items())
    assert "(99." in str(found)


def test_a_row_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="head_size=65: expected one of"):
        coverage([{**PLAIN, "head_size": 65}], 2)
    with pytest.raises(ValueError, match="ALiBi without sinks"):
        coverage([{**PLAIN, "alibi": True, "sinks": True}], 2)
    with pytest.raises(ValueError, match="axes"):
        coverage([{"head_size": 64}], 2)
    with pytest.raises(ValueError, match="tier='long': expected one of cpu, gpu"):
        covering_rows("long")


def test_a_line_says_what_ran() -> None:
    ids = [case.id for case in covering_cases("cpu")]
    assert coverage_line("cpu") == coverage_line("cpu", ids)
    assert coverage_line("cpu", ids).count("(100 %)") == 2
    assert f"{len(ids) - 1} cases" in coverage_line("cpu", ids[1:])
    assert "(100 %)" not in coverage_line("cpu", ids[1:])


# What makes them. The library that does is for development.


def test_rows_that_are_there_stay_when_a_value_is_added(tmp_path: Path) -> None:
    pytest.importorskip("covertable")
    path = tmp_path / "covering.json"
    before = generate(path, small := _model(3, 3, 2, 2))
    write(before, path, small)
    assert generate(path, small) == before, "nothing was missing, and rows were added"

    after = generate(path, larger := _model(3, 3, 3, 2))
    for tier, strength in STRENGTHS.items():
        assert all(row in after[tier] for row in before[tier])
        assert len(after[tier]) > len(before[tier])
        assert coverage(after[tier], strength, larger).uncovered == ()
    assert after["cpu"][: len(before["cpu"])] == before["cpu"]


def test_a_head_size_more_only_appends_rows() -> None:
    pytest.importorskip("covertable")
    rows = covering_rows("cpu")
    assert extended(rows, 2) == rows
    larger = Model(
        tuple(
            dataclasses.replace(axis, values=(*axis.values, Value(48, "made up")))
            if axis.name == "head_size"
            else axis
            for axis in MODEL.axes
        ),
        MODEL.constraints,
    )
    more = extended(rows, 2, larger)
    assert more[: len(rows)] == rows
    # One with each batch, and few besides.
    assert len(MODEL.factors["batch"]) <= len(more) - len(rows) <= 2 * len(MODEL.factors["batch"])


def test_rows_that_are_there_have_a_new_axis_first_value(tmp_path: Path) -> None:
    pytest.importorskip("covertable")
    path = tmp_path / "covering.json"
    before = generate(path, small := _model(3, 2, 2))
    write(before, path, small)
    after = generate(path, _model(3, 2, 2, 2))
    assert [{**row, "d": "d0"} for row in before["cpu"]] == after["cpu"][: len(before["cpu"])]


def test_rows_that_cannot_be_any_more_go() -> None:
    model = _model(2, 2, 2)
    rows: list[Row] = [
        {"a": "a0", "b": "b1", "c": "c0"},
        {"a": "a1", "b": "b1", "c": "c0"},
        {"a": "a0", "b": "b1", "c": "c7"},
    ]
    assert still_valid(rows, model) == rows[:1]


def test_a_library_that_leaves_something_out_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    covertable = pytest.importorskip("covertable.main")
    monkeypatch.setattr(covertable.Controller, "make_async", lambda self: iter(self.presets))
    model = _model(2, 2, 2)
    with pytest.raises(RuntimeError, match="leaves 8 out"):
        extended([{"a": "a0", "b": "b0", "c": "c0"}], 2, model)


def test_the_file_has_a_row_to_a_line() -> None:
    content = json.loads(DATA.read_text())
    assert content["axes"] == list(MODEL.names)
    rows = sum(len(content[tier]) for tier in STRENGTHS)
    assert len(DATA.read_text().splitlines()) == rows + 3 + 2 * len(STRENGTHS)
