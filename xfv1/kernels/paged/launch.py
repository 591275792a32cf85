"""The host's side of paged attention: it checks the arguments, cuts the work, and launches.

`xfv1.kernels.paged.device` gives the formula and says how the work is cut. All shapes of a launch
come from tensor shapes and host bounds, never from device values, so a launch neither syncs nor
breaks CUDA graph capture.
"""

import torch

from xfv1.device import Device, device_of
from xfv1.kernels.paged.device import _attention_kernel, _merge_kernel
from xfv1.kernels.paged.tiling import (
    MAX_DECODE_ROWS,
    MAX_HEAD_SIZE,
    Config,
    decode_config,
    head_parts,
    power_of_2,
    prefill_config,
)

MAX_SPLITS = 128
# A split shorter than this many keys costs more in the merge than it wins.
MIN_SPLIT_KEYS = 256
# Programs wanted per SM. Decode: more than the three that fit at a time, so that they even out.
DECODE_PROGRAMS_PER_SM = 4
PREFILL_PROGRAMS_PER_SM = 1

_CACHE_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)
_QUERY_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    *,
    out: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    causal: bool = True,
    sliding_window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    alibi_sqrt: bool = False,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    num_splits: int | None = None,
    config: Config | None = None,
    batch_invariant: bool = False,
) -> None:
    """Attention of a ragged batch of queries over a paged KV cache.

    Request i has the query tokens ``query_start_loc[i]:query_start_loc[i + 1]`` (perhaps none), the
    last of the ``seq_lens[i]`` positions whose keys lie in the blocks ``block_table[i]``.

    Args:
        query: [num_tokens, num_heads, head_size], float16, bfloat16 or float32; unit stride in the
            last dimension, like all tensors with a head dimension here. num_tokens may exceed
            ``query_start_loc[-1]``; rows past that are neither read nor written.
        key_cache, value_cache: [num_blocks, block_size, num_kv_heads, head_size] in the query's
            dtype, float8_e4m3fn, float8_e5m2 or, on AMD, float8_e4m3fnuz.
        out: [>= num_tokens, num_heads, head_size], any float dtype.
        block_table: [num_reqs, max_blocks] int32, unit stride in the last dimension. Entries for
            blocks that no query sees are not used.
        seq_lens, query_start_loc: [num_reqs], [num_reqs + 1] int32, contiguous, on the device.
        max_query_len, max_seq_len: upper bounds over the requests, known to the host. The first
            must hold; the second only guides the number of splits.
        scale: factor of the logits.
        sliding_window: keys seen at most, the query's own included; None or <= 0: no window.
        softcap: None or 0: no cap.
        alibi_slopes: [num_heads] float; alibi_sqrt takes the distance's square root.
        sinks: [num_heads], a logit per head that only joins the denominator.
        k_scale, v_scale: one float each, on the device: what the cached values are multiplied by.
        lse: [num_tokens, num_heads] float32, any strides; written if given.
        num_splits: programs that share the keys of one row tile; None: chosen to fill the GPU.
        config: tiling, in place of ``decode_config`` or ``prefill_config``.
        batch_invariant: a token's answer is the same bits whatever else is in the batch, and
            however its request is cut into steps; in place of num_splits and config.
    """
    _check(query, key_cache, value_cache, out, block_table)
    num_tokens, num_heads, head_size = query.shape
    _, block_size, num_kv_heads, _ = key_cache.shape
    num_reqs = seq_lens.shape[0]
    if num_tokens == 0 or num_reqs == 0 or max_query_len <= 0:
        return

    group = num_heads // num_kv_heads
    window = sliding_window if sliding_window is not None and sliding_window > 0 else 0
    device = device_of(query.device)
    if key_cache.dtype == torch.float8_e4m3fn and not device.converts_e4m3:
        key_cache, value_cache = key_cache.view(torch.uint8), value_cache.view(torch.uint8)
    decode = max_query_len == 1 or max_query_len * group <= MAX_DECODE_ROWS
    item_sizes = query.element_size(), key_cache.element_size()
    if batch_invariant:
        decode, num_splits = False, 1
        config = decode_config(device, head_size, MAX_DECODE_ROWS, *item_sizes)
    if config is None:
        choose = decode_config if decode else prefill_config
        config = choose(device, head_size, max_query_len * group, *item_sizes)
    if decode:
        tiles_per_req = -(-max_query_len * group // config.block_m)
        num_tiles = num_reqs * tiles_per_req
    else:
        tiles_per_req = 0
        num_tiles = num_tokens * group // config.block_m + num_reqs

    if num_splits is None:
        num_keys = min(max_seq_len, window + max_query_len) if window else max_seq_len
        num_splits = _num_splits(device, num_tiles * num_kv_heads, num_keys, decode)
    num_splits = max(num_splits, 1)
    split = num_splits > 1
    acc = part_max = part_sum = None
    if split:
        shape = (num_tokens, num_heads, num_splits)
        acc = query.new_empty((*shape, head_size), dtype=torch.float32)
        part_max, part_sum = (query.new_empty(shape, dtype=torch.float32) for _ in range(2))
    lse_strides = (0, 0) if lse is None else lse.stride()
    part1, part2 = head_parts(head_size)
    _attention_kernel[(num_tiles * num_kv_heads, num_splits)](
        query,
        key_cache,
        value_cache,
        out,
        lse,
        acc,
        part_max,
        part_sum,
        block_table,
        seq_lens,
        query_start_loc,
        alibi_slopes,
        sinks,
        k_scale,
        v_scale,
        float(scale),
        float(softcap or 0.0),
        window,
        num_reqs,
        num_splits,
        block_table.stride(0),
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
        *lse_strides,
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_SIZE=head_size,
        D1=part1,
        D2=part2,
        BLOCK_SIZE=block_size,
        TILES_PER_REQ=tiles_per_req,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        CAUSAL=causal,
        HAS_WINDOW=window > 0,
        HAS_SOFTCAP=bool(softcap),
        ALIBI_SQRT=alibi_sqrt,
        SPLIT=split,
        INVARIANT=batch_invariant,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if split:
        _merge_kernel[(num_tokens, num_heads)](
            acc,
            part_max,
            part_sum,
            out,
            lse,
            query_start_loc,
            sinks,
            v_scale,
            num_reqs,
            num_splits,
            out.stride(0),
            out.stride(1),
            *lse_strides,
            HEAD_SIZE=head_size,
            D=power_of_2(head_size),
            BLOCK_S=16,
            num_warps=4,
        )


def _check(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    out: torch.Tensor,
    block_table: torch.Tensor,
) -> None:
    """Raise a ValueError for tensors that the kernel cannot take."""
    num_heads, head_size = query.shape[1:]
    num_kv_heads = key_cache.shape[2]
    if num_heads % num_kv_heads != 0:
        raise ValueError(f"{num_heads} heads cannot share {num_kv_heads} KV heads evenly")
    if not 1 <= head_size <= MAX_HEAD_SIZE:
        raise ValueError(f"head size {head_size} is not in 1..{MAX_HEAD_SIZE}")
    if key_cache.shape != value_cache.shape or key_cache.shape[3] != head_size:
        raise ValueError(
            f"caches {tuple(key_cache.shape)}, {tuple(value_cache.shape)} do not fit the query's "
            f"head size {head_size}"
        )
    if query.dtype not in _QUERY_DTYPES:
        raise ValueError(f"query dtype {query.dtype} is not one of {_QUERY_DTYPES}")
    if key_cache.dtype != value_cache.dtype or key_cache.dtype not in (query.dtype, *_CACHE_DTYPES):
        raise ValueError(
            f"cache dtypes {key_cache.dtype}, {value_cache.dtype} do not fit query {query.dtype}"
        )
    if any(x.stride(-1) != 1 for x in (query, key_cache, value_cache, out, block_table)):
        raise ValueError("the last dimension must have unit stride")


def _num_splits(device: Device, programs: int, num_keys: int, decode: bool) -> int:
    """How many programs share the keys of one row tile, so that together they fill the device.

    programs: of a launch without splits. num_keys: of the longest request.
    """
    per_sm = DECODE_PROGRAMS_PER_SM if decode else PREFILL_PROGRAMS_PER_SM
    target = device.multiprocessors * per_sm
    wanted = -(-target // programs) if decode else target // programs
    return min(wanted, num_keys // MIN_SPLIT_KEYS, MAX_SPLITS)
