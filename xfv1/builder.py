"""Turns vLLM's CommonAttentionMetadata into one step's metadata, without asking the device."""

from dataclasses import replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import get_dcp_local_seq_lens
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    CrossAttentionSpec,
    EncoderOnlyAttentionSpec,
)

from xfv1 import compat, debug
from xfv1.phase import DECODE, PREFILL, Batch, Phase
from xfv1.step import Parts, XFormersMetadata, split

# For a few numbers on the host, NumPy costs a fraction of what PyTorch does.
Lens = npt.NDArray[np.int32]


class XFormersMetadataBuilder(AttentionMetadataBuilder[XFormersMetadata]):
    """Builds a step's metadata from host facts and views of vLLM's persistent buffers."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table: bool = True

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.is_cross = isinstance(kv_cache_spec, CrossAttentionSpec)
        self.is_encoder = isinstance(kv_cache_spec, EncoderOnlyAttentionSpec)
        self.debug = debug.enabled()
        self.speculates = vllm_config.speculative_config is not None
        # Verifying drafts counts as decoding: 1 + num_speculative_tokens to a request.
        self._init_reorder_batch_threshold(
            1, supports_spec_as_decode=True, supports_dcp_with_varlen=True
        )
        self.dcp_world_size, self.dcp_rank = compat.context_group(kv_cache_spec)
        self.interleave = vllm_config.parallel_config.cp_kv_cache_interleave_size
        if self.dcp_world_size > 1:
            # Numbers of keys, which captured graphs read: this rank's keys from before the step,
            # then the step's own.
            max_num_reqs = vllm_config.scheduler_config.max_num_seqs
            self._lens = torch.zeros(2, max_num_reqs, dtype=torch.int32, device=device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> XFormersMetadata:
        """The step's metadata. Only XFV1_DEBUG's checks wait for the device.

        Raises:
            NotImplementedError: for causality that differs between requests.
        """
        common = common_attn_metadata
        # Cross attention's keys are the encoder's, but the host's lengths are the decoder's.
        bound = None if self.is_cross else _host_lens(common)
        if self.debug:
            debug.check_batch(common, bound, encoder=self.is_encoder, cross=self.is_cross)
        if isinstance(common.causal, torch.Tensor):
            raise NotImplementedError("causal differs between requests: expected True or False")
        num_reqs = common.num_reqs
        starts = common.query_start_loc_cpu[: num_reqs + 1]
        query_lens = np.diff(starts.numpy())
        lens = None if bound is None else bound.numpy()
        unsure = self._unsure(common, query_lens, lens)
        whole = Phase(
            batch=Batch(
                PREFILL if common.max_query_len > 1 else DECODE,
                num_reqs=num_reqs,
                max_query_len=common.max_query_len,
                max_seq_len=common.max_seq_len,
                uniform=bool((query_lens == common.max_query_len).all()),
                fresh=lens is not None and _is_fresh(query_lens, lens),
                host_lens=unsure is None or not unsure.any(),
            ),
            rows=slice(0, common.num_actual_tokens),
            query_start_loc=common.query_start_loc[: num_reqs + 1],
            query_start_loc_cpu=starts,
            seq_lens=common.seq_lens[:num_reqs],
            seq_lens_cpu=bound,
            block_table=common.block_table_tensor[:num_reqs],
        )
        batches: list[Batch] = []
        # Most ops refuse an empty batch.
        if 0 not in (num_reqs, common.num_actual_tokens, common.max_query_len):
            decodes = _decodes(query_lens, self.reorder_batch_threshold or 1)
            batches = _batches(whole.batch, query_lens, lens, unsure, decodes)
        metadata = XFormersMetadata(
            whole=whole,
            batches=batches,
            slot_mapping=common.slot_mapping,
            causal=common.causal,
        )
        if batches and self.dcp_world_size > 1:
            metadata.parts = self._parts(whole, batches)
        return metadata

    def _unsure(
        self, common: CommonAttentionMetadata, query_lens: Lens, lens: Lens | None
    ) -> npt.NDArray[np.bool_] | None:
        """Mask [num_reqs]: True where the host knows only an upper bound on seq_len. None: all
        lengths are exact.

        Where drafts are verified and steps are scheduled ahead, the host assumes that all drafts
        of the step before were accepted.
        """
        if lens is None:
            return np.ones(len(query_lens), dtype=np.bool_)
        if not self.speculates:
            return None
        unsure = query_lens > 0
        if common.is_prefilling is not None:
            # vLLM may leave out a graph's padding.
            prefilling = common.is_prefilling[: len(unsure)].numpy()
            unsure[: len(prefilling)] &= ~prefilling
        return unsure

    def _parts(self, whole: Phase, batches: list[Batch]) -> Parts:
        context_lens, query_lens = self._lens[:, : whole.batch.num_reqs]
        query_lens.copy_(whole.query_start_loc.diff())
        # The helper is asked for all ranks' lengths. Asked for one rank's, it may copy that rank's
        # number from the host.
        local = get_dcp_local_seq_lens(
            whole.seq_lens - query_lens, self.dcp_world_size, None, self.interleave
        )
        context_lens.copy_(local[:, self.dcp_rank])
        new = whole.changed(batch=replace(whole.batch, lse=True), seq_lens=query_lens)
        # Decodes always get a context phase, even an empty one: a graph captured without context
        # is replayed with some.
        if whole.batch.fresh and batches[0].kind == PREFILL:
            return Parts([], new)
        context = whole.changed(seq_lens=context_lens, seq_lens_cpu=None)
        return Parts(split(context, [self._context_batch(batch) for batch in batches]), new)

    def _context_batch(self, batch: Batch) -> Batch:
        """The batch over this rank's keys from before the step."""
        # The first rank has the most of the longest request's keys.
        turns = -(-batch.max_seq_len // (self.dcp_world_size * self.interleave))
        return replace(
            batch,
            max_seq_len=turns * self.interleave,
            fresh=False,
            lse=True,
            host_lens=False,
        )

    def update_block_table(
        self, metadata: XFormersMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> XFormersMetadata:
        """The same batch in another cache group."""
        return metadata.over(blk_table, slot_mapping)


def _host_lens(common: CommonAttentionMetadata) -> torch.Tensor | None:
    """[num_reqs] int32 on the host: bounds on seq_lens, exact for prompts; None if not known.

    A draft model's proposer lengthens requests on the device and in max_seq_len alone (vLLM's
    extend_all_queries_by_N).
    """
    bound: torch.Tensor | None = common.seq_lens_cpu_upper_bound
    if bound is None or not common.num_reqs:
        return bound
    bound = bound[: common.num_reqs]
    return bound if bound.numpy().max() >= common.max_seq_len else None


def _decodes(query_lens: Lens, threshold: int) -> int:
    """How many requests decode: the first ones that have the same few tokens, or none."""
    asking = query_lens[query_lens > 0]
    if not asking.size or asking[0] > threshold:
        return 0
    others = (query_lens != asking[0]) & (query_lens > 0)
    return int(others.argmax()) if others.any() else len(query_lens)


def _is_fresh(query_lens: Lens, lens: Lens) -> bool:
    """Whether no request has context. lens: bounds on seq_lens."""
    return bool((lens <= query_lens).all())


def _batches(
    whole: Batch,
    query_lens: Lens,
    lens: Lens | None,
    unsure: npt.NDArray[np.bool_] | None,
    decodes: int,
) -> list[Batch]:
    """The decodes, then the prefills, whichever there are.

    query_lens: [num_reqs]. lens: see `_is_fresh`, None if not known. unsure: see `_unsure`.
    """
    if decodes == 0:
        return [replace(whole, kind=PREFILL)]
    if decodes == whole.num_reqs:
        # A graph is captured without context, and replayed with some.
        return [replace(whole, kind=DECODE, fresh=False)]
    # Some of the decodes may have no token.
    query_len = int(query_lens[:decodes].max())
    decode = Batch(
        DECODE,
        num_reqs=decodes,
        max_query_len=query_len,
        # The longest decode's length, not the whole batch's: it decides how keys are split.
        max_seq_len=whole.max_seq_len if lens is None else int(lens[:decodes].max()),
        uniform=bool((query_lens[:decodes] == query_len).all()),
        host_lens=unsure is None or not unsure[:decodes].any(),
    )
    prefill = Batch(
        PREFILL,
        num_reqs=whole.num_reqs - decodes,
        max_query_len=whole.max_query_len,
        max_seq_len=whole.max_seq_len,
        uniform=False,
        fresh=lens is not None and _is_fresh(query_lens[decodes:], lens[decodes:]),
        host_lens=unsure is None or not unsure[decodes:].any(),
    )
    return [decode, prefill]
