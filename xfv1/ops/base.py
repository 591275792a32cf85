"""The interface of an op: its arguments, and the questions that it answers."""

from dataclasses import dataclass
from typing import Protocol

import torch

from xfv1.device import Device
from xfv1.phase import Batch, Phase


@dataclass(frozen=True)
class Layer:
    """The facts of one attention layer and its cache, which no step changes.

    dtype: of query, key, value and output.
    kv_dtype: what the cache stores, a torch float8 dtype or the same as dtype.
    block_size: 0 where there is no cache.
    causal: decoder attention.
    batch_invariant: a token's answer must be the same, bit for bit, whatever is run with it.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    block_size: int
    sliding_window: int | None = None
    softcap: float | None = None
    alibi: bool = False
    alibi_sqrt: bool = False
    sinks: bool = False
    causal: bool = True
    batch_invariant: bool = False

    @property
    def quantized(self) -> bool:
        return self.kv_dtype.itemsize == 1

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


@dataclass
class Call:
    """One phase of one layer's forward: the layer's facts, the phase, and the tensors.

    query, out: [num_tokens, num_heads, head_size].
    key, value: [num_tokens, num_kv_heads, head_size], the step's own, or None.
    key_cache, value_cache: [num_blocks, block_size, num_kv_heads, head_size] views, or None for an
        encoder.
    k_scale, v_scale: float32 tensors of one element on the device.
    lse: [num_tokens, num_heads] float32 to fill, or None.
    """

    layer: Layer
    phase: Phase
    query: torch.Tensor
    key: torch.Tensor | None
    value: torch.Tensor | None
    key_cache: torch.Tensor | None
    value_cache: torch.Tensor | None
    out: torch.Tensor
    scale: float
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    lse: torch.Tensor | None = None

    @property
    def batch(self) -> Batch:
        return self.phase.batch


class Op(Protocol):
    """One way to compute attention.

    name: what XFV1_OPS calls it.
    ragged: decodes and prefills are best served in one call.
    batch_invariant: it can serve layers that ask for that.
    """

    name: str
    ragged: bool
    batch_invariant: bool

    def not_supported_reasons(self, layer: Layer, batch: Batch, device: Device) -> list[str]:
        """Why the op cannot serve the batch, in words; empty if it can.

        The answer depends on the arguments and on installed packages alone, never on the device's
        memory.
        """
        ...

    def run(self, call: Call) -> None:
        """Fill call.out (and call.lse). Rows past the last request's tokens stay as they are."""
        ...


def dtype_reasons(layer: Layer, *dtypes: torch.dtype) -> list[str]:
    """A reason if the layer's dtype is not among the given ones."""
    if layer.dtype in dtypes:
        return []
    return [f"{layer.dtype}: takes {', '.join(map(str, dtypes))}"]


def capability_reasons(
    device: Device, first: tuple[int, int], last: tuple[int, int] = (99, 0)
) -> list[str]:
    """A reason if the device's compute capability is not from first to last."""
    if first <= device.capability <= last:
        return []
    found, least, most = ("{}.{}".format(*version) for version in (device.capability, first, last))
    expected = f"{least} or later" if last == (99, 0) else least if first == last else ""
    return [f"compute capability {found}: expected {expected or f'{least} to {most}'}"]


def feature_reasons(layer: Layer, *supported: str) -> list[str]:
    """One reason for each feature of the layer that is not among the supported ones."""
    present = {
        "sliding_window": layer.sliding_window is not None,
        "softcap": layer.softcap is not None,
        "alibi": layer.alibi,
        "alibi_sqrt": layer.alibi_sqrt,
        "sinks": layer.sinks,
        "fp8": layer.quantized,
        "noncausal": not layer.causal,
    }
    words = {
        "sliding_window": "sliding windows",
        "softcap": "logits softcap",
        "alibi": "ALiBi",
        "alibi_sqrt": "ALiBi's sqrt form",
        "sinks": "attention sinks",
        "fp8": "fp8 KV caches",
        "noncausal": "non-causal attention",
    }
    return [f"no {words[name]}" for name, on in present.items() if on and name not in supported]
