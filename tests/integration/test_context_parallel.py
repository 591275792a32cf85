"""Does a decode context parallel group answer as one rank that has the whole cache?

The group is in this process: a thread to a rank, and vLLM's collectives among them, so one GPU
will do. What belongs to which rank is vLLM's own slot mapping; what merges the ranks' answers is
vLLM's too. Its kernels are Triton's: without a GPU these tests run once more, in a process where
vLLM finds Triton and Triton interprets.
"""

import copy
import dataclasses
import inspect
import threading
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.cases import AttnCase
from fixtures.inputs.build import AttnInputs, build_inputs
from fixtures.inputs.pages import HUGE, NULL_BLOCK
from tests.harness import server
from tests.harness.batch import common_metadata
from tests.harness.driver import Driver, drive
from tests.harness.memory import new_output
from tests.harness.truth import expected
from tests.harness.verdicts import Refused
from tests.integration.interpreted import passed_in_interpreter
from tests.integration.test_metadata import assert_same
from xfv1 import compat
from xfv1.backend import XFormersAttentionBackend
from xfv1.impl import XFormersImpl


def _case(scenario: str = "mixed_small", dtype: str = "fp32", **choices: Any) -> AttnCase:
    # The ranks of a group share a KV head.
    return AttnCase(scenario=scenario, dtype=dtype, num_heads=4, num_kv_heads=1, **choices)


SPLITK = "xformers_splitk,triton"
# (case, ranks, cp_kv_cache_interleave_size), and the settings of XFV1_OPS it is run with.
CASES: dict[str, tuple[AttnCase, int, int, tuple[str, ...]]] = {
    "mixed": (_case(), 2, 1, ("torch", "triton")),
    "four ranks": (_case(), 4, 1, ("triton",)),
    "half precision": (_case(dtype="fp16"), 2, 1, ("", "triton")),
    "bfloat16": (_case(dtype="bf16"), 2, 1, ("", "torch")),
    "decodes, some within one rank": (_case("edge_decode", "fp16"), 2, 4, ("", "triton", SPLITK)),
    "decodes, padded": (
        _case("small_decode", "fp16", pad_reqs=2, pad_tokens=2),
        2,
        1,
        ("", "torch", SPLITK),
    ),
    "verification": (_case("spec_uniform5", "fp16"), 2, 16, ("", "triton", SPLITK)),
    "verification, uneven": (_case("spec_ragged"), 4, 2, ("triton",)),
    "prompts": (_case("odd_prefill"), 2, 1, ("triton",)),
    "prompts, long": (_case("fresh_prefill", "fp16"), 2, 1, ("", "torch")),
    "prompts beside decodes": (_case("mixed_fresh"), 2, 8, ("torch",)),
    "chunks": (_case("chunked_prefill", "fp16"), 2, 16, ("", "torch")),
    "a request without tokens": (_case("mixed_empty"), 2, 1, ("torch", "triton")),
    "softcap": (_case(softcap=30.0), 2, 1, ("triton",)),
    "sinks": (_case(sinks=True), 2, 1, ("torch", "triton")),
    "sinks, prompts": (_case("odd_prefill", sinks=True), 2, 1, ("triton",)),
    "fp8": (_case(kv_dtype="fp8_e4m3"), 2, 1, ("torch", "triton")),
    "noncausal": (_case(attention="noncausal"), 2, 1, ("triton",)),
    "layout": (_case(kv_layout="LBHNC"), 2, 1, ("triton",)),
}
RUNS = [
    pytest.param(case, ranks, interleave, ops, id=f"{name}-{ops or 'any'}")
    for name, (case, ranks, interleave, settings) in CASES.items()
    for ops in settings
]


