"""xFormers' split-K Triton kernel over the paged cache: decodes and uniform verification."""

import functools
from typing import Any

import torch

from xfv1.device import Device
from xfv1.ops.base import Call, Layer, capability_reasons, dtype_reasons, feature_reasons
from xfv1.ops.xformers.base import attend, installed_reasons, paged_inputs
from xfv1.phase import DECODE, Batch

HEAD_SIZES = (16, 32, 64, 128, 256, 512)
# The most queries a request may have under its causal mask.
MAX_QUERY_LEN = 16
TILES = (64, 32, 16)


class XFormersSplitK:
    name = "xformers_splitk"
    ragged = False
    batch_invariant = False

    def not_supported_reasons(self, layer: Layer, batch: Batch, device: Device) -> list[str]:
        reasons = []
        if device.kind == "cpu" and not device.interpreted:
            reasons.append("runs on a CPU only under TRITON_INTERPRET=1")
        if device.kind == "cuda":
            reasons += capability_reasons(device, (8, 0))
        reasons = reasons or installed_reasons("triton_splitk")
        dtypes = (torch.float16,) if device.interpreted else (torch.float16, torch.bfloat16)
        reasons += dtype_reasons(layer, *dtypes)
        reasons += feature_reasons(layer, "noncausal")
        if layer.head_size not in HEAD_SIZES:
            reasons.append(f"head size {layer.head_size}: takes {', '.join(map(str, HEAD_SIZES))}")
        if layer.block_size % TILES[-1]:
            reasons.append(f"block size {layer.block_size}: a multiple of {TILES[-1]}")
        if batch.kind != DECODE or batch.max_query_len > MAX_QUERY_LEN:
            reasons.append(f"serves decodes of up to {MAX_QUERY_LEN} tokens")
        if not batch.uniform:
            reasons.append("needs the same number of tokens in every request")
        if not batch.token_major:
            reasons.append("needs a cache whose blocks lie token by token (layout LBNHC)")
        return reasons

    def run(self, call: Call) -> None:
        key, value, bias = paged_inputs(call)
        tile = next(tile for tile in TILES if call.layer.block_size % tile == 0)
        attend(call, splitk_op(tile, call.query.device.type), key, value, bias)


@functools.cache
def splitk_op(tile: int, device: str) -> Any:
    """xFormers' op with a tile of keys that divides the page."""
    from xformers.ops.fmha import triton_splitk

    return type(
        f"SplitKTile{tile}",
        (triton_splitk.FwOp,),
        {"BLOCK_N": tile, "SUPPORTED_DEVICES": {device}},
    )
