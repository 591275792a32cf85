"""Every check can fail, and says where; every transform keeps the answer it says it keeps."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import find, given, settings

from fixtures.cases import KV_LAYOUTS, AttnCase
from fixtures.cases.space import MODEL
from fixtures.cases.strategies import (
    EXAMPLES,
    MAX_WORK,
    PART_LAYERS,
    attn_cases,
    cases_of,
    parts,
    profile,
)
from fixtures.cases.tables import work
from fixtures.inputs.build import AttnInputs, build_inputs
from fixtures.inputs.pages import GUARD_BLOCKS, LAYER, LAYERS
from fixtures.inputs.transforms import (
    as_captured,
    first_tokens,
    later_tokens,
    permute_blocks,
    select_requests,
    shorten,
    spread_blocks,
)
from reference import attend
from tests.conformance import test_invariance, test_visibility
from tests.harness.compare import (
    check_cache,
    check_inputs_unchanged,
    check_lse,
    check_output,
    check_padding,
)
from tests.harness.memory import bits, check_guards, new_output
from tests.harness.perturb import PERTURBATIONS, honest
from tests.harness.record import Recorder
from tests.harness.truth import Expected, expected, requests, semantics, written_cache
from tests.harness.verdicts import Mismatch, Outcome

# A decode, a chunk and a prompt over blocks of 16, of which no window frees any.
SMALL = AttnCase(
    query_lens=(1, 5, 12),
    seq_lens=(21, 30, 12),
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
)
CASES = {
    "plain": SMALL,
    "bf16_sliding_window": SMALL.replace(dtype="bf16", sliding_window=9),
    "alibi": SMALL.replace(alibi=True),
    "sinks_softcap": SMALL.replace(sinks=True, softcap=30.0),
    "fp8": SMALL.replace(kv_dtype="fp8_e4m3"),
    "noncausal": SMALL.replace(attention="noncausal"),
    "padded": SMALL.replace(pad_reqs=2, pad_tokens=3),
    "fp32_heads_first": SMALL.replace(dtype="fp32", kv_layout="LHBNC"),
}


def _answer(inputs: AttnInputs) -> Outcome:
    """What an honest candidate does."""
    output = new_output(inputs)
    output[: inputs.case.num_tokens] = honest(inputs)
    return Outcome(output, written_cache(inputs)[1])


@functools.cache
def _small() -> tuple[AttnInputs, Expected]:
    inputs = build_inputs(SMALL)
    return inputs, expected(inputs)


# The output.


@pytest.mark.parametrize("name", CASES)
def test_an_honest_answer_passes_every_check(name: str) -> None:
    inputs = build_inputs(CASES[name])
    outcome, truth = _answer(inputs), expected(inputs)
    verdict = check_output(inputs, outcome, truth)
    check_padding(inputs, outcome)
    check_cache(inputs, outcome, truth.storage)
    check_inputs_unchanged(inputs, inputs.copied(inputs.device))
    assert verdict.elements == truth.output.numel()
    assert verdict.share is not None
    assert 0 < verdict.share < 1


# A token's row in the batch, and where that is: request, token in it, position.
TOKENS = ((0, 0, 0, 20), (1, 1, 0, 25), (5, 1, 4, 29), (6, 2, 0, 0), (17, 2, 11, 11))


@pytest.mark.parametrize(("row", "request_index", "token", "position"), TOKENS)
@pytest.mark.parametrize(("head", "dim"), [(0, 0), (3, 15), (2, 7)])
def test_one_wrong_element_is_named_with_both_values_and_its_budget(
    row: int, request_index: int, token: int, position: int, head: int, dim: int
) -> None:
    inputs, truth = _small()
    outcome = _answer(inputs)
    at = (row, head, dim)
    wrong = truth.output[at] + 4 * truth.budget[at]
    outcome.output[at] = wrong
    with pytest.raises(Mismatch) as caught:
        check_output(inputs, outcome, truth)
    text = str(caught.value)
    query_len, length = SMALL.query_lens[request_index], SMALL.seq_lens[request_index]
    assert f"1 of {truth.output.numel()} elements beyond budget, on heads {head}\n" in text
    assert f"request {request_index} (query {query_len}, keys {length}), token {token} " in text
    assert f"at position {position}, head {head}, dim {dim}\n" in text
    said = {name: float(number) for name, number in re.findall(r"(\w+) +([-\d.e]+)", text)}
    assert said["candidate"] == float(outcome.output[at])
    assert said["reference"] == float(truth.output[at])
    assert said["budget"] == float(truth.budget[at])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_never_within_a_budget(bad: float) -> None:
    inputs, truth = _small()
    outcome = _answer(inputs)
    outcome.output[3, 1, 2] = bad
    with pytest.raises(Mismatch, match="token 2 at position 27, head 1, dim 2") as caught:
        check_output(inputs, outcome, truth)
    assert f"candidate {bad!r}" in str(caught.value)


def test_an_output_that_was_never_written_fails() -> None:
    inputs, truth = _small()
    with pytest.raises(Mismatch, match=f"{truth.output.numel()} of {truth.output.numel()}"):
        check_output(inputs, Outcome(new_output(inputs), truth.storage), truth)


def test_a_comparison_of_nothing_fails() -> None:
    inputs, truth = _small()
    nothing = dataclasses.replace(truth, output=truth.output[:0], budget=truth.budget[:0])
    outcome = Outcome(new_output(inputs)[:0], truth.storage)
    with pytest.raises(Mismatch, match="nothing was compared"):
        check_output(inputs, outcome, nothing)


# The LSE.


@pytest.mark.parametrize("bad", [4.0, -math.inf, math.inf, math.nan])
def test_a_wrong_lse_is_named(bad: float) -> None:
    """Times its budget off, or no number."""
    _, truth = _small()
    lse = truth.lse.clone()
    share = check_lse(lse.float(), truth).share
    assert share is not None
    assert share < 1
    lse[5, 2] += bad * truth.lse_budget[5, 2]
    with pytest.raises(Mismatch, match="1 of 72 beyond budget, worst: row 5, head 2\n") as caught:
        check_lse(lse, truth)
    assert f"candidate {float(lse[5, 2])!r}" in str(caught.value)


def test_the_lse_of_nothing_seen_is_minus_infinity() -> None:
    _, truth = _small()
    nothing = truth.lse.clone()
    nothing[3] = -math.inf
    blind = dataclasses.replace(truth, lse=nothing)
    assert check_lse(nothing, blind).share == 0
    with pytest.raises(Mismatch, match="row 3, head 0"):
        check_lse(truth.lse, blind)


# Padding.


def test_a_written_row_past_the_tokens_is_named() -> None:
    inputs = build_inputs(SMALL.replace(pad_tokens=3))
    outcome = _answer(inputs)
    check_padding(inputs, outcome)
    outcome.output[SMALL.num_tokens + 1, 0, 3] = 0.0
    with pytest.raises(Mismatch, match="output row 19 was written: num_actual_tokens is 18"):
        check_padding(inputs, outcome)


# The cache.


def _strides(inputs: AttnInputs) -> dict[str, int]:
    """Elements from one to the next along each axis of the storage."""
    case = inputs.case
    sizes = {"L": LAYERS, "H": case.num_kv_heads, "N": case.block_size, "C": 2 * case.head_size}
    sizes["B"] = inputs.cache.shape[0] + GUARD_BLOCKS
    return {
        axis: math.prod(sizes[inner] for inner in case.kv_layout[at + 1 :])
        for at, axis in enumerate(case.kv_layout)
    }


def _flip(outcome: Outcome, where: int) -> None:
    bits(outcome.storage)[where] ^= 1


# Layer, block, KV head, offset, content; the dim of a value is what is past the key's 16.
PLACES = {
    "another layer": (1 - LAYER, 3, 1, 5, 20),
    "the null block": (LAYER, 0, 0, 0, 0),
    "a block's last element": (LAYER, 2, 1, 15, 31),
    "past the cache": (LAYER, -1, 1, 7, 15),
}


@pytest.mark.parametrize("layout", KV_LAYOUTS)
@pytest.mark.parametrize("place", PLACES)
def test_one_flipped_bit_is_located(layout: str, place: str) -> None:
    inputs = build_inputs(SMALL.replace(kv_layout=layout))
    outcome, truth = _answer(inputs), written_cache(inputs)[1]
    layer, block, head, offset, content = PLACES[place]
    block %= inputs.cache.shape[0] + GUARD_BLOCKS
    where = dict(zip("LBHNC", (layer, block, head, offset, content), strict=True))
    strides = _strides(inputs)
    _flip(outcome, sum(index * strides[axis] for axis, index in where.items()))
    part = "key" if content < 16 else "value"
    with pytest.raises(Mismatch) as caught:
        check_cache(inputs, outcome, truth)
    assert str(caught.value) == (
        "the cache differs in 1 elements (1 of them written by the candidate):"
        f" first layer {layer}, block {block}, slot {16 * block + offset}, KV head {head},"
        f" {part} dim {content % 16}"
    )


@pytest.mark.parametrize("layout", KV_LAYOUTS)
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8_e5m2"])
def test_a_new_token_that_was_not_written_is_located(layout: str, kv_dtype: str) -> None:
    inputs = build_inputs(SMALL.replace(kv_layout=layout, kv_dtype=kv_dtype))
    outcome, truth = _answer(inputs), written_cache(inputs)[1]
    slot = int(inputs.slot_mapping[9])
    block, offset = divmod(slot, SMALL.block_size)
    view = inputs.cache.shape, inputs.cache.stride(), inputs.cache.storage_offset()
    was = bits(inputs.storage).as_strided(*view)[block, :, offset]
    bits(outcome.storage).as_strided(*view)[block, :, offset] = was
    said = rf"differs in 64 elements \(0 of .* layer {LAYER}, block {block}, slot {slot}, KV head 0"
    with pytest.raises(Mismatch, match=f"{said}, key dim 0$"):
        check_cache(inputs, outcome, truth)


def test_a_write_past_the_last_token_is_located() -> None:
    """In the last block's tail, which is the request's own and yet not to be written."""
    inputs = build_inputs(SMALL)
    outcome, truth = _answer(inputs), written_cache(inputs)[1]
    slot = int(inputs.slot_mapping[SMALL.num_tokens - 1]) + 1
    view = inputs.cache.shape, inputs.cache.stride(), inputs.cache.storage_offset()
    outcome.storage.as_strided(*view)[slot // 16, :, slot % 16] = 0.0
    with pytest.raises(Mismatch, match=rf"64 elements \(64 of .* slot {slot}, KV head 0, key dim"):
        check_cache(inputs, outcome, truth)


def test_a_nan_of_other_bits_is_another_value() -> None:
    inputs = build_inputs(SMALL)
    outcome, truth = _answer(inputs), written_cache(inputs)[1]
    assert outcome.storage[0].isnan()
    _flip(outcome, 0)
    assert outcome.storage[0].isnan()
    with pytest.raises(Mismatch, match="layer 0, block 0, slot 0"):
        check_cache(inputs, outcome, truth)


@pytest.mark.parametrize(("row", "where"), [(-1, "before its first"), (1, "after its last")])
def test_a_row_written_beside_the_output_is_seen(row: int, where: str) -> None:
    output = new_output(_small()[0])
    check_guards(output)
    size = output[0].numel()
    start = output.storage_offset() + (-size if row < 0 else output.numel())
    output.as_strided((size,), (1,), start)[-1] = 0.0
    with pytest.raises(Mismatch, match=f"written {where} row"):
        check_guards(output)


@pytest.mark.parametrize("fused_qkv", [False, True])
def test_what_lies_beside_a_batchs_rows_is_nan(fused_qkv: bool) -> None:
    inputs = build_inputs(SMALL.replace(fused_qkv=fused_qkv))
    for tensor in (inputs.query, inputs.key, inputs.value):
        assert tensor.isfinite().all()
        width = tensor.stride(0)
        around = tensor.as_strided(
            (tensor.shape[0] + 2, *tensor.shape[1:]),
            tensor.stride(),
            tensor.storage_offset() - width,
        )
        assert around[[0, -1]].isnan().all()


# The inputs.


@pytest.mark.parametrize(
    "name",
    ["query", "key", "value", "block_table", "slot_mapping", "seq_lens", "query_start_loc"],
)
def test_a_changed_input_is_named(name: str) -> None:
    inputs = build_inputs(SMALL)
    given = inputs.copied(inputs.device)
    getattr(given, name).flatten()[-1] += 1
    with pytest.raises(Mismatch, match=f"changed its input {name}$"):
        check_inputs_unchanged(inputs, given)


def test_a_changed_bit_of_padding_is_seen() -> None:
    """-0 equals 0 as a number; as bits it does not."""
    inputs = build_inputs(SMALL.replace(pad_tokens=2, fused_qkv=True))
    inputs.query[-1] = 0.0
    given = inputs.copied(inputs.device)
    given.query[-1] *= -1.0
    with pytest.raises(Mismatch, match="changed its input query"):
        check_inputs_unchanged(inputs, given)


# The visibility probe.

PROBED = AttnCase(
    query_lens=(1, 5),
    seq_lens=(40, 30),
    num_heads=4,
    num_kv_heads=2,
    head_size=32,
    block_size=64,
)


@pytest.fixture
def probe(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Probes a candidate that answers by a function of the inputs: how much it was asked."""

    def run(case: AttnCase, answer: Callable[[AttnInputs], torch.Tensor]) -> int:
        class Candidate:
            def run(self, inputs: AttnInputs) -> Outcome:
                output = new_output(inputs)
                output[: inputs.case.num_tokens] = answer(inputs).to(output.dtype)
                return Outcome(output, inputs.storage)

        monkeypatch.setattr(test_visibility, "drive", lambda *_: Candidate())
        record = Recorder(request.node)
        probed: Any = test_visibility.test_sees_exactly_the_keys_it_may
        probed(object, case, torch.device("cpu"), build_inputs(case), record)
        ((_, measured),) = request.node.user_properties
        return int(measured["elements"])

    return run


