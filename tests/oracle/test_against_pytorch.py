"""The reference beside PyTorch's own attention, both in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import AuxRequest, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from reference import attend, visible

MAX_HEAD_SIZE, MAX_KEYS = 16, 48
# The largest |scale * q.k| and |v| that standard normal draws of these sizes come to, with room.
MAX_LOGIT, MAX_VALUE = 16.0, 6.0
# A dot product rounds once per term, and an exponential turns a logit's absolute error into its
# weight's relative one; numerator and denominator each have it, and each sums over the keys.
ROUNDINGS = 2 * (MAX_HEAD_SIZE * MAX_LOGIT + MAX_KEYS)
# Both sides round, each to half an ulp.
TOLERANCE = 2 * ROUNDINGS * MAX_VALUE * torch.finfo(torch.float64).eps / 2

# (num_queries, num_keys): a decode, a prompt, a chunk with context, one key.
LENGTHS = [(1, 37), (16, 16), (7, 40), (1, 1), (33, 48)]
HEADS = [(4, 4), (4, 2), (6, 1)]
# FlexAttention takes its time eagerly: each of both once, not all pairs.
PAIRS = list(zip(LENGTHS, [HEADS[at % len(HEADS)] for at in range(len(LENGTHS))], strict=True))

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
Draw = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
ScoreMod = Callable[..., torch.Tensor]


def _draw(lengths: tuple[int, int], heads: tuple[int, int], head_size: int = MAX_HEAD_SIZE) -> Draw:
    """query [q, num_heads, head_size], key and value [k, num_kv_heads, head_size], float64."""
    rng = torch.Generator().manual_seed(1000 * sum(lengths) + 10 * sum(heads) + head_size)
    shapes = [(lengths[0], heads[0]), (lengths[1], heads[1]), (lengths[1], heads[1])]
    query, key, value = (
        torch.randn(*shape, head_size, generator=rng, dtype=torch.float64) for shape in shapes
    )
    return query, key, value


def _mask(lengths: tuple[int, int], causal: bool, window: int | None) -> torch.Tensor:
    """[q, k] bool, written out pair by pair."""
    queries, keys = lengths
    seen = torch.zeros(lengths, dtype=torch.bool)
    for row in range(queries):
        for column in range(keys):
            distance = keys - queries + row - column
            inside = window is None or abs(distance) < window
            seen[row, column] = inside and (distance >= 0 or not causal)
    return seen


def _batched(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """[tokens, heads, head_size] as PyTorch's [1, heads, tokens, head_size]."""
    return [tensor.transpose(0, 1)[None] for tensor in tensors]


def _close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(actual, wanted, rtol=0, atol=TOLERANCE)


def _flex(draw: Draw, score_mod: ScoreMod, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """output [q, num_heads, head_size] and lse [q, num_heads]."""
    query, key, value = _batched(*draw)
    output, aux = flex_attention(
        query,
        key,
        value,
        score_mod=score_mod,
        scale=scale,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None
    return output[0].transpose(0, 1), aux.lse[0].transpose(0, 1)


def _score_mod(
    lengths: tuple[int, int],
    causal: bool = True,
    sliding_window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    alibi_sqrt: bool = False,
) -> ScoreMod:
    """The reference's semantics as FlexAttention has them said: per score."""
    context = lengths[1] - lengths[0]

    def score_mod(score: torch.Tensor, *index: torch.Tensor) -> torch.Tensor:
        _, head, row, column = index
        distance = row + context - column
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if alibi_slopes is not None:
            far = distance.abs().double()
            score = score - alibi_slopes[head] * (far.sqrt() if alibi_sqrt else far)
        if causal:
            score = torch.where(distance >= 0, score, -math.inf)
        if sliding_window is not None:
            score = torch.where(distance.abs() < sliding_window, score, -math.inf)
        return score

    return score_mod


def test_the_tolerance_covers_the_draws() -> None:
    """What TOLERANCE was derived from holds for every draw here."""
    for lengths in LENGTHS:
        for heads in HEADS:
            query, key, value = _draw(lengths, heads)
            assert lengths[1] <= MAX_KEYS
            assert float(value.abs().max()) < MAX_VALUE
            assert float(query.norm(dim=-1).max() * key.norm(dim=-1).max()) < MAX_LOGIT / 0.25


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 5, 200])
def test_visibility_is_what_is_written_out(
    lengths: tuple[int, int], causal: bool, window: int | None
) -> None:
    queries, keys = lengths
    seen = visible(
        torch.arange(keys - queries, keys), torch.arange(keys), causal=causal, sliding_window=window
    )
    assert torch.equal(seen, _mask(lengths, causal, window))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_output_is_scaled_dot_product_attentions(
    lengths: tuple[int, int], heads: tuple[int, int], causal: bool, window: int | None
) -> None:
    draw = _draw(lengths, heads)
    query, key, value = _batched(*draw)
    mask = _mask(lengths, causal, window)
    wanted = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.25, enable_gqa=True
    )
    result = attend(*draw, scale=0.25, causal=causal, sliding_window=window)
    _close(result.output, wanted[0].transpose(0, 1))


