"""Why vLLM would not give a case to a backend: what the backend itself declares beforehand."""

import inspect
from typing import Any

import torch

from fixtures.cases import AttnCase
from fixtures.inputs import TORCH_DTYPES
from tests.harness.server import attn_type


def configuration_reasons(backend: type[Any], case: AttnCase, device: torch.device) -> list[str]:
    """The reasons that the backend's validate_configuration gives against a case.

    The method is called with those arguments that the installed vLLM passes to it.
    """
    from vllm.platforms.interface import DeviceCapability

    capability = DeviceCapability(0, 0)
    if device.type == "cuda":
        capability = DeviceCapability(*torch.cuda.get_device_capability(device))
    facts: dict[str, Any] = {
        "head_size": case.head_size,
        "dtype": TORCH_DTYPES[case.dtype],
        "kv_cache_dtype": case.kv_dtype,
        "block_size": case.block_size,
        "use_mla": False,
        "has_sink": case.sinks,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": capability,
        "attn_type": attn_type(case),
        "has_sliding_window": case.sliding_window is not None,
        "use_non_causal": case.attention == "noncausal",
    }
    known = inspect.signature(backend.validate_configuration).parameters
    reasons: list[str] = backend.validate_configuration(
        **{name: value for name, value in facts.items() if name in known}
    )
    if case.alibi_sqrt and not backend.supports_alibi_sqrt():
        reasons.append("ALiBi's sqrt form not supported")
    return reasons


def layout_reasons(backend: type[Any], case: AttnCase) -> list[str]:
    """Why vLLM would never give the backend a cache of the case's layout; empty if it would."""
    if case.attention == "encoder":
        return []
    if hasattr(backend, "supported_kv_cache_layouts"):
        layouts = backend.supported_kv_cache_layouts()
        names = None if layouts is None else [layout.name for layout in layouts]
    else:
        names = _layouts_by_stride_order(backend)
    if names is not None and case.kv_layout not in names:
        return [f"KV cache layout {case.kv_layout} not among {', '.join(names)}"]
    return []


def _layouts_by_stride_order(backend: type[Any]) -> list[str]:
    """The layouts that a backend of vLLM before 0.29 names by its stride orders."""
    from vllm.v1.attention.backends import utils

    names = []
    for setting in ("NHD", "HND"):
        utils.set_kv_cache_layout(setting)
        try:
            for layered in (False, True):
                try:
                    order = backend.get_kv_cache_stride_order(include_num_layers_dimension=layered)
                except (NotImplementedError, AttributeError, ValueError):
                    order = (0, 1, 2, 3) if not layered else ()
                axes = "LBHNC" if len(order) == 5 else "BHNC"
                if order:
                    name = "".join(axes[axis] for axis in order)
                    names.append(name if layered else f"L{name}")
        finally:
            utils.set_kv_cache_layout(None)
    return sorted(set(names))