@pytest.mark.parametrize(
    "choices",
    [{}, {"sliding_window": 17}, {"attention": "noncausal"}, {"kv_dtype": "fp8_e4m3"}],
    ids=str,
)
def test_a_probe_lets_an_honest_answer_pass(probe: Any, choices: dict[str, Any]) -> None:
    asked = probe(PROBED.replace(**choices), honest)
    # Each query, head and dimension that stands for a position.
    assert PROBED.num_tokens * PROBED.num_heads < asked <= build_inputs(PROBED).query.numel()


# By fault: the case's choices, and what the message must say.
PROBES: dict[str, tuple[dict[str, Any], str]] = {
    "newest_lost": ({}, "position 39 does not see the key at 39"),
    "look_ahead": ({}, "position 25 sees the key at 26"),
    "made_causal": ({"attention": "noncausal"}, "position 25 does not see the key at 2[6-9]"),
    "window_ignored": ({"sliding_window": 17}, r"position 39 sees the key at (\d|1\d|2[0-2])$"),
    "window_plus_one": ({"sliding_window": 17}, "position 39 sees the key at 22"),
    "window_minus_one": (
        {"sliding_window": 17},
        "position 39 does not see the key at 23",
    ),
}


@pytest.mark.parametrize("fault", PROBES)
def test_a_probe_names_the_key_that_is_seen_or_missed(probe: Any, fault: str) -> None:
    choices, said = PROBES[fault]
    with pytest.raises(Mismatch, match=rf"request \d .*, head 0: the query at {said}"):
        probe(PROBED.replace(**choices), PERTURBATIONS[fault].output)


