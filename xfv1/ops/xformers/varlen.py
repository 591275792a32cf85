"""xFormers' variable-length ops over contiguous keys: prefills on any card, Turing's too."""

import importlib
from typing import Any

import torch

from xfv1.device import Capabilities, Device
from xfv1.ops.base import Call, Layer, capability_reasons, dtype_reasons, feature_reasons
from xfv1.ops.xformers.base import installed_reasons
from xfv1.ops.xformers.gather import attend_contiguous, pieces
from xfv1.phase import DECODE, Batch


class XFormersVarlen:
    """One of xFormers' ops that takes fresh keys, or keys gathered from the pages."""

    ragged = True
    batch_invariant = False

    def __init__(
        self,
        name: str,
        module: str,
        devices: dict[str, Capabilities],
        dtypes: tuple[torch.dtype, ...],
        max_head_size: int,
        features: tuple[str, ...],
    ) -> None:
        """module: of xformers.ops.fmha. devices: their kinds, each with the capabilities served."""
        self.name = name
        self.module = module
        self.devices = devices
        self.dtypes = dtypes
        self.max_head_size = max_head_size
        self.features = features

    def not_supported_reasons(self, layer: Layer, batch: Batch, device: Device) -> list[str]:
        if device.kind not in self.devices:
            reasons = [f"runs on {', '.join(self.devices)}, not on {device.kind}"]
        else:
            reasons = capability_reasons(device, *self.devices[device.kind])
        reasons = reasons or installed_reasons(self.module)
        dtypes = self.dtypes
        if device.kind == "cuda" and device.capability < (8, 0):
            dtypes = tuple(dtype for dtype in dtypes if dtype != torch.bfloat16)
        reasons += dtype_reasons(layer, *dtypes)
        if layer.head_size > self.max_head_size or layer.head_size % 8:
            reasons.append(f"head size {layer.head_size}: multiples of 8 to {self.max_head_size}")
        reasons += feature_reasons(layer, *self.features)
        if not layer.causal and layer.sliding_window is not None:
            reasons.append("no windows without causality")
        if batch.kind == DECODE:
            # A gather would copy the cache.
            reasons.append("serves prefills and encoders")
        elif not batch.host_lens and not batch.fresh:
            reasons.append("needs every request's number of keys on the host")
        return reasons

    def run(self, call: Call) -> None:
        op: Any = importlib.import_module(f"xformers.ops.fmha.{self.module}").FwOp
        for piece in pieces(call):
            attend_contiguous(piece, op)


HALF = (torch.float16, torch.bfloat16)
FEATURES = ("sliding_window", "noncausal", "fp8")
# NVIDIA's capabilities are those of xFormers' classes (CUDA_MINIMUM_COMPUTE_CAPABILITY and
# CUDA_MAXIMUM_COMPUTE_CAPABILITY); AMD's are the cards that xFormers' wheels are built for.
VARLEN_OPS = (
    XFormersVarlen("xformers_fa2", "flash", {"cuda": ((8, 0), (99, 0))}, HALF, 256, FEATURES),
    XFormersVarlen(
        "xformers_cutlass",
        "cutlass",
        {"cuda": ((5, 0), (9, 0))},
        (*HALF, torch.float32),
        512,
        FEATURES,
    ),
    XFormersVarlen("xformers_ck", "ck", {"hip": ((9, 0), (9, 4))}, HALF, 256, FEATURES),
)
