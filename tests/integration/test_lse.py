"""Ops asked for the LSE give the reference's, which merging parts of a context depends on."""

from typing import Any

import pytest
import torch

from fixtures.cases import AttnCase
from fixtures.inputs import TORCH_DTYPES, AttnInputs, build_inputs
from tests.harness.oracle import expected, written_cache
from xfv1.dispatch import OPS
from xfv1.ops.base import DECODE, PREFILL, Batch, Call, Layer, device_of

CASES = (
    AttnCase(scenario="edge_decode"),
    AttnCase(scenario="mixed_small", sliding_window=17, dtype="bf16"),
    AttnCase(scenario="mixed_small", softcap=30.0),
    AttnCase(scenario="chunked_prefill", alibi=True),
    AttnCase(scenario="mixed_fresh", sinks=True),
    AttnCase(scenario="mixed_small", kv_dtype="fp8_e4m3"),
)


def _call(inputs: AttnInputs) -> Call:
    case = inputs.case
    dtype = TORCH_DTYPES[case.dtype]
    key_cache, value_cache = inputs.split_cache(written_cache(inputs)[0])
    longest = max(case.query_lens)
    scales: dict[str, Any] = {}
    for name in ("k_scale", "v_scale"):
        scales[name] = torch.tensor([getattr(inputs, name)], device=inputs.query.device)
    return Call(
        layer=Layer(
            num_heads=case.num_heads,
            num_kv_heads=case.num_kv_heads,
            head_size=case.head_size,
            dtype=dtype,
            kv_dtype=dtype if case.kv_dtype == "auto" else TORCH_DTYPES[case.kv_dtype],
            block_size=case.block_size,
            sliding_window=case.sliding_window,
            softcap=case.softcap,
            alibi=case.alibi,
            sinks=case.sinks,
        ),
        batch=Batch(
            DECODE if longest == 1 else PREFILL,
            num_reqs=inputs.num_reqs,
            max_query_len=longest,
            max_seq_len=max(case.seq_lens),
            uniform=len(set(case.query_lens)) == 1,
            lse=True,
        ),
        query=inputs.query,
        key=inputs.key,
        value=inputs.value,
        key_cache=key_cache,
        value_cache=value_cache,
        out=torch.empty_like(inputs.query),
        query_start_loc=inputs.query_start_loc,
        seq_lens=inputs.seq_lens,
        block_table=inputs.block_table,
        query_start_loc_cpu=inputs.query_start_loc.cpu(),
        seq_lens_cpu=inputs.seq_lens.cpu(),
        scale=inputs.scale,
        alibi_slopes=inputs.alibi_slopes,
        sinks=inputs.sinks,
        lse=torch.full(inputs.query.shape[:2], float("nan"), device=inputs.query.device),
        **scales,
    )


@pytest.mark.parametrize("sample", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("name", OPS)
def test_lse_is_the_references(name: str, sample: AttnCase, device: torch.device) -> None:
    """|lse - truth| within its budget for every (token, head)."""
    inputs = build_inputs(sample, device)
    call = _call(inputs)
    if reasons := OPS[name].not_supported_reasons(call.layer, call.batch, device_of(device.type)):
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    OPS[name].run(call)
    truth = expected(inputs)
    assert call.lse is not None
    error = (call.lse.double() - truth.lse).abs()
    assert bool((error <= truth.lse_budget).all()), f"{float((error / truth.lse_budget).max())}"
