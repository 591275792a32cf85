"""Attention small enough to do by hand; the arithmetic stands beside each example.

Notation: s are the logits, p the probabilities, o the output; all scales are 1 unless said.
"""

import math
from typing import Any

import pytest
import torch

from reference import Attended, attend, gather_kv, paged_attention, visible, write_kv

# The examples are a handful of float64 operations on numbers below 100: an ulp each.
ROUNDING = 16 * torch.finfo(torch.float64).eps * 100
LN2, LN3 = math.log(2.0), math.log(3.0)
NAN, INF = float("nan"), float("inf")


def _column(*numbers: float) -> torch.Tensor:
    """[len(numbers), 1 head, head_size 1]."""
    return torch.tensor(numbers, dtype=torch.float64)[:, None, None]


def _per_head(*numbers: float) -> torch.Tensor:
    """[num_heads]: slopes or sinks."""
    return torch.tensor(numbers, dtype=torch.float64)


def _attend(query: list[float], key: list[float], value: list[float], **how: Any) -> Attended:
    return attend(_column(*query), _column(*key), _column(*value), **{"scale": 1.0, **how})


def _equal(actual: torch.Tensor, wanted: list[float]) -> None:
    expected = torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(actual.flatten(), expected, rtol=0, atol=ROUNDING)


# One request.


def test_one_key_gets_all_the_weight() -> None:
    """s = 2 * 3 = 6, p = e^6 / e^6 = 1, o = 1 * 7, lse = ln e^6 = 6."""
    result = _attend([2], [3], [7])
    _equal(result.output, [7])
    _equal(result.lse, [6])
    _equal(result.probabilities, [1])
    _equal(result.logits, [6])


def test_two_keys_share_by_their_exponentials() -> None:
    """s = [0, ln 3], e^s = [1, 3], p = [1/4, 3/4], o = 8 / 4 + 3 * 4 / 4 = 5, lse = ln 4."""
    result = _attend([1], [0, LN3], [8, 4])
    _equal(result.probabilities, [1 / 4, 3 / 4])
    _equal(result.output, [5])
    _equal(result.lse, [math.log(4)])


def test_scale_multiplies_the_dot_product() -> None:
    """q.k = [0, 2 ln 3], scale 1/2: s = [0, ln 3] as above."""
    _equal(_attend([2], [0, LN3], [8, 4], scale=0.5).output, [5])


def test_scale_of_zero_takes_the_mean() -> None:
    """s = [0, 0, 0], p = 1/3 each, o = (1 + 2 + 6) / 3 = 3, lse = ln 3."""
    result = _attend([9], [1, 2, 3], [1, 2, 6], scale=0.0)
    _equal(result.output, [3])
    _equal(result.lse, [LN3])


def test_a_query_does_not_see_the_future() -> None:
    """All s = 0: query 0 sees v = 2, query 1 the mean (2 + 6) / 2, query 2 (2 + 6 + 13) / 3."""
    result = _attend([0, 0, 0], [1, 1, 1], [2, 6, 13])
    _equal(result.output, [2, 4, 7])
    _equal(result.lse, [0, LN2, LN3])


def test_queries_are_the_last_of_their_sequence() -> None:
    """Two queries of four keys sit at positions 2 and 3: means of 3 and of 4 values."""
    _equal(_attend([0, 0], [1, 1, 1, 1], [2, 6, 13, 3]).output, [7, 6])


def test_without_causality_every_query_sees_every_key() -> None:
    """All s = 0: (2 + 6 + 13) / 3 = 7 for each."""
    _equal(_attend([0, 0, 0], [1, 1, 1], [2, 6, 13], causal=False).output, [7, 7, 7])


# Windows: W keys, the query's own among them.


def test_a_window_of_one_is_the_querys_own_key() -> None:
    _equal(_attend([5, 5, 5], [1, 2, 3], [2, 6, 13], sliding_window=1).output, [2, 6, 13])


@pytest.mark.parametrize(("length", "mean"), [(2, 1.5), (3, 2.0), (4, 3.0)])
def test_a_window_of_three_holds_three_keys(length: int, mean: float) -> None:
    """Values 1, 2, 3, 4, all s = 0, W = 3, the last query: of W - 1 keys it sees all, (1 + 2) / 2;
    of W all, (1 + 2 + 3) / 3; of W + 1 it loses the first, (2 + 3 + 4) / 3."""
    values = [float(n + 1) for n in range(length)]
    result = _attend([0], [1] * length, values, sliding_window=3)
    _equal(result.output, [mean])
    _equal(result.lse, [math.log(min(length, 3))])


