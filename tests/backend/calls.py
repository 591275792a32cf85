"""A batch as xfv1's ops are called with it, without a backend around them."""

from typing import Any

import torch

from fixtures.cases import AttnCase
from fixtures.inputs import TORCH_DTYPES, AttnInputs
from tests.harness.truth import written_cache
from xfv1.ops.base import Call, Layer
from xfv1.phase import DECODE, ENCODER, PREFILL, Batch, Phase


def layer_of(case: AttnCase, fnuz: bool = False) -> Layer:
    """The facts of a case's layer. fnuz: the device's float8_e4m3 is an MI300's."""
    stored = TORCH_DTYPES[case.cache_dtype]
    if fnuz and stored == torch.float8_e4m3fn:
        stored = torch.float8_e4m3fnuz
    return Layer(
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_size=case.head_size,
        dtype=TORCH_DTYPES[case.dtype],
        kv_dtype=stored,
        block_size=case.block_size if case.paged else 0,
        sliding_window=case.sliding_window,
        softcap=case.softcap,
        alibi=case.alibi,
        alibi_sqrt=case.alibi_sqrt,
        sinks=case.sinks,
        causal=case.causal,
    )


def whole_call(inputs: AttnInputs) -> Call:
    """The whole batch in one call, as one phase that wants the LSE too."""
    case = inputs.case
    encoder, rows = not case.paged, slice(0, case.num_tokens)
    longest = max(case.query_lens)
    cache = written_cache(inputs)[0]
    caches = (None, None) if encoder else inputs.split_cache(cache)
    own = case.attention != "cross"
    scales: dict[str, Any] = {
        name: torch.tensor([getattr(inputs, name)], device=inputs.query.device)
        for name in ("k_scale", "v_scale")
    }
    return Call(
        layer=layer_of(case),
        phase=Phase(
            batch=Batch(
                ENCODER if encoder else DECODE if len(set(case.query_lens)) == 1 else PREFILL,
                num_reqs=inputs.num_reqs,
                max_query_len=longest,
                max_seq_len=max(case.seq_lens),
                uniform=len({*case.query_lens, *(0,) * case.pad_reqs}) == 1,
                fresh=encoder,
                token_major=cache.stride(0) == cache.stride(2) * case.block_size,
                lse=True,
            ),
            rows=rows,
            query_start_loc=inputs.query_start_loc,
            query_start_loc_cpu=inputs.query_start_loc.cpu(),
            seq_lens=inputs.seq_lens,
            seq_lens_cpu=inputs.seq_lens.cpu(),
            block_table=inputs.block_table,
        ),
        query=inputs.query[rows],
        key=inputs.key[rows] if own else None,
        value=inputs.value[rows] if own else None,
        key_cache=caches[0],
        value_cache=caches[1],
        out=torch.empty_like(inputs.query[rows]),
        scale=inputs.scale,
        alibi_slopes=inputs.alibi_slopes,
        sinks=inputs.sinks,
        lse=torch.full((case.num_tokens, case.num_heads), float("nan"), device=inputs.query.device),
        **scales,
    )