def test_a_prompt_is_scaled_dot_product_attentions_causal() -> None:
    """PyTorch's is_causal aligns to the first key, which is the same where there is no context."""
    draw = _draw((16, 16), (4, 4))
    query, key, value = _batched(*draw)
    wanted = scaled_dot_product_attention(query, key, value, is_causal=True)
    _close(attend(*draw, scale=MAX_HEAD_SIZE**-0.5).output, wanted[0].transpose(0, 1))


@pytest.mark.parametrize("head_size", [1, 3, 8])
def test_any_head_size_is_scaled_dot_product_attentions(head_size: int) -> None:
    draw = _draw((7, 40), (4, 2), head_size)
    query, key, value = _batched(*draw)
    mask = _mask((7, 40), True, None)
    wanted = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    _close(attend(*draw, scale=head_size**-0.5).output, wanted[0].transpose(0, 1))


def _slopes(num_heads: int) -> torch.Tensor:
    return 2.0 ** -torch.arange(1, num_heads + 1, dtype=torch.float64)


FLEX: dict[str, dict[str, Any]] = {
    "causal": {},
    "noncausal": {"causal": False},
    "sliding_window": {"sliding_window": 5},
    "noncausal_sliding_window": {"causal": False, "sliding_window": 5},
    "softcap": {"softcap": 0.7},
    "alibi": {"alibi": True},
    "alibi_sqrt": {"alibi": True, "alibi_sqrt": True},
    "noncausal_alibi": {"causal": False, "alibi": True},
    "softcap_alibi_sliding_window": {"softcap": 0.7, "alibi": True, "sliding_window": 5},
}


def _semantics(feature: str, num_heads: int) -> dict[str, Any]:
    fields = dict(FLEX[feature])
    if fields.pop("alibi", False):
        fields["alibi_slopes"] = _slopes(num_heads)
    return fields


@pytest.mark.parametrize(("lengths", "heads"), PAIRS)
@pytest.mark.parametrize("feature", FLEX)
def test_output_and_lse_are_flex_attentions(
    lengths: tuple[int, int], heads: tuple[int, int], feature: str
) -> None:
    draw, how = _draw(lengths, heads), _semantics(feature, heads[0])
    output, lse = _flex(draw, _score_mod(lengths, **how), 0.25)
    result = attend(*draw, scale=0.25, **how)
    _close(result.output, output)
    _close(result.lse, lse)


@pytest.mark.parametrize("lengths", LENGTHS[:3])
@pytest.mark.parametrize("feature", FLEX)
def test_a_sink_is_one_more_key_without_a_value(lengths: tuple[int, int], feature: str) -> None:
    """FlexAttention over the keys and one more, whose score is the sink and whose value is 0."""
    heads = (4, 2)
    query, key, value = _draw(lengths, heads)
    how = _semantics(feature, heads[0])
    sinks = torch.tensor([-2.0, 0.0, 1.5, 4.0], dtype=torch.float64)
    inner, last = _score_mod(lengths, **how), lengths[1]

    def score_mod(score: torch.Tensor, *index: torch.Tensor) -> torch.Tensor:
        _, head, _, column = index
        return torch.where(column == last, sinks[head], inner(score, *index))

    empty = torch.zeros(1, heads[1], MAX_HEAD_SIZE, dtype=torch.float64)
    longer = (query, torch.cat([key, empty]), torch.cat([value, empty]))
    output, lse = _flex(longer, score_mod, 0.25)
    result = attend(query, key, value, scale=0.25, sinks=sinks, **how)
    _close(result.output, output)
    _close(result.lse, lse)


@pytest.mark.parametrize("feature", FLEX)
def test_a_sink_gates_what_attention_without_it_gives(feature: str) -> None:
    """With lse of the keys alone: o_sink = o / (1 + e^(sink - lse)), ln(e^lse + e^sink) its lse."""
    lengths, heads = (7, 40), (4, 2)
    draw, how = _draw(lengths, heads), _semantics(feature, heads[0])
    sinks = torch.tensor([-2.0, 0.0, 1.5, 4.0], dtype=torch.float64)
    output, lse = _flex(draw, _score_mod(lengths, **how), 0.25)
    result = attend(*draw, scale=0.25, sinks=sinks, **how)
    _close(result.output, output * torch.sigmoid(lse - sinks)[..., None])
    _close(result.lse, torch.logaddexp(lse, sinks.expand_as(lse)))