def test_a_window_moves_with_its_query() -> None:
    """W = 2, values 1, 3, 7, 9: [1], [1, 3], [3, 7], [7, 9]."""
    _equal(_attend([0] * 4, [1] * 4, [1, 3, 7, 9], sliding_window=2).output, [1, 2, 5, 8])


def test_a_window_reaches_both_ways_without_causality() -> None:
    """W = 2, |i - j| < 2, values 0, 3, 6, 12: [0, 3], [0, 3, 6], [3, 6, 12], [6, 12]."""
    result = _attend([0] * 4, [1] * 4, [0, 3, 6, 12], causal=False, sliding_window=2)
    _equal(result.output, [1.5, 3, 7, 9])


@pytest.mark.parametrize(
    ("causal", "window", "rows"),
    [
        (True, None, ["1110", "1111"]),
        (True, 1, ["0010", "0001"]),
        (True, 2, ["0110", "0011"]),
        (True, 3, ["1110", "0111"]),
        (True, 4, ["1110", "1111"]),
        (False, None, ["1111", "1111"]),
        (False, 1, ["0010", "0001"]),
        (False, 2, ["0111", "0011"]),
        (False, 3, ["1111", "0111"]),
    ],
)
def test_visibility_of_two_queries_at_the_end_of_four_keys(
    causal: bool, window: int | None, rows: list[str]
) -> None:
    """Positions 2 and 3; a 1 for each key seen."""
    seen = visible(torch.tensor([2, 3]), torch.arange(4), causal=causal, sliding_window=window)
    assert ["".join(str(int(key)) for key in row) for row in seen] == rows


# What is done to logits.


def test_softcap_bends_a_logit_before_the_softmax() -> None:
    """c = 2, s = [0, 2 atanh(ln(3) / 2)]: 2 tanh(atanh(ln(3) / 2)) = ln 3; p = [1/4, 3/4]."""
    result = _attend([1], [0, 2 * math.atanh(LN3 / 2)], [8, 4], softcap=2.0)
    _equal(result.logits, [0, LN3])
    _equal(result.output, [5])


def test_softcap_bounds_a_logit() -> None:
    """c = ln 3, s = [0, 100 c]: tanh(100) = 1 in float64, so the capped logit is ln 3."""
    _equal(_attend([100], [0, LN3], [8, 4], softcap=LN3).output, [5])


def test_alibi_takes_slope_times_distance() -> None:
    """Distances [2, 1, 0], slope ln 2: e^s = [1/4, 1/2, 1], o = (7/4 + 14/2 + 21) / (7/4) = 17."""
    result = _attend([0], [0, 0, 0], [7, 14, 21], alibi_slopes=_per_head(LN2))
    _equal(result.logits, [-2 * LN2, -LN2, 0])
    _equal(result.output, [17])
    _equal(result.lse, [math.log(7 / 4)])


def test_alibi_sqrt_takes_slope_times_root_of_distance() -> None:
    """Distances [4, 3, 2, 1, 0], roots [2, sqrt(3), sqrt(2), 1, 0]."""
    slopes = _per_head(LN2)
    result = _attend([0], [0] * 5, [1] * 5, alibi_slopes=slopes, alibi_sqrt=True)
    _equal(result.logits, [-2 * LN2, -(3**0.5) * LN2, -(2**0.5) * LN2, -LN2, 0])


def test_alibi_counts_the_context() -> None:
    """Two queries of three keys: distances [1, 0, hidden] and [2, 1, 0]."""
    result = _attend([0, 0], [0] * 3, [1] * 3, alibi_slopes=_per_head(1.0))
    _equal(result.logits, [-1, 0, -INF, -2, -1, 0])


def test_alibi_counts_forwards_too_without_causality() -> None:
    """Distances |i - j| of two queries of two keys: [0, 1], [1, 0]."""
    slopes = _per_head(1.0)
    result = _attend([0, 0], [0, 0], [1, 1], causal=False, alibi_slopes=slopes)
    _equal(result.logits, [0, -1, -1, 0])


def test_softcap_comes_before_alibi() -> None:
    """s = [100, 0], c = ln 3: capped [ln 3, 0], then ALiBi of slope ln 3: [0, 0]; o = the mean.

    The other way round the first would be c tanh((100 - ln 3) / c) = ln 3, and o = 3.5.
    """
    slopes = _per_head(LN3)
    result = _attend([1], [100, 0], [2, 8], softcap=LN3, alibi_slopes=slopes)
    _equal(result.logits, [0, 0])
    _equal(result.output, [5])


