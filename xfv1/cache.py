"""The KV cache: its views, what it stores, and how keys and values get into it.

vLLM's cache of a layer is [num_blocks, num_kv_heads, block_size, 2 * head_size]: the keys of a
token and head, then its values.
"""

from typing import Any

import torch

from xfv1.device import Device, device_of

# Key and value views [num_blocks, block_size, num_kv_heads, head_size].
Views = tuple[torch.Tensor, torch.Tensor]
# The threads that vLLM's cache op counts in.
WARP = 32
FP8 = ("fp8", "fp8_e4m3", "fp8_e5m2")


def views(kv_cache: torch.Tensor, head_size: int, fp8: torch.dtype | None) -> Views:
    """A layer's keys and values. fp8: the float8 dtype of a cache that vLLM allocates as bytes."""
    key_cache, value_cache = kv_cache.transpose(1, 2).split(head_size, dim=-1)
    if fp8 is not None and key_cache.dtype != fp8:
        return key_cache.view(fp8), value_cache.view(fp8)
    return key_cache, value_cache


def kv_dtype(kv_cache_dtype: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a cache stores keys and values in, for a model of the given dtype.

    Raises:
        NotImplementedError: for caches quantized in other ways, or of another 16-bit dtype.
    """
    if fp8 := fp8_dtype(kv_cache_dtype):
        return fp8
    if kv_cache_dtype != "auto" and getattr(torch, kv_cache_dtype) != dtype:
        model = str(dtype).removeprefix("torch.")
        raise NotImplementedError(
            f"kv_cache_dtype={kv_cache_dtype!r}: expected the model's own dtype, {model}, or fp8"
        )
    return dtype


def fp8_dtype(kv_cache_dtype: str) -> torch.dtype | None:
    """The float8 dtype a cache stores, or None where it stores the model's own.

    Raises:
        NotImplementedError: for caches quantized in other ways.
    """
    if kv_cache_dtype in ("auto", "float16", "bfloat16", "float32"):
        return None
    if kv_cache_dtype not in FP8:
        accepted = ", ".join(("auto", "float16", "bfloat16", "float32", *FP8))
        raise NotImplementedError(f"kv_cache_dtype={kv_cache_dtype!r}: expected {accepted}")
    if kv_cache_dtype == "fp8_e5m2":
        return torch.float8_e5m2
    from vllm.platforms import current_platform

    # By either name vLLM's op writes the platform's own format: float8_e4m3fnuz on an MI300.
    platform_dtype: torch.dtype = current_platform.fp8_dtype()
    return platform_dtype


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    layer: Any,
) -> None:
    """Store keys and values in their slots, by vLLM's own op where it can, else by PyTorch's.

    key_cache, value_cache: [num_blocks, block_size, num_kv_heads, head_size] views.
    """
    # The op never returns if a token has fewer elements than a warp has threads.
    if key.shape[1] * key.shape[2] >= WARP and vllm_writes(
        device_of(key.device), key.dtype, kv_cache_dtype
    ):
        from vllm import _custom_ops

        # The op reads bytes and a dtype's name.
        raw = [c.view(torch.uint8) if c.itemsize == 1 else c for c in (key_cache, value_cache)]
        _custom_ops.reshape_and_cache_flash(
            key, value, *raw, slot_mapping, kv_cache_dtype, layer._k_scale, layer._v_scale
        )
        return
    # A graph may capture this, so the tokens are not counted. Padding, whose slot is -1, writes
    # back what the first slot holds: vLLM gives that slot to no request.
    real = (slot_mapping >= 0)[:, None, None]
    slots = slot_mapping.clamp(min=0).long()
    blocks, offsets = slots // key_cache.shape[1], slots % key_cache.shape[1]
    for new, cache, scale in (
        (key, key_cache, layer._k_scale),
        (value, value_cache, layer._v_scale),
    ):
        stored = quantize(new[: slots.numel()], cache.dtype, scale)
        # As integers: a NaN keeps its bits, and PyTorch can index few float8 tensors.
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[cache.itemsize]
        cells = cache.view(bits)
        cells[blocks, offsets] = torch.where(real, stored.view(bits), cells[blocks, offsets])


def vllm_writes(device: Device, dtype: torch.dtype, kv_cache_dtype: str) -> bool:
    """Whether vLLM's cache op stores keys of a dtype in such a cache on a device.

    By its source (csrc, each maker's quant_utils.cuh) it knows no fp8_e5m2 on AMD, and makes no
    float8 of bfloat16 on NVIDIA's cards before Ampere. A card needs no instructions for float8.
    """
    if device.kind == "cpu":
        return False
    if not kv_cache_dtype.startswith("fp8"):
        return True
    if device.kind == "hip":
        return kv_cache_dtype != "fp8_e5m2"
    return dtype != torch.bfloat16 or device.capability >= (8, 0)


def quantize(content: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
    """Keys or values as a cache of that dtype stores them."""
    if dtype.itemsize == 1:
        largest = torch.finfo(dtype).max
        content = (content.float() / scale).clamp(-largest, largest)
    return content.to(dtype)


def read_back(content: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
    """Keys or values as a float8 cache gives them back."""
    return (quantize(content, dtype, scale).float() * scale).to(content.dtype)
