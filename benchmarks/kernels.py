"""Time attention per call: xfv1's dispatch, each of its ops, and the kernels it is measured by.

    python -m benchmarks.kernels --rows decode prefill --peers fa3 unified --json out.json
    python -m benchmarks.kernels --sweep --rows decode --match 1x32768

Contenders run on the same queries, pages and metadata, in one process, in turns. Before it is
timed each must agree with a float32 reference to MAX_ERROR; one that does not, or raises, is
reported with its reason. Decodes are timed as a captured CUDA graph over several layers' caches,
visited in turn so that none is left in L2; prefills by CUDA events over calls that were queued
while the device was held up, so that no gap on the host is timed.

The measuring process is a child: if a kernel ruins the CUDA context, or the process, its contender
is written down as having crashed and a new child goes on with the rest.
"""

import argparse
import contextlib
import copy
import gc
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import RESULTS, ROOT, environment, save, say
from benchmarks.shapes import DECODE, MAX_RATIO, MIN_TURING_GAIN, ROWS, TURING, Row
from fixtures.cases import AttnCase
from fixtures.inputs import TORCH_DTYPES, AttnInputs

MAX_ERROR = 1e-2
ROUNDS = 9
# Device time of one contender in one round, and of all layers' caches in one decode graph's turn.
SLICE_MS = {DECODE: 4.0}
DEFAULT_SLICE_MS = 8.0
COLD_BYTES = 400 * 2**20
MAX_LAYERS = 24
# Cycles the device waits before a timed region, for each call that the host has yet to queue.
CYCLES_PER_CALL = 400_000
# Of the time in all, what compiling ahead may take.
WARM_SHARE = 0.45
# Seconds a child may take to end, past its deadline.
GRACE = 15.0
CRASHED, MAX_CRASHES = 75, 2
WHOLE_ROW = "the whole row"
# What vLLM's backends assume of a decode that runs in a captured graph.
GRAPH_SIZES = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
FA_GRAPH_SPLITS = 32
TRITON_SEGMENTS, TRITON_MIN_GRID = 16, 128
FLASHINFER_WORKSPACE = 394 * 2**20
DEFAULT = "xfv1"
PEERS = ("fa3", "unified", "flashinfer")
TURING_OPS = ("xformers_cutlass", "xformers_fa2")
GATHERED = "+gather"

Run = Callable[[int, torch.Tensor], None]


# The batch ----------------------------------------------------------------------------------


