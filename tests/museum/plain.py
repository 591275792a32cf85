"""A plain PyTorch backend for vLLM V1, which is correct and slow.

`--candidate=tests.museum.plain:Plain` runs it. It serves every feature of the matrix on a CPU. It
is a second implementation beside `reference`: request by request, in float32, and each stage is a
method, so that a planted fault (`tests.museum.faults`) replaces one stage. It uses neither xfv1 nor
`reference`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

INF = float("inf")
ENCODERS = (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)
# Integers as wide as a cache's elements: PyTorch indexes few float8 tensors.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


# The question.


@dataclass(frozen=True)
class Layer:
    """One attention layer.

    alibi_slopes, sinks: [num_heads] float32, or None. k_scale, v_scale: tensors of one element, by
    which a quantized cache is multiplied; 1 for any other cache.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    causal: bool
    quantized: bool
    sliding_window: int | None
    softcap: float | None
    alibi_slopes: torch.Tensor | None
    alibi_sqrt: bool
    sinks: torch.Tensor | None
    k_scale: torch.Tensor
    v_scale: torch.Tensor

    @property
    def group(self) -> int:
        """How many query heads read one KV head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class Call:
    """Some consecutive requests of a step, of one layer.

    decodes: whether they are the step's decodes. query, out: [num_rows, num_heads, head_size], of
    the whole step. key, value: [num_rows, num_kv_heads, head_size], the new ones of the whole step.
    key_cache, value_cache: [num_blocks, block_size, num_kv_heads, head_size], None for an encoder.
    query_start_loc: [num_reqs + 1], rows of the whole step. seq_lens: [num_reqs]. block_table:
    [num_reqs, max_blocks]. host_lens: [num_reqs], the host's upper bounds on seq_lens, or None.
    max_seq_len: the largest of them.
    """

    layer: Layer
    decodes: bool
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    key_cache: torch.Tensor | None
    value_cache: torch.Tensor | None
    out: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    host_lens: torch.Tensor | None
    max_seq_len: int


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
    def index(self) -> torch.Tensor:
        """[query_len]: each query's place among the request's new tokens."""
        return torch.arange(self.query_len)

    @property
    def positions(self) -> torch.Tensor:
        """[query_len]: each query's place in the sequence."""
        return self.index + self.length - self.query_len

    def blocks(self, count: int) -> torch.Tensor:
        """Ids of the blocks that hold the first ``count`` keys."""
        return self.call.block_table[self.request, : -(-count // self.block_size)].long()

    @property
    def block_size(self) -> int:
        assert self.call.key_cache is not None
        return self.call.key_cache.shape[1]

    @property
    def paged(self) -> bool:
        return self.call.key_cache is not None


def pieces(call: Call) -> Iterator[Piece]:
    """The requests of a call that have tokens."""
    starts = call.query_start_loc.tolist()
    for request, length in enumerate(call.seq_lens.tolist()):
        rows = slice(starts[request], starts[request + 1])
        if rows.start < rows.stop:
            yield Piece(call, request, rows, length)


# The step's metadata.


@dataclass
class PlainMetadata(AttentionMetadata):
    """One step's batch. All tensors but host_lens are vLLM's own, which a graph refreshes in place.

    num_decodes: how many requests, the first ones, decode: they have the same few tokens, or none.
    decode_len: an upper bound on the number of keys of a decode.
    """

    num_actual_tokens: int
    num_reqs: int
    num_decodes: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    causal: bool
    host_lens: torch.Tensor | None
    max_seq_len: int
    decode_len: int


class PlainBuilder(AttentionMetadataBuilder[PlainMetadata]):
    """Finds where the decodes of a step end, and copies the rest."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The verification of drafts decodes too.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> PlainMetadata:
        common = common_attn_metadata
        threshold = self.reorder_batch_threshold or 1
        num_decodes, *_ = split_decodes_and_prefills(common, threshold, require_uniform=True)
        bound = common.seq_lens_cpu_upper_bound
        known = bound is not None and 0 < num_decodes < common.num_reqs
        return PlainMetadata(
            num_actual_tokens=common.num_actual_tokens,
            num_reqs=common.num_reqs,
            num_decodes=num_decodes,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            causal=common.causal,
            host_lens=bound,
            max_seq_len=common.max_seq_len,
            decode_len=int(bound[:num_decodes].max()) if known else common.max_seq_len,
        )


# The computation.


class PlainImpl(AttentionImpl[PlainMetadata]):
    """Attention in plain PyTorch, decodes and prefills apart, request by request, in stages."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        use_alibi_sqrt: bool = False,
    ) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = scale
        # vLLM makes layers where the default dtype is the model's.
        self.alibi_slopes = (
            None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        )
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        # vLLM's models spell "no cap" both as None and as 0.
        self.softcap = logits_soft_cap or None
        self.attn_type = attn_type
        self.sinks = sinks
        self.alibi_sqrt = use_alibi_sqrt

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write the new keys and values to their slots; a slot of -1 is padding."""
        cache = self.typed(kv_cache)
        tokens = (slot_mapping >= 0).nonzero().flatten()
        slots, size = slot_mapping[tokens].long(), cache.shape[2]
        new = torch.cat(
            [
                stored(key[tokens], cache.dtype, layer._k_scale),
                stored(value[tokens], cache.dtype, layer._v_scale),
            ],
            dim=-1,
        )
        bits = BITS[cache.itemsize]
        cache.view(bits)[slots // size, :, slots % size] = new.view(bits)

    @property
    def float8(self) -> torch.dtype | None:
        """The dtype of a quantized cache, or None for a cache of the model's dtype."""
        if not self.kv_cache_dtype.startswith("fp8") or self.attn_type in ENCODERS:
            return None
        if self.kv_cache_dtype == "fp8_e5m2":
            return torch.float8_e5m2
        platforms_own: torch.dtype = current_platform.fp8_dtype()
        return platforms_own

    def typed(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """The cache in the dtype that it stores: vLLM allocates a quantized one as bytes."""
        return kv_cache if self.float8 is None else kv_cache.view(self.float8)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: PlainMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of the batch into ``output``, [num_rows, num_heads, head_size]."""
        if attn_metadata is None:
            # vLLM's profiling run.
            return output.fill_(0)
        for call in self.calls(layer, query, key, value, kv_cache, attn_metadata, output):
            self.run(self.prepare(call))
        return output

    def calls(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: PlainMetadata,
        output: torch.Tensor,
    ) -> list[Call]:
        """The step's decodes, then its prefills, whichever there are; an encoder's all at once."""
        encoder = self.attn_type in ENCODERS
        caches: tuple[torch.Tensor | None, ...] = (None, None)
        if not encoder:
            caches = self.typed(kv_cache).transpose(1, 2).split(self.head_size, dim=-1)
        facts = self.layer(layer, metadata.causal)
        decodes, num_reqs = 0 if encoder else metadata.num_decodes, metadata.num_reqs
        host = metadata.host_lens
        return [
            Call(
                layer=facts,
                decodes=first < decodes,
                query=query,
                key=key,
                value=value,
                key_cache=caches[0],
                value_cache=caches[1],
                out=output,
                query_start_loc=metadata.query_start_loc[first : last + 1],
                seq_lens=metadata.seq_lens[first:last],
                block_table=metadata.block_table[first:last],
                host_lens=None if host is None else host[first:last],
                max_seq_len=metadata.decode_len if first < decodes else metadata.max_seq_len,
            )
            for first, last in ((0, decodes), (decodes, num_reqs))
            if first < last
        ]

    def layer(self, layer: Any, causal: bool) -> Layer:
        """The facts of the layer. layer: vLLM's, whose scales are set after it is made."""
        one = torch.ones(1)
        return Layer(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            scale=self.scale,
            causal=causal,
            quantized=self.float8 is not None,
            sliding_window=self.sliding_window,
            softcap=self.softcap,
            alibi_slopes=self.alibi_slopes,
            alibi_sqrt=self.alibi_sqrt,
            sinks=None if self.sinks is None else self.sinks.detach().float(),
            k_scale=layer._k_scale if self.float8 else one,
            v_scale=layer._v_scale if self.float8 else one,
        )

    def prepare(self, call: Call) -> Call:
        """The call as it is computed."""
        return call

    def run(self, call: Call) -> None:
        """Fill the call's rows of ``call.out``."""
        for piece in pieces(call):
            key, value = self.read(piece, piece.length)
            answer = self.answer(piece, key, value, self.seen(piece, len(key)))
            call.out[piece.rows] = answer.to(call.out.dtype)

    def answer(
        self, piece: Piece, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor:
        """[query_len, num_heads, head_size] float32 of one request."""
        span = self.span(seen)
        logits = self.logits(piece, key[span], span.start)
        return self.attend(piece, self.mask(logits, seen[:, span]), value[span])

    def read(self, piece: Piece, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first ``count`` keys and values, [count, num_kv_heads, head_size] float32."""
        call, layer = piece.call, piece.layer
        if call.key_cache is None or call.value_cache is None:
            return call.key[piece.rows].float(), call.value[piece.rows].float()
        ids = piece.blocks(count)
        key, value = (
            cache[ids].flatten(0, 1)[:count].float() for cache in (call.key_cache, call.value_cache)
        )
        return key * layer.k_scale, value * layer.v_scale

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
        """The keys to use: from the first to the last that any query sees."""
        used = seen.any(dim=0).nonzero().flatten()
        return slice(int(used[0]), int(used[-1]) + 1) if used.numel() else slice(0, 0)

    def logits(self, piece: Piece, key: torch.Tensor, first: int) -> torch.Tensor:
        """[num_heads, query_len, num_keys]: scaled, capped, biased.

        first: the position of the first of these keys.
        """
        layer = piece.layer
        query = piece.call.query[piece.rows].float().unflatten(1, (layer.num_kv_heads, layer.group))
        logits = torch.einsum("qhgd,khd->hgqk", query, key).flatten(0, 1) * layer.scale
        if layer.softcap is not None:
            logits = layer.softcap * self.tanh(logits / layer.softcap)
        if layer.alibi_slopes is not None:
            away = self.distance(piece, torch.arange(first, first + len(key)))
            away = away.sqrt() if layer.alibi_sqrt else away
            logits = logits - layer.alibi_slopes[:, None, None] * away
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
        lse = with_sinks(piece.layer, logits.logsumexp(dim=-1))
        return weigh(exp_minus(logits, lse[..., None]), value).transpose(0, 1)


def stored(new: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
    """New keys or values as a cache of that dtype stores them."""
    if dtype.itemsize == 1:
        largest = torch.finfo(dtype).max
        new = (new.float() / scale).clamp(-largest, largest)
    return new.to(dtype)


def exp_minus(x: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """exp(x - offset), 0 where both are minus infinity."""
    return torch.exp(x - offset.masked_fill(offset == -INF, 0.0))


def with_sinks(layer: Layer, lse: torch.Tensor) -> torch.Tensor:
    """The LSE, [num_heads, query_len], with each head's sink in it."""
    return lse if layer.sinks is None else torch.logaddexp(lse, layer.sinks[:, None])


def weigh(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[num_heads, query_len, head_size]: the values' sum by [num_heads, query_len, num_keys]."""
    grouped = weights.unflatten(0, (value.shape[1], -1))
    return torch.einsum("hgqk,khd->hgqd", grouped, value).flatten(0, 1)


class Plain(AttentionBackend):
    """The backend that vLLM asks; a fault gives it another impl or builder."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [
        "auto",
        "float16",
        "bfloat16",
        "fp8",
        "fp8_e4m3",
        "fp8_e5m2",
    ]
    forward_includes_kv_cache_update: bool = False
    impl: ClassVar[type[PlainImpl]] = PlainImpl
    builder: ClassVar[type[PlainBuilder]] = PlainBuilder

    @staticmethod
    def get_name() -> str:
        # The name that vLLM keeps for backends it does not have.
        return "CUSTOM"

    @classmethod
    def get_impl_cls(cls) -> type[PlainImpl]:
        return cls.impl

    @classmethod
    def get_builder_cls(cls) -> type[PlainBuilder]:
        return cls.builder

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_alibi_sqrt(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type in (AttentionType.DECODER, AttentionType.ENCODER_DECODER, *ENCODERS)

    @classmethod
    def supported_kv_cache_layouts(cls) -> None:
        """Any layout: PyTorch reads all strides."""
        return
