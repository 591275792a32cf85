"""From vLLM's CommonAttentionMetadata to the phases of one step, without asking the device."""

import copy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
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
from xfv1.ops.base import DECODE, PREFILL, Batch

# Of few numbers on the host: NumPy costs a fraction of what PyTorch does.
Lens = npt.NDArray[np.int32]


@dataclass
class Phase:
    """Some consecutive requests of a step, and their tokens.

    rows: the tokens' rows. query_start_loc: [num_reqs + 1] int32, first 0; *_cpu: on the host.
    seq_lens: [num_reqs] int32. block_table: [num_reqs, max_blocks] int32. plans: see
    `xfv1.ops.base.Call`.
    """

    batch: Batch
    rows: slice
    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor | None
    block_table: torch.Tensor
    plans: dict[Any, Any] = field(default_factory=dict)


@dataclass
class Parts:
    """The keys of a step whose cache is spread over a decode context parallel group.

    context: the step's phases over what this rank's cache holds of the keys from before the step;
    none if no request has any, on any rank. new: all requests over the step's own keys.
    """

    context: list[Phase]
    new: Phase


@dataclass
class XFormersMetadata(AttentionMetadata):
    """One step's batch, whole and in phases.

    whole: all requests as one ragged phase. batches: the same as decodes, then prefills, whichever
    there are; none where nothing is asked. slot_mapping: [num_tokens] int64 (vLLM's cross attention
    replaces it). parts: None where the cache is whole.
    """

    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    causal: bool
    whole: Phase
    batches: list[Batch]
    parts: Parts | None = None
    _phases: list[Phase] | None = None

    @property
    def phases(self) -> list[Phase]:
        """A phase to each of the batches. Made when first asked for: an op that serves both decodes
        and prefills takes the whole."""
        if self._phases is None:
            self._phases = _phases(self.whole, self.batches)
        return self._phases


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
        # Verification of drafts, 1 + num_speculative_tokens to a request, decodes too.
        self._init_reorder_batch_threshold(
            1, supports_spec_as_decode=True, supports_dcp_with_varlen=True
        )
        self.dcp_world_size, self.dcp_rank = compat.context_group(kv_cache_spec)
        self.interleave = vllm_config.parallel_config.cp_kv_cache_interleave_size
        if self.dcp_world_size > 1:
            # Graphs read them: this rank's keys from before the step, and the step's own.
            max_num_reqs = vllm_config.scheduler_config.max_num_seqs
            self._lens = torch.zeros(2, max_num_reqs, dtype=torch.int32, device=device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> XFormersMetadata:
        """The step's metadata. Never waits for the device, but for XFV1_DEBUG's checks.

        Raises:
            NotImplementedError: for causality that differs between requests.
        """
        common = common_attn_metadata
        # Cross attention's keys are the encoder's; what the host is told are the decoder's.
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
        # Most ops take no empty batch.
        if 0 not in (num_reqs, common.num_actual_tokens, common.max_query_len):
            decodes = _decodes(query_lens, self.reorder_batch_threshold or 1)
            batches = _batches(whole.batch, query_lens, lens, unsure, decodes)
        metadata = XFormersMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            causal=common.causal,
            whole=whole,
            batches=batches,
        )
        if batches and self.dcp_world_size > 1:
            metadata.parts = self._parts(whole, metadata.phases)
        return metadata

    def _unsure(
        self, common: CommonAttentionMetadata, query_lens: Lens, lens: Lens | None
    ) -> npt.NDArray[np.bool_] | None:
        """[num_reqs], of whose keys' number the host has no more than a bound; None if of nobody's.

        Where drafts are verified, and steps are scheduled ahead, the host takes it that all drafts
        of the step before were accepted.
        """
        if lens is None:
            return np.ones(len(query_lens), dtype=np.bool_)
        if not self.speculates:
            return None
        unsure = query_lens > 0
        if common.is_prefilling is not None:
            # A graph's padding may be left out.
            prefilling = common.is_prefilling[: len(unsure)].numpy()
            unsure[: len(prefilling)] &= ~prefilling
        return unsure

    def _parts(self, whole: Phase, phases: list[Phase]) -> Parts:
        context_lens, query_lens = self._lens[:, : whole.batch.num_reqs]
        query_lens.copy_(whole.query_start_loc.diff())
        # All ranks' lengths: asked for one's, vLLM's helper may copy its number from the host.
        local = get_dcp_local_seq_lens(
            whole.seq_lens - query_lens, self.dcp_world_size, None, self.interleave
        )
        context_lens.copy_(local[:, self.dcp_rank])
        new = replace(whole, batch=replace(whole.batch, lse=True), seq_lens=query_lens, plans={})
        # Decodes never do without, for a graph's sake (see `_split`).
        if whole.batch.fresh and phases[0].batch.phase == PREFILL:
            return Parts([], new)
        context, first = [], 0
        for phase in phases:
            last = first + phase.batch.num_reqs
            # The first rank's share of the longest, which is the largest.
            turns = -(-phase.batch.max_seq_len // (self.dcp_world_size * self.interleave))
            batch = replace(
                phase.batch,
                max_seq_len=turns * self.interleave,
                fresh=False,
                lse=True,
                host_lens=False,
            )
            lens = context_lens[first:last]
            context.append(replace(phase, batch=batch, seq_lens=lens, seq_lens_cpu=None, plans={}))
            first = last
        return Parts(context, new)

    def update_block_table(
        self, metadata: XFormersMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> XFormersMetadata:
        """The same batch in another cache group: other blocks, other plans."""
        updated = copy.copy(metadata)
        updated.block_table, updated.slot_mapping = blk_table, slot_mapping
        (updated.whole,) = _with_table([metadata.whole], blk_table)
        updated._phases = None
        if metadata.parts is not None:
            (new,) = _with_table([metadata.parts.new], blk_table)
            updated.parts = Parts(_with_table(metadata.parts.context, blk_table), new)
        return updated


def _with_table(phases: list[Phase], block_table: torch.Tensor) -> list[Phase]:
    """Consecutive phases of a step, over other blocks."""
    result, first = [], 0
    for phase in phases:
        last = first + phase.batch.num_reqs
        result.append(replace(phase, block_table=block_table[first:last], plans={}))
        first = last
    return result


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
    """How many requests decode: the first ones, all of the same few tokens, or of none."""
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
    """Decodes, then prefills, whichever there are. query_lens: [num_reqs]; lens: see `_is_fresh`,
    None if not known; unsure: see `_unsure`."""
    if decodes == 0:
        return [replace(whole, phase=PREFILL)]
    if decodes == whole.num_reqs:
        # What a graph is captured with has no context; what it is replayed with has.
        return [replace(whole, phase=DECODE, fresh=False)]
    # Some may have no token.
    query_len = int(query_lens[:decodes].max())
    decode = Batch(
        DECODE,
        num_reqs=decodes,
        max_query_len=query_len,
        # The decodes' longest, not the batch's: it sizes their splits.
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


def _phases(whole: Phase, batches: list[Batch]) -> list[Phase]:
    if len(batches) < 2:
        return [replace(whole, batch=batch, plans={}) for batch in batches]
    decodes = batches[0].num_reqs
    starts, bound = whole.query_start_loc_cpu, whole.seq_lens_cpu
    tokens = int(starts[decodes])
    decode = Phase(
        batch=batches[0],
        rows=slice(0, tokens),
        query_start_loc=whole.query_start_loc[: decodes + 1],
        query_start_loc_cpu=starts[: decodes + 1],
        seq_lens=whole.seq_lens[:decodes],
        seq_lens_cpu=None if bound is None else bound[:decodes],
        block_table=whole.block_table[:decodes],
    )
    prefill = Phase(
        batch=batches[1],
        rows=slice(tokens, whole.rows.stop),
        query_start_loc=whole.query_start_loc[decodes:] - tokens,
        query_start_loc_cpu=starts[decodes:] - tokens,
        seq_lens=whole.seq_lens[decodes:],
        seq_lens_cpu=None if bound is None else bound[decodes:],
        block_table=whole.block_table[decodes:],
    )
    return [decode, prefill]
