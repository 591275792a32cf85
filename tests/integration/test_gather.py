"""The ops that gather keys from the pages take what a request's queries see, and nothing else."""

import pytest
import torch

from fixtures.cases import AttnCase
from fixtures.inputs import build_inputs
from reference import gather_kv
from tests.harness.candidate import bits
from tests.integration.calls import whole_call
from xfv1.ops.gather import contiguous_kv, picked

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("head_size", [8, 20, 24, 37, 80])
@pytest.mark.parametrize("first", [0, 1, 4])
def test_picked_slots_are_the_caches_bit_for_bit(
    dtype: torch.dtype, head_size: int, first: int, device: torch.device
) -> None:
    """Whatever word its rows allow: NaN keeps its payload, rows may begin anywhere."""
    blocks, block_size, heads = 5, 16, 3
    shape = (blocks, block_size, heads, 2 * head_size)
    rng = torch.Generator().manual_seed(head_size)
    numel = blocks * block_size * heads * 2 * head_size
    raw = torch.randint(0, 256, ((first + numel) * dtype.itemsize,), generator=rng)
    memory = raw.to(device, torch.uint8).view(dtype)[first:].view(shape)
    ids = torch.tensor([4, 0, 0, 3], device=device)
    offsets = torch.tensor([0, 15, 7, 7], device=device)
    for cache in (memory[..., :head_size], memory[..., head_size:]):
        made = picked(cache, ids, offsets)
        assert made.dtype == dtype and made.is_contiguous()
        one_by_one = torch.stack([cache[int(b), int(o)] for b, o in zip(ids, offsets, strict=True)])
        assert torch.equal(bits(made), bits(one_by_one))
