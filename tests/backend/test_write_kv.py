"""Are keys and values stored where slot_mapping says, bit for bit, and nothing else?

By vLLM's op on a GPU, but for tokens too small for it, and by PyTorch.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import reference
from tests.cards.cards import CARDS
from tests.harness.memory import bits
from xfv1 import cache
from xfv1.cache import fp8_dtype, vllm_writes, write_kv

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
    """The cache's keys, and its values."""
    key_cache, value_cache = cache.transpose(1, 2).chunk(2, dim=-1)
    return key_cache, value_cache


@pytest.mark.parametrize("allocated", [torch.uint8, torch.float8_e4m3fn])
def test_a_float8_caches_bytes_are_its_keys_and_values(allocated: torch.dtype) -> None:
    """vLLM allocates bytes, by whichever dtype."""
    stored = new_cache(2, 16, torch.float8_e4m3fn, torch.device("cpu"))
    got = cache.views(stored.view(allocated), 16, torch.float8_e4m3fn)
    for mine, right in zip(got, views(stored), strict=True):
        assert mine.dtype == torch.float8_e4m3fn
        assert mine.data_ptr() == right.data_ptr()
        assert torch.equal(bits(mine), bits(right))


@pytest.fixture
def layer(device: torch.device) -> SimpleNamespace:
    """The scales of vLLM's layer, made before a capture, which takes nothing from the host."""
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


# Who writes a float8 cache. AMD's build of vLLM's op knows no fp8_e5m2, and NVIDIA's makes no
# float8 of bfloat16 before Ampere; PyTorch writes these, so that every cache is served.
AMD = [name for name in CARDS if name.startswith("gfx")]


@pytest.mark.parametrize("name", CARDS)
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("model", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_vllms_op_is_given_what_it_can_write(
    model: torch.dtype, kv_cache_dtype: str, name: str
) -> None:
    amd_cannot = name in AMD and kv_cache_dtype == "fp8_e5m2"
    turing_cannot = name == "sm_75" and kv_cache_dtype.startswith("fp8") and model == torch.bfloat16
    written = vllm_writes(CARDS[name].device, model, kv_cache_dtype)
    assert written == (not amd_cannot and not turing_cannot)


@pytest.mark.parametrize(
    ("card", "name", "model", "stored", "vllm"),
    [
        ("gfx942", "fp8_e5m2", torch.float16, torch.float8_e5m2, False),
        ("gfx942", "fp8_e4m3", torch.float16, torch.float8_e4m3fnuz, True),
        ("sm_75", "fp8_e4m3", torch.bfloat16, torch.float8_e4m3fn, False),
        ("sm_75", "fp8_e4m3", torch.float16, torch.float8_e4m3fn, True),
        ("sm_86", "fp8_e5m2", torch.bfloat16, torch.float8_e5m2, True),
        ("sm_86", "auto", torch.bfloat16, torch.bfloat16, True),
    ],
)
def test_what_vllms_op_cannot_write_pytorch_does(
    monkeypatch: pytest.MonkeyPatch,
    layer: SimpleNamespace,
    card: str,
    name: str,
    model: torch.dtype,
    stored: torch.dtype,
    vllm: bool,
) -> None:
    """As on that card, on tensors of the CPU."""
    from vllm import _custom_ops

    calls: list[Any] = []

    def op(key: torch.Tensor, value: torch.Tensor, *others: Any) -> None:
        calls.append(others)

    monkeypatch.setattr(cache, "device_of", lambda device: CARDS[card].device)
    monkeypatch.setattr(_custom_ops, "reshape_and_cache_flash", op)
    cpu = torch.device("cpu")
    layer = SimpleNamespace(_k_scale=layer._k_scale.cpu(), _v_scale=layer._v_scale.cpu())
    key, value = torch.randn(2, len(SLOTS), 8, 64).to(model).unbind()
    done = new_cache(8, 64, stored, cpu)
    right = done.clone()
    slots = torch.tensor(SLOTS)
    write_kv(key, value, *views(done), slots, name, layer)
    if vllm:
        (((key_cache, *_, kv_cache_dtype, _, _)),) = calls
        assert kv_cache_dtype == name
        # It is given bytes, and the name alone says which float8.
        assert key_cache.dtype == (torch.uint8 if stored.itemsize == 1 else stored)
        assert torch.equal(bits(done), bits(right))
    else:
        assert calls == []
        reference.write_kv(key, value, *views(right), slots, k_scale=K_SCALE, v_scale=V_SCALE)
        assert torch.equal(bits(done), bits(right))


@pytest.mark.parametrize("platforms", [torch.float8_e4m3fn, torch.float8_e4m3fnuz], ids=str)
def test_a_caches_float8_is_its_platforms(
    monkeypatch: pytest.MonkeyPatch, platforms: torch.dtype
) -> None:
    """By either name: on an MI300, whose float8 is e4m3fnuz, vLLM's op writes no other e4m3."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "fp8_dtype", classmethod(lambda cls: platforms))
    assert fp8_dtype("fp8") == fp8_dtype("fp8_e4m3") == platforms
    assert fp8_dtype("fp8_e5m2") == torch.float8_e5m2
    assert fp8_dtype("auto") is None