class Group:
    """vLLM's group of ranks, each a thread. One runs at a time, until it meets the others."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._own = threading.local()
        self._turn = threading.Lock()
        self._all_here = threading.Barrier(world_size, timeout=60)
        self._given: list[Any] = [None] * world_size

    @property
    def rank_in_group(self) -> int:
        rank: int = getattr(self._own, "rank", 0)
        return rank

    @rank_in_group.setter
    def rank_in_group(self, rank: int) -> None:
        self._own.rank = rank

    def run(self, step: Callable[[int], torch.Tensor]) -> list[torch.Tensor]:
        """What each rank's step returns."""

        def start(rank: int) -> torch.Tensor:
            self.rank_in_group = rank
            try:
                with self._turn:
                    return step(rank)
            except Exception:
                self._all_here.abort()
                raise

        with ThreadPoolExecutor(self.world_size) as pool:
            return list(pool.map(start, range(self.world_size)))

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return self._meet(tensor, lambda given: torch.cat(given, dim))

    def reduce_scatter(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        own = self.rank_in_group
        return self._meet(
            tensor, lambda given: sum(g.chunk(self.world_size, dim)[own] for g in given)
        )

    def all_to_all(self, output: torch.Tensor, tensor: torch.Tensor, **options: Any) -> Any:
        own = self.rank_in_group
        parts = self._meet(
            tensor, lambda given: torch.cat([g.chunk(self.world_size)[own] for g in given])
        )
        output.copy_(parts)
        return self

    def wait(self) -> None:
        """Of the work that an asynchronous collective returns: it is done."""

    @property
    def device_group(self) -> None:
        return None

    def _meet(
        self, tensor: torch.Tensor, combine: Callable[[list[torch.Tensor]], Any]
    ) -> torch.Tensor:
        self._given[self.rank_in_group] = tensor
        self._wait()
        combined: torch.Tensor = combine(list(self._given))
        self._wait()
        return combined

    def _wait(self) -> None:
        self._turn.release()
        try:
            self._all_here.wait()
        finally:
            self._turn.acquire()


@pytest.fixture
def parallel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Group]:
    """Puts this process into a group of that size, and vLLM's configuration with it."""
    from vllm.distributed import parallel_state

    configured = server.vllm_config

    def enter(size: int, interleave: int = 1, comm: str = "ag_rs") -> Group:
        def config(*shape: Any) -> Any:
            changed = copy.copy(configured(*shape))
            changed.parallel_config = copy.copy(changed.parallel_config)
            changed.parallel_config.decode_context_parallel_size = size
            changed.parallel_config.cp_kv_cache_interleave_size = interleave
            changed.parallel_config.dcp_comm_backend = comm
            return changed

        group = Group(size)
        monkeypatch.setattr(parallel_state, "_DCP", group)
        monkeypatch.setattr(server, "vllm_config", config)
        return group

    return enter


@pytest.fixture
def vllm_triton(device: torch.device) -> None:
    from vllm.triton_utils import HAS_TRITON

    if not HAS_TRITON:
        pytest.skip("vLLM's merge needs Triton: test_ranks_agree_in_the_interpreter runs these")