def test_a_probe_counts_the_keys_that_are_seen(probe: Any) -> None:
    """Every key asked about is seen, and some other twice: only the count tells."""
    with pytest.raises(Mismatch, match=r"token 0, head 0: 41.\d+ keys are seen, expected 40"):
        probe(PROBED, lambda inputs: honest(inputs).double() * (40 / 41))


# Repeats.


@pytest.mark.parametrize("wrong", [2, 701, test_invariance.RUNS])
def test_one_run_that_differs_in_a_bit_is_named(wrong: int, request: pytest.FixtureRequest) -> None:
    inputs, _ = _small()
    answer, done = _answer(inputs), 0

    class Driver:
        def run(self, _: AttnInputs) -> Outcome:
            nonlocal done
            done += 1
            output = answer.output.clone()
            bits(output)[3, 1, 2] ^= done == wrong
            return Outcome(output, answer.storage)

    repeated: Any = test_invariance.test_a_thousand_runs_are_the_same_bit_for_bit
    with pytest.raises(
        Mismatch, match=f"^runs 1 and {wrong} of one batch: 1 of .* token 3, head 1"
    ):
        repeated(Driver(), inputs, Recorder(request.node))
    assert done == wrong


# Transforms.


def _same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def _rows(case: AttnCase, spans: Sequence[tuple[int, int, int]]) -> torch.Tensor:
    """Of (request, first, last) the rows of those tokens."""
    starts = [sum(case.query_lens[:request]) for request in range(len(case.query_lens))]
    return torch.cat([torch.arange(starts[r] + a, starts[r] + b) for r, a, b in spans])


