"""Consecutive requests of a step: the host's facts about them, and their tensors.

vLLM is not needed here: ops, which also run without it, take a phase.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

DECODE, PREFILL, ENCODER = "decode", "prefill", "encoder"
KINDS = (DECODE, PREFILL, ENCODER)
_MISSING = object()
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """The facts of one phase of one step that an op may decide by; the host knows them all.

    kind: one of KINDS.
    uniform: every request has max_query_len tokens.
    fresh: no request has context, and key and value hold all there is to attend to.
    token_major: the cache can be viewed as [num_blocks * block_size, num_kv_heads, head_size].
    lse: the caller wants the LSE too, to merge this with another part of the keys. A request may
        have no keys in this part.
    host_lens: the host knows every request's number of keys.
    """

    kind: str
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
        return self.kind == ENCODER or self.fresh


@dataclass
class Phase:
    """Some consecutive requests of a step, and their tokens.

    rows: the rows of its tokens in the step's tensors. A graph's padding may follow the last
        request's tokens.
    query_start_loc: [num_reqs + 1] int32 on the device, the first is 0.
    query_start_loc_cpu: the same on the host.
    seq_lens: [num_reqs] int32 on the device.
    seq_lens_cpu: on the host an upper bound of seq_lens, exact if batch.host_lens; or None.
    block_table: [num_reqs, max_blocks] int32 on the device.
    first: the index of the first request among the step's.
    plans: the results that `once` keeps.
    """

    batch: Batch
    rows: slice
    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor | None
    block_table: torch.Tensor
    first: int = 0
    plans: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """The requests' tokens, without a graph's padding."""
        return int(self.query_start_loc_cpu[-1])

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result of `make`, kept for all layers of the step that ask for the same key.

        The key names all that the result depends on, apart from the requests themselves.
        """
        made: T = self.plans.get(key, _MISSING)
        if made is _MISSING:
            made = self.plans[key] = make()
        return made

    def described(self, batch: Batch) -> "Phase":
        """The phase, its plans too, with a batch that says more of the same requests."""
        return Phase(
            batch,
            self.rows,
            self.query_start_loc,
            self.query_start_loc_cpu,
            self.seq_lens,
            self.seq_lens_cpu,
            self.block_table,
            self.first,
            self.plans,
        )

    def changed(self, **facts: Any) -> "Phase":
        """The phase with other facts, for which nothing is planned yet."""
        return replace(self, **facts, plans={})

    def requests(self, first: int, last: int, batch: Batch) -> "Phase":
        """The phase of its requests [first:last], which `batch` describes."""
        # NumPy reads a number in a fraction of the time that PyTorch takes.
        known = self.query_start_loc_cpu.numpy()
        start, stop = int(known[first]), self.rows.stop
        if last < self.batch.num_reqs:
            stop = self.rows.start + int(known[last])
        bounds, requests = slice(first, last + 1), slice(first, last)
        starts, starts_cpu = self.query_start_loc[bounds], self.query_start_loc_cpu[bounds]
        if start:
            starts, starts_cpu = starts - start, starts_cpu - start
        lens_cpu = self.seq_lens_cpu
        return Phase(
            batch=batch,
            rows=slice(self.rows.start + start, stop),
            query_start_loc=starts,
            query_start_loc_cpu=starts_cpu,
            seq_lens=self.seq_lens[requests],
            seq_lens_cpu=None if lens_cpu is None else lens_cpu[requests],
            block_table=self.block_table[requests],
            first=self.first + first,
        )

    def over(self, block_table: torch.Tensor) -> "Phase":
        """The same requests in another cache group, whose table of the step's requests this is."""
        last = self.first + self.batch.num_reqs
        return self.changed(block_table=block_table[self.first : last])