def test_a_sink_is_in_the_denominator_only() -> None:
    """e^s = [1], sink ln 3: p = 1 / (1 + 3), o = 8 / 4 = 2, lse = ln 4."""
    result = _attend([0], [1], [8], sinks=_per_head(LN3))
    _equal(result.probabilities, [1 / 4])
    _equal(result.output, [2])
    _equal(result.lse, [math.log(4)])


def test_a_sink_is_neither_scaled_nor_capped() -> None:
    """Scale 0 and c = ln 2 leave s = [0]; a sink of ln 3, above the cap, still weighs 3: o = 2."""
    sinks = _per_head(LN3)
    _equal(_attend([5], [5], [8], scale=0.0, softcap=LN2, sinks=sinks).output, [2])


def test_each_head_has_its_own_slope_and_sink() -> None:
    """Head 0: e^s = [1/2, 1], sink e^0 = 1: o = (4 / 2 + 8) / (5/2) = 4, lse = ln(5/2).
    Head 1: e^s = [1/4, 1], sink e^(ln 3) = 3: o = (4 / 4 + 8) / (17/4) = 36/17, lse = ln(17/4)."""
    result = attend(
        torch.zeros(1, 2, 1),
        torch.zeros(2, 1, 1),
        _column(4, 8),
        scale=1.0,
        alibi_slopes=_per_head(LN2, 2 * LN2),
        sinks=_per_head(0.0, LN3),
    )
    _equal(result.output, [4, 36 / 17])
    _equal(result.lse, [math.log(5 / 2), math.log(17 / 4)])


def test_consecutive_query_heads_share_a_kv_head() -> None:
    """4 query heads on 2 KV heads: 0 and 1 read KV head 0, 2 and 3 read KV head 1."""
    value = torch.tensor([[[10.0], [20.0]]])
    result = attend(torch.ones(1, 4, 1), torch.ones(1, 2, 1), value, scale=1.0)
    _equal(result.output, [10, 10, 20, 20])


def test_a_query_head_meets_its_own_kv_heads_keys() -> None:
    """Keys [0, ln 3] of KV head 0, [ln 3, 0] of KV head 1; queries 1, 0 | 1, 0; values 0 and 4.

    Weights of the second key: 3/4, 1/2 | 1/4, 1/2."""
    query = torch.tensor([[[1.0], [0.0], [1.0], [0.0]]], dtype=torch.float64)
    key = torch.tensor([[[0.0], [LN3]], [[LN3], [0.0]]], dtype=torch.float64)
    value = torch.tensor([[[0.0], [0.0]], [[4.0], [4.0]]])
    _equal(attend(query, key, value, scale=1.0).output, [3, 2, 1, 2])


def test_head_size_two_is_a_dot_product_and_two_outputs() -> None:
    """q = (1, 2), k = (0, 0), (ln 3, 0): s = [0, ln 3], p = [1/4, 3/4]; v = (4, 8), (8, 0)."""
    key = torch.tensor([[[0.0, 0.0]], [[LN3, 0.0]]], dtype=torch.float64)
    value = torch.tensor([[[4.0, 8.0]], [[8.0, 0.0]]])
    result = attend(torch.tensor([[[1.0, 2.0]]]), key, value, scale=1.0)
    _equal(result.output, [7, 2])


# Queries that see nothing, keys that nothing sees.


def test_a_query_that_sees_no_key_gives_zeros() -> None:
    """Three queries of one key sit at -2, -1 and 0: the first two see nothing."""
    result = _attend([1, 1, 1], [1], [7])
    _equal(result.output, [0, 0, 7])
    assert result.lse.flatten().tolist() == [-INF, -INF, 1.0]
    _equal(result.probabilities, [0, 0, 1])


def test_a_query_that_sees_only_a_sink_has_its_lse() -> None:
    """lse = ln e^(ln 3) = ln 3, and a sink has no value: o = 0."""
    result = _attend([1, 1], [LN2], [7], sinks=_per_head(LN3))
    _equal(result.output, [0, 2 / 5 * 7])
    _equal(result.lse, [LN3, math.log(5)])


def test_keys_no_query_sees_may_hold_anything() -> None:
    """W = 2, the last query: keys 0 and 1 are before the window; the mean of 4 and 6 is left."""
    result = _attend([0], [NAN, INF, 1, 1], [NAN, -INF, 4, 6], sliding_window=2)
    _equal(result.output, [5])
    assert torch.isfinite(result.lse).all()


