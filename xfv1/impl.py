"""One attention layer: it writes the new keys and values, then runs an op for each phase."""

from dataclasses import replace
from typing import Any

import torch
from vllm.distributed.parallel_state import get_dcp_group
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

from xfv1 import cache, compat, debug, dispatch, support
from xfv1.device import device_of
from xfv1.ops.base import Call, Layer, Op
from xfv1.phase import ENCODER, Batch, Phase
from xfv1.step import XFormersMetadata

ENCODERS = (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)


class XFormersImpl(AttentionImpl[XFormersMetadata]):
    """vLLM's AttentionImpl over xfv1's ops.

    Raises:
        NotImplementedError: from the constructor, with each op's reasons, where no op serves the
            layer, so that a model fails when it is loaded and not in its first step.
        ValueError: naming the argument that makes no sense.
    """

    can_return_lse_for_decode = True
    supports_dcp = True
    # A step's own keys are not read from the cache, so it does not matter on which rank a draft's
    # keys lie.
    supports_mtp_with_cp_non_trivial_interleave_size = True

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
        chunk_lookback: int = -1,
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
        if chunk_lookback != -1:
            raise NotImplementedError(
                f"chunk_lookback={chunk_lookback}: expected -1: no attention in chunks"
            )
        dtype = torch.get_default_dtype()
        encoder = attn_type in ENCODERS
        if not encoder:
            # An encoder keeps nothing in the cache.
            cache.kv_dtype(kv_cache_dtype, dtype)
        self.fp8_dtype = cache.fp8_dtype(kv_cache_dtype)
        self._layers: dict[tuple[torch.dtype, int, bool, int], Layer] = {}
        self.debug = debug.enabled()
        self._checked = self._layer(dtype, support.BLOCK_SIZE, True)
        sharded = self.dcp_world_size > 1 and not encoder
        uses = self._uses(dtype, sharded)
        refused = self._refusals(uses, sharded)
        if refused:
            raise NotImplementedError("xfv1: " + "; ".join(refused))
        self._merge = compat.shard_merge() if sharded else None
        device = device_of(compat.device_kind())
        for facts, use in uses:
            compat.log_once(
                "xfv1: XFormersAttentionBackend serves %s", support.summary(facts, device, **use)
            )

    def _uses(self, dtype: torch.dtype, sharded: bool) -> list[tuple[Layer, dict[str, bool]]]:
        """The layer as ops will see it: its facts, and how they are used (`support.summary`)."""
        encoder = self.attn_type in ENCODERS
        causal = self.attn_type == AttentionType.DECODER
        layer = self._layer(dtype, 0 if encoder or sharded else support.BLOCK_SIZE, causal)
        # Cross attention's lengths are the encoder's, which only the device knows.
        host_lens = self.attn_type != AttentionType.ENCODER_DECODER
        own = {"encoder": encoder or sharded, "host_lens": host_lens, "lse": sharded}
        if not sharded:
            return [(layer, own)]
        context = self._layer(dtype, support.BLOCK_SIZE, False, self.dcp_world_size)
        return [(layer, own), (context, {"host_lens": False, "lse": True})]

    def _refusals(self, uses: list[tuple[Layer, dict[str, bool]]], sharded: bool) -> list[str]:
        """Why the layer cannot be served."""
        (layer, use), device = uses[0], device_of(compat.device_kind())
        refused = support.model_reasons() + support.parallel_reasons(
            layer,
            self.pcp_world_size,
            self.dcp_world_size if sharded else 1,
            cross=self.attn_type == AttentionType.ENCODER_DECODER,
            shares_cache=self.kv_sharing_target_layer_name is not None,
        )
        for facts, each in uses:
            refused += support.layer_reasons(facts, device, **each)
        if use["host_lens"] and not use["encoder"] and compat.speculates():
            # With speculative decoding the host does not always know seq_lens exactly either.
            again = support.layer_reasons(layer, device, host_lens=False)
            refused += [reason for reason in again if reason not in refused]
        return refused

    def _layer(self, dtype: torch.dtype, block_size: int, causal: bool, ranks: int = 1) -> Layer:
        """The layer's facts. ranks: of a decode context parallel group, for its context."""
        key = (dtype, block_size, causal, ranks)
        if key not in self._layers:
            self._layers[key] = Layer(
                num_heads=self.num_heads * ranks,
                num_kv_heads=self.num_kv_heads,
                head_size=self.head_size,
                dtype=dtype,
                kv_dtype=self.fp8_dtype if self.fp8_dtype and block_size else dtype,
                block_size=block_size,
                sliding_window=self.sliding_window,
                softcap=self.logits_soft_cap,
                alibi=self.alibi_slopes is not None,
                alibi_sqrt=self.use_alibi_sqrt and self.alibi_slopes is not None,
                sinks=self.sinks is not None and ranks == 1,
                causal=causal,
                batch_invariant=compat.batch_invariant(),
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
            debug.check_update(self._checked, key, value, kv_cache, slot_mapping)
        if not slot_mapping.numel():
            return
        key_cache, value_cache = cache.views(kv_cache, self.head_size, self.fp8_dtype)
        cache.write_kv(key, value, key_cache, value_cache, slot_mapping, self.kv_cache_dtype, layer)

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
            debug.check_forward(
                self._checked,
                attn_metadata.whole,
                query,
                key,
                value,
                None if encoder else kv_cache,
                attn_metadata.slot_mapping,
                output,
                cross=self.attn_type == AttentionType.ENCODER_DECODER,
            )
        if self.alibi_slopes is not None and self.alibi_slopes.device != query.device:
            self.alibi_slopes = self.alibi_slopes.to(query.device)

        caches = None if encoder else cache.views(kv_cache, self.head_size, self.fp8_dtype)
        if attn_metadata.parts is not None and caches is not None:
            self._run_parts(attn_metadata, caches, layer, query, key, value, output)
            return output
        block_size = 0 if caches is None else caches[0].shape[1]
        facts = self._layer(query.dtype, block_size, attn_metadata.causal)
        for phase in self._phases(facts, attn_metadata, caches, query):
            self._run(facts, phase, caches, layer, query, key, value, output)
        return output

    def _phases(
        self,
        facts: Layer,
        metadata: XFormersMetadata,
        caches: cache.Views | None,
        query: torch.Tensor,
    ) -> list[Phase]:
        """The phases to run: the whole step if one op is best for decodes and prefills."""
        batches, whole = metadata.batches, metadata.whole
        if caches is None and batches:
            return [whole]
        if len(batches) == 2:
            first, second = (
                self._op(facts, self._batch(batch, whole, caches), whole, query)
                for batch in batches
            )
            if first is second and first.ragged:
                return [whole]
        return metadata.phases

    def _run_parts(
        self,
        metadata: XFormersMetadata,
        caches: cache.Views,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """A step whose cache is spread over a decode context parallel group.

        Each rank attends to the step's new keys by itself, causally and with sinks. It attends to
        the context's keys in its own cache without a mask, for the query heads of all ranks. vLLM
        merges the answers.
        """
        parts, rows = metadata.parts, metadata.whole.rows
        assert parts is not None and self._merge is not None
        query, key, value, output = query[rows], key[rows], value[rows], output[rows]
        if self.fp8_dtype is not None:
            # Later steps read these keys and values from the float8 cache. This step must see the
            # same numbers.
            key = cache.read_back(key, self.fp8_dtype, layer._k_scale)
            value = cache.read_back(value, self.fp8_dtype, layer._v_scale)
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        new = self._layer(query.dtype, 0, metadata.causal)
        self._run(new, parts.new, None, layer, query, key, value, output, lse)
        if not parts.context:
            return
        group = get_dcp_group()
        query = group.all_gather(query.contiguous(), dim=1)
        context = torch.empty_like(query)
        context_lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        facts = self._layer(query.dtype, caches[0].shape[1], False, self.dcp_world_size)
        for phase in parts.context:
            self._run(facts, phase, caches, layer, query, None, None, context, context_lse)
        context, context_lse = self._merge(context, context_lse, group, return_lse=True)
        merge_attn_states(
            output, context, context_lse.t().contiguous(), output, lse.t().contiguous()
        )

    def _batch(self, batch: Batch, phase: Phase, caches: cache.Views | None) -> Batch:
        """A batch of a phase's requests, with what the layer and its cache add to it."""
        if caches is None:
            return replace(batch, kind=ENCODER, max_seq_len=batch.max_query_len, fresh=True)
        blocks, size = caches[0].stride()[:2]
        token_major = blocks == size * caches[0].shape[1]
        # `key` and `value` do not serve a layer that reads another's cache, nor one whose cache
        # stores rounded numbers: both must read the cache.
        own = self.kv_sharing_target_layer_name is None and self.fp8_dtype is None
        fresh = batch.fresh and own and self.attn_type == AttentionType.DECODER
        if (batch.token_major, batch.fresh) == (token_major, fresh):
            return batch
        return phase.once(
            ("batch", batch, token_major, fresh),
            lambda: replace(batch, fresh=fresh, token_major=token_major),
        )

    def _op(self, facts: Layer, batch: Batch, phase: Phase, query: torch.Tensor) -> Op:
        """The op for a batch that `_batch` has completed; the phase keeps the choice."""
        # `batch` is part of the key: layers with equal facts differ in `fresh` if one shares
        # another's cache.
        return phase.once(
            ("op", facts, batch), lambda: dispatch.choose(facts, batch, device_of(query.device))
        )

    def _run(
        self,
        facts: Layer,
        phase: Phase,
        caches: cache.Views | None,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        output: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> None:
        batch = self._batch(phase.batch, phase, caches)
        op = self._op(facts, batch, phase, query)
        rows, seen = phase.rows, phase
        if batch is not phase.batch:
            seen = phase.once(("phase", batch), lambda: phase.described(batch))
        if self.attn_type == AttentionType.ENCODER_DECODER:
            # `key` and `value` are those of an encoder's tokens, not of the step's.
            key = value = None
        op.run(
            Call(
                layer=facts,
                phase=seen,
                query=query[rows],
                key=None if key is None else key[rows],
                value=None if value is None else value[rows],
                key_cache=None if caches is None else caches[0],
                value_cache=None if caches is None else caches[1],
                out=output[rows],
                scale=self.scale,
                alibi_slopes=self.alibi_slopes,
                sinks=self.sinks if facts.sinks else None,
                k_scale=layer._k_scale,
                v_scale=layer._v_scale,
                lse=None if lse is None else lse[rows],
            )
        )