@pytest.mark.parametrize("name", CASES)
def test_moved_blocks_have_the_same_answer(name: str) -> None:
    inputs = build_inputs(CASES[name])
    moved = permute_blocks(inputs, seed=3)
    assert not torch.equal(moved.block_table, inputs.block_table)
    assert torch.equal(expected(moved).output, expected(inputs).output)
    assert torch.equal(expected(moved).budget, expected(inputs).budget)
    assert int((moved.slot_mapping < 0).sum()) == inputs.case.pad_tokens


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("order", [(2, 0, 1), (1,), (2, 1)])
def test_selected_requests_have_their_own_answers(name: str, order: tuple[int, ...]) -> None:
    case = CASES[name]
    inputs = build_inputs(case)
    chosen = select_requests(inputs, order)
    rows = _rows(case, [(request, 0, case.query_lens[request]) for request in order])
    truth = expected(inputs)
    _same(expected(chosen).output, truth.output[rows])
    _same(expected(chosen).budget, truth.budget[rows])


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].causal])
def test_two_steps_have_the_answers_of_one(name: str) -> None:
    """A causal query sees no later one, so the first step's answers are the whole's own."""
    case = CASES[name].replace(query_lens=(4, 5, 12), seq_lens=(21, 30, 12), sliding_window=None)
    inputs, counts = build_inputs(case), (1, 3, 11)
    truth = expected(inputs)
    first = first_tokens(inputs, counts)
    done = expected(first)
    rows = _rows(case, [(request, 0, count) for request, count in enumerate(counts)])
    _same(done.output, truth.output[rows])

    later = later_tokens(inputs, counts, done.storage)
    spans = [(r, counts[r], q) for r, q in enumerate(case.query_lens)]
    rest = expected(later)
    _same(rest.output, truth.output[_rows(case, spans)])
    assert torch.equal(bits(rest.storage), bits(truth.storage))


