"""Chooses the op that serves a batch of a layer, and says why the others do not.

The order in which ops are tried is data (`xfv1.rules`); whether an op can serve is its own answer.
Nothing here looks at the device's memory.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import replace

from xfv1 import settings
from xfv1.device import Device
from xfv1.ops.base import Layer, Op
from xfv1.ops.torch_cpu import TorchCpu
from xfv1.ops.triton_paged import TritonPaged
from xfv1.ops.vllm_fa import VllmFlashAttention
from xfv1.ops.xformers.fa3 import XFormersFA3
from xfv1.ops.xformers.splitk import XFormersSplitK
from xfv1.ops.xformers.varlen import VARLEN_OPS
from xfv1.phase import Batch
from xfv1.rules import RULES

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        XFormersSplitK(),
        XFormersFA3(),
        *VARLEN_OPS,
        VllmFlashAttention(3),
        VllmFlashAttention(2),
        TritonPaged(),
        TorchCpu(),
    )
}


class NoOp(NotImplementedError):
    """No op serves a layer; the message gives every op's reasons."""


def order_of(layer: Layer, batch: Batch, device: Device) -> Sequence[str]:
    """Names of the ops to try, best first: XFV1_OPS where set, else the first rule that fits."""
    return settings.ops() or next(
        (rule.order for rule in RULES if rule.fits(layer, batch, device)), tuple(OPS)
    )


def reasons(layer: Layer, batch: Batch, device: Device) -> dict[str, list[str]]:
    """Every op that may be tried, in order, with why it cannot serve (empty if it can)."""
    tried = {}
    for name in order_of(layer, batch, device):
        tried[name] = OPS[name].not_supported_reasons(layer, batch, device)
        if layer.batch_invariant and not OPS[name].batch_invariant:
            tried[name].append("its bits depend on what else is in the batch")
    return tried


def choose(layer: Layer, batch: Batch, device: Device) -> Op:
    """The op for one phase of one layer.

    Raises:
        NoOp: with every op's reasons.
    """
    # Rounding leaves few different batches, so that `_choose` keeps most of its answers.
    rounded = replace(
        batch,
        num_reqs=1 << (batch.num_reqs - 1).bit_length() if batch.num_reqs > 1 else batch.num_reqs,
        max_seq_len=1 << max(batch.max_seq_len - 1, 0).bit_length(),
        max_query_len=min(batch.max_query_len, 64),
    )
    return _choose(layer, rounded, device, os.environ.get("XFV1_OPS", ""))


@functools.lru_cache(maxsize=4096)
def _choose(layer: Layer, batch: Batch, device: Device, setting: str) -> Op:
    tried = reasons(layer, batch, device)
    for name, why in tried.items():
        if not why:
            return OPS[name]
    raise NoOp(f"no op serves {batch.kind}: {explain(tried)}")


def explain(tried: dict[str, list[str]]) -> str:
    return "; ".join(f"{name}: {', '.join(why)}" for name, why in tried.items())
