"""How far from the truth an honest kernel may be: the one place where a tolerance is derived.

The truth is the answer of the float64 reference to the very numbers that the candidate was given.
An honest kernel (`reference.lowprec` is one) differs from it by a handful of roundings, and the
size of each is known:

1. The output is rounded once: u * |o|, with u the unit roundoff of the model's dtype.
2. Each probability p_j is rounded to the operands' dtype before it meets v_j. The errors of
   different keys are independent and uniform within u * p_j, so their sum has a standard
   deviation of u / sqrt(3) * sqrt(sum_j p_j**2 * v_j**2), not the sum's worst case; that is what
   keeps the budget sharp at 32k keys. A kernel may normalize by the rounded or by the exact sum;
   (|v_j| + |o|)**2 <= 2 v_j**2 + 2 o**2 covers both.
3. Each logit is a float32 dot product, then scaled, shifted and put through an exponential:
   errors proportional to u32 * (scale * |q| |k_j| + |s_j|). A softcap may use the hardware's
   tanh in half precision (tanh.approx.f32, as FlashAttention does): 2**-11 of s_j more.
   A logit's error d_j moves the output by p_j * d_j * (v_j - o).
4. A quantized cache may be dequantized to the model's dtype first: u / sqrt(3) relative on each
   element of k and v more.
5. fp16 has probabilities below its smallest normal: an absolute error of half a subnormal step.
   A GPU may flush float32 numbers below float32's smallest normal to zero.
6. Where the layer quantizes the query for the backend, the kernel multiplies in float8, which its
   probabilities are rounded to (2) before they are divided by their exact sum. Those near zero
   are off by at most themselves, and at most half that type's smallest step beside a largest
   weight of 1: in e4m3 2**-10.

The bound is 6 standard deviations: no matrix run here draws the 1e9 elements it takes to see one
beyond. All of it is first-order, and a factor above what honest kernels show (see
tests/meta/test_budget.py, which holds it from both sides).

A small fault in all elements at once hides below what each may be off. It shows in a sum of them,
<error, w>, whose bound (`Budget.along`) follows from the same roundings. With e the error of one
query and head, e = sum_j c_j * (v_j - o), or * v_j, the c_j independent, so that <e, w> has the
variance sum_j var(c_j) * <v_j - o, w>**2; for w one element this is the bound above. But over
1e5 elements independent errors average out, and what they share stays. So what may have one sign
everywhere (3: an exponential's bias, a constant of too few digits) counts at its worst, in a sum
of absolute values; and a cache's dequantization (4), a function of few stored values, as what it
makes of these very keys and values, twice: the scale may be rounded before the product is.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from reference.attention import Attended

SIGMAS = 6.0
UNIFORM = 3.0**-0.5
U32 = 2.0**-24
# The roundings of a float32 dot product, its scaling and an exponential together, in units of u32.
LOGIT_ROUNDINGS = 8.0
TANH_APPROX = 2.0**-11


class Spread(NamedTuple):
    """How far <error, w> of one request may be from 0.

    variance: of the errors that are independent from request to request. drift: a bound on the
    errors that are not.
    """

    variance: float
    drift: float


@dataclass(frozen=True)
class Budget:
    """Bounds on |candidate - truth|, and the quantities that they were derived from.

    output: [num_queries, num_heads, head_size] float64. lse: [num_queries, num_heads] float64.
    value: [num_keys, num_kv_heads, head_size] float64, zero where no query sees it.
    noise: [num_heads, num_queries, num_keys], the variance of a probability's error that is
        independent of all others. shift: the same shape, bound on a logit's error.
    """

    output: torch.Tensor
    lse: torch.Tensor
    attended: Attended
    value: torch.Tensor
    noise: torch.Tensor
    shift: torch.Tensor
    dtype: torch.dtype

    def along(self, w: torch.Tensor, dequantized: Iterable[torch.Tensor] = ()) -> Spread:
        """How far <candidate - truth, w> may be from 0.

        Args:
            w: [num_queries, num_heads, head_size] float64.
            dequantized: the outputs of honest kernels that dequantize a part of the cache to the
                model's dtype, each of w's shape.
        """
        p, o = self.attended.probabilities, self.attended.output
        heads = self.value.shape[1], w.shape[1] // self.value.shape[1]
        by_key = torch.einsum("qhgd,khd->hgqk", w.unflatten(1, heads), self.value).flatten(0, 1)
        by_output = (o * w).sum(dim=-1).transpose(0, 1)[..., None]
        # A kernel normalizes by the rounded or by the exact sum: see 2 above.
        probabilities = 2.0 * (self.noise * (by_key.square() + by_output.square())).sum()
        rounded = unit_roundoff(self.dtype) * o.abs() + smallest_step(self.dtype)
        rounding = (UNIFORM * rounded * w).square().sum()
        drift = (p * self.shift * (by_key - by_output).abs()).sum()
        drift += 2.0 * sum(((other - o) * w).sum().abs() for other in dequantized)
        return Spread(float(probabilities + rounding), float(drift))


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the spacing at 1: the largest relative error of rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def smallest_step(dtype: torch.dtype) -> float:
    """The largest error of rounding a number next to zero."""
    flushed = torch.finfo(torch.float32).smallest_normal
    return max(torch.finfo(dtype).smallest_normal * unit_roundoff(dtype), flushed)


def attention_budget(
    attended: Attended,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    dtype: torch.dtype,
    softcap: float | None = None,
    quantized: bool = False,
    operands: torch.dtype | None = None,
) -> Budget:
    """The budget of one request.

    Args:
        attended: the reference's answer.
        query: [num_queries, num_heads, head_size]; key, value: [num_keys, num_kv_heads,
            head_size], as the reference was given them.
        dtype: the model's dtype, in which kernels hold operands and probabilities.
        quantized: whether the cache is fp8.
        operands: the dtype that kernels multiply in, where it is not the model's.
    """
    u = unit_roundoff(dtype)
    held = operands or dtype
    # float32 kernels keep probabilities in float32, with an exponential's few roundings.
    u_p = unit_roundoff(held) if held != torch.float32 else LOGIT_ROUNDINGS * U32
    num_kv_heads, head_size = key.shape[1:]
    group = query.shape[1] // num_kv_heads
    p = attended.probabilities
    seen = torch.isfinite(attended.logits)
    used = seen.any(dim=1).any(dim=0)[:, None, None]
    k = key.double().masked_fill(~used, 0.0)
    v = value.double().masked_fill(~used, 0.0)

    norms = torch.einsum(
        "qh,kh->hqk",
        query.double().norm(dim=-1),
        k.norm(dim=-1).repeat_interleave(group, dim=1),
    )
    logits = attended.logits.masked_fill(~seen, 0.0).abs()
    logit_error = LOGIT_ROUNDINGS * U32 * (scale * norms + logits)
    # An exponential's own error may be a bias too, which is a logit's.
    shift = logit_error + LOGIT_ROUNDINGS * U32
    if softcap is not None and dtype != torch.float32:
        logit_error = logit_error + UNIFORM * TANH_APPROX * logits
        shift += TANH_APPROX * logits
    if quantized:
        # Independent over head_size elements; a planted query is no larger than three of them.
        logit_error = logit_error + UNIFORM * u * (3.0 / head_size) ** 0.5 * scale * norms

    subnormal = smallest_step(dtype)
    noise = p.square() * (UNIFORM * u_p) ** 2 + (UNIFORM * subnormal) ** 2 * seen
    weight = p.square() * ((UNIFORM * u_p) ** 2 + logit_error.square())
    if held != dtype:
        # A sink's weight, which has no key, may be the largest.
        rest = 1.0 - p.sum(dim=-1, keepdim=True)
        largest_weight = torch.maximum(p.amax(dim=-1, keepdim=True), rest)
        lost = torch.minimum(p, smallest_step(held) * largest_weight).square()
        noise += lost
        weight += lost
    if quantized:
        weight += p.square() * (UNIFORM * u) ** 2
    o = attended.output
    grouped = weight.unflatten(0, (num_kv_heads, group))
    spread = torch.einsum("hgqk,khd->qhgd", grouped, v.square()).flatten(1, 2)
    variance = 2.0 * (spread + weight.sum(dim=-1).transpose(0, 1)[..., None] * o.square())

    largest = v.abs().amax(dim=0).repeat_interleave(group, dim=0)
    count = seen.sum(dim=-1).transpose(0, 1).double()
    floor = SIGMAS * subnormal * count.sqrt()[..., None] * (1.0 + largest[None])
    output = SIGMAS * variance.sqrt() + 1.01 * u * o.abs() + floor

    lse_error = SIGMAS * (p * logit_error).sum(dim=-1).transpose(0, 1)
    finite = attended.lse.masked_fill(attended.lse == float("-inf"), 0.0)
    lse = lse_error + 2 * LOGIT_ROUNDINGS * U32 * (1.0 + finite.abs())
    return Budget(output, lse, attended, v, noise, shift, dtype)