@dataclass
class Work:
    """One row's tensors; a contender's call attends over one of the layers' caches.

    query: [num_tokens, num_heads, head_size]. key, value: [num_tokens, num_kv_heads, head_size],
    what the first layer's pages hold for the new tokens. caches: per layer [num_blocks,
    num_kv_heads, block_size, 2 * head_size], token by token in memory as vLLM has it by default.
    """

    row: Row
    device: torch.device
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    caches: list[torch.Tensor]
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    scale: float
    driver: Any = None
    default_ops: str = ""

    def kv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value views [num_blocks, block_size, num_kv_heads, head_size]."""
        key, value = self.caches[layer].transpose(1, 2).split(self.row.head_size, dim=-1)
        return key, value

    def new_output(self) -> torch.Tensor:
        return torch.full_like(self.query, float("nan"))

    @cached_property
    def case(self) -> AttnCase:
        row = self.row
        return AttnCase(
            query_lens=(row.query_len,) * row.num_reqs, seq_lens=row.seq_lens,
            num_heads=row.num_heads, num_kv_heads=row.num_kv_heads, head_size=row.head_size,
            block_size=row.block_size, dtype=row.dtype,
        )  # fmt: skip

    @property
    def inputs(self) -> AttnInputs:
        """The batch as the harness hands it to a backend."""
        return AttnInputs(
            case=self.case, query=self.query, key=self.key, value=self.value,
            cache=self.caches[0], storage=self.caches[0], block_table=self.block_table,
            slot_mapping=self.slot_mapping, seq_lens=self.seq_lens,
            query_start_loc=self.query_start_loc, scale=self.scale, alibi_slopes=None,
            sinks=None, k_scale=1.0, v_scale=1.0,
        )  # fmt: skip

    @cached_property
    def reference(self) -> dict[int, torch.Tensor]:
        """float32 output by layer: of the first, and of the last that is timed."""
        return {layer: reference(self, layer) for layer in {0, len(self.caches) - 1}}


def build(row: Row, device: torch.device) -> Work:
    """Random tensors, and pages in a random order."""
    dtype = TORCH_DTYPES[row.dtype]
    rng = torch.Generator(device).manual_seed(len(row.id))
    counts = [-(-length // row.block_size) for length in row.seq_lens]
    # Block 0 is nobody's, as in vLLM.
    ids = torch.randperm(sum(counts), generator=rng, device=device, dtype=torch.int32) + 1
    table = torch.zeros(row.num_reqs, max(counts), dtype=torch.int32, device=device)
    first = 0
    for request, count in enumerate(counts):
        table[request, :count] = ids[first : first + count]
        first += count

    layers = 1
    if row.phase == DECODE:
        layers = min(max(-(-COLD_BYTES // row.kv_bytes), 2), MAX_LAYERS)
    shape = (sum(counts) + 1, row.block_size, row.num_kv_heads, 2 * row.head_size)
    caches = [
        torch.randn(shape, generator=rng, device=device, dtype=dtype).transpose(1, 2)
        for _ in range(layers)
    ]
    num_tokens = row.num_reqs * row.query_len
    lens = torch.tensor(row.seq_lens, device=device)
    positions = lens[:, None] - row.query_len + torch.arange(row.query_len, device=device)
    blocks = table.gather(1, positions // row.block_size).long()
    slots = (blocks * row.block_size + positions % row.block_size).flatten()
    work = Work(
        row=row,
        device=device,
        query=torch.randn(
            num_tokens, row.num_heads, row.head_size, generator=rng, device=device, dtype=dtype
        ),
        key=caches[0][:0],
        value=caches[0][:0],
        caches=caches,
        block_table=table,
        slot_mapping=slots,
        seq_lens=lens.int(),
        query_start_loc=torch.arange(row.num_reqs + 1, device=device, dtype=torch.int32)
        * row.query_len,
        scale=row.head_size**-0.5,
    )
    keys, values = work.kv(0)
    at = (slots // row.block_size, slots % row.block_size)
    work.key, work.value = keys[at].contiguous(), values[at].contiguous()
    return work


def reference(work: Work, layer: int) -> torch.Tensor:
    """[num_tokens, num_heads, head_size] float32: softmax over all visible keys."""
    row = work.row
    key_cache, value_cache = work.kv(layer)
    group = row.num_heads // row.num_kv_heads
    out = torch.empty(work.query.shape, dtype=torch.float32, device=work.device)
    for request, length in enumerate(row.seq_lens):
        ids = work.block_table[request, : -(-length // row.block_size)].long()
        key = key_cache[ids].flatten(0, 1)[:length].float()
        value = value_cache[ids].flatten(0, 1)[:length].float()
        first = request * row.query_len
        # At most a GiB of logits at a time.
        chunk = max(2**28 // (row.num_heads * length), 1)
        for start in range(0, row.query_len, chunk):
            end = min(start + chunk, row.query_len)
            query = work.query[first + start : first + end].float()
            grouped = query.unflatten(1, (row.num_kv_heads, group))
            logits = torch.einsum("qhgd,khd->hgqk", grouped, key) * work.scale
            if row.query_len > 1:
                at = torch.arange(start, end, device=work.device) + length - row.query_len
                hidden = torch.arange(length, device=work.device) > at[:, None]
                logits = logits.masked_fill_(hidden, float("-inf"))
            weights = torch.softmax(logits, dim=-1)
            attended = torch.einsum("hgqk,khd->qhgd", weights, value)
            out[first + start : first + end] = attended.flatten(1, 2)
    return out


class Wrong(Exception):
    """A contender's output is not attention."""


def check(outputs: dict[int, torch.Tensor], work: Work) -> float:
    """The largest ||out - reference|| / ||reference|| of the layers given; NaN never passes."""
    worst = 0.0
    for layer, expected in work.reference.items():
        if layer in outputs:
            error = (outputs[layer].float() - expected).norm() / expected.norm()
            worst = max(worst, float(error)) if error == error else float("nan")
    if not worst < MAX_ERROR:
        raise Wrong(f"relative error {worst:.3g} against the float32 reference")
    return worst


# Contenders: from a batch to a call over one layer ---------------------------------------------


def config_as_served(case: AttnCase) -> Any:
    """The harness' VllmConfig with the graphs that serving has."""
    from vllm.config import CUDAGraphMode

    from tests.harness.server import config_of

    config = copy.deepcopy(config_of(case))
    compilation = config.compilation_config
    compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    compilation.cudagraph_capture_sizes = GRAPH_SIZES
    compilation.max_cudagraph_capture_size = GRAPH_SIZES[-1]
    return config


def driver_of(backend: type[Any], case: AttnCase, device: torch.device) -> Any:
    """A backend's own builder and impl, set up by the test harness for the batch's shapes."""
    from tests.harness.driver import drive

    return drive(backend, case, device, config=config_as_served(case))


@contextlib.contextmanager
def ops_setting(names: str | None) -> Iterator[None]:
    before = os.environ.pop("XFV1_OPS", None)
    if names:
        os.environ["XFV1_OPS"] = names
    try:
        yield
    finally:
        os.environ.pop("XFV1_OPS", None)
        if before is not None:
            os.environ["XFV1_OPS"] = before


