"""Which op serves which phase of which layer, and why not the others.

The order in which ops are tried is data (`RULES`), measured by benchmarks/kernels.py; whether an
op can serve is its own answer. Nothing here looks at the device's memory.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from xfv1 import settings
from xfv1.ops.base import DECODE, ENCODER, PREFILL, Batch, Device, Layer, Op
from xfv1.ops.torch_cpu import TorchCpu
from xfv1.ops.triton_paged import TritonPaged
from xfv1.ops.vllm_fa import VllmFlashAttention
from xfv1.ops.xformers_fa3 import XFormersFA3
from xfv1.ops.xformers_splitk import XFormersSplitK
from xfv1.ops.xformers_varlen import VARLEN_OPS

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


@dataclass(frozen=True)
class Rule:
    """Ops in the order to try them, where a phase's facts lie within bounds (inclusive).

    num_reqs, seq_lens: rounded up to powers of two; seq_lens and query_lens: the longest request's.
    dtypes: the model's; empty for any.
    """

    phase: str
    order: tuple[str, ...]
    head_sizes: tuple[int, int] = (1, 512)
    num_reqs: tuple[int, int] = (0, 1 << 30)
    seq_lens: tuple[int, int] = (0, 1 << 30)
    query_lens: tuple[int, int] = (0, 1 << 30)
    dtypes: tuple[torch.dtype, ...] = ()
    capability: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (99, 0))

    def fits(self, layer: Layer, batch: Batch, device: Device) -> bool:
        return (
            self.phase == batch.phase
            and self.head_sizes[0] <= layer.head_size <= self.head_sizes[1]
            and self.num_reqs[0] <= batch.num_reqs <= self.num_reqs[1]
            and self.seq_lens[0] <= batch.max_seq_len <= self.seq_lens[1]
            and self.query_lens[0] <= batch.max_query_len <= self.query_lens[1]
            and (not self.dtypes or layer.dtype in self.dtypes)
            and self.capability[0] <= device.capability <= self.capability[1]
        )


# vLLM's FlashAttention 2 is built for sm_80 and as PTX: from Hopper on the driver compiles it at
# first use, which can take minutes. xfv1's own kernel takes seconds.
HOPPER = ((9, 0), (99, 0))
HALF = (torch.float16, torch.bfloat16)
HOPPER_DECODES = ("vllm_fa3", "triton", "xformers_fa3", "xformers_splitk", "vllm_fa2", "torch")
OWN_FIRST = ("triton", *(name for name in HOPPER_DECODES if name != "triton"))
VARLEN = ("xformers_fa2", "xformers_ck", "xformers_cutlass")

# The first rule that fits decides. Hopper's are measured (benchmarks/results/h100-kernels.json);
# no other card has been measured.
RULES: tuple[Rule, ...] = (
    # Few requests of some length: 60 us where the own kernel takes 54.
    Rule(
        DECODE, OWN_FIRST, head_sizes=(128, 128), num_reqs=(2, 16), dtypes=HALF, capability=HOPPER
    ),
    # 172 us, for 32 requests, where the own kernel takes 143.
    Rule(DECODE, OWN_FIRST, head_sizes=(80, 80), num_reqs=(2, 64), dtypes=HALF, capability=HOPPER),
    Rule(DECODE, HOPPER_DECODES, capability=HOPPER),
    Rule(DECODE, ("xformers_splitk", "vllm_fa2", "triton", "torch")),
    # 268 us by FlashAttention 3, 460 by the own kernel, 537 by PyTorch's FlashAttention 2.
    Rule(
        PREFILL,
        ("vllm_fa3", "xformers_fa3", "triton", *VARLEN, "vllm_fa2", "torch"),
        dtypes=HALF,
        capability=HOPPER,
    ),
    # Few queries of long requests: to gather their keys takes more than to attend to them, 1194 us
    # against the own kernel's 256 for 64 requests of 8 queries over 2048 keys.
    Rule(
        PREFILL,
        ("vllm_fa2", "triton", *VARLEN, "torch"),
        query_lens=(0, 32),
        seq_lens=(256, 1 << 30),
    ),
    Rule(PREFILL, (*VARLEN, "triton", "torch"), capability=HOPPER),
    Rule(PREFILL, ("vllm_fa2", *VARLEN, "triton", "torch")),
    Rule(
        ENCODER,
        ("xformers_fa3", "vllm_fa3", *VARLEN, "triton", "vllm_fa2", "torch"),
        capability=HOPPER,
    ),
    Rule(ENCODER, ("vllm_fa2", *VARLEN, "triton", "torch")),
)


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
    # Powers of two bound how many different batches there are to decide on.
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
    raise NoOp(f"no op serves {batch.phase}: {explain(tried)}")


def explain(tried: dict[str, list[str]]) -> str:
    return "; ".join(f"{name}: {', '.join(why)}" for name, why in tried.items())


def typical_batches(
    *, encoder: bool = False, host_lens: bool = True, lse: bool = False
) -> list[Batch]:
    """A layer's phases, each as the batch that asks most of an op: ragged, with context."""
    ragged = Batch(PREFILL, num_reqs=2, max_query_len=64, max_seq_len=128, uniform=False, lse=lse)
    if encoder:
        return [replace(ragged, phase=ENCODER, max_seq_len=64)]
    return [
        Batch(DECODE, num_reqs=2, max_seq_len=128, host_lens=host_lens, lse=lse),
        replace(ragged, host_lens=host_lens),
    ]


def layer_reasons(layer: Layer, device: Device, **kind: bool) -> list[str]:
    """Why a layer cannot be served at all: one reason for each phase that no op serves.

    kind: see `typical_batches`, here and in `summary`.
    """
    refused = []
    for batch in typical_batches(**kind):
        try:
            choose(layer, batch, device)
        except NoOp as error:
            refused.append(str(error))
    return refused


def summary(layer: Layer, device: Device, **kind: bool) -> str:
    """Which op serves each phase of a layer, in words; the layer must be servable."""
    batches = typical_batches(**kind)
    return ", ".join(f"{b.phase} by {choose(layer, b, device).name}" for b in batches)
