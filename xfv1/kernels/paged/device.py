# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Paged attention over vLLM's KV cache, in Triton: the code that runs on the device.

`_attention_kernel` serves prefill and decode, `_merge_kernel` adds up what it leaves of splits.

For query token t of a request (position ``pos = seq_len - q_len + t``) and key j::

    s[j] = scale * k_scale * (q . k[j])
    s[j] = softcap * tanh(s[j] / softcap)                      # if softcap
    s[j] = s[j] - slope * |pos - j|    (or sqrt(|pos - j|))    # if ALiBi
    s[j] = -inf unless j is visible
    out  = v_scale * sum_j exp(s[j]) v[j] / Z,   Z = sum_j exp(s[j]) + exp(sink)
    lse  = ln Z

Key j is visible iff ``j < seq_len``, ``0 <= pos - j`` (causal), and ``pos - j < window`` (causal)
or ``|pos - j| < window`` (not causal). A row that sees no key gives out = 0, lse = sink or -inf.

How the work is cut:

* The query heads that share a KV head are packed: *row* r of a request is token ``r // group``,
  head ``r % group`` of that KV head. A program owns ``block_m`` consecutive rows of one request and
  one KV head, so any group size, 1 to num_heads, packs without waste.
* Keys are visited in tiles of ``block_n`` positions, aligned to ``block_n``; a tile may span
  several blocks of the cache. Tiles that every row sees in full take a path without any mask.
* The tiles of a program may be cut over ``num_splits`` programs; each leaves its unnormalised sum,
  max and denominator in memory and ``_merge_kernel`` adds them up, in a fixed order.
* For batch invariance all of this is fixed: one tiling, no splits, no path without a mask, and
  the keys in ascending order. A tile that a row does not see leaves its sums as they are, bit for
  bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _find_request(query_start_loc_ptr, tile, num_reqs, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """The request that row tile ``tile`` belongs to.

    Request i owns the tiles from ``query_start_loc[i] * GROUP // BLOCK_M + i``: always enough of
    them, at most one too many, and known without a prefix sum over the tile counts.
    """
    lo = tile * 0
    hi = lo + num_reqs
    while hi - lo > 1:
        mid = (lo + hi) // 2
        first = tl.load(query_start_loc_ptr + mid) * GROUP // BLOCK_M + mid
        lo = tl.where(first <= tile, mid, lo)
        hi = tl.where(first <= tile, hi, mid)
    return lo


@triton.jit
def _load_rows(
    ptr, offsets, dims, live, HEAD_SIZE: tl.constexpr, MASKED: tl.constexpr, PADDED: tl.constexpr
):
    """Rows of K or V: ``ptr[offsets[:, None] + dims]``, 0 where dead or past the head size."""
    ptrs = ptr + offsets[:, None] + dims[None, :]
    if MASKED and PADDED:
        x = tl.load(ptrs, mask=live[:, None] & (dims < HEAD_SIZE)[None, :], other=0.0)
    elif MASKED:
        x = tl.load(ptrs, mask=live[:, None], other=0.0)
    elif PADDED:
        x = tl.load(ptrs, mask=(dims < HEAD_SIZE)[None, :], other=0.0)
    else:
        x = tl.load(ptrs)
    return x


@triton.jit
def _widened(x, dtype: tl.constexpr):
    """Keys or values in the dtype that they are multiplied in. Bytes are float8_e4m3fn.

    Such a byte is one sign, four bits of exponent and three of fraction. Put where float16 has its
    sign, the low four of its five bits of exponent and the high three of its ten of fraction, it is
    a float16 that is 2**8 times too small: float16's exponents count from -15, float8's from -7.
    The product is exact, for subnormal numbers and zeros too. All ones but the sign is NaN.
    """
    if x.dtype == tl.uint8:
        bits = x.to(tl.uint16)
        magnitude = bits & 0x7F
        shifted = tl.where(magnitude == 0x7F, 0x7E00, magnitude << 7)
        half = ((bits & 0x80) << 8 | shifted).to(tl.uint16).to(tl.float16, bitcast=True)
        x = half * 256.0
    return x.to(dtype)


@triton.jit
def _tanh(x, PRECISE: tl.constexpr):
    """tanh for any x; the exponential may overflow to inf, which gives the right 1."""
    y = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * _LOG2E)))
    if PRECISE:
        # The difference above cancels near 0, where its absolute error of 1e-7 is a large relative
        # one. It matters to float32 only.
        xx = x * x
        series = x + x * xx * (-1 / 3 + xx * (2 / 15 + xx * (-17 / 315 + xx * (62 / 2835))))
        y = tl.where(xx < 0.04, series, y)
    return y


