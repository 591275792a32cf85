"""A case's phases as xfv1's ops are called with them, each tensor empty, on any device."""

from collections.abc import Iterator

import torch

from fixtures.cases import AttnCase
from tests.backend.calls import layer_of
from xfv1.ops.base import Call
from xfv1.phase import DECODE, ENCODER, PREFILL, Batch, Phase

META = torch.device("meta")
# On AMD Triton tells tensors within 2 GiB from larger ones, and a served cache is larger.
CACHE_BYTES = 5 << 30


def calls(
    case: AttnCase, device: torch.device, cache_bytes: int = CACHE_BYTES, fnuz: bool = False
) -> Iterator[Call]:
    """The decodes of a case, then its prefills, as xfv1 tells them apart; or the whole encoder.

    fnuz: a float8 cache is what an MI300 stores.
    """
    pairs = list(case.requests)
    if not case.paged:
        yield _call(case, ENCODER, pairs, device, cache_bytes, fnuz)
        return
    decodes, first = 0, pairs[0][0]
    if 0 < first <= 1 + case.drafts:
        while decodes < len(pairs) and pairs[decodes][0] == first:
            decodes += 1
    for kind, part in ((DECODE, pairs[:decodes]), (PREFILL, pairs[decodes:])):
        if any(query_len for query_len, _ in part):
            yield _call(case, kind, part, device, cache_bytes, fnuz)


def _call(
    case: AttnCase,
    kind: str,
    pairs: list[tuple[int, int]],
    device: torch.device,
    cache_bytes: int,
    fnuz: bool,
) -> Call:
    layer = layer_of(case, fnuz)
    query_lens, seq_lens = (
        torch.tensor(lens, dtype=torch.int32) for lens in zip(*pairs, strict=True)
    )
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), query_lens.cumsum(0, dtype=torch.int32)])
    tokens, reqs, longest = int(starts[-1]), len(pairs), int(seq_lens.max())

    def empty(*shape: int, dtype: torch.dtype = layer.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    query, key, value = (
        empty(tokens, count, case.head_size)
        for count in (case.num_heads, case.num_kv_heads, case.num_kv_heads)
    )
    if case.fused_qkv:
        widths = [part.shape[1] * case.head_size for part in (query, key, value)]
        query, key, value = (
            part.unflatten(1, (-1, case.head_size))
            for part in empty(tokens, sum(widths)).split(widths, dim=1)
        )
    key_cache = value_cache = None
    if kind != ENCODER:
        cache = _cache(case, layer.kv_dtype, device, cache_bytes)
        key_cache, value_cache = cache.transpose(1, 2).split(case.head_size, dim=-1)
    scale = empty(1, dtype=torch.float32)
    return Call(
        layer=layer,
        phase=Phase(
            batch=Batch(
                kind,
                num_reqs=reqs,
                max_query_len=int(query_lens.max()),
                max_seq_len=longest,
                uniform=bool((query_lens == query_lens[0]).all()),
                fresh=kind == ENCODER,
            ),
            rows=slice(0, tokens),
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts,
            seq_lens=seq_lens.to(device),
            seq_lens_cpu=seq_lens,
            block_table=torch.zeros(
                reqs, -(-longest // case.block_size), dtype=torch.int32, device=device
            ),
        ),
        query=query,
        key=key,
        value=value,
        key_cache=key_cache,
        value_cache=value_cache,
        out=empty(tokens, case.num_heads, case.head_size),
        scale=case.head_size**-0.5,
        alibi_slopes=empty(case.num_heads, dtype=torch.float32) if case.alibi else None,
        sinks=empty(case.num_heads) if case.sinks else None,
        k_scale=scale,
        v_scale=scale,
    )


def _cache(
    case: AttnCase, dtype: torch.dtype, device: torch.device, least_bytes: int
) -> torch.Tensor:
    """A layer's cache [num_blocks, num_kv_heads, block_size, 2 * head_size] of so many bytes, the
    second layer of two in the case's layout."""
    sizes = {"L": 2, "H": case.num_kv_heads, "N": case.block_size, "C": 2 * case.head_size}
    block = case.num_kv_heads * case.block_size * 2 * case.head_size * dtype.itemsize
    sizes["B"] = max(-(-least_bytes // block), 1)
    shape = [sizes[axis] for axis in case.kv_layout]
    physical = torch.empty(shape, dtype=dtype, device=device)
    return physical.permute([case.kv_layout.index(axis) for axis in "LBHNC"])[1]