def test_very_negative_logits_are_still_a_softmax() -> None:
    """s = [-750, -750 + ln 3]: p = [1/4, 3/4], though e^-750 is 0 in float64."""
    _equal(_attend([1], [-750, -750 + LN3], [8, 4]).output, [5])


# Paged caches. Values are numbered so that an output names the slots that it came from.


def _cache(blocks: list[list[float]]) -> torch.Tensor:
    """[num_blocks, block_size, 1 KV head, head_size 1]."""
    return torch.tensor(blocks, dtype=torch.float64)[..., None, None]


def test_keys_are_gathered_across_a_permuted_block_table() -> None:
    """Blocks of 2, table [2, 0, 1]: five entries are block 2, block 0 and the first of block 1."""
    cache = _cache([[30, 40], [50, NAN], [10, 20]])
    gathered = gather_kv(cache, torch.tensor([2, 0, 1, 99]), 5)
    assert gathered.flatten().tolist() == [10, 20, 30, 40, 50]


def test_a_block_may_stand_twice_in_a_row() -> None:
    cache = _cache([[1, 2], [3, 4]])
    assert gather_kv(cache, torch.tensor([1, 1, 0]), 6).flatten().tolist() == [3, 4, 3, 4, 1, 2]


@pytest.mark.parametrize(
    ("length", "mean"), [(1, 10.0), (2, 15.0), (3, 20.0), (4, 25.0), (5, 30.0)]
)
def test_a_length_ends_on_either_side_of_a_page_boundary(length: int, mean: float) -> None:
    """All s = 0, so o is the mean of the first ``length`` of 10, 20, 30, 40, 50; NaN follows, in
    the block, in the other blocks, and the table's tail names no block at all."""
    numbers = [10.0, 20.0, 30.0, 40.0, 50.0]
    kept = [*numbers[:length], *[NAN] * (6 - length)]
    cache = _cache([[NAN, NAN], kept[2:4], kept[4:6], kept[0:2]])
    output, lse = paged_attention(
        torch.zeros(1, 1, 1),
        cache,
        cache,
        torch.tensor([[3, 1, 2, 1 << 20, -1]]),
        torch.tensor([length]),
        torch.tensor([0, 1]),
        scale=1.0,
    )
    _equal(output, [mean])
    _equal(lse, [math.log(length)])


def test_a_ragged_batch_is_its_requests_one_by_one() -> None:
    """All s = 0. Request 0: one query of two keys, (2 + 4) / 2. Request 1: no query. Request 2: two
    queries of two keys, 6 and (6 + 8) / 2. The fourth row is padding."""
    cache = _cache([[2, 4], [6, 8]])
    output, lse = paged_attention(
        torch.zeros(4, 1, 1),
        cache,
        cache,
        torch.tensor([[0], [77], [1]]),
        torch.tensor([2, 5, 2]),
        torch.tensor([0, 1, 1, 3]),
        scale=1.0,
    )
    _equal(output, [3, 6, 7, 0])
    _equal(lse, [LN2, 0, LN2, -INF])


def test_scales_multiply_what_the_cache_holds() -> None:
    """k_scale 1/2: s = [0, 2 ln 3 / 2], p = [1/4, 3/4]; v_scale 10: o = 10 (8 / 4 + 3 * 4 / 4)."""
    output, lse = paged_attention(
        torch.ones(1, 1, 1).double(),
        _cache([[0, 2 * LN3]]),
        _cache([[8, 4]]),
        torch.tensor([[0]]),
        torch.tensor([2]),
        torch.tensor([0, 1]),
        scale=1.0,
        k_scale=0.5,
        v_scale=10.0,
    )
    _equal(output, [50])
    _equal(lse, [math.log(4)])


def test_nan_before_a_window_stays_in_the_cache() -> None:
    """Blocks of 1, W = 2, length 4: the table's first two entries name a block of NaN."""
    output, _ = paged_attention(
        torch.zeros(1, 1, 1),
        _cache([[NAN], [4], [6]]),
        _cache([[NAN], [4], [6]]),
        torch.tensor([[0, 0, 1, 2]]),
        torch.tensor([4]),
        torch.tensor([0, 1]),
        scale=1.0,
        sliding_window=2,
    )
    _equal(output, [5])


# Writes.


