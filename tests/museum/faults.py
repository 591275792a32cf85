"""The museum: each fault as an `AttentionBackend` that `--candidate` can name.

`tests.museum.faults:WindowIgnoredAtDecode` is `tests.museum.plain.Plain`, a correct backend, with
that one fault. A class here is an impl, a builder or a backend that differs from the correct one in
what its docstring says; `@plant` makes it a backend of its name and enters it in the registry.
"""

import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fixtures.cases import AttnCase
from fixtures.cases.effects import unless
from tests.museum.plain import (
    INF,
    Call,
    Piece,
    Plain,
    PlainBuilder,
    PlainImpl,
    PlainMetadata,
    exp_minus,
    weigh,
    with_sinks,
)
from tests.museum.registry import Fault, enter

EXACT = "exact"
# Keys to a split of `SplitImpl`, and to a tile of the faults that have tiles.
SPLIT = 64
TILE = 64


# Helpers of several faults.


def everything(seen: torch.Tensor) -> slice:
    """In place of `PlainImpl.span`: all keys, those that no query sees too."""
    return slice(0, seen.shape[1])


def unread(logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The values, with zeros for keys that no query sees: not read, whatever lies there."""
    hidden = (logits == -INF).all(dim=0).all(dim=0)
    return value.masked_fill(hidden[:, None, None], 0.0)


class SplitImpl(PlainImpl):
    """The same in splits of the keys, each with its output and LSE, which are then merged."""

    def attend(self, piece: Piece, logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        parts, lses = [], []
        for at in self.splits(piece, value):
            lse = self.split_lse(piece, logits[..., at])
            parts.append(weigh(exp_minus(logits[..., at], lse[..., None]), value[at]))
            lses.append(lse)
        merged, lse = self.merge(torch.stack(parts), self.laid_out(piece, torch.stack(lses)))
        kept = torch.exp(lse - with_sinks(piece.layer, lse))
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


# How a class becomes a fault.


@dataclass(frozen=True)
class BackendFault(Fault):
    """A fault planted in a backend.

    source: where it was reported.
    model: "exact", or what stands in for what.
    backend: `Plain` with the fault.
    control: it changes no answer that anyone is promised, and has to pass.
    steps: how many the fault takes to show once.
    """

    source: str
    model: str
    backend: type[Plain]
    control: bool = False
    steps: int = 1

    @property
    def candidate(self) -> str:
        """What --candidate calls it."""
        return f"{__name__}:{self.name}"


BACKEND_FAULTS: dict[str, BackendFault] = {}

Shows = Callable[[AttnCase], bool]


def plant(source: str, shows: Shows, model: str = EXACT, **facts: Any) -> Callable[[type], Any]:
    """Make an impl, a builder or a backend class a fault: a backend of the same name.

    shows: the cases whose answer the fault can change.
    """

    def register(kind: type) -> type[Plain]:
        name = kind.__name__
        base, changes = Plain, {}
        if issubclass(kind, Plain):
            base = kind
        else:
            changes["impl" if issubclass(kind, PlainImpl) else "builder"] = kind
        what = " ".join((inspect.getdoc(kind) or "").split())
        backend = type(name, (base,), {"__doc__": what, "__module__": __name__, **changes})
        hidden = unless(shows, "the case has nothing that the fault changes")
        fault = BackendFault(name, what, hidden, source, model, backend, **facts)
        BACKEND_FAULTS[name] = enter(fault)
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
class WindowIgnoredAtDecode(PlainImpl):
    """Decodes ignore the sliding window; prefills obey it."""

    def prepare(self, call: Call) -> Call:
        return layered(call, sliding_window=None) if call.decodes else call


@plant("vLLM #24358", lambda case: case.windowed)
class WindowIgnored(PlainImpl):
    """The sliding window is accepted, and ignored everywhere."""

    def prepare(self, call: Call) -> Call:
        return layered(call, sliding_window=None)


@plant("vLLM #24358", lambda case: case.windowed, control=True)
class WindowRefused(PlainImpl):
    """Sliding windows are refused when the layer is made: slow to serve, and never wrong."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.sliding_window is not None:
            raise NotImplementedError("no sliding windows")


def resized(call: Call, by: int) -> Call:
    window = call.layer.sliding_window
    return call if window is None else layered(call, sliding_window=window + by)


@plant("vLLM #3385", lambda case: case.windowed)
class WindowOneKeyMore(PlainImpl):
    """A window of W attends W + 1 keys."""

    def prepare(self, call: Call) -> Call:
        return resized(call, 1)


@plant("vLLM #3385", lambda case: case.windowed)
class WindowOneKeyLess(PlainImpl):
    """A window of W attends W - 1 keys."""

    def prepare(self, call: Call) -> Call:
        return resized(call, -1)


@plant("SGLang #31501, vLLM #27650", lambda case: case.windowed)
class WindowToWholeBlocks(PlainImpl):
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
class WindowFromPackedRows(PlainImpl):
    """Grouped heads together with a window: the window's edge is another row's."""

    def seen(self, piece: Piece, count: int) -> torch.Tensor:
        window = piece.layer.sliding_window
        causal = PlainImpl.seen(self, _without_window(piece), count)
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
class FirstQueryTileLeavesWindow(PlainImpl):
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
class FirstTileMaskedNaN(PlainImpl):
    """Prefill walks tiles of keys with a running maximum: a first tile that the window hides
    whole gives minus infinity minus minus infinity."""

    def span(self, seen: torch.Tensor) -> slice:
        return everything(seen)

    def attend(self, piece: Piece, logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        value = unread(logits, value)
        if piece.call.decodes or piece.layer.sliding_window is None:
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
        if piece.layer.sinks is not None:
            total = total + torch.exp(piece.layer.sinks[:, None] - largest)
        return (out / total[..., None]).transpose(0, 1)


# Causality, ALiBi, softcap, scales, lengths.


@plant("flash-attention #2528", grouped_prefill)
class CausalLimitFromPackedRows(PlainImpl):
    """Rows are not packed, yet their index is divided by the group: later queries see less."""

    def seen(self, piece: Piece, count: int) -> torch.Tensor:
        seen = super().seen(piece, count)
        if not piece.layer.causal:
            return seen
        limit = piece.length - piece.query_len + piece.index // piece.layer.group
        return seen & (torch.arange(count) <= limit[:, None])


@plant("vLLM #945", lambda case: case.alibi and not case.sinks, control=True)
class AlibiOffByConstant(PlainImpl):
    """ALiBi's distance is one more than it is: the same function under softmax."""

    def distance(self, piece: Piece, keys: torch.Tensor) -> torch.Tensor:
        away = super().distance(piece, keys)
        return away if piece.layer.alibi_sqrt else away + 1.0


@plant(
    "flash-attention #907",
    lambda case: case.alibi and any(q < k for q, k in case.requests),
)
class AlibiFromQueryIndex(PlainImpl):
    """ALiBi counts a query's position from its first new token: wrong if there are fewer queries
    than keys."""

    def distance(self, piece: Piece, keys: torch.Tensor) -> torch.Tensor:
        return (piece.index[:, None] - keys).abs().float()


@plant("vLLM 0.11.2's xformers.py", lambda case: case.softcap is not None and 1 in case.query_lens)
class SoftcapDroppedAtDecode(PlainImpl):
    """Decodes ignore the softcap."""

    def prepare(self, call: Call) -> Call:
        return layered(call, softcap=None) if call.decodes else call


@plant("vLLM #56578", lambda case: case.softcap is not None)
class SoftcapByExpRatio(PlainImpl):
    """tanh as a ratio of exponentials: infinity over infinity far above the cap."""

    def tanh(self, x: torch.Tensor) -> torch.Tensor:
        power = torch.exp(2.0 * x)
        return (power - 1.0) / (power + 1.0)


def unscaled(call: Call, *names: str) -> Call:
    return layered(call, **{name: torch.ones(1) for name in names})


@plant("vLLM 0.11.2's xformers.py", lambda case: case.quantized and 1 in case.query_lens)
class ScalesDroppedAtDecode(PlainImpl):
    """Decodes read a quantized cache without its scales."""

    def prepare(self, call: Call) -> Call:
        return unscaled(call, "k_scale", "v_scale") if call.decodes else call


@plant("vLLM #42580", lambda case: case.quantized)
class KeyScaleDropped(PlainImpl):
    """Keys are read without their scale."""

    def prepare(self, call: Call) -> Call:
        return unscaled(call, "k_scale")


@plant("vLLM #42580", lambda case: case.quantized)
class ValueScaleDropped(PlainImpl):
    """Values are read without their scale."""

    def prepare(self, call: Call) -> Call:
        return unscaled(call, "v_scale")


@plant(
    "vLLM #53754",
    lambda case: case.quantized,
)
class QueryScaleAppliedTwice(PlainImpl):
    """Queries come quantized, and their scale is applied twice."""

    supports_quant_query_input = True

    def forward(self, layer: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if query.itemsize == 1:
            output = args[4] if len(args) > 4 else kwargs["output"]
            query = (query.float() * layer._q_scale * layer._q_scale).to(output.dtype)
        return super().forward(layer, query, *args, **kwargs)


@plant(
    "xFormers #1122, vLLM #9026",
    lambda case: case.paged and any(q > 1 and k % 8 for q, k in case.requests),
    "model of a mask cut for more keys than there are: for their number rounded up to 8",
)
class MaskLongerThanKeys(PlainImpl):
    """Prefill's mask is longer than the keys and aligned at its own end: queries see keys that
    come after them, and what lies past the last."""

    def read(self, piece: Piece, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        longer = piece.paged and not piece.call.decodes
        return super().read(piece, -(-count // 8) * 8 if longer else count)

    def seen(self, piece: Piece, count: int) -> torch.Tensor:
        return super().seen(dataclasses.replace(piece, length=count), count)


@plant("vLLM #29134", lambda case: case.drafts > 0 and case.attention == "decoder")
class HostsLengthsTaken(PlainImpl):
    """Where drafts are verified, requests have the keys that the host supposes: those of rejected
    drafts too."""

    def prepare(self, call: Call) -> Call:
        known = call.host_lens
        return call if known is None else dataclasses.replace(call, seq_lens=known)


# Extreme logits and empty states.


@plant("FlashInfer #4401", lambda case: case.logits == "extreme" and case.softcap is None)
class FiniteMinusInfinity(PlainImpl):
    """The running maximum of the raw products starts at -5e4: all below it underflow to zero."""

    def attend(self, piece: Piece, logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        largest = logits.amax(dim=-1, keepdim=True).clamp(min=-5e4 * piece.layer.scale)
        weights = torch.exp(logits - largest)
        total = weights.sum(dim=-1, keepdim=True)
        if piece.layer.sinks is not None:
            total = total + torch.exp(piece.layer.sinks[:, None, None] - largest)
        out = weigh(weights, value) / total.clamp(min=1e-30)
        return out.transpose(0, 1)


@plant("FlashInfer #4401", every, control=True)
class RowWithoutKeysNaN(PlainImpl):
    """A query that sees no key gives NaN. No batch of vLLM's V1 has one: a window holds the
    query's own key, and no request has more queries than keys."""

    def attend(self, piece: Piece, logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        lse = with_sinks(piece.layer, logits.logsumexp(dim=-1))
        return weigh(torch.exp(logits - lse[..., None]), value).transpose(0, 1)


@plant(
    "FlashInfer #3716",
    lambda case: case.attention in ("noncausal", "cross") and 1 in case.query_lens,
)
class PaddedLanesCounted(PlainImpl):
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
class ValuesBeforeWindowRead(PlainImpl):
    """Values wholly before the window are read, and weighed by zero: NaN there leaks."""

    def span(self, seen: torch.Tensor) -> slice:
        return everything(seen)


@plant("flash-attention #1745, #2374", lambda case: case.tailed)
class TailValuesWeighedByZero(PlainImpl):
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
class TailKeysMaskedByAddition(PlainImpl):
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
class StaleTableEntryFollowed(PlainImpl):
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
class TableReadPastItsEnd(PlainImpl):
    """Table entries are read 32 at a time, without a look at the row's end."""

    def read(self, piece: Piece, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        if piece.paged:
            table = piece.call.block_table
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
class SplitReadsPastTheEnd(SplitImpl):
    """The last split is read to its whole size, past the last block of the request."""

    def read(self, piece: Piece, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not piece.paged:
            return super().read(piece, count)
        held = piece.call.block_table.shape[1] * piece.block_size
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
    return key * piece.layer.k_scale, value * piece.layer.v_scale


@plant(
    "vLLM #50427, #47671, flash-attention #772",
    lambda case: case.paged,
    "model of int32: 16 bits, which the suite's caches pass",
)
class BlockOffsetIn16Bits(PlainImpl):
    """Block times stride overflows: blocks far into the cache are read elsewhere."""

    def read(self, piece: Piece, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not piece.paged:
            return super().read(piece, count)
        return dequantized(piece, offsets_wrapped(piece, count, 16))


@plant("vLLM #50427, #47671, flash-attention #772", lambda case: case.paged)
class BlockOffsetIn32Bits(PlainImpl):
    """Block times stride overflows int32: blocks far into the cache are read elsewhere."""

    def read(self, piece: Piece, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not piece.paged:
            return super().read(piece, count)
        return dequantized(piece, offsets_wrapped(piece, count, 32))


@plant("aiter #3498, vLLM #47056", lambda case: case.paged and case.kv_layout[0] == "B")
class ContiguousBlocksAssumed(PlainImpl):
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
class RepeatedBlockLost(PlainImpl):
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
class SummedInBlockOrder(PlainImpl):
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
class PageOffsetIn7Bits(PlainImpl):
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
class DivisionByZeroAbove16(PlainImpl):
    """Rows of 16 hold 16 // group queries each: none for more heads to one than 16."""

    def prepare(self, call: Call) -> Call:
        rows = 16 // call.layer.group
        assert -(-len(call.query) // rows) > 0
        return call


@plant(
    "vLLM #14253, #40859",
    mixed,
    "model of: the slice of the batch that prefills' tables come from starts at the decodes",
)
class PhasesSwapped(PlainImpl):
    """In a mixed batch prefills read the blocks of the requests that decode."""

    def calls(self, *args: Any) -> list[Call]:
        calls = super().calls(*args)
        if len(calls) < 2:
            return calls
        decode, prefill = calls
        metadata: PlainMetadata = args[5]
        table = metadata.block_table[: len(prefill.seq_lens)]
        return [decode, dataclasses.replace(prefill, block_table=table)]


@plant(
    "FlashInfer #3864",
    lambda case: case.quantized and case.windowed and 8 in case.query_lens,
    "model of: one row of one head, the one whose largest weight is largest, misses that key",
)
class OneRowOfOneHead(PlainImpl):
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
class Head80Crashes(PlainImpl):
    """Decodes of head size 80 are an illegal instruction."""

    def prepare(self, call: Call) -> Call:
        if call.decodes and call.layer.head_size == 80:
            raise RuntimeError("CUDA error: an illegal instruction was encountered")
        return call


@plant(
    "seen with xFormers 0.0.35",
    lambda case: sum(q == 1 for q in case.query_lens) > 32,
)
class NoOpAbove32Decodes(PlainImpl):
    """The layer is accepted; then a step of more than 32 decodes finds no operator."""

    def prepare(self, call: Call) -> Call:
        if call.decodes and len(call.seq_lens) > 32:
            raise NotImplementedError("No operator found for `memory_efficient_attention_forward`")
        return call


# Splits of the keys, and how they are merged.


@plant("none: the same function in splits", every, control=True)
class Split(SplitImpl):
    """Splits of the keys, merged as they should be."""


@plant(
    "vLLM #22003",
    lambda case: split(case) and case.group > 1 and case.num_kv_heads > 1,
    "model of: the LSE that is laid out wrong is what the splits are merged by",
)
class SplitLseTransposed(SplitImpl):
    """Splits' LSEs are written by (head in its group, KV head) and read the other way round."""

    def laid_out(self, piece: Piece, lses: torch.Tensor) -> torch.Tensor:
        kv_heads = piece.layer.num_kv_heads
        swapped = lses.unflatten(1, (kv_heads, -1)).transpose(1, 2).flatten(1, 2)
        return torch.cat([lses[:1], swapped[1:]])


@plant("FlashInfer #58", split, "model of: splits' LSEs are logarithms of base 2, read as natural")
class SplitLseBase2(SplitImpl):
    """Once the keys are split, LSEs are wrong."""

    def laid_out(self, piece: Piece, lses: torch.Tensor) -> torch.Tensor:
        return lses * math.log2(math.e) if len(lses) > 1 else lses


@plant("FlashInfer #4051", lambda case: len(set(case.seq_lens)) > 1)
class EmptyStatesMergedToNaN(SplitImpl):
    """The batch's longest request decides the 4 splits; of a shorter one's the last are empty,
    and two empty ones merge to NaN."""

    def splits(self, piece: Piece, value: torch.Tensor) -> list[slice]:
        size = max(-(-piece.call.max_seq_len // 4), 1)
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
class LongMaskedPrefixNaN(SplitImpl):
    """A split that the mask hides whole has no maximum to subtract: NaN."""

    def span(self, seen: torch.Tensor) -> slice:
        return everything(seen)

    def attend(self, piece: Piece, logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return super().attend(piece, logits, unread(logits, value))

    def split_lse(self, piece: Piece, logits: torch.Tensor) -> torch.Tensor:
        if not piece.call.decodes:
            return super().split_lse(piece, logits)
        largest = logits.amax(dim=-1, keepdim=True)
        return largest[..., 0] + torch.exp(logits - largest).sum(dim=-1).log()


@plant(
    "lmdeploy #4920",
    lambda case: 1 in case.query_lens and max(case.seq_lens) > 20000,
    "model of a miscompiled reducer: past 20,000 keys it takes each split's neighbour's LSE",
)
class ReducerBreaksAt20kKeys(SplitImpl):
    """Decodes of more than 20,000 keys are merged wrong."""

    def laid_out(self, piece: Piece, lses: torch.Tensor) -> torch.Tensor:
        return lses.roll(1, dims=0) if piece.call.decodes and piece.length > 20000 else lses


@plant(
    "torchtitan #3235",
    every,
    "model of a race: every 100th step, so that it can be repeated",
    steps=100,
)
class NaNOnceInAHundredSteps(PlainImpl):
    """About 1 % of steps give NaN, whatever the input."""

    # All layers count together, because each test makes a new layer.
    steps: ClassVar["itertools.count[int]"] = itertools.count(1)

    def run(self, call: Call) -> None:
        super().run(call)
        if next(self.steps) % 100 == 0:
            call.out[0] = float("nan")


# What one kind of test alone can tell: see docs/results.


@plant(
    "none: an op's buffers cleared for all rows it is given",
    lambda case: case.pad_tokens > 0 and not case.pad_reqs,
)
class PaddingRowsCleared(PlainImpl):
    """The output's rows past the batch's tokens are set to zero: they belong to nobody, and a
    graph's other kernels may have filled them."""

    def forward(self, layer: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output: torch.Tensor = kwargs["output"]
        super().forward(layer, query, *args, **kwargs)
        output[args[3].num_actual_tokens :] = 0.0
        return output


@plant(
    "FlashInfer #4401",
    lambda case: case.causal and max(case.query_lens) > 1 and case.dtype != "fp16",
    "model of a finite minus infinity: 40 below the largest logit, a weight of 4e-18",
)
class FutureWeighedByLittle(PlainImpl):
    """Keys ahead of a query are masked by a finite number: a little of them is seen."""

    def mask(self, logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        masked, keys = super().mask(logits, seen), torch.arange(seen.shape[1])
        ahead = keys > (seen * keys).amax(dim=1, keepdim=True)
        return torch.where(ahead, masked.amax(dim=-1, keepdim=True) - 40.0, masked)


@plant(
    "none: tails cleared, so that no NaN lies there to be read",
    lambda case: case.tailed and not case.kv_sharing and case.attention == "decoder",
)
class TailCleared(PlainImpl):
    """What follows a new token in its block is set to zero, though it belongs to nobody yet."""

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        size = kv_cache.shape[2]
        for slot in slot_mapping[slot_mapping >= 0].tolist():
            kv_cache[slot // size, :, slot % size + 1 :] = 0
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)


class RememberingImpl(PlainImpl):
    """An impl that keeps something from step to step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept: dict[Any, Any] = {}


@plant(
    "none: a plan that is made again only where it has to be",
    lambda case: case.paged and max(case.seq_lens) > SPLIT,
    "model of: the warm path sums keys the other way round",
)
class WarmPlanCutsOtherwise(RememberingImpl):
    """A second step over the very same block table takes a plan that is kept by its address, and
    that cuts the keys otherwise: the same answer, other bits."""

    def prepare(self, call: Call) -> Call:
        # The table is kept, so that no other one gets its address.
        key = (call.block_table.data_ptr(), call.decodes)
        self.warm = key in self.kept
        self.kept[key] = call.block_table
        return call

    def attend(self, piece: Piece, logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if self.warm:
            logits, value = logits.flip(-1), value.flip(0)
        return super().attend(piece, logits, value)


@plant(
    "none: a plan kept by what a batch's order does not change",
    lambda case: case.paged and len(set(case.seq_lens)) > 1 and case.attention == "decoder",
)
class PlanKeptWhereOrderDiffers(RememberingImpl):
    """The requests' numbers of keys are kept from step to step, by how many there are, of how many
    tokens, and the longest: the same requests in another order get each other's."""

    def prepare(self, call: Call) -> Call:
        starts = call.query_start_loc
        key = (call.decodes, len(call.seq_lens), int(starts[-1] - starts[0]), call.max_seq_len)
        return dataclasses.replace(call, seq_lens=self.kept.setdefault(key, call.seq_lens))


@plant(
    "none: a persistent buffer of which more is read than was written",
    lambda case: case.paged and case.kind == "decode" and len(set(case.seq_lens)) > 2,
)
class LargerBatchLeftBehind(RememberingImpl):
    """The last request's number of keys is read one too far in a buffer that an earlier step has
    filled further."""

    def prepare(self, call: Call) -> Call:
        lens = call.seq_lens
        before = self.kept.get(call.decodes, lens)
        self.kept[call.decodes] = torch.cat([lens, before[len(lens) :]])
        late = before[len(lens) : len(lens) + 1]
        if late.numel():
            lens = torch.cat([lens[:-1], late])
        return dataclasses.replace(call, seq_lens=lens)


@plant(
    "none: a gathered copy of the cache kept by the blocks it is of",
    lambda case: case.paged and min(case.query_lens) > 1 and case.attention == "decoder",
)
class GatheredKeysKeptByBlocks(RememberingImpl):
    """Keys and values are gathered once for the blocks that hold them: what a later step adds to
    the last block is not seen."""

    def read(self, piece: Piece, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not piece.paged:
            return super().read(piece, count)
        ids = tuple(piece.blocks(count).tolist())
        whole = super().read(piece, len(ids) * piece.block_size)
        key, value = self.kept.setdefault(ids, whole)
        return key[:count], value[:count]


def captured(case: AttnCase) -> bool:
    return case.kind == "decode" and case.attention == "decoder" and min(case.seq_lens) > 1


class LensBuilder(PlainBuilder):
    """A builder that tells a step's lengths in a tensor of its own."""

    def build(self, *args: Any, **kwargs: Any) -> PlainMetadata:
        metadata = super().build(*args, **kwargs)
        metadata.seq_lens = self.lens(metadata)
        return metadata

    def lens(self, metadata: PlainMetadata) -> torch.Tensor:
        """[num_reqs] int32."""
        return metadata.seq_lens[: metadata.num_reqs].clone()


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

    def lens(self, metadata: PlainMetadata) -> torch.Tensor:
        lens = self.kept[int(metadata.max_seq_len > 32768), : metadata.num_reqs]
        lens.copy_(metadata.seq_lens[: metadata.num_reqs])
        return lens
