"""xFormers' FlashAttention-3 op: over the paged cache, or over a prefill's own keys."""

import importlib.util
from typing import Any

import torch

from xfv1.device import Device
from xfv1.ops.base import Call, Layer, capability_reasons, dtype_reasons, feature_reasons
from xfv1.ops.xformers.base import attend, installed_reasons, paged_inputs
from xfv1.ops.xformers.gather import attend_contiguous
from xfv1.phase import Batch


class XFormersFA3:
    name = "xformers_fa3"
    ragged = True
    batch_invariant = False

    def not_supported_reasons(self, layer: Layer, batch: Batch, device: Device) -> list[str]:
        if device.kind != "cuda":
            return [f"runs on cuda, not on {device.kind}"]
        reasons = capability_reasons(device, (8, 0), (9, 0))
        if importlib.util.find_spec("flash_attn_3") is None:
            reasons.append("flash_attn_3 is not installed")
        reasons = reasons or installed_reasons("flash3")
        reasons += dtype_reasons(layer, torch.float16, torch.bfloat16)
        reasons += feature_reasons(layer, "sliding_window", "noncausal")
        if not 32 <= layer.head_size <= 256 or layer.head_size % 8:
            reasons.append(f"head size {layer.head_size}: multiples of 8 from 32 to 256")
        if not layer.causal and layer.sliding_window is not None:
            reasons.append("no windows without causality")
        paged = not batch.own_keys
        if paged and layer.sliding_window is not None:
            reasons.append("no sliding windows over the paged cache")
        if paged and not batch.token_major:
            reasons.append("needs a cache whose blocks lie token by token (layout LBNHC)")
        return reasons

    def run(self, call: Call) -> None:
        from xformers.ops.fmha import flash3

        op: Any = flash3.FwOp
        if call.batch.own_keys:
            attend_contiguous(call, op)
        else:
            key, value, bias = paged_inputs(call)
            attend(call, op, key, value, bias)