@pytest.mark.parametrize("name", CASES)
def test_spread_blocks_hold_the_same_batch(name: str) -> None:
    """The same answer, from blocks far apart."""
    inputs = build_inputs(CASES[name])
    spread = spread_blocks(inputs, 4 * inputs.cache[0].numel())
    assert spread.cache.stride(0) == 4 * inputs.cache[0].numel()
    _same(expected(spread).output, expected(inputs).output)


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].sliding_window is None])
def test_shortened_requests_attend_to_what_is_left(name: str) -> None:
    """The first keys of the context, then the new ones: their answer, gathered by hand."""
    inputs = build_inputs(CASES[name])
    shorter = shorten(inputs)
    assert shorter.case.seq_lens == (14, 20, 12)
    answer = expected(shorter).output
    assert torch.isfinite(answer).all()
    whole = list(requests(inputs, written_cache(inputs)[0]))
    for request, length in zip(whole, shorter.case.seq_lens, strict=True):
        query_len = len(request.query)
        kept = length - query_len
        key, value = (
            torch.cat([source[:kept], source[len(source) - query_len :]])
            for source in (request.key, request.value)
        )
        attended = attend(request.query, key, value, **semantics(inputs))
        _same(answer[request.rows], attended.output)


def test_a_request_that_is_no_shorter_keeps_another_layers_keys() -> None:
    """Nobody writes them again."""
    inputs = build_inputs(AttnCase(query_lens=(1, 1), seq_lens=(1, 21), kv_sharing=True))
    shorter = shorten(inputs)
    assert shorter.case.seq_lens == (1, 14)
    _same(expected(shorter).output[:1], expected(inputs).output[:1])


def test_a_dummy_batch_is_uniform_and_writes_nowhere() -> None:
    """In the batch's own tensors, padding's request like the others; what is left are rows past
    the tokens."""
    inputs = build_inputs(AttnCase(query_lens=(2, 2), seq_lens=(21, 30), pad_reqs=1, pad_tokens=3))
    dummy = as_captured(inputs)
    assert (dummy.case.query_lens, dummy.case.seq_lens) == ((2, 2, 2), (2, 2, 2))
    assert (dummy.case.pad_reqs, dummy.case.pad_tokens) == (0, 1)
    assert dummy.query_start_loc.tolist() == [0, 2, 4, 6]
    assert dummy.seq_lens.tolist() == [2, 2, 2]
    assert not dummy.block_table.any()
    assert (dummy.slot_mapping == -1).all()
    for name in ("query_start_loc", "seq_lens", "block_table", "slot_mapping"):
        assert getattr(dummy, name) is getattr(inputs, name)


