"""Keys and values of a prefill, contiguous: its own, or gathered from the pages."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from xfv1.ops.base import Call
from xfv1.ops.xformers_base import attend, query_info, shared

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
    """The call in calls that each gather up to MAX_GATHERED bytes, or one request's keys.

    Many requests that share a long start may see more keys together than the cache holds.
    """
    layer = call.layer
    # In float32, for a moment, where a scale is applied.
    itemsize = 4 if layer.quantized else layer.dtype.itemsize
    most = MAX_GATHERED // (2 * layer.num_kv_heads * layer.head_size * itemsize)
    plan = ("pieces", layer.sliding_window, most)
    if plan not in call.plans:
        call.plans[plan] = None if call.batch.own_keys else _pieces(call, most)
    found = call.plans[plan]
    if found is None:
        yield call
        return
    for rows, facts in found:
        lse = None if call.lse is None else call.lse[rows]
        yield replace(call, query=call.query[rows], out=call.out[rows], lse=lse, **facts)


def _pieces(call: Call, most: int) -> list[tuple[slice, dict[str, Any]]] | None:
    """Of requests that have up to `most` keys together: their tokens' rows, and what else of a call
    is theirs. None where all have no more."""
    assert call.seq_lens_cpu is not None
    counts = [end - first for first, end in _key_range(call)]
    if sum(counts) <= most:
        return None
    cuts, total = [0], 0
    for request, count in enumerate(counts):
        if total + count > most:
            cuts.append(request)
            total = 0
        total += count
    starts = call.query_start_loc_cpu.tolist()
    found = []
    for first, last in itertools.pairwise([*cuts, len(counts)]):
        rows, requests = slice(starts[first], starts[last]), slice(first, last)
        # Before a first request that is too long alone, or of requests without tokens.
        if rows.start == rows.stop:
            continue
        bounds = slice(first, last + 1)
        lens = [end - start for start, end in itertools.pairwise(starts[bounds])]
        facts = {
            "batch": replace(
                call.batch,
                num_reqs=last - first,
                max_query_len=max(lens),
                max_seq_len=int(call.seq_lens_cpu[requests].max()),
            ),
            "query_start_loc": call.query_start_loc[bounds] - rows.start,
            "query_start_loc_cpu": call.query_start_loc_cpu[bounds] - rows.start,
            "seq_lens": call.seq_lens[requests],
            "seq_lens_cpu": call.seq_lens_cpu[requests],
            "block_table": call.block_table[requests],
            "plans": {},
        }
        found.append((rows, facts))
    return found


def contiguous_kv(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """[num_keys, num_kv_heads, head_size] of the query's dtype, request after request.

    What a request's queries may see in the cache is gathered by indices made once a step; their
    number is known on the host, for the length of a prefill is, so nothing waits for the device.
    """
    if call.batch.own_keys:
        assert call.key is not None and call.value is not None
        rows = int(call.query_start_loc_cpu[-1])
        return call.key[:rows], call.value[:rows]
    assert call.key_cache is not None and call.value_cache is not None
    blocks, offsets = _slots(call)
    key, value = (picked(cache, blocks, offsets) for cache in (call.key_cache, call.value_cache))
    if call.layer.quantized:
        assert call.k_scale is not None and call.v_scale is not None
        key = (key.float() * call.k_scale).to(call.layer.dtype)
        value = (value.float() * call.v_scale).to(call.layer.dtype)
    return key, value


def picked(cache: torch.Tensor, blocks: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """cache[blocks, offsets], which PyTorch copies element by element: as few as there can be.

    cache: [num_blocks, block_size, num_kv_heads, head_size], unit stride in the last dimension.
    """
    # Where a head's row may begin, and how long it is.
    steps = (cache.storage_offset(), *cache.stride()[:3], cache.shape[3])
    word = WORDS[math.gcd(max(WORDS), *(step * cache.itemsize for step in steps))]
    return cache.view(word)[blocks, offsets].view(cache.dtype)


def contiguous_bias(call: Call) -> Any:
    """xFormers' mask for `contiguous_kv`, made once a step and kind of layer."""
    from xformers.ops.fmha import attn_bias

    window = call.layer.sliding_window
    fresh = call.batch.own_keys
    plan = ("contiguous_bias", call.layer.causal, window, fresh)
    if plan not in call.plans:
        queries = query_info(call)
        keys = queries if fresh else _key_info(_key_range(call), call.block_table.device)
        if not call.layer.causal:
            bias: Any = attn_bias.BlockDiagonalMask(q_seqinfo=queries, k_seqinfo=keys)
        elif window is None:
            bias = attn_bias.BlockDiagonalCausalFromBottomRightMask(
                q_seqinfo=queries, k_seqinfo=keys
            )
        else:
            bias = attn_bias.BlockDiagonalCausalLocalAttentionFromBottomRightMask(
                q_seqinfo=queries, k_seqinfo=keys, _window_size=window
            )
        call.plans[plan] = bias
    return call.plans[plan]


def _key_range(call: Call) -> list[tuple[int, int]]:
    """The positions [first, end) of each request's keys that some query of it sees.

    What lies wholly before a window is not the request's any more: vLLM frees those blocks.
    """
    assert call.seq_lens_cpu is not None
    lens = call.seq_lens_cpu.tolist()
    window = call.layer.sliding_window
    if window is None:
        return [(0, length) for length in lens]
    starts = call.query_start_loc_cpu.tolist()
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


def _slots(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Block and offset of every key of the batch that is seen: [num_keys] each."""
    plan = ("slots", call.layer.sliding_window)
    if plan not in call.plans:
        assert call.key_cache is not None
        size = call.key_cache.shape[1]
        ranges = _key_range(call)
        # Made on the host, where all of it is known, in one copy: request, then position.
        positions = torch.cat([torch.arange(*keys) for keys in ranges])
        counts = torch.tensor([end - first for first, end in ranges])
        requests = torch.repeat_interleave(torch.arange(len(ranges)), counts)
        both = torch.stack([requests, positions]).to(call.block_table.device, non_blocking=True)
        blocks = call.block_table[both[0], both[1] // size].long()
        call.plans[plan] = blocks, both[1] % size
    slots: tuple[torch.Tensor, torch.Tensor] = call.plans[plan]
    return slots
