"""Does the builder say of each phase of a batch what is so? Ops on a GPU go by all of it."""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from fixtures.cases import AttnCase
from fixtures.inputs import AttnInputs, build_inputs
from fixtures.inputs.transforms import permute_blocks
from tests.harness.batch import common_metadata
from tests.harness.compare import check_output
from tests.harness.driver import Driver, drive
from tests.harness.truth import expected
from xfv1.backend import XFormersAttentionBackend
from xfv1.phase import DECODE, PREFILL, Phase

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Split:
    """A batch, how many of its requests decode, and up to how many tokens that is; its case's, if
    None."""

    case: AttnCase
    decodes: int
    threshold: int | None = None


SPLITS = {
    "decodes": Split(AttnCase(scenario="edge_decode"), 17),
    "decodes of a graph": Split(AttnCase(scenario="small_decode", pad_reqs=2, pad_tokens=2), 4),
    "prompts": Split(AttnCase(scenario="fresh_prefill"), 0),
    "chunks": Split(AttnCase(scenario="chunked_prefill", pad_tokens=3), 0),
    "mixed": Split(AttnCase(scenario="mixed_small"), 2),
    "mixed, prompts": Split(AttnCase(scenario="mixed_fresh"), 3),
    "mixed, one of each": Split(AttnCase(query_lens=(1, 3), seq_lens=(9, 3)), 1),
    "mixed, longest decodes": Split(
        AttnCase(query_lens=(1, 1, 7, 2), seq_lens=(90, 17, 30, 40)), 2
    ),
    "no token": Split(AttnCase(scenario="mixed_empty"), 2),
    "no token first": Split(AttnCase(query_lens=(0, 1, 1, 9), seq_lens=(7, 18, 33, 40)), 3),
    "no token but prompts": Split(AttnCase(query_lens=(0, 7, 9), seq_lens=(7, 18, 33)), 0),
    "verification": Split(AttnCase(scenario="spec_uniform5"), 3),
    "verification not counted": Split(AttnCase(scenario="spec_uniform5"), 0, threshold=4),
    "mixed verification": Split(AttnCase(scenario="mixed_spec"), 3),
    "cross": Split(AttnCase(scenario="cross_small", attention="cross"), 2),
}


def built(split: Split) -> tuple[AttnInputs, Driver, Any]:
    inputs = build_inputs(split.case, CPU)
    driver = drive(XFormersAttentionBackend, split.case, CPU)
    if split.threshold is not None:
        driver.builder.reorder_batch_threshold = split.threshold
    return inputs, driver, driver.metadata(inputs)


def check_phase(phase: Phase, split: Split, inputs: AttnInputs, requests: slice, kind: str) -> None:
    """Every field, of some consecutive requests of the batch."""
    case = split.case
    starts = inputs.query_start_loc.tolist()
    lens = [b - a for a, b in itertools.pairwise(starts)][requests]
    keys = (lens if case.attention == "cross" else inputs.seq_lens.tolist())[requests]
    first, last, _ = requests.indices(inputs.num_reqs)
    batch = phase.batch
    # A graph's padding is rows of its batch too.
    rows = starts[last] + case.pad_tokens * bool(case.pad_reqs)
    assert (phase.rows.start or 0, phase.rows.stop) == (starts[first], rows)
    local = [start - starts[first] for start in starts[first : last + 1]]
    assert phase.query_start_loc.tolist() == phase.query_start_loc_cpu.tolist() == local
    assert torch.equal(phase.block_table, inputs.block_table[first:last])
    if case.attention != "cross":
        assert phase.seq_lens.tolist() == keys
    assert (batch.kind, batch.num_reqs, batch.max_query_len) == (kind, last - first, max(lens))
    # On the host are a decoder's lengths, not an encoder's; of verified drafts, bounds.
    known = case.attention != "cross"
    verified = case.drafts and any(
        0 < n <= 1 + case.drafts and n < k for n, k in zip(lens, keys, strict=True)
    )
    assert batch.host_lens == (known and not verified)
    assert (phase.seq_lens_cpu is None) != known
    bounds = common_metadata(inputs).seq_lens_cpu_upper_bound.tolist()[requests]
    assert phase.seq_lens_cpu is None or phase.seq_lens_cpu.tolist() == bounds
    assert batch.fresh == (known and all(k <= q for q, k in zip(lens, keys, strict=True)))
    uniform = len(set(lens)) == 1
    # Of prefills beside decodes nobody asks, and it is not said.
    assert batch.uniform == uniform or (first > 0 and not batch.uniform)
    assert phase.plans == {}


