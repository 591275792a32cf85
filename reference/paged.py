"""The paged cache: gather by block_table, write by slot_mapping."""

import torch

from reference.attention import attend


def gather_kv(
    cache: torch.Tensor, block_ids: torch.Tensor, length: int, scale: float = 1.0
) -> torch.Tensor:
    """The first ``length`` entries of one request, in order, dequantized: ``cache * scale``.

    Args:
        cache: [num_blocks, block_size, num_kv_heads, head_size], of any strides; float8 too.
        block_ids: [max_blocks] the request's row of the block table; entries past the last
            block in use are not looked at.
        length: number of entries to gather.
        scale: dequantization scale (k_scale or v_scale).

    Returns:
        [length, num_kv_heads, head_size] float64.

    Raises:
        ValueError: if the row is too short for ``length`` or names a block the cache lacks.
    """
    num_blocks, block_size = cache.shape[:2]
    needed = -(-length // block_size)
    if needed > block_ids.numel():
        raise ValueError(
            f"block_table row of {block_ids.numel()} blocks of {block_size}: expected at least"
            f" {needed} for a length of {length}"
        )
    used = block_ids[:needed].long()
    if needed and not (int(used.min()) >= 0 and int(used.max()) < num_blocks):
        raise ValueError(f"block_table row {used.tolist()}: expected ids below {num_blocks}")
    return cache[used].double().flatten(0, 1)[:length] * scale


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    sliding_window: int | None = None,
    alibi_slopes: torch.Tensor | None = None,
    alibi_sqrt: bool = False,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a ragged batch over a paged cache that already holds the batch's own keys.

    Args:
        query: [num_tokens, num_heads, head_size]; request r owns rows
            ``query_start_loc[r]:query_start_loc[r + 1]``, rows past the last are padding.
        key_cache, value_cache: [num_blocks, block_size, num_kv_heads, head_size], of any strides.
        block_table: [num_reqs, max_blocks] integer block ids.
        seq_lens: [num_reqs] number of keys of each request, its own queries' included.
        query_start_loc: [num_reqs + 1], non-decreasing, first 0.
        k_scale, v_scale: what a stored key and value are multiplied by (fp8 caches).
        Others: see `reference.attention.attend`.

    Returns:
        output [num_tokens, num_heads, head_size] and lse [num_tokens, num_heads], float64;
        padding rows are 0 and -inf.

    Raises:
        ValueError: naming the argument, where shapes do not fit. No input is changed.
    """
    num_reqs = seq_lens.numel()
    if query_start_loc.numel() != num_reqs + 1:
        raise ValueError(
            f"query_start_loc of {query_start_loc.numel()} entries: expected {num_reqs + 1}"
        )
    if block_table.shape[0] < num_reqs:
        raise ValueError(f"block_table of {block_table.shape[0]} rows: expected {num_reqs}")
    output = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    lse = torch.full(query.shape[:2], float("-inf"), dtype=torch.float64, device=query.device)
    starts = query_start_loc.tolist()
    for request, length in enumerate(seq_lens.tolist()):
        rows = slice(starts[request], starts[request + 1])
        if rows.start == rows.stop:
            continue
        attended = attend(
            query[rows],
            gather_kv(key_cache, block_table[request], length, k_scale),
            gather_kv(value_cache, block_table[request], length, v_scale),
            scale=scale,
            causal=causal,
            sliding_window=sliding_window,
            alibi_slopes=alibi_slopes,
            alibi_sqrt=alibi_sqrt,
            softcap=softcap,
            sinks=sinks,
        )
        output[rows] = attended.output
        lse[rows] = attended.lse
    return output, lse


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Write each token's key and value to its slot, ``cache[slot] = quantize(x / scale)``.

    Only the caches change. A slot of -1 is padding and writes nothing. A float8 cache stores the
    nearest representable value, clamped to the largest finite one, as vLLM's op does; any other
    stores the value in the cache's dtype and ignores the scales.

    Args:
        key, value: [num_tokens, num_kv_heads, head_size]; rows past slot_mapping are padding.
        key_cache, value_cache: [num_blocks, block_size, num_kv_heads, head_size], any strides.
        slot_mapping: [num_tokens] integer, ``block * block_size + offset``.

    Raises:
        ValueError: if a slot lies outside the cache.
    """
    num_blocks, block_size = key_cache.shape[:2]
    slots = slot_mapping.long()
    if slots.numel() and int(slots.max()) >= num_blocks * block_size:
        raise ValueError(
            f"slot_mapping holds {int(slots.max())}: expected below {num_blocks * block_size}"
        )
    tokens = (slots >= 0).nonzero().flatten()
    blocks, offsets = slots[tokens] // block_size, slots[tokens] % block_size
    for source, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        cache[blocks, offsets] = store(source[tokens], cache.dtype, scale)


def store(source: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """``source`` as a cache of ``dtype`` holds it: divided by scale and clamped if float8."""
    if dtype.itemsize > 1:
        return source.to(dtype)
    largest = torch.finfo(dtype).max
    # float32 division first: that is how vLLM's op quantizes, and it decides ties.
    return (source.float() / scale).clamp(-largest, largest).to(dtype)
