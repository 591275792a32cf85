"""Keys and values of a prefill, contiguous: its own, or gathered from the pages."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from xfv1.ops.base import Call
from xfv1.ops.xformers.base import attend, query_info, shared
from xfv1.phase import Batch, Phase

# Bytes of keys and values to gather at a time: vLLM sets no memory aside for them.
MAX_GATHERED = 256 * 2**20
# Dtypes to copy bytes by.
WORDS = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
    16: torch.complex128,
}


def attend_contiguous(call: Call, op: Any) -> None:
    """One xFormers op over `contiguous_kv`."""
    key, value = (shared(tensor, call.layer.group) for tensor in contiguous_kv(call))
    attend(call, op, key, value, contiguous_bias(call))


def pieces(call: Call) -> Iterator[Call]:
    """The call, cut into calls that each gather up to MAX_GATHERED bytes, or one request's keys.

    Many requests that share a long start may see more keys together than the cache holds.
    """
    layer = call.layer
    # A scale is applied in float32.
    itemsize = 4 if layer.quantized else layer.dtype.itemsize
    most = MAX_GATHERED // (2 * layer.num_kv_heads * layer.head_size * itemsize)
    window = layer.sliding_window
    found = call.phase.once(
        ("pieces", window, most),
        lambda: None if call.batch.own_keys else _pieces(call.phase, window, most),
    )
    if found is None:
        yield call
        return
    for phase in found:
        first = phase.rows.start - call.phase.rows.start
        rows = slice(first, first + phase.num_tokens)
        lse = None if call.lse is None else call.lse[rows]
        yield replace(call, phase=phase, query=call.query[rows], out=call.out[rows], lse=lse)


def _pieces(phase: Phase, window: int | None, most: int) -> list[Phase] | None:
    """The phase, cut into phases that have up to `most` keys, or one request.

    None if all requests together have no more. Requests without tokens may be left out.
    """
    counts = [end - first for first, end in _key_range(phase, window)]
    if sum(counts) <= most:
        return None
    cuts, total = [0], 0
    for request, count in enumerate(counts):
        if total + count > most:
            cuts.append(request)
            total = 0
        total += count
    starts = phase.query_start_loc_cpu.tolist()
    return [
        phase.requests(first, last, _batch(phase, first, last))
        for first, last in itertools.pairwise([*cuts, len(counts)])
        # There are no tokens before a first request that is too long alone.
        if starts[first] != starts[last]
    ]


def _batch(phase: Phase, first: int, last: int) -> Batch:
    """The facts of a phase's requests [first:last]."""
    assert phase.seq_lens_cpu is not None
    return replace(
        phase.batch,
        num_reqs=last - first,
        max_query_len=int(phase.query_start_loc_cpu[first : last + 1].diff().max()),
        max_seq_len=int(phase.seq_lens_cpu[first:last].max()),
    )


def contiguous_kv(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """[num_keys, num_kv_heads, head_size] of the query's dtype, request after request.

    The cached keys that a request's queries may see are gathered by indices, which are made once a
    step. The host knows the lengths of prefills, and so the number of indices: nothing waits for
    the device.
    """
    if call.batch.own_keys:
        assert call.key is not None and call.value is not None
        rows = call.phase.num_tokens
        return call.key[:rows], call.value[:rows]
    assert call.key_cache is not None and call.value_cache is not None
    phase, window, size = call.phase, call.layer.sliding_window, call.key_cache.shape[1]
    blocks, offsets = phase.once(("slots", window), lambda: _slots(phase, window, size))
    key, value = (picked(cache, blocks, offsets) for cache in (call.key_cache, call.value_cache))
    if call.layer.quantized:
        assert call.k_scale is not None and call.v_scale is not None
        key = (key.float() * call.k_scale).to(call.layer.dtype)
        value = (value.float() * call.v_scale).to(call.layer.dtype)
    return key, value


def picked(cache: torch.Tensor, blocks: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """cache[blocks, offsets], copied in the widest words that fit: PyTorch copies one at a time.

    cache: [num_blocks, block_size, num_kv_heads, head_size], unit stride in the last dimension.
    """
    # A word must divide where a head's row may begin, and how long it is.
    steps = (cache.storage_offset(), *cache.stride()[:3], cache.shape[3])
    word = WORDS[math.gcd(max(WORDS), *(step * cache.itemsize for step in steps))]
    return cache.view(word)[blocks, offsets].view(cache.dtype)


def contiguous_bias(call: Call) -> Any:
    """xFormers' mask for `contiguous_kv`, made once a step and kind of layer."""
    phase, causal, window = call.phase, call.layer.causal, call.layer.sliding_window
    own_keys = call.batch.own_keys
    return phase.once(
        ("contiguous_bias", causal, window, own_keys),
        lambda: _contiguous_bias(phase, causal, window, own_keys),
    )


def _contiguous_bias(phase: Phase, causal: bool, window: int | None, own_keys: bool) -> Any:
    from xformers.ops.fmha import attn_bias

    queries = query_info(phase)
    keys = queries
    if not own_keys:
        keys = _key_info(_key_range(phase, window), phase.block_table.device)
    if not causal:
        return attn_bias.BlockDiagonalMask(q_seqinfo=queries, k_seqinfo=keys)
    if window is None:
        return attn_bias.BlockDiagonalCausalFromBottomRightMask(q_seqinfo=queries, k_seqinfo=keys)
    return attn_bias.BlockDiagonalCausalLocalAttentionFromBottomRightMask(
        q_seqinfo=queries, k_seqinfo=keys, _window_size=window
    )


def _key_range(phase: Phase, window: int | None) -> list[tuple[int, int]]:
    """The positions [first, end) of each request's keys that some query of it sees.

    Blocks that lie wholly before a window are not the request's any more: vLLM frees them.
    """
    assert phase.seq_lens_cpu is not None
    lens = phase.seq_lens_cpu.tolist()
    if window is None:
        return [(0, length) for length in lens]
    starts = phase.query_start_loc_cpu.tolist()
    return [
        (max(length - (end - start) - window + 1, 0), length)
        for (start, end), length in zip(itertools.pairwise(starts), lens, strict=True)
    ]


def _key_info(ranges: list[tuple[int, int]], device: torch.device) -> Any:
    from xformers.ops.fmha.attn_bias import _SeqLenInfo

    lens = [end - first for first, end in ranges]
    starts = [0, *itertools.accumulate(lens)]
    return _SeqLenInfo(
        seqstart=torch.tensor(starts, dtype=torch.int32).to(device, non_blocking=True),
        max_seqlen=max(lens),
        min_seqlen=min(lens),
        seqstart_py=starts,
    )


def _slots(phase: Phase, window: int | None, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Block and offset of every key that some query sees: [num_keys] each. size: of a block."""
    ranges = _key_range(phase, window)
    # The host knows requests and positions: one copy takes both to the device.
    positions = torch.cat([torch.arange(*keys) for keys in ranges])
    counts = torch.tensor([end - first for first, end in ranges])
    requests = torch.repeat_interleave(torch.arange(len(ranges)), counts)
    both = torch.stack([requests, positions]).to(phase.block_table.device, non_blocking=True)
    blocks = phase.block_table[both[0], both[1] // size].long()
    return blocks, both[1] % size