@contextlib.contextmanager
def ops_chosen() -> Iterator[list[str]]:
    """The names of the ops that xfv1 chooses meanwhile land in the list that this yields."""
    from xfv1 import dispatch

    names: list[str] = []
    choose = dispatch.choose

    def noted(*asked: Any) -> Any:
        op = choose(*asked)
        names.append(op.name)
        return op

    with mock.patch.object(dispatch, "choose", noted):
        yield names


def xfv1(op: str | None = None) -> Callable[[Work], Run]:
    """xfv1's builder and impl; with one op alone, or as dispatched. `+gather`: as though the
    batch had context, so that keys come from the pages."""

    def prepare(work: Work) -> Run:
        from xfv1.backend import XFormersAttentionBackend

        work.driver = work.driver or driver_of(XFormersAttentionBackend, work.case, work.device)
        driver = work.driver
        metadata = driver.metadata(work.inputs)
        if op and op.endswith(GATHERED):
            metadata.batches = [replace(batch, fresh=False) for batch in metadata.batches]
        impl, layer = driver.layer.impl, driver.layer

        def run(index: int, out: torch.Tensor) -> None:
            impl.forward(
                layer, work.query, work.key, work.value, work.caches[index], metadata, output=out
            )

        # The first call picks the op, which the step then keeps.
        with ops_setting(op and op.removesuffix(GATHERED)), ops_chosen() as names:
            run(0, work.new_output())
        if op is None:
            work.default_ops = "+".join(dict.fromkeys(names))
        return run

    return prepare


def fa3(work: Work) -> Run:
    """FlashAttention-3 as vLLM's FLASH_ATTN calls it, scheduled ahead of time."""
    from vllm.v1.attention.backends.fa_utils import (
        flash_attn_varlen_func,
        get_flash_attn_version,
        get_scheduler_metadata,
    )

    row = work.row
    if get_flash_attn_version(head_size=row.head_size) != 3:
        raise NotImplementedError("vLLM's FLASH_ATTN does not use FlashAttention-3 here")
    # As its builder decides with graphs of up to GRAPH_SIZES[-1] tokens.
    splits = FA_GRAPH_SPLITS if len(work.query) <= GRAPH_SIZES[-1] else 0
    longest = max(row.seq_lens)
    plan = get_scheduler_metadata(
        batch_size=row.num_reqs, max_seqlen_q=row.query_len, max_seqlen_k=longest,
        num_heads_q=row.num_heads, num_heads_kv=row.num_kv_heads, headdim=row.head_size,
        cache_seqlens=work.seq_lens, qkv_dtype=work.query.dtype,
        cu_seqlens_q=work.query_start_loc, page_size=row.block_size, causal=True,
        window_size=(-1, -1), num_splits=splits,
    )  # fmt: skip
    one = torch.ones((), device=work.device).expand(row.num_reqs, row.num_kv_heads)

    def run(index: int, out: torch.Tensor) -> None:
        key, value = work.kv(index)
        flash_attn_varlen_func(
            q=work.query, k=key, v=value, out=out, cu_seqlens_q=work.query_start_loc,
            max_seqlen_q=row.query_len, seqused_k=work.seq_lens, max_seqlen_k=longest,
            softmax_scale=work.scale, causal=True, alibi_slopes=None, window_size=[-1, -1],
            block_table=work.block_table, softcap=0, scheduler_metadata=plan, fa_version=3,
            q_descale=one, k_descale=one, v_descale=one, num_splits=splits, s_aux=None,
        )  # fmt: skip

    return run


