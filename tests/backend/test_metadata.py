"""Does each way in which vLLM asks for a step's metadata give what building it anew gives?

gpu_model_runner updates the block table where cache groups differ in nothing else, and builds for
a graph's capture; the proposers build for drafting. What a graph then reads at every replay is
asked of all candidates, in tests/conformance.
"""

import dataclasses
from typing import Any

import pytest
import torch

from fixtures.cases import AttnCase
from fixtures.inputs import build_inputs
from fixtures.inputs.transforms import as_captured
from tests.harness.batch import common_metadata
from tests.harness.compare import check_output
from tests.harness.driver import drive
from tests.harness.record import Recorder
from tests.harness.truth import expected
from xfv1.backend import XFormersAttentionBackend
from xfv1.phase import DECODE, PREFILL

# (scenario, the phases it has).
STEPS = {
    "decodes": (AttnCase(scenario="small_decode"), [DECODE]),
    "padded": (AttnCase(scenario="small_decode", pad_reqs=2, pad_tokens=2), [DECODE]),
    "prompts": (AttnCase(scenario="fresh_prefill"), [PREFILL]),
    "mixed": (AttnCase(scenario="mixed_small"), [DECODE, PREFILL]),
    "verification": (AttnCase(scenario="spec_uniform5"), [DECODE]),
    "verification beside prompts": (AttnCase(scenario="mixed_spec"), [DECODE, PREFILL]),
}
STEP = pytest.mark.parametrize(("sample", "phases"), STEPS.values(), ids=STEPS)


def assert_same(one: Any, other: Any, where: str = "metadata") -> None:
    """Field by field, what is made when asked for too; plans apart, which layers make."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            if field.name != "plans":
                name = field.name.removeprefix("_")
                assert_same(getattr(one, name), getattr(other, name), f"{where}.{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    else:
        assert one == other, where


@STEP
def test_updated_table_equals_a_build_with_it(
    sample: AttnCase, phases: list[str], device: torch.device
) -> None:
    inputs = build_inputs(sample, device)
    builder = drive(XFormersAttentionBackend, sample, device).builder
    common = common_metadata(inputs)
    other = dataclasses.replace(
        common,
        block_table_tensor=common.block_table_tensor + 7,
        slot_mapping=common.slot_mapping + 7,
    )
    built = builder.build(0, common)
    assert [phase.batch.kind for phase in built.phases] == phases
    # What layers of the first group have planned is of its blocks.
    for phase in (built.whole, *built.phases):
        phase.plans["made of"] = phase.block_table
    updated = builder.update_block_table(built, other.block_table_tensor, other.slot_mapping)
    assert_same(updated, builder.build(0, other))
    assert [phase.plans for phase in (updated.whole, *updated.phases)] == [{}] * (1 + len(phases))
    assert_same(built, builder.build(0, common))


def test_updated_table_equals_a_build_of_local_chunks(device: torch.device) -> None:
    """vLLM's wrapper turns requests into virtual ones, and the table with them."""
    from vllm.model_executor.layers.attention.chunked_local_attention import (
        create_chunked_local_attention_backend,
    )

    inputs = build_inputs(AttnCase(scenario="mixed_small"), device)
    driver = drive(XFormersAttentionBackend, inputs.case, device)
    wrapper = create_chunked_local_attention_backend(XFormersAttentionBackend, 16)
    own = driver.builder
    builder = wrapper.get_builder_cls()(
        own.kv_cache_spec, own.layer_names, own.vllm_config, own.device
    )
    common = common_metadata(inputs)
    other = dataclasses.replace(common, block_table_tensor=common.block_table_tensor + 7)
    updated = builder.update_block_table(
        builder.build(0, common), other.block_table_tensor, other.slot_mapping
    )
    assert_same(updated, builder.build(0, other))


