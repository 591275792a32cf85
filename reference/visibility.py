"""May this query see this key? The whole masking semantics, in one predicate."""

import torch


def visible(
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    *,
    causal: bool = True,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Whether each query sees each key: ``0 <= i - j < W`` if causal, else ``|i - j| < W``.

    A window W therefore holds W keys, the query's own among them (vLLM's meaning; the
    ``window_size=(W - 1, 0)`` of FlashAttention). Without causality it reaches as far forwards
    as backwards, ``(W - 1, W - 1)``, as vLLM's backends have it for encoders.

    Args:
        query_positions: [num_queries] positions of the queries in their sequence; negative
            where a request has more queries than keys.
        key_positions: [num_keys] positions of the keys in the same sequence.
        causal: hide keys after the query.
        sliding_window: number of keys a query may see, itself included; None for all.

    Returns:
        [num_queries, num_keys] bool.

    Raises:
        ValueError: if ``sliding_window`` is below 1.
    """
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window={sliding_window}: expected None or at least 1")
    distance = query_positions[:, None] - key_positions[None, :]
    if causal:
        result = distance >= 0
        return result if sliding_window is None else result & (distance < sliding_window)
    if sliding_window is None:
        return torch.ones_like(distance, dtype=torch.bool)
    return distance.abs() < sliding_window