@triton.jit
def _finite(x):
    """x, or 0 where x is -inf, so that ``exp2(y - x)`` of an empty row is 0 and never NaN."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _normaliser(m, l, head, head_mask, sinks_ptr, v_scale_ptr):
    """(factor, lse): ``out = acc * factor`` for sums taken relative to 2**m. Adds the sink."""
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=head_mask).to(tl.float32) * _LOG2E
        total_m = tl.maximum(m, sink)
        base = _finite(total_m)
        factor = tl.exp2(m - base)
        total = l * factor + tl.exp2(sink - base)
    else:
        base = m
        factor = 1.0
        total = l
    lse = tl.where(total == 0.0, float("-inf"), (base + tl.log2(total)) * _LN2)
    factor = factor / tl.where(total == 0.0, 1.0, total)
    if v_scale_ptr is not None:
        factor = factor * tl.load(v_scale_ptr).to(tl.float32)
    return factor, lse


@triton.jit
def _block_ids(table_ptr, tile, lo, hi, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The cache block of each key of a tile, one for all if the tile lies in one block."""
    if BLOCK_SIZE % BLOCK_N == 0:
        ids = tl.load(table_ptr + tile // (BLOCK_SIZE // BLOCK_N), tile * BLOCK_N < hi, other=0)
    else:
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        ids = tl.load(table_ptr + n // BLOCK_SIZE, (n >= lo) & (n < hi), other=0)
    return ids


@triton.jit
def _attend(
    tile,
    block,
    q1,
    q2,
    acc1,
    acc2,
    m,
    l,
    pos,
    slope,
    key_ptr,
    value_ptr,
    lo,
    hi,
    window,
    logit_scale,
    softcap,
    K_BLOCK: tl.constexpr,
    K_SLOT: tl.constexpr,
    V_BLOCK: tl.constexpr,
    V_SLOT: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    ALIBI_SQRT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One online-softmax step over the keys ``tile * BLOCK_N + [0, BLOCK_N)``.

    ``block`` is what ``_block_ids`` gave for the tile. q1, acc1 are the head dim's first part,
    q2, acc2 its second, or 0.

    Without MASKED the caller vouches that every row sees every key of the tile. With it, nothing
    outside ``[lo, hi)``, the keys that some row of the program sees, is loaded.
    """
    dtype: tl.constexpr = q1.dtype
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    live = (n >= lo) & (n < hi)
    if BLOCK_SIZE % BLOCK_N == 0:
        slot = tile % (BLOCK_SIZE // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    else:
        slot = n % BLOCK_SIZE
    k_offs = block.to(tl.int64) * K_BLOCK + slot * K_SLOT
    v_offs = block.to(tl.int64) * V_BLOCK + slot * V_SLOT
    d1 = tl.arange(0, D1)
    PADDED1: tl.constexpr = D1 > HEAD_SIZE
    PADDED2: tl.constexpr = D1 + D2 > HEAD_SIZE

    k1 = _widened(_load_rows(key_ptr, k_offs, d1, live, HEAD_SIZE, MASKED, PADDED1), dtype)
    s = tl.dot(q1, tl.trans(k1), input_precision="ieee")
    if D2 > 0:
        d2 = D1 + tl.arange(0, D2)
        k2 = _widened(_load_rows(key_ptr, k_offs, d2, live, HEAD_SIZE, MASKED, PADDED2), dtype)
        s = tl.dot(q2, tl.trans(k2), s, input_precision="ieee")

    # s is in units of log2 from here on, softmax being exp2.
    if HAS_SOFTCAP:
        s = _tanh(s * (logit_scale / softcap), dtype == tl.float32) * (softcap * _LOG2E)
    else:
        s = s * (logit_scale * _LOG2E)
    distance = pos[:, None] - n[None, :]
    if HAS_ALIBI:
        penalty = tl.abs(distance).to(tl.float32)
        if ALIBI_SQRT:
            penalty = tl.sqrt(penalty)
        s = s - (slope * _LOG2E)[:, None] * penalty
    if MASKED:
        visible = live[None, :]
        if CAUSAL:
            visible = visible & (distance >= 0)
        if HAS_WINDOW:
            visible = visible & (distance < window)
            if not CAUSAL:
                visible = visible & (distance > -window)
        s = tl.where(visible, s, float("-inf"))

    new_m = tl.maximum(m, tl.max(s, 1))
    base = new_m
    if MASKED:
        base = _finite(new_m)
    alpha = tl.exp2(m - base)
    p = tl.exp2(s - base[:, None])
    l = l * alpha + tl.sum(p, 1)
    p = p.to(dtype)
    v1 = _widened(_load_rows(value_ptr, v_offs, d1, live, HEAD_SIZE, MASKED, PADDED1), dtype)
    acc1 = tl.dot(p, v1, acc1 * alpha[:, None], input_precision="ieee")
    if D2 > 0:
        v2 = _widened(_load_rows(value_ptr, v_offs, d2, live, HEAD_SIZE, MASKED, PADDED2), dtype)
        acc2 = tl.dot(p, v2, acc2 * alpha[:, None], input_precision="ieee")
    return acc1, acc2, new_m, l


# Arguments that change from step to step must not pick a new specialisation, and with it a
# compilation in the middle of serving.
_VARYING = ["window", "num_reqs", "num_splits", "stride_table", "stride_lt", "stride_lh"]
_UNALIGNED = [
    "block_table_ptr",
    "seq_lens_ptr",
    "query_start_loc_ptr",
    "lse_ptr",
    "alibi_slopes_ptr",
    "sinks_ptr",
    "k_scale_ptr",
    "v_scale_ptr",
]


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def _attention_kernel(
    query_ptr,  # [num_tokens, num_heads, HEAD_SIZE]
    key_cache_ptr,  # [num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE]
    value_cache_ptr,
    out_ptr,  # [num_tokens, num_heads, HEAD_SIZE]
    lse_ptr,  # [num_tokens, num_heads] float32, or None
    acc_ptr,  # [num_tokens, num_heads, num_splits, HEAD_SIZE] float32, used if SPLIT
    max_ptr,  # [num_tokens, num_heads, num_splits] float32, log2 units, used if SPLIT
    sum_ptr,
    block_table_ptr,  # [num_reqs, max_blocks] int32
    seq_lens_ptr,  # [num_reqs] int32
    query_start_loc_ptr,  # [num_reqs + 1] int32
    alibi_slopes_ptr,  # [num_heads] float32, or None
    sinks_ptr,  # [num_heads], or None
    k_scale_ptr,  # [1] float32, or None
    v_scale_ptr,
    scale,
    softcap,
    window,
    num_reqs,
    num_splits,
    stride_table,
    stride_qt,
    stride_qh,
    stride_ot,
    stride_oh,
    stride_lt,
    stride_lh,
    # The cache's strides are constants of a model; as constexpr they tell the compiler exactly how
    # wide it may load, which for a head size such as 40 "divisible by 16 or not" does not.
    K_BLOCK: tl.constexpr,
    K_SLOT: tl.constexpr,
    K_HEAD: tl.constexpr,
    V_BLOCK: tl.constexpr,
    V_SLOT: tl.constexpr,
    V_HEAD: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per KV head
    HEAD_SIZE: tl.constexpr,
    D1: tl.constexpr,  # the head dimension is done as a part of D1 and, if D2 > 0, one of D2
    D2: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILES_PER_REQ: tl.constexpr,  # row tiles per request if the same for all, 0: ragged
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ALIBI_SQRT: tl.constexpr,
    SPLIT: tl.constexpr,
    INVARIANT: tl.constexpr,  # every tile takes the path with a mask, in ascending order
):
    """Attention of one tile of rows over one split of its keys. Grid: (tiles * KV heads, splits).

    The KV head runs fastest: with the usual layouts, programs that run together then read
    neighbouring memory.
    """
    HAS_ALIBI: tl.constexpr = alibi_slopes_ptr is not None
    pid = tl.program_id(0)
    kv_head = pid % NUM_KV_HEADS
    tile = pid // NUM_KV_HEADS
    if TILES_PER_REQ > 0:
        req = tile // TILES_PER_REQ
        q_start = tl.load(query_start_loc_ptr + req)
        row0 = tile % TILES_PER_REQ * BLOCK_M
    else:
        # Last tiles first: under a causal mask they are the long ones.
        tile = tl.num_programs(0) // NUM_KV_HEADS - 1 - tile
        req = _find_request(query_start_loc_ptr, tile, num_reqs, GROUP, BLOCK_M)
        q_start = tl.load(query_start_loc_ptr + req)
        row0 = (tile - q_start * GROUP // BLOCK_M - req) * BLOCK_M
    q_len = tl.load(query_start_loc_ptr + req + 1) - q_start
    num_rows = q_len * GROUP
    if row0 >= num_rows:
        return
    seq_len = tl.load(seq_lens_ptr + req)

    rows = row0 + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    token = (q_start + rows // GROUP).to(tl.int64)
    head = kv_head * GROUP + rows % GROUP
    context = seq_len - q_len
    pos = context + rows // GROUP

    # Some row sees keys of [lo, hi) only; every row sees all of [full_lo, full_hi).
    first_pos = context + row0 // GROUP
    last_pos = context + (tl.minimum(row0 + BLOCK_M, num_rows) - 1) // GROUP
    lo = seq_len * 0
    hi = seq_len
    full_lo = lo
    full_hi = hi
    if CAUSAL:
        hi = tl.minimum(hi, last_pos + 1)
        full_hi = tl.minimum(full_hi, first_pos + 1)
    if HAS_WINDOW:
        lo = tl.maximum(first_pos - window + 1, 0)
        full_lo = tl.maximum(last_pos - window + 1, 0)
        if not CAUSAL:
            hi = tl.minimum(hi, last_pos + window)
            full_hi = tl.minimum(full_hi, first_pos + window)

    # The same in tiles of keys, of which this program takes its split: [begin, end), whose part
    # [full_begin, full_end) needs no mask.
    begin = lo // BLOCK_N
    end = tl.maximum(tl.cdiv(tl.maximum(hi, 0), BLOCK_N), begin)
    split = tl.program_id(1)
    if SPLIT:
        per_split = tl.cdiv(end - begin, num_splits)
        begin = tl.minimum(begin + split * per_split, end)
        end = tl.minimum(begin + per_split, end)
    full_begin = tl.minimum(tl.maximum(tl.cdiv(full_lo, BLOCK_N), begin), end)
    full_end = tl.minimum(tl.maximum(tl.maximum(full_hi, 0) // BLOCK_N, full_begin), end)
    if INVARIANT:
        full_begin = begin
        full_end = begin

    d1 = tl.arange(0, D1)
    q_ptrs = query_ptr + token * stride_qt + head * stride_qh
    q1 = tl.load(
        q_ptrs[:, None] + d1[None, :], row_mask[:, None] & (d1 < HEAD_SIZE)[None, :], other=0.0
    )
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    if D2 > 0:
        d2 = D1 + tl.arange(0, D2)
        q2 = tl.load(
            q_ptrs[:, None] + d2[None, :], row_mask[:, None] & (d2 < HEAD_SIZE)[None, :], other=0.0
        )
        acc2 = tl.zeros([BLOCK_M, D2], tl.float32)
    else:
        q2 = 0
        acc2 = 0
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    slope = m
    if HAS_ALIBI:
        slope = tl.load(alibi_slopes_ptr + head, mask=row_mask, other=0.0).to(tl.float32)
    logit_scale = scale
    if k_scale_ptr is not None:
        logit_scale = scale * tl.load(k_scale_ptr).to(tl.float32)
    table_ptr = block_table_ptr + req.to(tl.int64) * stride_table
    key_ptr = key_cache_ptr + kv_head.to(tl.int64) * K_HEAD
    value_ptr = value_cache_ptr + kv_head.to(tl.int64) * V_HEAD

    # Block ids are read one tile ahead, in registers: the loads of K and V then depend on no load
    # of their own iteration, and the compiler can keep num_stages - 1 tiles of them in flight.
    next_block = _block_ids(table_ptr, full_begin, lo, hi, BLOCK_SIZE, BLOCK_N)
    for tile in range(full_begin, full_end):
        block = next_block
        next_block = _block_ids(table_ptr, tile + 1, lo, hi, BLOCK_SIZE, BLOCK_N)
        acc1, acc2, m, l = _attend(
            tile, block, q1, q2, acc1, acc2, m, l, pos, slope, key_ptr, value_ptr, lo, hi,
            window, logit_scale, softcap, K_BLOCK, K_SLOT, V_BLOCK, V_SLOT, HEAD_SIZE, D1, D2,
            BLOCK_SIZE, BLOCK_N, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, HAS_ALIBI, ALIBI_SQRT, False,
        )  # fmt: skip
    # The edges: the tiles left of the full ones, then those right of them.
    num_full = full_end - full_begin
    tile = tl.where(begin < full_begin, begin, full_end)
    next_block = _block_ids(table_ptr, tile, lo, hi, BLOCK_SIZE, BLOCK_N)
    for i in range(begin, end - num_full):
        block = next_block
        next_tile = tl.where(i + 1 < full_begin, i + 1, i + 1 + num_full)
        next_block = _block_ids(table_ptr, next_tile, lo, hi, BLOCK_SIZE, BLOCK_N)
        acc1, acc2, m, l = _attend(
            tile, block, q1, q2, acc1, acc2, m, l, pos, slope, key_ptr, value_ptr, lo, hi,
            window, logit_scale, softcap, K_BLOCK, K_SLOT, V_BLOCK, V_SLOT, HEAD_SIZE, D1, D2,
            BLOCK_SIZE, BLOCK_N, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, HAS_ALIBI, ALIBI_SQRT, True,
        )  # fmt: skip
        tile = next_tile

    if SPLIT:
        part = (token * (NUM_KV_HEADS * GROUP) + head) * num_splits + split
        tl.store(max_ptr + part, m, row_mask)
        tl.store(sum_ptr + part, l, row_mask)
        # The merge reads no sum of an empty split, so none is written.
        row_mask = row_mask & (m != float("-inf"))
        o_ptrs = acc_ptr + part * HEAD_SIZE
    else:
        factor, lse = _normaliser(m, l, head, row_mask, sinks_ptr, v_scale_ptr)
        if lse_ptr is not None:
            tl.store(lse_ptr + token * stride_lt + head * stride_lh, lse, row_mask)
        acc1 = acc1 * factor[:, None]
        if D2 > 0:
            acc2 = acc2 * factor[:, None]
        o_ptrs = out_ptr + token * stride_ot + head * stride_oh
    dtype: tl.constexpr = o_ptrs.dtype.element_ty
    tl.store(
        o_ptrs[:, None] + d1[None, :],
        acc1.to(dtype),
        row_mask[:, None] & (d1 < HEAD_SIZE)[None, :],
    )
    if D2 > 0:
        tl.store(
            o_ptrs[:, None] + d2[None, :],
            acc2.to(dtype),
            row_mask[:, None] & (d2 < HEAD_SIZE)[None, :],
        )


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def _merge_kernel(
    acc_ptr,  # [num_tokens, num_heads, num_splits, HEAD_SIZE] float32
    max_ptr,  # [num_tokens, num_heads, num_splits] float32, log2 units
    sum_ptr,
    out_ptr,  # [num_tokens, num_heads, HEAD_SIZE]
    lse_ptr,  # [num_tokens, num_heads] float32, or None
    query_start_loc_ptr,  # [num_reqs + 1] int32
    sinks_ptr,  # [num_heads], or None
    v_scale_ptr,  # [1] float32, or None
    num_reqs,
    num_splits,
    stride_ot,
    stride_oh,
    stride_lt,
    stride_lh,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,  # HEAD_SIZE to the next power of two
    BLOCK_S: tl.constexpr,
):
    """Adds up the splits of one token and head. Grid: (num_tokens, num_heads)."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    if token >= tl.load(query_start_loc_ptr + num_reqs):
        return
    token = token.to(tl.int64)
    first = (token * tl.num_programs(1) + head) * num_splits
    d = tl.arange(0, D)
    m = tl.full((), float("-inf"), tl.float32)
    l = tl.full((), 0.0, tl.float32)
    acc = tl.zeros([D], tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        part = first + split
        part_m = tl.load(max_ptr + part, mask=split < num_splits, other=float("-inf"))
        part_l = tl.load(sum_ptr + part, mask=split < num_splits, other=0.0)
        part_acc = tl.load(
            acc_ptr + part[:, None] * HEAD_SIZE + d[None, :],
            mask=(part_m != float("-inf"))[:, None] & (d < HEAD_SIZE)[None, :],
            other=0.0,
        )
        new_m = tl.maximum(m, tl.max(part_m, 0))
        base = _finite(new_m)
        alpha = tl.exp2(m - base)
        weight = tl.exp2(part_m - base)
        l = l * alpha + tl.sum(part_l * weight, 0)
        acc = acc * alpha + tl.sum(part_acc * weight[:, None], 0)
        m = new_m
    factor, lse = _normaliser(m, l, head, None, sinks_ptr, v_scale_ptr)
    if lse_ptr is not None:
        tl.store(lse_ptr + token * stride_lt + head * stride_lh, lse)
    tl.store(
        out_ptr + token * stride_ot + head * stride_oh + d,
        (acc * factor).to(out_ptr.dtype.element_ty),
        d < HEAD_SIZE,
    )
