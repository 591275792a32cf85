"""Are keys and values stored where slot_mapping says, bit for bit, and nothing else?

By vLLM's op on a GPU, but for tokens too small for it, and by PyTorch.
"""

from types import SimpleNamespace

import pytest
import torch

import reference
from tests.harness.candidate import bits
from xfv1.compat import write_kv

# vLLM's name of the cache's dtype, the model's dtype, and what the cache stores.
DTYPES = (
    ("auto", torch.float16, torch.float16),
    ("auto", torch.float32, torch.float32),
    ("bfloat16", torch.bfloat16, torch.bfloat16),
    ("fp8_e4m3", torch.float16, torch.float8_e4m3fn),
    ("fp8_e5m2", torch.bfloat16, torch.float8_e5m2),
)
# (num_kv_heads, head_size): below a warp's 32 elements, at them, and of a served model.
TOKENS = ((1, 8), (3, 8), (2, 16), (8, 64))
K_SCALE, V_SCALE, BLOCK_SIZE = 0.5, 0.25, 16
# Slots in and between blocks, padding among them and at both ends.
SLOTS = (-1, 16, 31, -1, -1, 47, 48, 33, -1)


def new_cache(heads: int, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[4 blocks, heads, BLOCK_SIZE, 2 * size], the first NaN."""
    rng = torch.Generator().manual_seed(7)
    cache = torch.randn(4, heads, BLOCK_SIZE, 2 * size, generator=rng).to(dtype)
    cache[0] = torch.full((), float("nan")).to(dtype)
    return cache.to(device)


def views(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the keys, and of the values."""
    key_cache, value_cache = cache.transpose(1, 2).chunk(2, dim=-1)
    return key_cache, value_cache


@pytest.fixture
def layer(device: torch.device) -> SimpleNamespace:
    """What is read of vLLM's layer; made before a capture, which takes nothing from the host."""
    return SimpleNamespace(
        _k_scale=torch.tensor(K_SCALE, device=device), _v_scale=torch.tensor(V_SCALE, device=device)
    )


@pytest.mark.parametrize(("heads", "size"), TOKENS)
@pytest.mark.parametrize(("name", "model", "stored"), DTYPES)
def test_slots_hold_the_tokens_and_all_else_what_it_held(
    name: str, model: torch.dtype, stored: torch.dtype, heads: int, size: int,
    layer: SimpleNamespace, device: torch.device,
) -> None:  # fmt: skip
    """Padding writes nothing, and rows past slot_mapping's are padding too."""
    rng = torch.Generator().manual_seed(3)
    rows = len(SLOTS) + 2
    key, value = torch.randn(2, rows, heads, size, generator=rng).to(device, model).unbind()
    for slots in (SLOTS, (-1,) * len(SLOTS), SLOTS[5:6]):
        mapping = torch.tensor(slots, device=device)
        done = new_cache(heads, size, stored, device)
        right = done.clone()
        write_kv(key, value, *views(done), mapping, name, layer)
        reference.write_kv(key, value, *views(right), mapping, k_scale=K_SCALE, v_scale=V_SCALE)
        assert torch.equal(bits(done), bits(right)), slots


@pytest.mark.parametrize(("heads", "size"), TOKENS)
def test_a_captured_write_follows_the_slots(
    heads: int, size: int, layer: SimpleNamespace, device: torch.device
) -> None:
    if device.type != "cuda":
        pytest.skip("graphs are CUDA's")
    key, value = torch.randn(2, len(SLOTS), heads, size, device=device).half().unbind()
    slots = torch.full((len(SLOTS),), -1, device=device)
    done = new_cache(heads, size, torch.float16, device)
    right = done.clone()

    def write() -> None:
        write_kv(key, value, *views(done), slots, "auto", layer)

    write()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write()
    slots.copy_(torch.tensor(SLOTS))
    graph.replay()
    reference.write_kv(key, value, *views(right), slots)
    assert torch.equal(bits(done), bits(right))
