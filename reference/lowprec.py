"""The same maths rounded as kernels round: what an honest kernel's error looks like.

A model of the field's fused kernels (FlashAttention, xFormers, Triton): exact products of the
low-precision operands accumulated in float32, a float32 softmax whose unnormalized probabilities
are rounded to the operands' dtype before the second product, the denominator kept in float32,
the output rounded once. It is the yardstick that the error budget is held against.
"""

import torch

from reference.visibility import visible


def attend_lowprec(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    sliding_window: int | None = None,
    alibi_slopes: torch.Tensor | None = None,
    alibi_sqrt: bool = False,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    probabilities: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.attend` with a kernel's roundings; all arguments as there.

    Args:
        query, key, value: of one float dtype.
        probabilities: what these are rounded to, where it is not that dtype.

    Returns:
        output [num_queries, num_heads, head_size] in query's dtype, and lse
        [num_queries, num_heads] float32.
    """
    dtype = query.dtype
    num_queries, num_heads, _ = query.shape
    num_keys, num_kv_heads, _ = key.shape
    group = num_heads // num_kv_heads
    rows = torch.arange(num_keys - num_queries, num_keys, device=query.device)
    columns = torch.arange(num_keys, device=query.device)
    seen = visible(rows, columns, causal=causal, sliding_window=sliding_window)
    unread = ~seen.any(dim=0)[:, None, None]
    k = key.masked_fill(unread, 0.0).float().repeat_interleave(group, dim=1)
    v = value.masked_fill(unread, 0.0).float().repeat_interleave(group, dim=1)

    logits = torch.einsum("qhd,khd->hqk", query.float(), k) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if alibi_slopes is not None:
        distance = (rows[:, None] - columns[None, :]).abs().float()
        distance = distance.sqrt() if alibi_sqrt else distance
        logits = logits - alibi_slopes.float()[:, None, None] * distance
    logits = logits.masked_fill(~seen, float("-inf"))

    top = logits.amax(dim=-1, keepdim=True)
    if sinks is not None:
        sink = sinks.float()[:, None, None]
        top = torch.maximum(top, sink)
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = torch.exp(logits - top)
    total = weights.sum(dim=-1)
    if sinks is not None:
        total = total + torch.exp(sink - top)[..., 0]
    summed = torch.einsum("hqk,khd->qhd", weights.to(probabilities or dtype).float(), v)
    output = summed / total.transpose(0, 1).clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    lse = (total.log() + top[..., 0]).transpose(0, 1)
    return output.to(dtype), lse