def test_a_batch_without_rows_for_its_padding_is_not_captured() -> None:
    inputs = build_inputs(AttnCase(query_lens=(2, 2), seq_lens=(21, 30), pad_reqs=1, pad_tokens=1))
    with pytest.raises(ValueError, match="rows=5: expected 2 to each of 3 requests"):
        as_captured(inputs)


# Drawn cases.


@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@given(attn_cases())
def test_a_drawn_case_is_one_that_can_be(drawn: AttnCase) -> None:
    """It reads back, is small enough for a CPU, and combines nothing that does not go together."""
    assert AttnCase.from_id(drawn.id) == drawn
    assert work(drawn) <= MAX_WORK
    assert drawn.query_lens == tuple(sorted(drawn.query_lens))
    names = {"alibi", "sinks", "attention", "kv_dtype", "kv_sharing", "shared_prefix", "fused_qkv"}
    fields = {name: getattr(drawn, name) for name in names}
    fields["padding"] = "graph" if drawn.pad_reqs else "none"
    fields["window"] = "none" if drawn.sliding_window is None else "37"
    judged = [rule for rule in MODEL.constraints if set(rule.axes) <= set(fields)]
    assert len(judged) > 5
    assert all(rule.allows(*(fields[axis] for axis in rule.axes)) for rule in judged)


LEAST = AttnCase(query_lens=(1,), seq_lens=(1,), num_heads=1, num_kv_heads=1, head_size=8)


@pytest.mark.parametrize(
    ("holds", "least"),
    [
        (lambda case: True, LEAST),
        (lambda case: case.sliding_window, LEAST.replace(sliding_window=1)),
        (lambda case: case.dtype == "bf16" and case.sinks, LEAST.replace(dtype="bf16", sinks=True)),
        (lambda case: case.attention == "cross", LEAST.replace(attention="cross")),
        (lambda case: case.seq_lens[-1] > 20, LEAST.replace(seq_lens=(21,))),
        (
            lambda case: len(case.query_lens) > 2,
            LEAST.replace(query_lens=(1, 1, 1), seq_lens=(1, 1, 1)),
        ),
    ],
    ids=["any", "window", "bf16_sinks", "cross", "long", "three"],
)
def test_a_drawn_case_shrinks_to_the_least(
    holds: Callable[[AttnCase], Any], least: AttnCase
) -> None:
    many = settings(max_examples=1000, derandomize=True, database=None, deadline=None)
    assert find(attn_cases(), lambda case: bool(holds(case)), settings=many) == least


def test_a_soaks_part_draws_few_layers_and_many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPOTHESIS_PROFILE", "soak")
    seen: dict[int, list[AttnCase]] = {0: [], 1: []}

    @settings(max_examples=50, derandomize=True, database=None, deadline=None)
    @given(cases_of(0), cases_of(1))
    def draw(first: AttnCase, second: AttnCase) -> None:
        seen[0].append(first)
        seen[1].append(second)

    draw()
    layers = [
        {(c.head_size, c.num_heads, c.num_kv_heads, c.dtype, c.softcap) for c in found}
        for found in seen.values()
    ]
    assert all(1 < len(part) <= PART_LAYERS for part in layers)
    assert not layers[0] & layers[1]
    assert all(len({case.seq_lens for case in found}) > PART_LAYERS for found in seen.values())


def test_a_profile_is_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYPOTHESIS_PROFILE", raising=False)
    assert profile().derandomize
    for name, (several, examples) in EXAMPLES.items():
        monkeypatch.setenv("HYPOTHESIS_PROFILE", name)
        assert profile().max_examples == examples
        assert len(parts()) == several
        assert profile().derandomize == (name == "ci")
    monkeypatch.setenv("HYPOTHESIS_PROFILE", "fast")
    with pytest.raises(ValueError, match="'fast': expected one of ci, nightly, weekly, soak"):
        profile()
