"""The ops that gather keys from the pages take what a request's queries see, and nothing else."""

import pytest
import torch

from fixtures.cases import AttnCase
from fixtures.inputs import build_inputs
from reference import gather_kv
from tests.integration.calls import whole_call
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
    call = whole_call(inputs)
    key, value = contiguous_kv(call)
    for made, pages, scale in (
        (key, call.key_cache, inputs.k_scale),
        (value, call.value_cache, inputs.v_scale),
    ):
        assert pages is not None
        seen = []
        for row, (query_len, length) in enumerate(zip(case.query_lens, case.seq_lens, strict=True)):
            window = case.sliding_window or length
            first = max(length - query_len - window + 1, 0)
            seen.append(gather_kv(pages, inputs.block_table[row], length, scale)[first:])
        torch.testing.assert_close(made.double(), torch.cat(seen).double(), rtol=2e-3, atol=0)