def unified(work: Work) -> Run:
    """unified_attention as vLLM's TRITON_ATTN calls it."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    row = work.row
    wanted = TRITON_MIN_GRID // row.num_kv_heads
    threshold = min(GRAPH_SIZES, key=lambda size: abs(size - wanted))
    padded = 1 << (row.head_size - 1).bit_length()
    segments = (threshold, row.num_heads, TRITON_SEGMENTS)
    partial = [
        torch.empty(shape, dtype=torch.float32, device=work.device)
        for shape in ((*segments, padded), segments, segments)
    ]
    one = torch.ones((), device=work.device).expand(row.num_reqs, row.num_kv_heads)

    def run(index: int, out: torch.Tensor) -> None:
        key, value = work.kv(index)
        unified_attention(
            q=work.query, k=key, v=value, out=out, cu_seqlens_q=work.query_start_loc,
            max_seqlen_q=row.query_len, seqused_k=work.seq_lens,
            max_seqlen_k=max(row.seq_lens), softmax_scale=work.scale, causal=True,
            window_size=(-1, -1), block_table=work.block_table, softcap=0, q_descale=None,
            k_descale=one, v_descale=one, seq_threshold_3D=threshold,
            num_par_softmax_segments=TRITON_SEGMENTS, softmax_segm_output=partial[0],
            softmax_segm_max=partial[1], softmax_segm_expsum=partial[2],
        )  # fmt: skip

    return run


def flashinfer(work: Work) -> Run:
    """FlashInfer's paged wrappers as vLLM's FLASHINFER plans and runs them."""
    row = work.row
    if row.head_size == 80:
        # It would take the process' CUDA context with it.
        raise NotImplementedError("not run: illegal instruction at head size 80")
    from flashinfer import (
        BatchDecodeWithPagedKVCacheWrapper,
        BatchPrefillWithPagedKVCacheWrapper,
    )

    lens = torch.tensor(row.seq_lens, dtype=torch.int32)
    pages = (lens + row.block_size - 1) // row.block_size
    indptr = torch.zeros(row.num_reqs + 1, dtype=torch.int32)
    indptr[1:] = torch.cumsum(pages, 0)
    last = (lens - 1) % row.block_size + 1
    used = torch.arange(work.block_table.shape[1], device=work.device) < pages[:, None].to(
        work.device
    )
    indices = work.block_table[used].contiguous()
    workspace = torch.zeros(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=work.device)
    dtype = work.query.dtype
    wrapper: Any
    if row.phase == DECODE:
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_cuda_graph=True, use_tensor_cores=True,
            paged_kv_indptr_buffer=torch.empty_like(indptr, device=work.device),
            paged_kv_indices_buffer=torch.empty_like(indices),
            paged_kv_last_page_len_buffer=torch.empty_like(last, device=work.device),
        )  # fmt: skip
        wrapper.plan(
            indptr, indices, last, row.num_heads, row.num_kv_heads, row.head_size,
            row.block_size, q_data_type=dtype, kv_data_type=dtype, o_data_type=dtype,
            sm_scale=work.scale,
        )  # fmt: skip
    else:
        wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(
            work.query_start_loc.cpu(), indptr, indices, last, row.num_heads,
            row.num_kv_heads, row.head_size, row.block_size, causal=True,
            sm_scale=work.scale, q_data_type=dtype, kv_data_type=dtype, o_data_type=dtype,
        )  # fmt: skip

    def run(index: int, out: torch.Tensor) -> None:
        wrapper.run(work.query, work.kv(index), out=out)

    return run


def compile_flashinfer(rows: Sequence[Row]) -> None:
    """Build FlashInfer's kernels for the rows, decodes first; nvcc takes minutes."""
    from flashinfer.prefill import get_batch_prefill_module

    wanted = {
        ("fa2" if row.phase == DECODE else "fa3", TORCH_DTYPES[row.dtype], row.head_size): None
        for row in sorted(rows, key=lambda row: row.phase != DECODE)
        if row.head_size != 80
    }
    for backend, dtype, size in wanted:
        get_batch_prefill_module(
            backend, dtype, dtype, dtype, torch.int32, size, size, 0, False, False, False
        )


def contenders(row: Row, args: argparse.Namespace) -> dict[str, Callable[[Work], Run]]:
    """What to time on a row, by name. FlashInfer is given a turn of its own, see `measure_all`."""
    from xfv1.dispatch import OPS

    chosen: dict[str, Callable[[Work], Run]] = {}
    if row.phase == TURING:
        for name in TURING_OPS:
            chosen[name + GATHERED] = xfv1(name + GATHERED)
            if row.context == 0:
                chosen[name] = xfv1(name)
        chosen["unified"] = unified
        return chosen
    chosen[DEFAULT] = xfv1()
    for name in OPS:
        if name in args.ops or "all" in args.ops:
            chosen[name] = xfv1(name)
    peers = {"fa3": fa3, "unified": unified}
    return chosen | {name: peers[name] for name in args.peers if name in peers}


# Timing ------------------------------------------------------------------------------------------