def test_a_slot_is_block_times_block_size_plus_offset() -> None:
    """Blocks of 2: slot 3 is block 1 offset 1, slot 4 is block 2 offset 0."""
    key_cache, value_cache = _cache([[0, 0], [0, 0], [0, 0]]), _cache([[0, 0], [0, 0], [0, 0]])
    write_kv(_column(5, 7), _column(6, 8), key_cache, value_cache, torch.tensor([3, 4]))
    assert key_cache.flatten().tolist() == [0, 0, 0, 5, 7, 0]
    assert value_cache.flatten().tolist() == [0, 0, 0, 6, 8, 0]


def test_a_slot_of_minus_one_writes_nothing() -> None:
    """Not even the cache's last slot, which -1 would index; rows past the slots are padding."""
    key_cache, value_cache = _cache([[0, 0]]), _cache([[0, 0]])
    write_kv(_column(5, 7, 9), _column(6, 8, 9), key_cache, value_cache, torch.tensor([-1, 0]))
    assert key_cache.flatten().tolist() == [7, 0]
    assert value_cache.flatten().tolist() == [8, 0]


def test_a_write_goes_through_strides() -> None:
    """One storage of [2 blocks, 1 KV head, 2 slots, key and value]: slot 1 is elements 2 and 3."""
    storage = torch.zeros(8)
    key_cache, value_cache = storage.view(2, 1, 2, 2).transpose(1, 2).split(1, dim=-1)
    write_kv(_column(5), _column(6), key_cache, value_cache, torch.tensor([1]))
    assert storage.tolist() == [0, 0, 5, 6, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("dtype", "number", "stored"),
    [
        # x / scale = 6 / 0.5 = 12 = 1.5 * 2**3, exact in both formats.
        (torch.float8_e4m3fn, 6.0, 12.0),
        (torch.float8_e5m2, 6.0, 12.0),
        # 8.5 / 0.5 = 17, between 16 and 18 of e4m3 (3 bits): to even, 16. e5m2 (2 bits) has 16, 20.
        (torch.float8_e4m3fn, 8.5, 16.0),
        (torch.float8_e5m2, 8.5, 16.0),
        # 9.5 / 0.5 = 19, between 18 and 20: to even, 20. Nearer to 20 than 16 in e5m2.
        (torch.float8_e4m3fn, 9.5, 20.0),
        (torch.float8_e5m2, 9.5, 20.0),
        # Past the largest finite, 448 = 1.75 * 2**8 and 57344 = 1.75 * 2**15: not NaN, not inf.
        (torch.float8_e4m3fn, 1e5, 448.0),
        (torch.float8_e4m3fn, -1e5, -448.0),
        (torch.float8_e5m2, 1e5, 57344.0),
        (torch.float8_e5m2, -1e5, -57344.0),
    ],
)
def test_a_float8_cache_holds_the_nearest_number(
    dtype: torch.dtype, number: float, stored: float
) -> None:
    """Of x / scale, with scale 1/2, clamped to the largest finite number."""
    key_cache, value_cache = torch.zeros(2, 1, 1, 1, 1).to(dtype)
    write_kv(
        _column(number),
        _column(-number),
        key_cache,
        value_cache,
        torch.tensor([0]),
        k_scale=0.5,
        v_scale=0.5,
    )
    assert key_cache.float().item() == stored
    assert value_cache.float().item() == -stored


def test_key_and_value_have_scales_of_their_own() -> None:
    """8 / 0.5 = 16 and 8 / 4 = 2; gathered by the same scales both are 8 again."""
    key_cache, value_cache = torch.zeros(2, 1, 1, 1, 1).to(torch.float8_e4m3fn)
    slots = torch.tensor([0])
    write_kv(_column(8), _column(8), key_cache, value_cache, slots, k_scale=0.5, v_scale=4.0)
    assert (key_cache.float().item(), value_cache.float().item()) == (16.0, 2.0)
    assert gather_kv(key_cache, slots, 1, 0.5).item() == 8.0
    assert gather_kv(value_cache, slots, 1, 4.0).item() == 8.0


def test_only_a_float8_cache_is_scaled() -> None:
    """bf16 keeps 8 bits: 257 = 256 + 1 is halfway between 256 and 258, to even 256."""
    key_cache, value_cache = torch.zeros(2, 1, 1, 1, 1).bfloat16()
    slots = torch.tensor([0])
    write_kv(_column(257), _column(3), key_cache, value_cache, slots, k_scale=0.5, v_scale=0.5)
    assert (key_cache.item(), value_cache.item()) == (256.0, 3.0)
