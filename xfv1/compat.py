"""vLLM's facts about the process, and all that differs between its versions and platforms."""

import enum
import functools
import re
from collections.abc import Callable
from typing import Any

import torch

# The first and the last release series of vLLM that xfv1 is tested with.
TESTED = ((0, 26), (0, 33))


@functools.cache
def check_version() -> None:
    """Warn once if xfv1 is not tested with this vLLM. It works if vLLM's contract still holds.

    Raises:
        RuntimeError: for a release before the tested ones, but not for a development build.
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


def context_group(kv_cache_spec: Any) -> tuple[int, int]:
    """Size of the decode context parallel group a cache is spread over, and this rank in it."""
    from vllm.distributed.parallel_state import get_dcp_group

    # A draft model's cache may be whole on every rank (0.32 on).
    if not getattr(kv_cache_spec, "dcp_sharded", True):
        return 1, 0
    try:
        group = get_dcp_group()
    except AssertionError:
        # Tests have no group.
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
    config = served_config()
    return config is not None and config.speculative_config is not None


def served_config() -> Any:
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
