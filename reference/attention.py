"""Attention of one request whose keys are in order, in float64."""

from typing import NamedTuple

import torch

from reference.visibility import visible


class Attended(NamedTuple):
    """What one request's attention came to.

    output: [num_queries, num_heads, head_size] float64.
    lse: [num_queries, num_heads] float64, natural log of the softmax denominator, sink included.
    probabilities: [num_heads, num_queries, num_keys] float64; rows sum to 1, or to less by the
        sink's share, or to 0 where a query sees no key.
    logits: [num_heads, num_queries, num_keys] float64, -inf where a key is hidden.
    """

    output: torch.Tensor
    lse: torch.Tensor
    probabilities: torch.Tensor
    logits: torch.Tensor


def attend(
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
) -> Attended:
    """One request's attention, ``softmax(mask(softcap(scale * q.k) + alibi)) @ v``.

    The queries are the last ones of the sequence: query t of q sits at position
    ``num_keys - num_queries + t``. Order of operations, as in vLLM: scale, softcap
    ``c * tanh(s / c)``, ALiBi ``-slope * |i - j|`` (``-slope * sqrt(|i - j|)`` in the sqrt form),
    mask, softmax. A sink is one more logit in the denominator and has no value. A query that
    sees no key gives zeros and an LSE of -inf (of the sink, where there is one).

    Args:
        query: [num_queries, num_heads, head_size], any float dtype.
        key, value: [num_keys, num_kv_heads, head_size]; num_heads is a multiple of num_kv_heads
            and query head h reads KV head ``h // (num_heads // num_kv_heads)``.
        scale: softmax scale, multiplies the dot products.
        causal, sliding_window: see `reference.visibility.visible`.
        alibi_slopes: [num_heads].
        softcap: logits softcap, above 0; None for none.
        sinks: [num_heads] sink logits.

    Raises:
        ValueError: naming the argument, where shapes do not fit or softcap is not above 0.
    """
    num_queries, num_heads, head_size = query.shape
    num_keys, num_kv_heads, _ = key.shape
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads={num_heads}: expected a multiple of num_kv_heads={num_kv_heads}"
        )
    if key.shape[-1] != head_size or value.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"key of shape {tuple(key.shape)} and value of shape {tuple(value.shape)} do not fit"
            f" query of shape {tuple(query.shape)}"
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap}: expected None or above 0")
    for name, per_head in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if per_head is not None and per_head.shape != (num_heads,):
            raise ValueError(f"{name} of shape {tuple(per_head.shape)}: expected ({num_heads},)")

    query_positions = torch.arange(num_keys - num_queries, num_keys, device=query.device)
    key_positions = torch.arange(num_keys, device=query.device)
    seen = visible(query_positions, key_positions, causal=causal, sliding_window=sliding_window)
    # A key no query sees is not read: what lies there may be anything, NaN too.
    unread = ~seen.any(dim=0)[:, None, None]
    k = key.double().masked_fill(unread, 0.0)
    v = value.double().masked_fill(unread, 0.0)
    q = query.double().unflatten(1, (num_kv_heads, num_heads // num_kv_heads))

    logits = scale * torch.einsum("qhgd,khd->hgqk", q, k).flatten(0, 1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if alibi_slopes is not None:
        distance = (query_positions[:, None] - key_positions[None, :]).abs().double()
        if alibi_sqrt:
            distance = distance.sqrt()
        logits = logits - alibi_slopes.double()[:, None, None] * distance
    logits = logits.masked_fill(~seen, float("-inf"))

    lse = torch.logsumexp(logits, dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.double()[:, None])
    # -inf - -inf is NaN: a row that sees nothing has no probabilities at all.
    probabilities = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    grouped = probabilities.unflatten(0, (num_kv_heads, num_heads // num_kv_heads))
    output = torch.einsum("hgqk,khd->qhgd", grouped, v).flatten(1, 2)
    return Attended(output, lse.transpose(0, 1), probabilities, logits)
