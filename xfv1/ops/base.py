"""What an op is told, and what it has to answer."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from xfv1.device import Device

DECODE, PREFILL, ENCODER = "decode", "prefill", "encoder"
PHASES = (DECODE, PREFILL, ENCODER)


@dataclass(frozen=True)
class Layer:
    """What does not change from step to step: one attention layer and its cache.

    dtype: of query, key, value and output. kv_dtype: what the cache stores, a torch float8 dtype
    or the same as dtype. block_size: 0 where there is no cache. causal: decoder attention.
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


@dataclass(frozen=True)
class Batch:
    """What an op may decide by, of one phase of one step; host facts only.

    uniform: every request has max_query_len tokens. fresh: no request has context, and key and
    value hold all there is to attend to. token_major: the cache can be viewed as
    [num_blocks * block_size, num_kv_heads, head_size]. lse: the caller wants the LSE too, to merge
    this with another part of the keys; a request may have none in this one. host_lens: the host
    knows every request's number of keys.
    """

    phase: str
    num_reqs: int = 1
    max_query_len: int = 1
    max_seq_len: int = 1
    uniform: bool = True
    fresh: bool = False
    token_major: bool = True
    lse: bool = False
    host_lens: bool = True

    @property
    def own_keys(self) -> bool:
        """Whether all keys are those of the step's own tokens."""
        return self.phase == ENCODER or self.fresh


@dataclass
class Call:
    """One phase of one layer's forward: the tensors.

    query, out: [num_tokens, num_heads, head_size]. key, value: [num_tokens, num_kv_heads,
    head_size], this step's own. key_cache, value_cache: [num_blocks, block_size, num_kv_heads,
    head_size] views, None for an encoder. query_start_loc: [num_reqs + 1], seq_lens: [num_reqs],
    block_table: [num_reqs, max_blocks], all int32 on the device; *_cpu: the same on the host,
    seq_lens_cpu an upper bound, exact if batch.host_lens, or None. k_scale, v_scale: float32
    device tensors of one element. lse: [num_tokens, num_heads] float32 to fill, or None.
    plans: kept for all layers of one step, so that what depends on the batch alone is made once.
    """

    layer: Layer
    batch: Batch
    query: torch.Tensor
    key: torch.Tensor | None
    value: torch.Tensor | None
    key_cache: torch.Tensor | None
    value_cache: torch.Tensor | None
    out: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens_cpu: torch.Tensor | None
    scale: float
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    plans: dict[Any, Any] = field(default_factory=dict)


class Op(Protocol):
    """One way to compute attention.

    name: what XFV1_OPS calls it. ragged: decodes and prefills are best served in one call.
    batch_invariant: it can serve layers that ask for that.
    """

    name: str
    ragged: bool
    batch_invariant: bool

    def not_supported_reasons(self, layer: Layer, batch: Batch, device: Device) -> list[str]:
        """Why not, in words; empty if it can. Looks at nothing but its arguments and what is
        installed, and never at the device's memory."""
        ...

    def run(self, call: Call) -> None:
        """Fill call.out (and call.lse). Rows past the last request's stay as they are."""
        ...


def capability_reasons(
    device: Device, first: tuple[int, int], last: tuple[int, int] = (99, 0)
) -> list[str]:
    """Why not, where the device's compute capability is not from first to last."""
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
