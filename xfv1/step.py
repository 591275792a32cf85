"""One step's batch, as a builder describes it to every layer of a cache group."""

import copy
from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import AttentionMetadata

from xfv1.phase import Batch, Phase


@dataclass
class Parts:
    """The keys of a step whose cache is spread over a decode context parallel group.

    context: the step's phases over what this rank's cache holds of the keys from before the step.
        There are none if no request has such keys, on any rank.
    new: all requests over the step's own keys.
    """

    context: list[Phase]
    new: Phase


@dataclass
class XFormersMetadata(AttentionMetadata):
    """One step's batch, whole and in phases.

    whole: all requests as one ragged phase.
    batches: the same requests as decodes, then prefills, whichever there are. There are none where
        no request has a token.
    slot_mapping: [num_tokens] int64. vLLM's cross attention replaces it.
    parts: None where every rank has the whole cache.
    """

    whole: Phase
    batches: list[Batch]
    slot_mapping: torch.Tensor
    causal: bool
    parts: Parts | None = None
    _phases: list[Phase] | None = None

    @property
    def phases(self) -> list[Phase]:
        """A phase to each of the batches.

        They are made when first asked for: an op that serves both decodes and prefills takes the
        whole.
        """
        if self._phases is None:
            self._phases = split(self.whole, self.batches)
        return self._phases

    def over(self, block_table: torch.Tensor, slot_mapping: torch.Tensor) -> "XFormersMetadata":
        """The same batch in another cache group: other blocks, other slots, other plans."""
        updated = copy.copy(self)
        updated.slot_mapping = slot_mapping
        updated.whole = self.whole.over(block_table)
        updated._phases = None
        if self.parts is not None:
            context = [phase.over(block_table) for phase in self.parts.context]
            updated.parts = Parts(context, self.parts.new.over(block_table))
        return updated

    # vLLM's code may read these of any backend's metadata.

    @property
    def num_actual_tokens(self) -> int:
        rows: int = self.whole.rows.stop
        return rows

    @property
    def max_query_len(self) -> int:
        return self.whole.batch.max_query_len

    @property
    def max_seq_len(self) -> int:
        return self.whole.batch.max_seq_len

    @property
    def query_start_loc(self) -> torch.Tensor:
        return self.whole.query_start_loc

    @property
    def seq_lens(self) -> torch.Tensor:
        return self.whole.seq_lens

    @property
    def block_table(self) -> torch.Tensor:
        return self.whole.block_table


def split(whole: Phase, batches: list[Batch]) -> list[Phase]:
    """A phase to each of the batches, which together are of all requests."""
    if len(batches) < 2:
        return [whole.changed(batch=batch) for batch in batches]
    decodes, prefills = batches
    first = decodes.num_reqs
    return [
        whole.requests(0, first, decodes),
        whole.requests(first, first + prefills.num_reqs, prefills),
    ]
