"""Are keys and values stored where slot_mapping says, bit for bit, and nothing else?

By vLLM's op on a GPU, but for tokens too small for it, and by PyTorch.
"""

from types import SimpleNamespace

import pytest
import torch

import reference
from tests.harness.candidate import bits
from xfv1.compat import write_kv

DTYPES = {
    "auto": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32": (torch.float32, torch.float32),
    "fp8_e4m3": (torch.float16, torch.float8_e4m3fn),
    "fp8_e5m2": (torch.bfloat16, torch.float8_e5m2),
}
# (num_kv_heads, head_size): below a warp's 32 elements, at them, and of a served model.
TOKENS = ((1, 8), (3, 8), (2, 16), (8, 64))
K_SCALE, V_SCALE, BLOCK_SIZE = 0.5, 0.25, 16
# Slots in and between blocks, padding among them and at both ends.
SLOTS = (-1, 16, 31, -1, -1, 47, 48, 33, -1)


def caches(
    heads: int, size: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All of the cache, NaN, and its key and value views."""
    rng = torch.Generator().manual_seed(7)
    whole = torch.randn(4, heads, BLOCK_SIZE, 2 * size, generator=rng).to(dtype)
    whole[0] = torch.full((), float("nan")).to(dtype)
    whole = whole.to(device)
    key_cache, value_cache = whole.transpose(1, 2).split(size, dim=-1)
    return whole, key_cache, value_cache


def write(
    given: tuple[torch.Tensor, torch.Tensor],
    views: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    name: str,
) -> None:
    scales = (torch.tensor(scale, device=slots.device) for scale in (K_SCALE, V_SCALE))
    layer = SimpleNamespace(**dict(zip(("_k_scale", "_v_scale"), scales, strict=True)))
    write_kv(*given, *views, slots, name, layer)


@pytest.mark.parametrize(("heads", "size"), TOKENS)
@pytest.mark.parametrize("name", DTYPES)
def test_slots_hold_the_tokens_and_all_else_what_it_held(
    name: str, heads: int, size: int, device: torch.device
) -> None:
    """Padding writes nothing, and rows past slot_mapping's are padding too."""
    model, stored = DTYPES[name]
    rng = torch.Generator().manual_seed(3)
    rows = len(SLOTS) + 2
    key, value = torch.randn(2, rows, heads, size, generator=rng).to(device, model).unbind()
    for slots in (SLOTS, (-1,) * len(SLOTS), SLOTS[5:6]):
        mapping = torch.tensor(slots, device=device)
        done, *views = caches(heads, size, stored, device)
        right, *truth = caches(heads, size, stored, device)
        write((key, value), (views[0], views[1]), mapping, name)
        reference.write_kv(
            key, value, truth[0], truth[1], mapping, k_scale=K_SCALE, v_scale=V_SCALE
        )
        assert torch.equal(bits(done), bits(right)), slots


@pytest.mark.parametrize(("heads", "size"), TOKENS)
def test_a_captured_write_follows_the_slots(heads: int, size: int, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("graphs are CUDA's")
    key, value = torch.randn(2, len(SLOTS), heads, size, device=device).half().unbind()
    slots = torch.full((len(SLOTS),), -1, device=device)
    done, *views = caches(heads, size, torch.float16, device)
    right, *truth = caches(heads, size, torch.float16, device)
    graph = torch.cuda.CUDAGraph()
    write((key, value), (views[0], views[1]), slots, "auto")
    with torch.cuda.graph(graph):
        write((key, value), (views[0], views[1]), slots, "auto")
    slots.copy_(torch.tensor(SLOTS))
    graph.replay()
    reference.write_kv(key, value, truth[0], truth[1], slots)
    assert torch.equal(bits(done), bits(right))
