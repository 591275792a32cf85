"""All that differs between vLLM's versions (0.26 to 0.33), platforms and caches."""

import enum
import functools
import re
from collections.abc import Callable
from typing import Any

import torch

from xfv1.device import Device, device_of

# The first and the last release series of vLLM that xfv1 is tested with.
TESTED = ((0, 26), (0, 33))
# The threads that vLLM's cache op counts in.
WARP = 32
FP8 = ("fp8", "fp8_e4m3", "fp8_e5m2")


@functools.cache
def check_version() -> None:
    """Warn, once, of a vLLM that xfv1 is not tested with; it works if its contract still holds.

    Raises:
        RuntimeError: for a release before those. A development build's number says too little.
    """
    from vllm import __version__ as version

    numbers = re.match(r"(\d+)\.(\d+)", version)
    series = (int(numbers[1]), int(numbers[2])) if numbers else None
    first, last = TESTED
    tested = f"vLLM {first[0]}.{first[1]} to {last[0]}.{last[1]}"
    if series and first <= series <= last:
        return
    if series and series < first and "dev" not in version:
        raise RuntimeError(f"xfv1 needs {tested}, found vLLM {version}")
    _logger().warning("xfv1 is tested with %s, not with vLLM %s", tested, version)


@functools.cache
def device_kind() -> str:
    """torch's device type of vLLM's platform: "cuda" (ROCm too) or "cpu"."""
    from vllm.platforms import current_platform

    return "cpu" if current_platform.is_cpu() else "cuda"


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


def log_once(message: str, *args: object) -> None:
    """A line in vLLM's log, the first time only."""
    _logger().info_once(message, *args)


def warn_once(message: str, *args: object) -> None:
    """A warning in vLLM's log, the first time only.

    It is seen even where vLLM has not set its logging up yet, as when it loads plugins.
    """
    _logger().warning_once(message, *args)


def _logger() -> Any:
    from vllm.logger import init_logger

    return init_logger("vllm.xfv1")


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    layer: Any,
) -> None:
    """vLLM's own op where it can, else PyTorch's indexing.

    key_cache, value_cache: [num_blocks, block_size, num_kv_heads, head_size] views.
    """
    # Given fewer elements of a token than a warp has threads, the op never returns.
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
    # As a graph may capture it, so without a count of the tokens: padding, whose slot is -1, writes
    # back what the first slot holds, which vLLM gives to no request.
    real = (slot_mapping >= 0)[:, None, None]
    slots = slot_mapping.clamp(min=0).long()
    blocks, offsets = slots // key_cache.shape[1], slots % key_cache.shape[1]
    for new, cache, scale in (
        (key, key_cache, layer._k_scale),
        (value, value_cache, layer._v_scale),
    ):
        stored = quantize(new[: slots.numel()], cache.dtype, scale)
        # NaN stays the NaN it was, and PyTorch indexes few float8 tensors.
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


def context_group(kv_cache_spec: Any) -> tuple[int, int]:
    """Size of the decode context parallel group a cache is spread over, and this rank in it."""
    from vllm.distributed.parallel_state import get_dcp_group

    # A draft model's cache may be whole on every rank (0.32 on).
    if not getattr(kv_cache_spec, "dcp_sharded", True):
        return 1, 0
    try:
        group = get_dcp_group()
    except AssertionError:
        # There is none, in tests.
        return 1, 0
    return group.world_size, group.rank_in_group


def batch_invariant() -> bool:
    """Whether vLLM wants each answer to be the same bits whatever is computed with it."""
    from vllm import envs

    return bool(envs.VLLM_BATCH_INVARIANT)


def vllm_has_triton() -> bool:
    """Whether vLLM's own Triton kernels run in this process."""
    from vllm.triton_utils import HAS_TRITON

    return bool(HAS_TRITON)


def speculates() -> bool:
    """Whether the server that is being made verifies drafts."""
    config = _served()
    return config is not None and config.speculative_config is not None


def model_reasons() -> list[str]:
    """Why xfv1 cannot serve this model in this server, for facts that no backend is asked about.

    Which facts these are depends on vLLM's release. On a CPU, vLLM asks a backend nothing.
    """
    config = _served()
    if config is None:
        return []
    reasons = []
    model = config.model_config
    if (window := getattr(model, "rswa_window", None)) is not None:
        reasons.append(f"rswa_window={window}: expected None: no windows beside a whole prompt")
    if getattr(model, "is_mm_prefix_lm", False):
        reasons.append(
            f"model {model.model}: its image tokens see each other (is_mm_prefix_lm=True): "
            "expected causal attention"
        )
    if getattr(config.cache_config, "kv_sharing_fast_prefill", False):
        # vLLM copies such a step's query_start_loc to the host without waiting for it.
        reasons.append("--kv-sharing-fast-prefill: expected a server without it")
    return reasons


def _served() -> Any:
    """The VllmConfig of the server that is being made, if one is."""
    from vllm.config import get_current_vllm_config_or_none

    return get_current_vllm_config_or_none()


def shard_merge() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """vLLM's merge of the answers of a decode context parallel group's ranks, as configured.

    Called with an output [num_tokens, all heads, head_size], its LSE [num_tokens, all heads], the
    group and return_lse=True; gives the same of the rank's own heads.
    """
    from vllm.config import get_current_vllm_config

    try:
        from vllm.v1.attention.ops.dcp import cp_lse_ag_out_rs, dcp_a2a_lse_reduce
    except ImportError:
        # Before 0.29.
        from vllm.v1.attention.ops.common import cp_lse_ag_out_rs
        from vllm.v1.attention.ops.dcp_alltoall import dcp_a2a_lse_reduce
    a2a = get_current_vllm_config().parallel_config.dcp_comm_backend == "a2a"
    merge: Callable[..., Any] = dcp_a2a_lse_reduce if a2a else cp_lse_ag_out_rs
    return merge


LAYOUTS = ("LBNHC", "LBHNC", "BLNHC", "BLHNC", "BHLNC", "LHBNC")


def kv_cache_layouts() -> tuple[Any, ...]:
    """The layouts that xfv1 reads, the preferred first: members of vLLM's enum, named as there.

    vLLM before 0.29 has no such enum and asks for stride orders; any strides are read all the same.
    """
    from vllm.v1 import kv_cache_interface

    known: Any = getattr(kv_cache_interface, "KVCacheLayout", None)
    known = known or enum.Enum("Layout", LAYOUTS)
    return tuple(known[name] for name in LAYOUTS if name in known.__members__)


def stride_order(include_num_layers_dimension: bool) -> tuple[int, ...]:
    """Physical order of the cache's dimensions for the layout in force (0.26 to 0.28)."""
    from vllm.v1.attention.backends import utils

    layout = utils.get_kv_cache_layout()
    orders = {
        ("NHD", False): (0, 2, 1, 3),
        ("NHD", True): (1, 0, 3, 2, 4),
        ("HND", False): (0, 1, 2, 3),
        ("HND", True): (1, 2, 0, 3, 4),
    }
    if (layout, include_num_layers_dimension) not in orders:
        raise ValueError(f"KV cache layout {layout!r}: expected NHD or HND")
    return orders[layout, include_num_layers_dimension]
