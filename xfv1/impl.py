"""One attention layer: write the new keys and values, then run each phase's op."""

from dataclasses import replace
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType

from xfv1 import compat, debug, dispatch
from xfv1.metadata import Phase, XFormersMetadata
from xfv1.ops.base import ENCODER, Batch, Call, Layer, Op, device_of

ENCODERS = (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)


class XFormersImpl(AttentionImpl[XFormersMetadata]):
    """vLLM's AttentionImpl over xfv1's ops.

    Raises:
        NotImplementedError: from the constructor, with each op's reasons, where no op serves the
            layer, so that a model fails when it is loaded and not in its first step.
        ValueError: naming the argument that makes no sense.
    """

    can_return_lse_for_decode = False

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
        self.scale = float(scale)
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        # vLLM's models spell "no cap" both ways.
        self.logits_soft_cap = logits_soft_cap or None
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        self.use_alibi_sqrt = use_alibi_sqrt
        self.alibi_slopes = (
            None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        )
        if num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={num_heads}: expected a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if sinks is not None and sinks.shape[0] != num_heads:
            raise ValueError(f"sinks of {sinks.shape[0]} heads: expected num_heads={num_heads}")
        self.fp8_dtype = compat.fp8_dtype(kv_cache_dtype)
        self.debug = debug.enabled()
        self._layers: dict[tuple[torch.dtype, int, bool], Layer] = {}
        device = device_of(compat.device_kind())
        encoder = attn_type in ENCODERS
        causal = attn_type == AttentionType.DECODER
        layer = self._layer(torch.get_default_dtype(), 0 if encoder else 16, causal)
        # Cross attention's lengths are the encoder's, which only the device knows.
        kind = {"encoder": encoder, "host_lens": attn_type != AttentionType.ENCODER_DECODER}
        if refused := dispatch.layer_reasons(layer, device, **kind):
            raise NotImplementedError("xfv1: " + "; ".join(refused))
        compat.log_once("xfv1: %s", dispatch.summary(layer, device, **kind))

    def _layer(self, dtype: torch.dtype, block_size: int, causal: bool) -> Layer:
        key = (dtype, block_size, causal)
        if key not in self._layers:
            self._layers[key] = Layer(
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_size=self.head_size,
                dtype=dtype,
                kv_dtype=self.fp8_dtype or dtype,
                block_size=block_size,
                sliding_window=self.sliding_window,
                softcap=self.logits_soft_cap,
                alibi=self.alibi_slopes is not None,
                alibi_sqrt=self.use_alibi_sqrt and self.alibi_slopes is not None,
                sinks=self.sinks is not None,
                causal=causal,
            )
        return self._layers[key]

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        if self.sinks is not None:
            self.sinks = self.sinks.detach()

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write this step's keys and values to their slots.

        key, value: [num_rows, num_kv_heads, head_size], rows past slot_mapping's are padding.
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size].
        """
        if self.attn_type in ENCODERS:
            return
        if self.debug:
            debug.check_update(self, key, value, kv_cache, slot_mapping)
        if not slot_mapping.numel():
            return
        key_cache, value_cache = self._split(kv_cache)
        compat.write_kv(
            key, value, key_cache, value_cache, slot_mapping, self.kv_cache_dtype, layer
        )

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: XFormersMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of the batch into ``output``.

        query, output: [num_rows, num_heads, head_size]. key, value: [num_rows, num_kv_heads,
        head_size]. kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size].
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("xfv1 does not quantize its output")
        if attn_metadata is None:
            # Profiling run.
            return output.fill_(0)
        encoder = self.attn_type in ENCODERS
        if self.debug:
            cache = None if encoder else kv_cache
            debug.check_forward(self, query, key, value, cache, attn_metadata, output)
        if self.alibi_slopes is not None and self.alibi_slopes.device != query.device:
            self.alibi_slopes = self.alibi_slopes.to(query.device)

        caches = None if encoder else self._split(kv_cache)
        block_size = 0 if caches is None else caches[0].shape[1]
        facts = self._layer(query.dtype, block_size, attn_metadata.causal)
        phases = attn_metadata.phases
        if encoder and phases:
            phases = [attn_metadata.whole]
        elif len(phases) == 2:
            ops = [self._op(facts, phase, caches, query) for phase in phases]
            if ops[0] is ops[1] and ops[0].ragged:
                phases = [attn_metadata.whole]
        for phase in phases:
            self._run(facts, phase, caches, layer, query, key, value, output)
        return output

    def _split(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value views [num_blocks, block_size, num_kv_heads, head_size]."""
        key_cache, value_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        if self.fp8_dtype is not None and key_cache.dtype != self.fp8_dtype:
            return key_cache.view(self.fp8_dtype), value_cache.view(self.fp8_dtype)
        return key_cache, value_cache

    def _batch(self, phase: Phase, caches: tuple[torch.Tensor, torch.Tensor] | None) -> Batch:
        """The phase's batch, with what the layer and its cache add to it."""
        batch = phase.batch
        if caches is None:
            return replace(batch, phase=ENCODER, max_seq_len=batch.max_query_len, fresh=True)
        blocks, size = caches[0].stride()[:2]
        token_major = blocks == size * caches[0].shape[1]
        # Shared layers are given keys that are not theirs; quantized ones must see what is stored.
        own = self.kv_sharing_target_layer_name is None and self.fp8_dtype is None
        fresh = batch.fresh and own and self.attn_type == AttentionType.DECODER
        key = ("batch", token_major, fresh)
        if key not in phase.plans:
            phase.plans[key] = replace(batch, fresh=fresh, token_major=token_major)
        cached: Batch = phase.plans[key]
        return cached

    def _op(
        self,
        facts: Layer,
        phase: Phase,
        caches: tuple[torch.Tensor, torch.Tensor] | None,
        query: torch.Tensor,
    ) -> Op:
        # Layers alike in all else may differ in whose keys they read, and so in their batch.
        batch = self._batch(phase, caches)
        key = ("op", facts, batch)
        if key not in phase.plans:
            phase.plans[key] = dispatch.choose(facts, batch, device_of(query.device.type))
        op: Op = phase.plans[key]
        return op

    def _run(
        self,
        facts: Layer,
        phase: Phase,
        caches: tuple[torch.Tensor, torch.Tensor] | None,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        op = self._op(facts, phase, caches, query)
        own = (
            key is not None
            and value is not None
            and self.attn_type != AttentionType.ENCODER_DECODER
        )
        op.run(
            Call(
                layer=facts,
                batch=self._batch(phase, caches),
                query=query[phase.rows],
                key=key[phase.rows] if own and key is not None else None,
                value=value[phase.rows] if own and value is not None else None,
                key_cache=None if caches is None else caches[0],
                value_cache=None if caches is None else caches[1],
                out=output[phase.rows],
                query_start_loc=phase.query_start_loc,
                seq_lens=phase.seq_lens,
                block_table=phase.block_table,
                query_start_loc_cpu=phase.query_start_loc_cpu,
                seq_lens_cpu=phase.seq_lens_cpu,
                scale=self.scale,
                alibi_slopes=self.alibi_slopes,
                sinks=self.sinks,
                k_scale=layer._k_scale,
                v_scale=layer._v_scale,
                plans=phase.plans,
            )
        )