def test_drafting_after_verification_equals_a_build(device: torch.device, record: Recorder) -> None:
    """One token to a request, and the host knows lengths as if every draft had been accepted."""
    inputs = build_inputs(AttnCase(scenario="small_decode"), device)
    driver = drive(XFormersAttentionBackend, inputs.case, device)
    driver.builder.reorder_batch_threshold = 5
    common = common_metadata(inputs)
    bound = common.seq_lens_cpu_upper_bound + 3
    common = dataclasses.replace(
        common, seq_lens_cpu_upper_bound=bound, max_seq_len=int(bound.max())
    )
    drafting = driver.builder.build_for_drafting(common_attn_metadata=common, draft_index=1)
    assert_same(drafting, driver.builder.build(0, common, fast_build=True))
    assert [phase.batch.kind for phase in drafting.phases] == [DECODE]
    outcome = driver.step(inputs.copied(device), drafting)
    record(check_output(inputs, outcome, expected(inputs, outcome.query)))


def test_a_draft_models_longer_requests_are_not_taken_for_whole_prompts(
    device: torch.device,
) -> None:
    """vLLM's extend_all_queries_by_N tells the device of the tokens it adds, and not the host."""
    from vllm.v1.spec_decode.utils import extend_all_queries_by_N

    inputs = build_inputs(AttnCase(scenario="mixed_fresh"), device)
    builder = drive(XFormersAttentionBackend, inputs.case, device).builder
    common = common_metadata(inputs)
    assert builder.build(0, common).phases[-1].batch.fresh
    arange = torch.arange(1 + common.num_reqs, dtype=torch.int32, device=device)
    longer = extend_all_queries_by_N(common, 2, arange, common.slot_mapping)
    assert int(longer.seq_lens.max()) == longer.max_seq_len
    for phase in builder.build(0, longer).phases:
        assert not phase.batch.fresh
        assert not phase.batch.host_lens
        assert phase.seq_lens_cpu is None


@pytest.mark.parametrize("name", STEPS)
def test_a_host_that_is_told_no_lengths_knows_none(name: str, device: torch.device) -> None:
    inputs = build_inputs(STEPS[name][0], device)
    builder = drive(XFormersAttentionBackend, inputs.case, device).builder
    common = dataclasses.replace(common_metadata(inputs), seq_lens_cpu_upper_bound=None)
    metadata = builder.build(0, common)
    assert metadata.phases
    for phase in (metadata.whole, *metadata.phases):
        assert not phase.batch.fresh
        assert not phase.batch.host_lens
        assert phase.seq_lens_cpu is None


def test_a_step_without_requests_has_no_phase(device: torch.device) -> None:
    inputs = build_inputs(STEPS["mixed"][0], device)
    builder = drive(XFormersAttentionBackend, inputs.case, device).builder
    common = common_metadata(inputs)
    empty = dataclasses.replace(
        common,
        query_start_loc=common.query_start_loc[:1],
        query_start_loc_cpu=common.query_start_loc_cpu[:1],
        seq_lens=common.seq_lens[:0],
        seq_lens_cpu_upper_bound=common.seq_lens_cpu_upper_bound[:0],
        block_table_tensor=common.block_table_tensor[:0],
        slot_mapping=common.slot_mapping[:0],
        num_reqs=0,
        num_actual_tokens=0,
        max_query_len=0,
        max_seq_len=0,
        is_prefilling=None,
    )
    metadata = builder.build(0, empty)
    assert metadata.phases == []
    assert metadata.whole.batch.num_reqs == 0


@pytest.mark.parametrize("name", ["decodes", "padded", "verification"])
def test_a_capture_is_of_decodes_with_context(name: str, device: torch.device) -> None:
    """vLLM's dummy batch has none: keys of the step alone would do for it, and for no other."""
    case, _ = STEPS[name]
    driver = drive(XFormersAttentionBackend, case, device)
    metadata = driver.metadata_to_capture(as_captured(build_inputs(case, device)))
    (phase,) = metadata.phases
    assert phase.batch.kind == DECODE
    assert not phase.batch.fresh
    assert phase.batch.max_seq_len == driver.config.model_config.max_model_len