def check_whole(metadata: Any, split: Split, inputs: AttnInputs) -> None:
    """What vLLM's own code reads of a batch's metadata is what it said of the batch."""
    if split.case.attention == "cross":
        # vLLM builds that of another batch.
        return
    common = common_metadata(inputs)
    for name in ("num_actual_tokens", "max_query_len", "max_seq_len", "causal"):
        assert getattr(metadata, name) == getattr(common, name), name
    for name in ("query_start_loc", "seq_lens", "slot_mapping"):
        assert torch.equal(getattr(metadata, name), getattr(common, name)), name
    assert torch.equal(metadata.block_table, common.block_table_tensor)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_phases_are_what_the_batch_is(split: Split) -> None:
    inputs, _, metadata = built(split)
    every, decodes = slice(0, inputs.num_reqs), split.decodes
    longest = max(split.case.query_lens)
    check_phase(metadata.whole, split, inputs, every, PREFILL if longest > 1 else DECODE)
    check_whole(metadata, split, inputs)
    wanted = [(slice(0, decodes), DECODE), (slice(decodes, inputs.num_reqs), PREFILL)]
    wanted = [(part, kind) for part, kind in wanted if part.start < part.stop]
    assert len(metadata.phases) == len(wanted)
    for phase, (part, kind) in zip(metadata.phases, wanted, strict=True):
        check_phase(phase, split, inputs, part, kind)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_keys_are_bounded_by_the_phases_own_longest_where_that_is_known(split: Split) -> None:
    """It sizes the decodes' splits; of prefills it may be the batch's."""
    _, _, metadata = built(split)
    longest = metadata.max_seq_len
    assert metadata.whole.batch.max_seq_len == longest
    for phase in metadata.phases:
        own = longest
        if phase.batch.kind == DECODE and phase.seq_lens_cpu is not None:
            own = max(phase.seq_lens_cpu.tolist())
        assert phase.batch.max_seq_len == own


@pytest.mark.parametrize(
    ("prefilling", "known"),
    [
        (None, False),
        ([False, True, True, True], False),
        ([True, True, True, True], True),
        # vLLM leaves out a graph's padding, which has no tokens.
        ([True, True, True, True, False], True),
        ([True, True, True], False),
    ],
)
def test_where_drafts_are_verified_only_prompts_lengths_are_known(
    prefilling: list[bool] | None, known: bool
) -> None:
    """vLLM's is_prefilling says whose; without drafts all are."""
    case = AttnCase(query_lens=(9, 3, 7, 12, 0), seq_lens=(19, 33, 17, 12, 7))
    inputs = build_inputs(case, CPU)
    builder = drive(XFormersAttentionBackend, case, CPU).builder
    flags = None if prefilling is None else torch.tensor(prefilling)
    common = replace(common_metadata(inputs), is_prefilling=flags)
    for speculates, expected_known in ((False, True), (True, known)):
        builder.speculates = speculates
        metadata = builder.build(0, common)
        batches = [phase.batch for phase in (metadata.whole, *metadata.phases)]
        assert {batch.host_lens for batch in batches} == {expected_known}


