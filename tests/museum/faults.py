"""The museum: each fault as an `AttentionBackend` that `--candidate` can name.

`tests.museum.faults:WindowIgnoredAtDecode` is `Plain`, a correct backend over xfv1's CPU op, with
that one fault. A class here is an op, an impl, a builder or a backend that differs from the correct
one in what its docstring says; `@plant` makes it a backend of its name and enters it in `FAULTS`.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionLayer

from fixtures.cases import AttnCase
from xfv1.backend import XFormersAttentionBackend
from xfv1.builder import XFormersMetadataBuilder
from xfv1.impl import XFormersImpl
from xfv1.ops.base import Call, Layer, Op
from xfv1.ops.torch_cpu import TorchCpu
from xfv1.phase import DECODE, Batch, Phase
from xfv1.step import XFormersMetadata

INF = float("inf")
EXACT = "exact"
# Keys to a split of `SplitOp`, and to a tile of the faults that have tiles.
SPLIT = 64
TILE = 64


# The correct backend, in stages that a fault can replace.


@dataclass(frozen=True)
class Piece:
    """One request of a call: its tokens' rows, and how many keys it has."""

    call: Call
    request: int
    rows: slice
    length: int

    @property
    def layer(self) -> Layer:
        return self.call.layer

    @property
    def query_len(self) -> int:
        return int(self.rows.stop - self.rows.start)

    @property
    def decodes(self) -> bool:
        return self.call.batch.kind == DECODE

    @property
    def index(self) -> torch.Tensor:
        """[query_len]: each query's place among the request's new tokens."""
        return torch.arange(self.query_len)

    @property
    def positions(self) -> torch.Tensor:
        """[query_len]: each query's place in the sequence."""
        return self.index + self.length - self.query_len

    def blocks(self, count: int) -> torch.Tensor:
        """Ids of the blocks that hold the first ``count`` keys."""
        return self.call.phase.block_table[self.request, : -(-count // self.block_size)].long()

    @property
    def block_size(self) -> int:
        assert self.call.key_cache is not None
        return self.call.key_cache.shape[1]

    @property
    def paged(self) -> bool:
        return self.call.key_cache is not None


def pieces(call: Call) -> Iterator[Piece]:
    """The requests of a call that have tokens."""
    starts = call.phase.query_start_loc.tolist()
    for request, length in enumerate(call.phase.seq_lens.tolist()):
        rows = slice(starts[request], starts[request + 1])
        if rows.start < rows.stop:
            yield Piece(call, request, rows, length)


class PlainOp(TorchCpu):
    """Attention in plain PyTorch, request by request; decodes and prefills apart."""

    name = "museum"
    ragged = False

    def run(self, call: Call) -> None:
        for piece in pieces(self.prepare(call)):
            key, value = self.read(piece, piece.length)
            seen = self.seen(piece, len(key))
            span = self.span(seen)
            key, value, seen = key[span], value[span], seen[:, span]
            logits = self.mask(self.logits(piece, key, span.start), seen)
            call.out[piece.rows] = self.attend(piece, logits, value).to(call.out.dtype)

    def prepare(self, call: Call) -> Call:
        return call

    def read(self, piece: Piece, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first ``count`` keys and values, [count, num_kv_heads, head_size] float32."""
        return self._keys_and_values(piece.call, piece.request, piece.rows, count)

    def seen(self, piece: Piece, count: int) -> torch.Tensor:
        """[query_len, count] bool."""
        keys = torch.arange(count)
        distance = piece.positions[:, None] - keys
        seen = (keys < piece.length).expand_as(distance)
        if piece.layer.causal:
            seen = seen & (distance >= 0)
        if piece.layer.sliding_window is not None:
            seen = seen & (distance.abs() < piece.layer.sliding_window)
        return seen

    def span(self, seen: torch.Tensor) -> slice:
        """The keys to read: from the first to the last that any query sees."""
        used = seen.any(dim=0).nonzero().flatten()
        return slice(int(used[0]), int(used[-1]) + 1) if used.numel() else slice(0, 0)

    def logits(self, piece: Piece, key: torch.Tensor, first: int) -> torch.Tensor:
        """[num_heads, query_len, num_keys]: scaled, capped, biased. first: the first key's
        position."""
        layer, call = piece.layer, piece.call
        query = call.query[piece.rows].float().unflatten(1, (layer.num_kv_heads, layer.group))
        logits = torch.einsum("qhgd,khd->hgqk", query, key).flatten(0, 1) * call.scale
        if layer.softcap is not None:
            logits = layer.softcap * self.tanh(logits / layer.softcap)
        if call.alibi_slopes is not None:
            away = self.distance(piece, torch.arange(first, first + len(key)))
            away = away.sqrt() if layer.alibi_sqrt else away
            logits = logits - call.alibi_slopes[:, None, None] * away
        return logits

    def tanh(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)

    def distance(self, piece: Piece, keys: torch.Tensor) -> torch.Tensor:
        """[query_len, num_keys] float32: how far a key lies, for ALiBi."""
        return (piece.positions[:, None] - keys).abs().float()

    def mask(self, logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        return logits.masked_fill(~seen, -INF)

    def attend(self, piece: Piece, logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[query_len, num_heads, head_size] float32 of masked logits."""
        lse = with_sinks(piece.call, logits.logsumexp(dim=-1))
        return weigh(exp_minus(logits, lse[..., None]), value).transpose(0, 1)


def exp_minus(x: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """exp(x - offset), 0 where both are minus infinity."""
    return torch.exp(x - offset.masked_fill(offset == -INF, 0.0))


def with_sinks(call: Call, lse: torch.Tensor) -> torch.Tensor:
    """The LSE, [num_heads, query_len], with each head's sink in it."""
    return lse if call.sinks is None else torch.logaddexp(lse, call.sinks.float()[:, None])


def weigh(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[num_heads, query_len, head_size]: the values' sum by [num_heads, query_len, num_keys]."""
    grouped = weights.unflatten(0, (value.shape[1], -1))
    return torch.einsum("hgqk,khd->hgqd", grouped, value).flatten(0, 1)


def everything(seen: torch.Tensor) -> slice:
    """In place of `PlainOp.span`: all keys, those that no query sees too."""
    return slice(0, seen.shape[1])


def unread(logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The values, with zeros for keys that no query sees: not read, whatever lies there."""
    hidden = (logits == -INF).all(dim=0).all(dim=0)
    return value.masked_fill(hidden[:, None, None], 0.0)


class SplitOp(PlainOp):
    """The same in splits of the keys, each with its output and LSE, which are then merged."""

    def attend(self, piece: Piece, logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        parts, lses = [], []
        for at in self.splits(piece, value):
            lse = self.split_lse(piece, logits[..., at])
            parts.append(weigh(exp_minus(logits[..., at], lse[..., None]), value[at]))
            lses.append(lse)
        merged, lse = self.merge(torch.stack(parts), self.laid_out(piece, torch.stack(lses)))
        kept = torch.exp(lse - with_sinks(piece.call, lse))
        return (merged * kept[..., None].nan_to_num(0.0)).transpose(0, 1)

    def splits(self, piece: Piece, value: torch.Tensor) -> list[slice]:
        """Which keys each split has."""
        return [slice(at, at + SPLIT) for at in range(0, max(len(value), 1), SPLIT)]

    def split_lse(self, piece: Piece, logits: torch.Tensor) -> torch.Tensor:
        """[num_heads, query_len] of one split."""
        return logits.logsumexp(dim=-1)

    def laid_out(self, piece: Piece, lses: torch.Tensor) -> torch.Tensor:
        """[splits, num_heads, query_len], as the merge reads them."""
        return lses

    def merge(self, parts: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lse = lses.logsumexp(dim=0)
        return (parts * exp_minus(lses, lse)[..., None]).sum(dim=0), lse


class MuseumImpl(XFormersImpl):
    """xfv1's impl with one op, whatever the batch."""

    op: ClassVar[Op] = PlainOp()

    def _op(self, facts: Layer, batch: Batch, phase: Phase, query: torch.Tensor) -> Op:
        return self.op


class Plain(XFormersAttentionBackend):
    """The correct candidate."""

    impl: ClassVar[type[MuseumImpl]] = MuseumImpl
    builder: ClassVar[type[XFormersMetadataBuilder]] = XFormersMetadataBuilder

    @classmethod
    def get_builder_cls(cls) -> type[XFormersMetadataBuilder]:
        return cls.builder

    @classmethod
    def get_impl_cls(cls) -> type[MuseumImpl]:
        return cls.impl


# The table of faults, and how a class gets into it.


Shows = Callable[[AttnCase], bool]


@dataclass(frozen=True)
class Fault:
    """One exhibit.

    name: of the backend class here. source: where it was reported. what: what it does. model:
    "exact", or what stands in for what. shows: the cases whose answer it can change. control: it
    changes no answer that anyone is promised, and has to pass. steps: how many the fault takes to
    show once.
    """

    name: str
    source: str
    what: str
    model: str
    shows: Shows
    backend: type[Plain]
    control: bool = False
    steps: int = 1

    @property
    def candidate(self) -> str:
        """What --candidate calls it."""
        return f"{__name__}:{self.name}"


FAULTS: dict[str, Fault] = {}


def plant(source: str, shows: Shows, model: str = EXACT, **facts: Any) -> Callable[[type], Any]:
    """Make an op, an impl, a builder or a backend class a fault: a backend of the same name."""

    def register(kind: type) -> type[Plain]:
        name = kind.__name__
        base, changes = Plain, {}
        if issubclass(kind, Plain):
            base = kind
        elif issubclass(kind, MuseumImpl):
            changes["impl"] = kind
        elif issubclass(kind, XFormersMetadataBuilder):
            changes["builder"] = kind
        else:
            changes["impl"] = type(f"{name}Impl", (MuseumImpl,), {"op": kind()})
        what = " ".join((inspect.getdoc(kind) or "").split())
        backend = type(name, (base,), {"__doc__": what, "__module__": __name__, **changes})
        assert name not in FAULTS, name
        FAULTS[name] = Fault(name, source, what, model, shows, backend, **facts)
        return backend

    return register


def layered(call: Call, **changes: Any) -> Call:
    """The call as if of another layer."""
    return dataclasses.replace(call, layer=dataclasses.replace(call.layer, **changes))


# Which cases can tell.


def every(case: AttnCase) -> bool:
    return True


def windowed_at_decode(case: AttnCase) -> bool:
    return case.windowed and 1 in case.query_lens


def windowed_prefill(case: AttnCase) -> bool:
    return case.windowed and max(case.query_lens) > 1


def grouped_prefill(case: AttnCase) -> bool:
    return case.group > 1 and case.causal and max(case.query_lens) > 1


def split(case: AttnCase) -> bool:
    return max(case.seq_lens) > SPLIT


def mixed(case: AttnCase) -> bool:
    return case.kind == "mixed" and case.attention == "decoder"


# Windows.


@plant("vLLM #23969", windowed_at_decode)
class WindowIgnoredAtDecode(PlainOp):
    """Decodes ignore the sliding window; prefills obey it."""

    def prepare(self, call: Call) -> Call:
        return layered(call, sliding_window=None) if call.batch.kind == DECODE else call


@plant("vLLM #24358", lambda case: case.windowed)
class WindowIgnored(PlainOp):
    """The sliding window is accepted, and ignored everywhere."""

    def prepare(self, call: Call) -> Call:
        return layered(call, sliding_window=None)


@plant("vLLM #24358", lambda case: case.windowed, control=True)
class WindowRefused(MuseumImpl):
    """Sliding windows are refused when the layer is made: slow to serve, and never wrong."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.sliding_window is not None:
            raise NotImplementedError("no sliding windows")


def resized(call: Call, by: int) -> Call:
    window = call.layer.sliding_window
    return call if window is None else layered(call, sliding_window=window + by)


@plant("vLLM #3385", lambda case: case.windowed)
class WindowOneKeyMore(PlainOp):
    """A window of W attends W + 1 keys."""

    def prepare(self, call: Call) -> Call:
        return resized(call, 1)


@plant("vLLM #3385", lambda case: case.windowed)
class WindowOneKeyLess(PlainOp):
    """A window of W attends W - 1 keys."""

    def prepare(self, call: Call) -> Call:
        return resized(call, -1)


@plant("SGLang #31501, vLLM #27650", lambda case: case.windowed)
class WindowToWholeBlocks(PlainOp):
    """The window only decides which blocks are read: the oldest key's block is seen whole."""

    def seen(self, piece: Piece, count: int) -> torch.Tensor:
        seen = super().seen(piece, count)
        if piece.layer.sliding_window is None or not piece.paged:
            return seen
        first = seen.float().argmax(dim=1) // piece.block_size * piece.block_size
        causal = torch.arange(count) <= piece.positions[:, None]
        return seen | (causal & (torch.arange(count) >= first[:, None]))


@plant(
    "vLLM #17476",
    lambda case: windowed_prefill(case) and case.group > 1,
    "model of the symptom: the window's edge is taken from rows in which grouped heads are packed",
)
class WindowFromPackedRows(PlainOp):
    """Grouped heads together with a window: the window's edge is another row's."""

    def seen(self, piece: Piece, count: int) -> torch.Tensor:
        window = piece.layer.sliding_window
        causal = PlainOp.seen(self, _without_window(piece), count)
        if window is None:
            return causal
        edge = piece.length - piece.query_len + piece.index // piece.layer.group
        return causal & ((edge[:, None] - torch.arange(count)).abs() < window)


def _without_window(piece: Piece) -> Piece:
    return dataclasses.replace(piece, call=layered(piece.call, sliding_window=None))


@plant(
    "FlashInfer #4972",
    lambda case: (
        windowed_prefill(case)
        and case.attention == "noncausal"
        and any(q < k for q, k in case.requests)
    ),
    "model of the symptom: 16 keys of those left of the window",
)
class FirstQueryTileLeavesWindow(PlainOp):
    """Not causal, fewer queries than keys: the first 128 queries see keys left of the window."""

    def seen(self, piece: Piece, count: int) -> torch.Tensor:
        seen = super().seen(piece, count)
        window = piece.layer.sliding_window
        if window is None or piece.layer.causal or piece.query_len == piece.length:
            return seen
        beyond = piece.positions[:, None] - torch.arange(count) - window
        leaves = (beyond >= 0) & (beyond < 16) & (piece.index < 128)[:, None]
        return seen | leaves


@plant("vLLM #4405", windowed_prefill)
class FirstTileMaskedNaN(PlainOp):
    """Prefill walks tiles of keys with a running maximum: a first tile that the window hides
    whole gives minus infinity minus minus infinity."""

    def span(self, seen: torch.Tensor) -> slice:
        return everything(seen)

    def attend(self, piece: Piece, logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        value = unread(logits, value)
        if piece.decodes or piece.layer.sliding_window is None:
            return super().attend(piece, logits, value)
        largest = torch.full(logits.shape[:-1], -INF)
        total = torch.zeros_like(largest)
        out = torch.zeros(*largest.shape, value.shape[-1])
        for tile, values in zip(logits.split(TILE, dim=-1), value.split(TILE), strict=True):
            newest = torch.maximum(largest, tile.amax(dim=-1))
            rescale, p = torch.exp(largest - newest), torch.exp(tile - newest[..., None])
            total = total * rescale + p.sum(dim=-1)
            out = out * rescale[..., None] + weigh(p, values)
            largest = newest
        if piece.call.sinks is not None:
            total = total + torch.exp(piece.call.sinks.float()[:, None] - largest)
        return (out / total[..., None]).transpose(0, 1)


# Causality, ALiBi, softcap, scales, lengths.


@plant("flash-attention #2528", grouped_prefill)
class CausalLimitFromPackedRows(PlainOp):
    """Rows are not packed, yet their index is divided by the group: later queries see less."""

    def seen(self, piece: Piece, count: int) -> torch.Tensor:
        seen = super().seen(piece, count)
        if not piece.layer.causal:
            return seen
        limit = piece.length - piece.query_len + piece.index // piece.layer.group
        return seen & (torch.arange(count) <= limit[:, None])


@plant("vLLM #945", lambda case: case.alibi and not case.sinks, control=True)
class AlibiOffByConstant(PlainOp):
    """ALiBi's distance is one more than it is: the same function under softmax."""

    def distance(self, piece: Piece, keys: torch.Tensor) -> torch.Tensor:
        away = super().distance(piece, keys)
        return away if piece.layer.alibi_sqrt else away + 1.0


@plant(
    "flash-attention #907",
    lambda case: case.alibi and any(q < k for q, k in case.requests),
)
class AlibiFromQueryIndex(PlainOp):
    """ALiBi counts a query's position from its first new token: wrong if there are fewer queries
    than keys."""

    def distance(self, piece: Piece, keys: torch.Tensor) -> torch.Tensor:
        return (piece.index[:, None] - keys).abs().float()


@plant("vLLM 0.11.2's xformers.py", lambda case: case.softcap is not None and 1 in case.query_lens)
class SoftcapDroppedAtDecode(PlainOp):
    """Decodes ignore the softcap."""

    def prepare(self, call: Call) -> Call:
        return layered(call, softcap=None) if call.batch.kind == DECODE else call


@plant("vLLM #56578", lambda case: case.softcap is not None)
class SoftcapByExpRatio(PlainOp):
    """tanh as a ratio of exponentials: infinity over infinity far above the cap."""

    def tanh(self, x: torch.Tensor) -> torch.Tensor:
        power = torch.exp(2.0 * x)
        return (power - 1.0) / (power + 1.0)


def unscaled(call: Call, *names: str) -> Call:
    ones: dict[str, Any] = {name: torch.ones(1) for name in names}
    return dataclasses.replace(call, **ones)


@plant("vLLM 0.11.2's xformers.py", lambda case: case.quantized and 1 in case.query_lens)
class ScalesDroppedAtDecode(PlainOp):
    """Decodes read a quantized cache without its scales."""

    def prepare(self, call: Call) -> Call:
        return unscaled(call, "k_scale", "v_scale") if call.batch.kind == DECODE else call


@plant("vLLM #42580", lambda case: case.quantized)
class KeyScaleDropped(PlainOp):
    """Keys are read without their scale."""

    def prepare(self, call: Call) -> Call:
        return unscaled(call, "k_scale")


@plant("vLLM #42580", lambda case: case.quantized)
class ValueScaleDropped(PlainOp):
    """Values are read without their scale."""

    def prepare(self, call: Call) -> Call:
        return unscaled(call, "v_scale")


@plant(
    "vLLM #53754",
    lambda case: case.quantized,
)
class QueryScaleAppliedTwice(MuseumImpl):
    """Queries come quantized, and their scale is applied twice."""

    supports_quant_query_input = True

    def forward(
        self, layer: AttentionLayer, query: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if query.itemsize == 1:
            output = args[4] if len(args) > 4 else kwargs["output"]
            query = (query.float() * layer._q_scale * layer._q_scale).to(output.dtype)
        return super().forward(layer, query, *args, **kwargs)


@plant(
    "xFormers #1122, vLLM #9026",
    lambda case: case.paged and any(q > 1 and k % 8 for q, k in case.requests),
    "model of a mask cut for more keys than there are: for their number rounded up to 8",
)
class MaskLongerThanKeys(PlainOp):
    """Prefill's mask is longer than the keys and aligned at its own end: queries see keys that
    come after them, and what lies past the last."""

    def read(self, piece: Piece, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        longer = piece.paged and not piece.decodes
        return super().read(piece, -(-count // 8) * 8 if longer else count)

    def seen(self, piece: Piece, count: int) -> torch.Tensor:
        return super().seen(dataclasses.replace(piece, length=count), count)


@plant("vLLM #29134", lambda case: case.drafts > 0 and case.attention == "decoder")
class HostsLengthsTaken(PlainOp):
    """Where drafts are verified, requests have the keys that the host supposes: those of rejected
    drafts too."""

    def prepare(self, call: Call) -> Call:
        known = call.phase.seq_lens_cpu
        if known is None:
            return call
        phase = dataclasses.replace(call.phase, seq_lens=known)
        return dataclasses.replace(call, phase=phase)


# Extreme logits and empty states.


@plant("FlashInfer #4401", lambda case: case.logits == "extreme" and case.softcap is None)
class FiniteMinusInfinity(PlainOp):
    """The running maximum of the raw products starts at -5e4: all below it underflow to zero."""

    def attend(self, piece: Piece, logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        largest = logits.amax(dim=-1, keepdim=True).clamp(min=-5e4 * piece.call.scale)
        weights = torch.exp(logits - largest)
        total = weights.sum(dim=-1, keepdim=True)
        if piece.call.sinks is not None:
            total = total + torch.exp(piece.call.sinks.float()[:, None, None] - largest)
        out = weigh(weights, value) / total.clamp(min=1e-30)
        return out.transpose(0, 1)


@plant("FlashInfer #4401", every, control=True)
class RowWithoutKeysNaN(PlainOp):
    """A query that sees no key gives NaN. No batch of vLLM's V1 has one: a window holds the
    query's own key, and no request has more queries than keys."""

    def attend(self, piece: Piece, logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        lse = with_sinks(piece.call, logits.logsumexp(dim=-1))
        return weigh(torch.exp(logits - lse[..., None]), value).transpose(0, 1)


@plant(
    "FlashInfer #3716",
    lambda case: case.attention in ("noncausal", "cross") and 1 in case.query_lens,
)
class PaddedLanesCounted(PlainOp):
    """Decode that is not causal: lanes up to the tile's end, 256 keys, count in the denominator
    with a logit of zero."""

    def attend(self, piece: Piece, logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if piece.query_len == 1 and not piece.layer.causal:
            lanes = -value.shape[0] % 256
            logits = torch.cat([logits, torch.zeros(*logits.shape[:-1], lanes)], dim=-1)
            value = torch.cat([value, torch.zeros(lanes, *value.shape[1:])])
        return super().attend(piece, logits, value)


# Reads beyond what is a request's own.


@plant("vLLM #30887", lambda case: case.windowed)
class ValuesBeforeWindowRead(PlainOp):
    """Values wholly before the window are read, and weighed by zero: NaN there leaks."""

    def span(self, seen: torch.Tensor) -> slice:
        return everything(seen)


@plant("flash-attention #1745, #2374", lambda case: case.tailed)
class TailValuesWeighedByZero(PlainOp):
    """The last block's slots after the last key are read, and their values weighed by zero."""

    def read(self, piece: Piece, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = piece.block_size if piece.paged else 1
        return super().read(piece, -(-count // size) * size)

    def span(self, seen: torch.Tensor) -> slice:
        return slice(super().span(seen).start, seen.shape[1])


@plant(
    "FlashInfer #941",
    lambda case: case.tailed,
    "model of: the mask is added to the logits, which does not hide NaN",
)
class TailKeysMaskedByAddition(PlainOp):
    """An unfilled last page's keys are masked by adding minus infinity: NaN there leaks."""

    def read(self, piece: Piece, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = piece.block_size if piece.paged else 1
        return super().read(piece, -(-count // size) * size)

    def span(self, seen: torch.Tensor) -> slice:
        return slice(super().span(seen).start, seen.shape[1])

    def mask(self, logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        return logits + torch.zeros(seen.shape).masked_fill(~seen, -INF)

    def attend(self, piece: Piece, logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return super().attend(piece, logits, value.nan_to_num(0.0))


@plant(
    "vLLM #42494",
    lambda case: case.paged,
    "exact; that it faults stands for an illegal memory access",
)
class StaleTableEntryFollowed(PlainOp):
    """The table's entry after a request's last is followed, and what is read there dropped."""

    def read(self, piece: Piece, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        if piece.paged:
            super().read(piece, (-(-count // piece.block_size) + 1) * piece.block_size)
        return super().read(piece, count)


@plant(
    "vLLM #53658, flash-attention #2711",
    lambda case: case.paged,
    "model of: past the table's allocation a read faults, where a GPU's often does not",
)
class TableReadPastItsEnd(PlainOp):
    """Table entries are read 32 at a time, without a look at the row's end."""

    def read(self, piece: Piece, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        if piece.paged:
            table = piece.call.phase.block_table
            lanes = -(-len(piece.blocks(count)) // 32) * 32
            allocated = table.untyped_storage().nbytes() // table.itemsize
            flat = table.as_strided((allocated,), (1,), 0)
            flat[table.storage_offset() + piece.request * table.stride(0) + torch.arange(lanes)]
        return super().read(piece, count)


@plant(
    "xFormers 0.0.25 to 0.0.28's changelog",
    lambda case: case.paged,
    "model of: what the table names past the last block is read, and weighed by zero",
)
class SplitReadsPastTheEnd(SplitOp):
    """The last split is read to its whole size, past the last block of the request."""

    def read(self, piece: Piece, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not piece.paged:
            return super().read(piece, count)
        held = piece.call.phase.block_table.shape[1] * piece.block_size
        return super().read(piece, min(-(-(count + 1) // SPLIT) * SPLIT, held))

    def span(self, seen: torch.Tensor) -> slice:
        return slice(super().span(seen).start, seen.shape[1])


# The cache's memory.


def offsets_wrapped(piece: Piece, count: int, bits: int) -> list[torch.Tensor]:
    """Keys and values where block * stride is computed in so many bits, and signed."""
    found = []
    for cache in (piece.call.key_cache, piece.call.value_cache):
        assert cache is not None
        offset = piece.blocks(count) * cache.stride(0)
        half = 1 << (bits - 1)
        wrapped = (offset + half) % (2 * half) - half + int(cache.storage_offset())
        within = torch.cartesian_prod(*(torch.arange(n) for n in cache.shape[1:]))
        inner = (within * torch.tensor(cache.stride()[1:])).sum(dim=-1).view(cache.shape[1:])
        inner = inner.to(cache.device)
        flat = cache.as_strided((cache.untyped_storage().nbytes() // cache.itemsize,), (1,), 0)
        where = (wrapped[:, None, None, None] + inner).remainder(flat.numel())
        found.append(flat[where].flatten(0, 1)[:count].float())
    return found


def dequantized(piece: Piece, found: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    key, value = found
    if piece.layer.quantized:
        assert piece.call.k_scale is not None and piece.call.v_scale is not None
        return key * piece.call.k_scale, value * piece.call.v_scale
    return key, value


@plant(
    "vLLM #50427, #47671, flash-attention #772",
    lambda case: case.paged,
    "model of int32: 16 bits, which the suite's caches pass",
)
class BlockOffsetIn16Bits(PlainOp):
    """Block times stride overflows: blocks far into the cache are read elsewhere."""

    def read(self, piece: Piece, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not piece.paged:
            return super().read(piece, count)
        return dequantized(piece, offsets_wrapped(piece, count, 16))


@plant("vLLM #50427, #47671, flash-attention #772", lambda case: case.paged)
class BlockOffsetIn32Bits(PlainOp):
    """Block times stride overflows int32: blocks far into the cache are read elsewhere."""

    def read(self, piece: Piece, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not piece.paged:
            return super().read(piece, count)
        return dequantized(piece, offsets_wrapped(piece, count, 32))


@plant("aiter #3498, vLLM #47056", lambda case: case.paged and case.kv_layout[0] == "B")
class ContiguousBlocksAssumed(PlainOp):
    """The stride from block to block is taken to be a block's size, as if there were one layer."""

    def prepare(self, call: Call) -> Call:
        caches: dict[str, Any] = {}
        for name in ("key_cache", "value_cache"):
            cache = getattr(call, name)
            if cache is not None:
                stride = (2 * math.prod(cache.shape[1:]), *cache.stride()[1:])
                caches[name] = cache.as_strided(cache.shape, stride, cache.storage_offset())
        return dataclasses.replace(call, **caches)


@plant("vLLM #30915", lambda case: case.shared_prefix)
class RepeatedBlockLost(PlainOp):
    """Each physical block stands for one place in a sequence, the last that names it: of a block
    that a row names twice, the first place is lost."""

    def seen(self, piece: Piece, count: int) -> torch.Tensor:
        seen = super().seen(piece, count)
        if not piece.paged:
            return seen
        ids = piece.blocks(count).tolist()
        last = {block: place for place, block in enumerate(ids)}
        kept = torch.tensor([last[block] == place for place, block in enumerate(ids)])
        return seen & kept.repeat_interleave(piece.block_size)[:count]


@plant("PyTorch #182593", lambda case: case.paged)
class SummedInBlockOrder(PlainOp):
    """Keys are summed in the order of their blocks in memory: the same answer, other bits."""

    def span(self, seen: torch.Tensor) -> slice:
        # The whole sequence, so that a place in it is a place in the table.
        return everything(seen)

    def attend(self, piece: Piece, logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        value = unread(logits, value)
        if not piece.paged:
            return super().attend(piece, logits, value)
        ids = piece.blocks(len(value)).repeat_interleave(piece.block_size)[: len(value)]
        order = ids.argsort(stable=True)
        return super().attend(piece, logits[..., order], value[order])


@plant("FlashInfer #4347", lambda case: case.paged and case.block_size > 128)
class PageOffsetIn7Bits(PlainOp):
    """A key's place in its page is taken modulo 128: pages over 128 repeat their first half."""

    def prepare(self, call: Call) -> Call:
        if call.key_cache is None or call.value_cache is None:
            return call
        slots = torch.arange(call.key_cache.shape[1]) % 128
        return dataclasses.replace(
            call, key_cache=call.key_cache[:, slots], value_cache=call.value_cache[:, slots]
        )


@plant(
    "vllm-plugin-FL #353, #474",
    lambda case: case.paged and not case.kv_sharing and case.attention != "cross",
)
class NeverStores(Plain):
    """The flag that forward writes the cache is inherited, and forward does not."""

    forward_includes_kv_cache_update = True


# Batches and heads.


@plant("vLLM #23424", lambda case: case.group > 16)
class DivisionByZeroAbove16(PlainOp):
    """Rows of 16 hold 16 // group queries each: none for more heads to one than 16."""

    def prepare(self, call: Call) -> Call:
        rows = 16 // call.layer.group
        assert -(-call.batch.max_query_len // rows) > 0
        return call


@plant(
    "vLLM #14253, #40859",
    mixed,
    "model of: the slice of the batch that prefills' tables come from starts at the decodes",
)
class PhasesSwapped(MuseumImpl):
    """In a mixed batch prefills read the blocks of the requests that decode."""

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: XFormersMetadata,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if attn_metadata is not None and len(attn_metadata.phases) == 2:
            decode, prefill = attn_metadata.phases
            table = attn_metadata.block_table[: prefill.batch.num_reqs]
            wrong = dataclasses.replace(prefill, block_table=table, plans={})
            attn_metadata = dataclasses.replace(attn_metadata, _phases=[decode, wrong])
        return super().forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)


@plant(
    "FlashInfer #3864",
    lambda case: case.quantized and case.windowed and 8 in case.query_lens,
    "model of: one row of one head, the one whose largest weight is largest, misses that key",
)
class OneRowOfOneHead(PlainOp):
    """8 queries, a quantized cache and a window: one (row, head) is wrong, by the data which."""

    def attend(self, piece: Piece, logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        layer = piece.layer
        if piece.query_len == 8 and layer.quantized and layer.sliding_window is not None:
            weights = exp_minus(logits, logits.logsumexp(dim=-1, keepdim=True))
            largest = torch.zeros(weights.numel(), dtype=torch.bool)
            largest[weights.argmax()] = True
            logits = logits.masked_fill(largest.view(weights.shape), -INF)
        return super().attend(piece, logits, value)


@plant("seen with FlashInfer 0.6.14 on an H100", lambda case: case.head_size == 80)
class Head80Crashes(PlainOp):
    """Decodes of head size 80 are an illegal instruction."""

    def prepare(self, call: Call) -> Call:
        if call.batch.kind == DECODE and call.layer.head_size == 80:
            raise RuntimeError("CUDA error: an illegal instruction was encountered")
        return call


@plant(
    "seen with xFormers 0.0.35",
    lambda case: sum(q == 1 for q in case.query_lens) > 32,
)
class NoOpAbove32Decodes(PlainOp):
    """The layer is accepted; then a step of more than 32 decodes finds no operator."""

    def prepare(self, call: Call) -> Call:
        if call.batch.kind == DECODE and call.batch.num_reqs > 32:
            raise NotImplementedError("No operator found for `memory_efficient_attention_forward`")
        return call


# Splits of the keys, and how they are merged.


@plant("none: the same function in splits", every, control=True)
class Split(SplitOp):
    """Splits of the keys, merged as they should be."""


@plant(
    "vLLM #22003",
    lambda case: split(case) and case.group > 1 and case.num_kv_heads > 1,
    "model of: the LSE that is laid out wrong is what the splits are merged by",
)
class SplitLseTransposed(SplitOp):
    """Splits' LSEs are written by (head in its group, KV head) and read the other way round."""

    def laid_out(self, piece: Piece, lses: torch.Tensor) -> torch.Tensor:
        kv_heads = piece.layer.num_kv_heads
        swapped = lses.unflatten(1, (kv_heads, -1)).transpose(1, 2).flatten(1, 2)
        return torch.cat([lses[:1], swapped[1:]])


@plant("FlashInfer #58", split, "model of: splits' LSEs are logarithms of base 2, read as natural")
class SplitLseBase2(SplitOp):
    """Once the keys are split, LSEs are wrong."""

    def laid_out(self, piece: Piece, lses: torch.Tensor) -> torch.Tensor:
        return lses * math.log2(math.e) if len(lses) > 1 else lses


@plant("FlashInfer #4051", lambda case: len(set(case.seq_lens)) > 1)
class EmptyStatesMergedToNaN(SplitOp):
    """The batch's longest request decides the 4 splits; of a shorter one's the last are empty,
    and two empty ones merge to NaN."""

    def splits(self, piece: Piece, value: torch.Tensor) -> list[slice]:
        size = max(-(-piece.call.batch.max_seq_len // 4), 1)
        return [slice(at * size, (at + 1) * size) for at in range(4)]

    def merge(self, parts: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = list(zip(parts, lses, strict=True))
        while len(states) > 1:
            states = [self._two(*states[at], *states[at + 1]) for at in range(0, len(states), 2)]
        return states[0]

    def _two(
        self, one: torch.Tensor, one_lse: torch.Tensor, two: torch.Tensor, two_lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        largest = torch.maximum(one_lse, two_lse)
        a, b = torch.exp(one_lse - largest), torch.exp(two_lse - largest)
        merged = (one * a[..., None] + two * b[..., None]) / (a + b)[..., None]
        return merged, largest + torch.log(a + b)


@plant(
    "xFormers 0.0.25 to 0.0.28's changelog",
    lambda case: (
        windowed_at_decode(case) and max(case.seq_lens) > (case.sliding_window or 0) + SPLIT
    ),
)
class LongMaskedPrefixNaN(SplitOp):
    """A split that the mask hides whole has no maximum to subtract: NaN."""

    def span(self, seen: torch.Tensor) -> slice:
        return everything(seen)

    def attend(self, piece: Piece, logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return super().attend(piece, logits, unread(logits, value))

    def split_lse(self, piece: Piece, logits: torch.Tensor) -> torch.Tensor:
        if not piece.decodes:
            return super().split_lse(piece, logits)
        largest = logits.amax(dim=-1, keepdim=True)
        return largest[..., 0] + torch.exp(logits - largest).sum(dim=-1).log()


@plant(
    "lmdeploy #4920",
    lambda case: 1 in case.query_lens and max(case.seq_lens) > 20000,
    "model of a miscompiled reducer: past 20,000 keys it takes each split's neighbour's LSE",
)
class ReducerBreaksAt20kKeys(SplitOp):
    """Decodes of more than 20,000 keys are merged wrong."""

    def laid_out(self, piece: Piece, lses: torch.Tensor) -> torch.Tensor:
        return lses.roll(1, dims=0) if piece.decodes and piece.length > 20000 else lses


@plant(
    "torchtitan #3235",
    every,
    "model of a race: every 100th step, so that it can be repeated",
    steps=100,
)
class NaNOnceInAHundredSteps(PlainOp):
    """About 1 % of steps give NaN, whatever the input."""

    def __init__(self) -> None:
        self.steps = 0

    def run(self, call: Call) -> None:
        super().run(call)
        self.steps += 1
        if self.steps % 100 == 0:
            call.out[0] = float("nan")


# What one kind of test alone can tell: see docs/results.


@plant(
    "none: an op's buffers cleared for all rows it is given",
    lambda case: case.pad_tokens > 0 and not case.pad_reqs,
)
class PaddingRowsCleared(MuseumImpl):
    """The output's rows past the batch's tokens are set to zero: they belong to nobody, and a
    graph's other kernels may have filled them."""

    def forward(
        self, layer: AttentionLayer, query: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        output: torch.Tensor = kwargs["output"]
        super().forward(layer, query, *args, **kwargs)
        output[args[3].num_actual_tokens :] = 0.0
        return output


@plant(
    "FlashInfer #4401",
    lambda case: case.causal and max(case.query_lens) > 1 and case.dtype != "fp16",
    "model of a finite minus infinity: 40 below the largest logit, a weight of 4e-18",
)
class FutureWeighedByLittle(PlainOp):
    """Keys ahead of a query are masked by a finite number: a little of them is seen."""

    def mask(self, logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        masked, keys = super().mask(logits, seen), torch.arange(seen.shape[1])
        ahead = keys > (seen * keys).amax(dim=1, keepdim=True)
        return torch.where(ahead, masked.amax(dim=-1, keepdim=True) - 40.0, masked)


@plant(
    "none: tails cleared, so that no NaN lies there to be read",
    lambda case: case.tailed and not case.kv_sharing and case.attention == "decoder",
)
class TailCleared(MuseumImpl):
    """What follows a new token in its block is set to zero, though it belongs to nobody yet."""

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        size = kv_cache.shape[2]
        for slot in slot_mapping[slot_mapping >= 0].tolist():
            kv_cache[slot // size, :, slot % size + 1 :] = 0
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)


class RememberingImpl(MuseumImpl):
    """An impl that keeps something from step to step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept: dict[Any, Any] = {}

    def _run(self, facts: Layer, phase: Phase, *args: Any) -> None:
        super()._run(facts, self.remembered(phase), *args)

    def remembered(self, phase: Phase) -> Phase:
        """The phase, with what is left of an earlier one."""
        return phase


class BackwardsOp(PlainOp):
    """Sums the keys from the last to the first, where a plan says so."""

    def attend(self, piece: Piece, logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if piece.call.phase.plans["warm"]:
            logits, value = logits.flip(-1), value.flip(0)
        return super().attend(piece, logits, value)


@plant(
    "none: a plan that is made again only where it has to be",
    lambda case: case.paged and max(case.seq_lens) > SPLIT,
    "model of: the warm path sums keys the other way round",
)
class WarmPlanCutsOtherwise(RememberingImpl):
    """A second step over the very same block table takes a plan that is kept by its address, and
    that cuts the keys otherwise: the same answer, other bits."""

    op = BackwardsOp()

    def remembered(self, phase: Phase) -> Phase:
        # Held on to, so that no other table gets the address.
        key = (phase.block_table.data_ptr(), phase.batch.kind)
        phase.plans["warm"] = key in self.kept
        self.kept[key] = phase.block_table
        return phase


@plant(
    "none: a plan kept by what a batch's order does not change",
    lambda case: case.paged and len(set(case.seq_lens)) > 1 and case.attention == "decoder",
)
class PlanKeptWhereOrderDiffers(RememberingImpl):
    """The requests' numbers of keys are kept from step to step, by how many there are, of how many
    tokens, and the longest: the same requests in another order get each other's."""

    def remembered(self, phase: Phase) -> Phase:
        key = (phase.batch, phase.rows.stop)
        self.kept.setdefault(key, phase.seq_lens)
        return dataclasses.replace(phase, seq_lens=self.kept[key])


@plant(
    "none: a persistent buffer of which more is read than was written",
    lambda case: case.paged and case.kind == "decode" and len(set(case.seq_lens)) > 2,
)
class LargerBatchLeftBehind(RememberingImpl):
    """The last request's number of keys is read one too far in a buffer that an earlier step has
    filled further."""

    def remembered(self, phase: Phase) -> Phase:
        lens = phase.seq_lens
        before = self.kept.get(phase.batch.kind, lens)
        self.kept[phase.batch.kind] = torch.cat([lens, before[len(lens) :]])
        late = before[len(lens) : len(lens) + 1]
        if late.numel():
            lens = torch.cat([lens[:-1], late])
        return dataclasses.replace(phase, seq_lens=lens)


class GatheringOp(PlainOp):
    """Keeps what it gathers, by the blocks it is from."""

    def read(self, piece: Piece, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not piece.paged:
            return super().read(piece, count)
        ids = tuple(piece.blocks(count).tolist())
        whole = super().read(piece, len(ids) * piece.block_size)
        key, value = piece.call.phase.plans["gathered"].setdefault(ids, whole)
        return key[:count], value[:count]


@plant(
    "none: a gathered copy of the cache kept by the blocks it is of",
    lambda case: case.paged and min(case.query_lens) > 1 and case.attention == "decoder",
)
class GatheredKeysKeptByBlocks(RememberingImpl):
    """Keys and values are gathered once for the blocks that hold them: what a later step adds to
    the last block is not seen."""

    op = GatheringOp()

    def remembered(self, phase: Phase) -> Phase:
        phase.plans["gathered"] = self.kept
        return phase


def captured(case: AttnCase) -> bool:
    return case.kind == "decode" and case.attention == "decoder" and min(case.seq_lens) > 1


class LensBuilder(XFormersMetadataBuilder):
    """A builder that tells a step's lengths in a tensor of its own."""

    def build(self, *args: Any, **kwargs: Any) -> XFormersMetadata:
        metadata = super().build(*args, **kwargs)
        lens = self.lens(metadata)
        metadata.whole = dataclasses.replace(metadata.whole, seq_lens=lens)
        return metadata

    def lens(self, metadata: XFormersMetadata) -> torch.Tensor:
        """[num_reqs] int32."""
        return metadata.whole.seq_lens.clone()


@plant("vLLM #42444", captured, "model of a plan: the lengths that a step's metadata is built with")
class PlannedBeforeCapture(LensBuilder):
    """The keys to visit are planned before a graph is captured, and never again."""


@plant("vLLM #27114", captured, "model of two kernels: each has its own tensor of lengths")
class KernelChosenByLongest(LensBuilder):
    """One kernel serves requests to 32,768 keys, another longer ones. A graph is captured with the
    other, as its requests could grow so long, and steps prepare what the first one reads."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept = torch.zeros(2, 1024, dtype=torch.int32, device=self.device)

    def lens(self, metadata: XFormersMetadata) -> torch.Tensor:
        lens = self.kept[int(metadata.max_seq_len > 32768), : metadata.whole.batch.num_reqs]
        lens.copy_(metadata.whole.seq_lens)
        return lens