def each_ms(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Milliseconds of one call, from `calls` of them back to back."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) * 1e3 / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(CYCLES_PER_CALL * calls)
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / calls


def timed_call(run: Run, work: Work) -> tuple[Callable[[], None], float]:
    """(what to time, relative error): one call for each layer, as a graph for decodes on a GPU."""
    outputs = [work.new_output() for _ in work.caches]

    def every_layer() -> None:
        for index, out in enumerate(outputs):
            run(index, out)

    every_layer()
    error = check(dict(enumerate(outputs)), work)
    if work.row.phase != DECODE or work.device.type != "cuda":
        return every_layer, error
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        every_layer()
    for out in outputs:
        out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    # The graph's own output, not the eager calls'.
    error = max(error, check(dict(enumerate(outputs)), work))

    def replay() -> None:
        graph.replay()

    # A graph uses its tensors by address; whoever holds the call holds them.
    replay.__dict__["keep"] = (outputs, run)
    return replay, error


def in_turns(
    calls: dict[str, Callable[[], None]], work: Work, rounds: int
) -> dict[str, dict[str, float]]:
    """Microseconds a layer: median, least and most of the rounds, in which all take turns."""
    layers = len(work.caches)
    repeats: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        each_ms(call, 2, work.device)
        once = each_ms(call, 2, work.device)
        wanted = SLICE_MS.get(work.row.phase, DEFAULT_SLICE_MS) / max(once, 1e-3)
        repeats[name] = max(min(round(wanted), 100), 2) if work.device.type == "cuda" else 1
    names = list(calls)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            each = each_ms(calls[name], repeats[name], work.device)
            times[name].append(each * 1e3 / layers)
    return {
        name: {
            "us": round(statistics.median(found), 3),
            "min_us": round(min(found), 3),
            "max_us": round(max(found), 3),
        }
        for name, found in times.items()
    }


def ceilings(device: torch.device) -> dict[str, float]:
    """Bytes per second of a copy (read and written) and FLOP/s of a bf16 product, both medians."""
    cuda = device.type == "cuda"
    count, side, rounds = (2**31, 8192, 15) if cuda else (2**24, 256, 3)
    source = torch.empty(count, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copies = [each_ms(lambda: target.copy_(source), 2, device) for _ in range(rounds)]
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    c = torch.empty_like(a)
    products = [each_ms(lambda: torch.mm(a, b, out=c), 3, device) for _ in range(rounds)]
    return {
        "copy_bytes_per_s": 2 * count / statistics.median(copies) * 1e3,
        "bf16_flops_per_s": 2 * side**3 / statistics.median(products) * 1e3,
    }


# One row -----------------------------------------------------------------------------------------


class Recorder:
    """The results file: whole after every contender, so that nothing measured is lost."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.state.setdefault("rows", {})

    def row(self, row: Row) -> dict[str, Any]:
        facts = {
            "label": row.label, "phase": row.phase, "dtype": row.dtype,
            "kv_bytes": row.kv_bytes, "flops": row.flops, "recorded": dict(row.recorded),
            "turns": [], "contenders": {},
        }  # fmt: skip
        entry: dict[str, Any] = self.state["rows"].setdefault(row.id, facts)
        return entry

    def crashes(self, name: str) -> int:
        """Rows in which a contender took the process with it; each costs a new one's start."""
        rows = self.state["rows"].values()
        return sum("crashed" in row["contenders"].get(name, {}) for row in rows)

    def busy_with(self, row: Row | None, name: str | None) -> None:
        """Say who is to blame if the process ends now."""
        self.state["in_flight"] = row and [row.id, name]
        self.save()

    def save(self) -> None:
        save(self.path, self.state)


def device_is_dead(device: torch.device) -> bool:
    """Whether an error has taken the CUDA context with it."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return True
    return False


def reason_of(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 600 else text[:600] + " ..."


def measure(
    row: Row,
    chosen: dict[str, Callable[[Work], Run]],
    recorder: Recorder,
    device: torch.device,
    rounds: int,
    turn: str,
) -> None:
    """Check every contender on a row, then time those that passed in turns."""
    entry = recorder.row(row)
    recorder.busy_with(row, WHOLE_ROW)
    work = build(row, device)
    calls, errors = {}, {}
    for name, prepare in chosen.items():
        if entry["contenders"].get(name, {}).keys() & {"failed", "refused", "crashed"}:
            continue
        if recorder.crashes(name) >= MAX_CRASHES:
            entry["contenders"][name] = {"failed": f"left out after {MAX_CRASHES} crashes"}
            continue
        recorder.busy_with(row, name)
        try:
            calls[name], errors[name] = timed_call(prepare(work), work)
        except NotImplementedError as error:
            entry["contenders"][name] = {"refused": reason_of(error)}
        except Exception as error:
            entry["contenders"][name] = {"failed": f"{type(error).__name__}: {reason_of(error)}"}
            say(f"  {row.id} {name}: {type(error).__name__}: {reason_of(error)[:200]}")
            # Its frames hold tensors, or a graph that was being captured.
            error.__traceback__ = None
            if device_is_dead(device):
                recorder.save()
                os._exit(CRASHED)
    recorder.busy_with(row, WHOLE_ROW)
    if turn == "flashinfer" and "flashinfer" not in calls:
        calls = {}
    if calls and rounds:
        found = in_turns(calls, work, rounds)
        for name, figures in found.items():
            kept = {**figures, "error": float(f"{errors[name]:.2e}"), "turn": turn}
            if name == DEFAULT:
                kept["op"] = work.default_ops
                if turn == "flashinfer":
                    # Measured once more, for FlashInfer's ratio alone.
                    entry["contenders"].setdefault("flashinfer", {})["beside_us"] = figures["us"]
                    continue
            entry["contenders"].setdefault(name, {}).update(kept)
    entry["turns"].append(turn)
    entry["layers"] = len(work.caches)
    recorder.busy_with(None, None)
    fastest = sorted((entry["contenders"][name].get("us", 0.0), name) for name in calls)
    say(f"{row.id}: " + ", ".join(f"{name} {us:.1f}" for us, name in fastest))


def measure_all(args: argparse.Namespace, rows: Sequence[Row], device: torch.device) -> None:
    """All rows; then, as FlashInfer compiles for minutes, all again with it and xfv1 alone."""
    recorder = Recorder(args.json)
    if not args.shard and "ceilings" not in recorder.state:
        recorder.state |= {
            "environment": environment(),
            "method": " ".join((__doc__ or "").split()),
            "rounds": args.rounds,
            "ceilings": ceilings(device),
        }
        recorder.save()
    turns: list[tuple[str, Row]] = [("main", row) for row in rows]
    if "flashinfer" in args.peers:
        ordered = sorted(rows, key=lambda row: row.phase != DECODE)
        turns += [("flashinfer", row) for row in ordered if row.phase != TURING]
    for turn, row in turns:
        if turn in recorder.row(row)["turns"]:
            continue
        if time.time() > args.deadline:
            recorder.state["stopped"] = f"out of time before {row.id}"
            recorder.save()
            say(recorder.state["stopped"])
            return
        chosen = contenders(row, args)
        if turn == "flashinfer":
            chosen = {DEFAULT: xfv1(), "flashinfer": flashinfer}
        measure(row, chosen, recorder, device, args.rounds, turn)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


# The sweep ---------------------------------------------------------------------------------------


def sweep(args: argparse.Namespace, rows: Sequence[Row], device: torch.device) -> None:
    """Tilings of xfv1's own kernel, then how many programs share an SM, on each row."""
    from xfv1.device import device_of
    from xfv1.kernels.paged import launch, tiling

    recorder = Recorder(args.json)
    recorder.state.setdefault("environment", environment())
    for row in rows:
        if time.time() > args.deadline:
            say(f"out of time before {row.id}")
            return
        work = build(row, device)
        decode = row.phase == DECODE
        choose = tiling.decode_config if decode else tiling.prefill_config
        rows_of_tile = row.num_heads // row.num_kv_heads * row.query_len
        base = choose(
            device_of(device),
            row.head_size,
            rows_of_tile,
            work.query.element_size(),
            work.kv(0)[0].element_size(),
        )

        def run_with(config: Any, splits: int | None, work: Work = work) -> Run:
            def run(index: int, out: torch.Tensor) -> None:
                key, value = work.kv(index)
                launch.paged_attention(
                    work.query, key, value, out=out, block_table=work.block_table,
                    seq_lens=work.seq_lens, query_start_loc=work.query_start_loc,
                    max_query_len=work.row.query_len, max_seq_len=max(work.row.seq_lens),
                    scale=work.scale, config=config, num_splits=splits,
                )  # fmt: skip

            return run

        tilings = [base, *(config for config in _tilings(base, decode) if config != base)]
        if device.type == "cpu":
            tilings = tilings[:2]
        if args.shard:
            # Compile alone: the cache on disk is what the measuring process starts from.
            part, parts = args.shard
            for config in tilings[part::parts]:
                with contextlib.suppress(Exception):
                    run_with(config, None)(0, work.new_output())
            continue
        found = _race({config: run_with(config, None) for config in tilings}, work, args)
        best = min(found, key=lambda config: found[config], default=base)
        counts = _split_counts(row, best, device)[: 2 if device.type == "cpu" else None]
        splits = _race({count: run_with(best, count) for count in counts}, work, args)
        recorder.state["rows"][row.id] = {
            "label": row.label,
            "chosen": str(base),
            "chosen_us": found.get(base),
            "tilings": {str(config): us for config, us in sorted(found.items(), key=_second)},
            "best": str(best),
            "splits": {str(count): us for count, us in sorted(splits.items(), key=_second)},
        }
        recorder.save()
        say(f"{row.label}: now {_tiling(base)} {found.get(base, float('nan')):.1f} us")
        for config, us in sorted(found.items(), key=_second)[:4]:
            say(f"    {us:9.1f} us  {_tiling(config)}")
        ordered = sorted(splits.items(), key=_second)[:4]
        say("    splits: " + ", ".join(f"{count}: {us:.1f}" for count, us in ordered))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _second(item: tuple[Any, float]) -> float:
    return item[1]


def _tiling(config: Any) -> str:
    return f"m{config.block_m} n{config.block_n} warps{config.num_warps} stages{config.num_stages}"


def _tilings(base: Any, decode: bool) -> Iterator[Any]:
    largest = 256 if base.block_m >= 128 else 128
    sizes = (base.block_m,) if decode else tuple(m for m in (64, 128, 256) if m <= largest)
    for block_m, block_n, warps, stages in itertools.product(
        sizes,
        (16, 32, 64, 128) if decode else (32, 64, 128),
        (2, 4, 8) if decode else (4, 8),
        (2, 3, 4, 5) if decode else (2, 3, 4),
    ):
        yield replace(base, block_m=block_m, block_n=block_n, num_warps=warps, num_stages=stages)


def _split_counts(row: Row, config: Any, device: torch.device) -> list[int]:
    """Splits that make 1 to 12 programs for each SM, and none."""
    sms = 132
    if device.type == "cuda":
        sms = torch.cuda.get_device_properties(device).multi_processor_count
    group = row.num_heads // row.num_kv_heads
    tiles = row.num_reqs * -(-row.query_len * group // config.block_m)
    programs = tiles * row.num_kv_heads
    wanted = {1} | {-(-sms * n // programs) for n in (1, 2, 3, 4, 5, 6, 8, 10, 12)}
    return sorted(count for count in wanted if count <= 128)


def _race(runs: dict[Any, Run], work: Work, args: argparse.Namespace) -> dict[Any, float]:
    """Microseconds a layer of each: all once, then the fastest six in turns."""
    calls, first = {}, {}
    for key, run in runs.items():
        if time.time() > args.deadline:
            break
        try:
            call, _ = timed_call(run, work)
            each_ms(call, 2, work.device)
            first[key] = each_ms(call, 5, work.device) * 1e3 / len(work.caches)
        except Exception as error:
            say(f"    {key}: {type(error).__name__}: {reason_of(error)[:100]}")
            if device_is_dead(work.device):
                os._exit(CRASHED)
            continue
        calls[key] = call
        for slow in sorted(first, key=lambda key: first[key])[6:]:
            calls.pop(slow, None)
    again = in_turns(calls, work, args.rounds) if calls else {}
    return first | {key: figures["us"] for key, figures in again.items()}


# The processes -----------------------------------------------------------------------------------


def supervise(args: argparse.Namespace) -> int:
    """Run children until all is measured, time is out, or nothing more can be learnt."""
    with contextlib.suppress(FileNotFoundError):
        args.json.unlink()
    child = [sys.executable, "-m", "benchmarks.kernels", *sys.argv[1:], "--worker"]
    child += ["--deadline", str(args.deadline), "--json", str(args.json)]
    code = 0
    # Ended from outside, take the children along: they are sessions of their own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with contextlib.ExitStack() as stack:

        def start(*extra: str, quiet: bool = True, **environ: str) -> "subprocess.Popen[bytes]":
            output = subprocess.DEVNULL if quiet else None
            process = subprocess.Popen(
                [*child, *extra], cwd=ROOT, stdout=output, stderr=output, start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environ},
            )  # fmt: skip
            stack.callback(_stop, process)
            return process

        if "flashinfer" in args.peers and not args.sweep and args.device == "cuda":
            start("--compile-flashinfer", MAX_JOBS="8")
        if args.warm and args.device == "cuda":
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            shards = [
                start("--shard", f"{part}/{args.warm}", "--json", f"{folder}/{part}")
                for part in range(args.warm)
            ]
            _wait(shards, args.started + WARM_SHARE * (args.deadline - args.started))
            say(f"kernels compiled after {time.time() - args.started:.0f} s")
        while True:
            worker = start(quiet=False)
            _wait([worker], args.deadline + GRACE)
            code = worker.returncode
            if time.time() > args.deadline or not _note_crash(args.json, code):
                break
    if not args.sweep and args.json.exists():
        print_table(json.loads(args.json.read_text()))
    say(f"{time.time() - args.started:.0f} s; results: {args.json}")
    return 0 if code in (0, CRASHED) else 1


def _wait(processes: Sequence["subprocess.Popen[bytes]"], deadline: float) -> None:
    for process in processes:
        try:
            process.wait(max(deadline - time.time(), 1.0))
        except subprocess.TimeoutExpired:
            _stop(process)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End a child that still runs, and the compilers it started: they are a group of their own."""
    if process.poll() is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def _note_crash(path: Path, code: int) -> bool:
    """Write down whom a child that ended badly was busy with; whether there was anyone."""
    if code == 0 or not path.exists():
        return False
    state = json.loads(path.read_text())
    if not state.get("in_flight"):
        return False
    row, name = state.pop("in_flight")
    entry = state["rows"][row]
    if name == WHOLE_ROW:
        # Each contender passed alone: there is none to leave out, so the row is.
        entry["turns"] += ["main", "flashinfer"]
        entry["failed"] = f"the process ended with {code} while timing"
    else:
        facts = entry["contenders"].setdefault(name, {})
        facts.setdefault("failed", f"the process ended with {code}")
        facts["crashed"] = True
    save(path, state)
    say(f"{row} {name}: the process ended with {code}; going on without it")
    return True


def print_table(state: dict[str, Any]) -> None:
    """A line a row: xfv1 against the fastest peer, and the ceiling it is near to."""
    limits = state.get("ceilings")
    if not limits:
        say("nothing measured")
        return
    say(
        f"\n{state['environment']['device']}: copy {limits['copy_bytes_per_s'] / 1e12:.2f} TB/s,"
        f" bf16 product {limits['bf16_flops_per_s'] / 1e12:.0f} TFLOP/s"
    )
    for entry in state["rows"].values():
        say(_line(entry, limits))


def _line(entry: dict[str, Any], limits: dict[str, float]) -> str:
    timed = {name: c for name, c in entry["contenders"].items() if "us" in c}
    failed = [name for name, c in entry["contenders"].items() if name in PEERS and "failed" in c]

    def shown(name: str) -> str:
        us = timed[name]["us"]
        if entry["phase"] == DECODE:
            percent = 100 * entry["kv_bytes"] / us * 1e6 / limits["copy_bytes_per_s"]
            return f"{name} {us:.1f} us {percent:.0f} %"
        rate = entry["flops"] / us * 1e6
        return f"{name} {rate / 1e12:.0f} TF {100 * rate / limits['bf16_flops_per_s']:.0f} %"

    head = f"{entry['label']:26s} | "
    if entry["phase"] == TURING:
        op = TURING_OPS[0] + GATHERED
        if "unified" not in timed or op not in timed:
            return head + "not measured"
        gain = timed["unified"]["us"] / timed[op]["us"]
        others = ", ".join(shown(name) for name in timed)
        return head + f"{others} | {gain:.2f}x {'met' if gain >= MIN_TURING_GAIN else 'missed'}"
    peers = {
        name: c.get("beside_us", timed.get(DEFAULT, {}).get("us", 0.0)) / c["us"]
        for name, c in timed.items()
        if name in PEERS
    }
    if DEFAULT not in timed:
        ours = entry["contenders"].get(DEFAULT, {})
        why = str(ours.get("failed") or ours.get("refused") or entry.get("failed", "not timed"))
        return head + f"xfv1: {why[:100]}"
    text = f"{shown(DEFAULT)} [{timed[DEFAULT].get('op', '?')}]"
    alone = {name: c["us"] for name, c in timed.items() if name not in PEERS and name != DEFAULT}
    if alone:
        best = min(alone, key=lambda name: alone[name])
        if alone[best] < 0.97 * timed[DEFAULT]["us"]:
            text += f" (op {best}: {alone[best]:.1f} us)"
    if not peers:
        return head + f"{text} | no peer"
    rival = max(peers, key=lambda name: peers[name])
    verdict = "met" if peers[rival] <= MAX_RATIO else "missed"
    missing = f" (failed: {', '.join(failed)})" if failed else ""
    return head + f"{text} | {shown(rival)} | {peers[rival]:.2f} {verdict}{missing}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=[*ROWS], default=["decode", "prefill"])
    parser.add_argument("--match", nargs="*", default=[""], help="rows whose id holds one of these")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["fa3", "unified"])
    parser.add_argument("--ops", nargs="*", default=["all"], help="xfv1 ops to time alone, or all")
    parser.add_argument("--json", type=Path, default=RESULTS / "kernels.json")
    parser.add_argument("--budget", type=float, default=225.0, help="seconds in all")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--warm", type=int, default=4, help="processes that compile ahead of the measuring one"
    )
    parser.add_argument("--sweep", action="store_true", help="tune xfv1's own kernel instead")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run")
    for name in ("--worker", "--compile-flashinfer"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--shard", type=_shard, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.json = args.json.resolve()
    args.started = time.time()
    args.deadline = args.deadline or args.started + args.budget
    return args


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    return int(part), int(parts)


def main() -> int:
    args = arguments()
    rows = [
        row
        for kind in args.rows
        for row in ROWS[kind]
        if any(text in row.id for text in args.match)
    ]
    if args.device == "cpu":
        rows = [row.shrunk() for row in rows]
    if not args.worker:
        return supervise(args)
    if args.compile_flashinfer:
        compile_flashinfer(rows)
        return 0
    from tests.harness.environment import prepare

    prepare()
    if args.sweep:
        sweep(args, rows, torch.device(args.device))
        return 0
    if args.shard:
        part, parts = args.shard
        rows, args.rounds = rows[part::parts], 0
        args.peers = [name for name in args.peers if name != "flashinfer"]
    measure_all(args, rows, torch.device(args.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
