"""The ops that gather keys from the pages take what a request's queries see, and nothing else."""

import pytest
import torch

from fixtures.cases import AttnCase
from fixtures.inputs import TORCH_DTYPES, build_inputs
from reference import gather_kv
from tests.harness.oracle import written_cache
from xfv1.ops.base import PREFILL, Batch, Call, Layer
from xfv1.ops.gather import contiguous_kv

CASES = (
    AttnCase(scenario="mixed_spec"),
    AttnCase(scenario="mixed_spec", block_size=32, sliding_window=37),
    AttnCase(scenario="chunked_prefill", sliding_window=1),
    AttnCase(scenario="mixed_small", kv_dtype="fp8_e4m3", sliding_window=19),
)


@pytest.mark.parametrize("of", CASES, ids=lambda case: case.id)
def test_gathered_keys_are_those_within_some_querys_window(of: AttnCase) -> None:
    """Blocks before a window hold NaN: they are another request's by then."""
    case = of
    inputs = build_inputs(case)
    cache, _ = written_cache(inputs)
    key_cache, value_cache = inputs.split_cache(cache)
    dtype = TORCH_DTYPES[case.dtype]
    key, value = contiguous_kv(
        Call(
            layer=Layer(
                num_heads=case.num_heads,
                num_kv_heads=case.num_kv_heads,
                head_size=case.head_size,
                dtype=dtype,
                kv_dtype=key_cache.dtype,
                block_size=case.block_size,
                sliding_window=case.sliding_window,
            ),
            batch=Batch(PREFILL, num_reqs=inputs.num_reqs),
            query=inputs.query,
            key=None,
            value=None,
            key_cache=key_cache,
            value_cache=value_cache,
            out=torch.empty_like(inputs.query),
            query_start_loc=inputs.query_start_loc,
            seq_lens=inputs.seq_lens,
            block_table=inputs.block_table,
            query_start_loc_cpu=inputs.query_start_loc,
            seq_lens_cpu=inputs.seq_lens,
            scale=inputs.scale,
            k_scale=torch.tensor(inputs.k_scale),
            v_scale=torch.tensor(inputs.v_scale),
        )
    )
    for made, pages, scale in (
        (key, key_cache, inputs.k_scale),
        (value, value_cache, inputs.v_scale),
    ):
        seen = []
        for row, (query_len, length) in enumerate(zip(case.query_lens, case.seq_lens, strict=True)):
            window = case.sliding_window or length
            first = max(length - query_len - window + 1, 0)
            seen.append(gather_kv(pages, inputs.block_table[row], length, scale)[first:])
        torch.testing.assert_close(made.double(), torch.cat(seen).double(), rtol=2e-3, atol=0)