def of_rank(inputs: AttnInputs, rank: int, ranks: int, interleave: int) -> AttnInputs:
    """What one rank of the current group is given of a batch: its query heads, its share of the
    context, and slots for its share of what is new."""
    case = inputs.case
    heads = case.num_heads // ranks
    own = slice(rank * heads, (rank + 1) * heads)
    lens = [*case.seq_lens, *(0,) * case.pad_reqs]
    query_lens = inputs.query_start_loc.diff().tolist()
    counts = [-(-length // (case.block_size * ranks)) for length in lens]
    num_blocks = 1 + sum(counts) + 1
    ids = list(range(num_blocks - 2, 0, -1))
    rows = [[ids.pop() for _ in range(count)] for count in counts]
    mapped, table = _slot_mapping(rows, lens, case.block_size, interleave, inputs.query.device)

    # A block nobody owns may hold NaN; in a request's own, only slots it will fill.
    shape = (num_blocks, *inputs.cache.shape[1:])
    order = ["BHNC".index(axis) for axis in case.kv_layout.replace("L", "")]
    poison = torch.full((), float("nan"), device=inputs.query.device).to(inputs.cache.dtype)
    storage = poison.repeat(inputs.cache[0].numel() * num_blocks)
    physical = storage.view([shape[axis] for axis in order])
    cache = physical.permute([order.index(axis) for axis in range(4)])
    cache[1:-1] = torch.tensor(HUGE[case.cache_dtype]).to(cache)
    slots, first = [], 0
    for row, (length, query_len) in enumerate(zip(lens, query_lens, strict=True)):
        slot = mapped[first : first + length]
        first += length
        slots.append(slot[length - query_len :])
        at = torch.arange(length - query_len, device=slot.device)[slot[: length - query_len] >= 0]
        size = case.block_size
        where = inputs.block_table[row, at // size].long(), at % size
        to = slot[at] // size, slot[at] % size
        cache.transpose(1, 2)[to] = inputs.cache.transpose(1, 2)[where]
    pad = torch.full((case.pad_tokens,), -1, device=inputs.query.device)
    return dataclasses.replace(
        inputs,
        case=case.replace(num_heads=heads),
        query=inputs.query[:, own],
        cache=cache,
        storage=storage,
        block_table=table,
        slot_mapping=torch.cat([*slots, pad]),
        sinks=None if inputs.sinks is None else inputs.sinks[own],
    )


def _slot_mapping(
    rows: list[list[int]], lens: list[int], size: int, interleave: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """vLLM's: the slot of every position of every request, or -1; and the block table."""
    from vllm.v1.worker.block_table import BlockTable

    facts: dict[str, Any] = {
        "block_size": size,
        "max_num_reqs": len(rows),
        "max_num_blocks_per_req": max(map(len, rows)) + 1,
        "max_num_batched_tokens": sum(lens),
        "pin_memory": False,
        "device": device,
        "kernel_block_size": size,
        "cp_kv_cache_interleave_size": interleave,
    }
    known = inspect.signature(BlockTable).parameters
    table = BlockTable(**{name: value for name, value in facts.items() if name in known})
    for row, ids in enumerate(rows):
        table.add_row([*ids, *[NULL_BLOCK] * (not ids)], row)
    table.commit_block_table(len(rows))
    starts = torch.tensor([0, *lens]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(length) for length in lens])
    table.compute_slot_mapping(len(rows), starts.to(device), positions.to(device))
    return table.slot_mapping.gpu[: sum(lens)], table.get_device_tensor(len(rows))


def answer(group: Group, inputs: AttnInputs, interleave: int) -> torch.Tensor:
    """[num_rows, num_heads, head_size]: all ranks' heads."""
    device = inputs.query.device
    drivers: list[Driver] = []
    shares: list[AttnInputs] = []
    for rank in range(group.world_size):
        group.rank_in_group = rank
        shares.append(of_rank(inputs, rank, group.world_size, interleave))
        drivers.append(
            drive(XFormersAttentionBackend, shares[rank].case, device, shares[rank].sinks)
        )

    def step(rank: int) -> torch.Tensor:
        share, driver = shares[rank], drivers[rank]
        cache, output = share.new_cache()[0], new_output(share)
        metadata = driver.builder.build(0, common_metadata(share))
        driver.update_cache(share, cache)
        layer = driver.layer
        layer.impl.forward(
            layer, share.query, share.key, share.value, cache, metadata, output=output
        )
        return output

    return torch.cat(group.run(step), dim=1)


def check_against_whole(output: torch.Tensor, inputs: AttnInputs) -> None:
    """Within the budget of one rank with the whole cache: what merging rounds besides is little."""
    truth = expected(inputs)
    error = (output[: inputs.case.num_tokens].double() - truth.output).abs()
    share = float((error / truth.budget).max())
    assert share <= 1, f"{share} of the budget"


@pytest.mark.usefixtures("vllm_triton")
@pytest.mark.parametrize(("sample", "ranks", "interleave", "ops"), RUNS)
def test_ranks_answer_as_one(
    parallel: Callable[..., Group],
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    sample: AttnCase,
    ranks: int,
    interleave: int,
    ops: str,
) -> None:
    monkeypatch.setenv("XFV1_OPS", ops)
    inputs = build_inputs(sample, device)
    try:
        output = answer(parallel(ranks, interleave), inputs, interleave)
    except Refused as refusal:
        pytest.skip(f"refused: {refusal}")
    check_against_whole(output, inputs)


@pytest.mark.usefixtures("vllm_triton")
def test_ranks_may_exchange_all_to_all(
    parallel: Callable[..., Group], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    group = parallel(2, comm="a2a")
    monkeypatch.setattr(torch.distributed, "all_to_all_single", group.all_to_all)
    inputs = build_inputs(_case("edge_decode"), device)
    check_against_whole(answer(group, inputs, 1), inputs)


@pytest.mark.usefixtures("vllm_triton")
def test_vllm_finds_it_compatible(parallel: Callable[..., Group], device: torch.device) -> None:
    """With drafts and keys that lie in runs, too."""
    from vllm.v1.worker.cp_utils import check_attention_cp_compatibility

    parallel(2, 16)
    driver = drive(XFormersAttentionBackend, _case(), device)
    driver.config.speculative_config = types.SimpleNamespace(num_speculative_tokens=3)
    check_attention_cp_compatibility(driver.config)
    impl = driver.layer.impl
    assert impl.need_to_return_lse_for_decode
    assert impl.lse_base_on_e
    assert driver.builder.reorder_batch_threshold == 1
    driver.config.parallel_config.prefill_context_parallel_size = 2
    with pytest.raises(AssertionError, match="does not support PCP"):
        check_attention_cp_compatibility(driver.config)


@pytest.mark.usefixtures("vllm_triton")
def test_lengths_stay_where_a_graph_reads_them(
    parallel: Callable[..., Group], device: torch.device
) -> None:
    """And are vLLM's: this rank's part of what came before the step, and the step's own."""
    from vllm.v1.attention.backends.utils import get_dcp_local_seq_lens

    group = parallel(2, 4)
    group.rank_in_group = 1
    driver = drive(XFormersAttentionBackend, _case(), device)
    places = set()
    for scenario in ("spec_uniform5", "small_decode", "edge_decode"):
        inputs = build_inputs(_case(scenario), device)
        parts = driver.metadata(inputs).parts
        (context,) = parts.context
        query_lens = inputs.query_start_loc.diff()
        local = get_dcp_local_seq_lens(inputs.seq_lens - query_lens, 2, 1, 4)
        assert context.seq_lens.tolist() == local.tolist()
        assert context.batch.max_seq_len >= int(local.max())
        assert parts.new.seq_lens.tolist() == query_lens.tolist()
        places.add((context.seq_lens.data_ptr(), parts.new.seq_lens.data_ptr()))
    assert len(places) == 1
    # Prompts leave out the context, which decodes never do: a graph is captured without.
    assert driver.metadata(build_inputs(_case("fresh_prefill"), device)).parts.context == []
    assert len(driver.metadata(build_inputs(_case("single_token"), device)).parts.context) == 1


@pytest.mark.usefixtures("vllm_triton")
def test_updated_table_equals_a_build_with_it(
    parallel: Callable[..., Group], device: torch.device
) -> None:
    parallel(2)
    inputs = build_inputs(_case(), device)
    builder = drive(XFormersAttentionBackend, inputs.case, device).builder
    common = common_metadata(inputs)
    table = common.block_table_tensor + 7
    updated = builder.update_block_table(builder.build(0, common), table, common.slot_mapping)
    assert_same(updated, builder.build(0, dataclasses.replace(common, block_table_tensor=table)))


@pytest.mark.usefixtures("vllm_triton")
@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ({"sliding_window": 16}, "no sliding windows"),
        ({"alibi": True}, "no ALiBi"),
        ({"attention": "cross"}, "no cross attention"),
        ({"kv_sharing": True}, "no layers that read another's cache"),
        ({"num_kv_heads": 2}, "no num_kv_heads=2, only 1"),
        ({"head_size": 80}, "no head_size=80, only powers of two"),
    ],
)
def test_what_cannot_be_spread_is_refused_with_the_reason(
    parallel: Callable[..., Group], device: torch.device, choices: dict[str, Any], reason: str
) -> None:
    parallel(2)
    with pytest.raises(Refused, match=f"decode_context_parallel_size=2: {reason}"):
        drive(XFormersAttentionBackend, _case().replace(**choices), device)


@pytest.mark.parametrize(
    ("fact", "value", "reason"),
    [
        ("vllm_has_triton", False, "no merge without Triton"),
        ("batch_invariant", True, "no batch invariance"),
    ],
)
def test_where_nothing_can_be_spread_is_said(
    parallel: Callable[..., Group],
    monkeypatch: pytest.MonkeyPatch,
    fact: str,
    value: bool,
    reason: str,
) -> None:
    parallel(2)
    monkeypatch.setattr(compat, fact, lambda: value)
    with pytest.raises(NotImplementedError, match=f"decode_context_parallel_size=2: {reason}"):
        XFormersImpl(4, 64, 0.125, 1)


def test_encoders_have_nothing_to_spread(
    parallel: Callable[..., Group], device: torch.device
) -> None:
    parallel(2)
    inputs = build_inputs(_case("fresh_prefill", attention="encoder"), device)
    driver = drive(XFormersAttentionBackend, inputs.case, device)
    check_against_whole(driver.run(inputs).output, inputs)


def test_prefill_context_parallelism_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    from vllm.distributed import parallel_state

    monkeypatch.setattr(parallel_state, "_PCP", Group(2))
    with pytest.raises(Refused, match="prefill_context_parallel_size=2: expected 1"):
        drive(XFormersAttentionBackend, _case(), device)
    assert not XFormersAttentionBackend.supports_pcp()


def test_ranks_agree_in_the_interpreter(device: torch.device, tmp_path: Path) -> None:
    if device.type == "cuda":
        pytest.skip("the GPU runs them")
    assert passed_in_interpreter(__file__, tmp_path) > len(CASES)