@pytest.mark.parametrize(
    ("prefilling", "known"),
    [
        ([True, True, False, False], [True, False]),
        ([True, False, True, True], [False, True]),
        ([False, True, True, True], [False, True]),
        ([True, True, True, False], [True, False]),
    ],
)
def test_each_phase_knows_its_own_requests_lengths(
    prefilling: list[bool], known: list[bool]
) -> None:
    case = AttnCase(query_lens=(1, 1, 4, 2), seq_lens=(19, 33, 17, 12))
    inputs = build_inputs(case, CPU)
    builder = drive(XFormersAttentionBackend, case, CPU).builder
    builder.speculates = True
    common = replace(common_metadata(inputs), is_prefilling=torch.tensor(prefilling))
    metadata = builder.build(0, common)
    assert [phase.batch.host_lens for phase in metadata.phases] == known
    assert not metadata.whole.batch.host_lens


@pytest.mark.parametrize(("scenario", "longest"), [("small_decode", 1), ("spec_uniform5", 5)])
def test_drafts_are_decodes(scenario: str, longest: int) -> None:
    """Of a model that drafts 4 tokens a step, up to 5 queries to a request."""
    driver = drive(XFormersAttentionBackend, AttnCase(scenario=scenario), CPU)
    assert driver.builder.reorder_batch_threshold == longest


@pytest.mark.parametrize("name", ["decodes", "mixed", "mixed verification", "prompts"])
def test_another_cache_groups_blocks_take_the_place_of_the_first(name: str) -> None:
    """As for a model whose layers have caches of several kinds: one build, and a table for each."""
    split = SPLITS[name]
    inputs, driver, first = built(split)
    driver.run(inputs)
    other = permute_blocks(inputs, seed=1)
    second = driver.builder.update_block_table(first, other.block_table, other.slot_mapping)
    assert torch.equal(first.block_table, inputs.block_table)
    assert second.slot_mapping is other.slot_mapping
    for phase in (first.whole, *first.phases):
        phase.plans["of the first"] = True
    part = 0
    check_phase(second.whole, split, other, slice(0, other.num_reqs), second.whole.batch.kind)
    for phase in second.phases:
        last = part + phase.batch.num_reqs
        check_phase(phase, split, other, slice(part, last), phase.batch.kind)
        part = last
    check_output(other, driver.step(other.copied(CPU), second), expected(other))


@pytest.mark.parametrize("name", ["mixed", "mixed, longest decodes", "no token first"])
def test_requests_of_a_phase_are_the_same_requests_of_the_step(name: str) -> None:
    """Each request of the prefills, cut from the prefills and from the whole step."""
    split = SPLITS[name]
    _, _, metadata = built(split)
    whole, (_, prefills) = metadata.whole, metadata.phases
    assert prefills.first == split.decodes
    for index in range(prefills.batch.num_reqs):
        batch = replace(prefills.batch, num_reqs=1)
        first = split.decodes + index
        one = prefills.requests(index, index + 1, batch)
        other = whole.requests(first, first + 1, batch)
        assert (one.first, one.rows, one.num_tokens) == (first, other.rows, other.num_tokens)
        assert one.rows.stop - one.rows.start == split.case.query_lens[first]
        for field in ("query_start_loc", "query_start_loc_cpu", "seq_lens", "seq_lens_cpu"):
            assert torch.equal(getattr(one, field), getattr(other, field)), field
        other_table = metadata.block_table + 1
        assert torch.equal(one.over(other_table).block_table, other.block_table + 1)


def test_a_plan_is_made_once_for_a_key() -> None:
    """None too; and a phase that is described anew keeps the plans, a changed one does not."""
    _, _, metadata = built(SPLITS["mixed"])
    phase, made = metadata.whole, []

    def make() -> None:
        made.append(1)

    assert [phase.once("plan", make) for _ in range(3)] == [None] * 3
    phase.described(replace(phase.batch, lse=True)).once("plan", make)
    assert len(made) == 1
    phase.once("another plan", make)
    phase.changed(batch=replace(phase.batch, lse=True)).once("plan", make)
    assert len(made) == 3
