"""The reference's answer to a case's inputs, with the budget that goes with it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fixtures.cases import AttnCase
from fixtures.cases.tables import work
from fixtures.inputs import TORCH_DTYPES, AttnInputs
from reference import attend, gather_kv, write_kv
from tests.harness.budget import SIGMAS, attention_budget

# A softmax scale wrong by one percent: a head size rounded up, a log2(e) of too few digits.
SCALE_FAULT = 1.01

# Multiplications that take one core a tenth of a second, as float64 and all that goes with them.
HOST_WORK = 2e8


@dataclass(frozen=True)
class Expected:
    """output, budget: [num_tokens, num_heads, head_size]; lse, lse_budget: [num_tokens, num_heads].

    All float64. storage: what the cache's storage must hold afterwards, bit for bit.
    along_scale: [num_tokens, num_heads, head_size], the direction w in which <error, w> best tells
        a wrong softmax scale: 1 where it is SCALE_FAULT times the right one, 0 for the truth.
        All zero where the scale is without effect.
    scale_budget: what an honest kernel's |<error, w>| may be.
    """

    output: torch.Tensor
    budget: torch.Tensor
    lse: torch.Tensor
    lse_budget: torch.Tensor
    storage: torch.Tensor
    along_scale: torch.Tensor
    scale_budget: float

    def scale_error(self, output: torch.Tensor) -> float:
        """<error, w> of a candidate's [num_tokens, num_heads, head_size]."""
        return float(((output.double() - self.output) * self.along_scale).sum())

    def scale_share(self, output: torch.Tensor) -> float:
        """Its size in its budget."""
        off = abs(self.scale_error(output))
        return off / self.scale_budget if off else 0.0

    @property
    def tells_scale(self) -> bool:
        """Whether a scale off by SCALE_FAULT, either way, is sure to leave the budget: an honest
        error may take away as much as the budget allows."""
        return 0.0 < self.scale_budget < 0.5


@dataclass(frozen=True)
class Request:
    """One request of a batch, gathered: its rows, query, and keys and values in order."""

    index: int
    rows: slice
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def reference_device(case: AttnCase, device: torch.device) -> torch.device:
    """Where a case's inputs are made and its truth is worked out: on the CPU, unless that is much.

    To a GPU, which the workers share, a small case is a hundred small waits.
    """
    return device if work(case) > HOST_WORK else torch.device("cpu")


def semantics(inputs: AttnInputs) -> dict[str, Any]:
    """The arguments of `reference.attend` that a case's inputs determine."""
    case = inputs.case
    return {
        "scale": inputs.scale,
        "causal": case.causal,
        "sliding_window": case.sliding_window,
        "alibi_slopes": inputs.alibi_slopes,
        "alibi_sqrt": case.alibi_sqrt,
        "softcap": case.softcap,
        "sinks": inputs.sinks,
    }


def written_cache(inputs: AttnInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of the cache after the batch's own tokens have been written: (cache, storage)."""
    cache, storage = inputs.new_cache()
    case = inputs.case
    if case.paged and not case.kv_sharing:
        key_cache, value_cache = inputs.split_cache(cache)
        write_kv(
            inputs.key,
            inputs.value,
            key_cache,
            value_cache,
            inputs.slot_mapping,
            k_scale=inputs.k_scale,
            v_scale=inputs.v_scale,
        )
    return cache, storage


def requests(inputs: AttnInputs, cache: torch.Tensor) -> Iterator[Request]:
    """The requests that have tokens; an encoder's keys are its own, not the cache's."""
    key_cache, value_cache = inputs.split_cache(cache)
    starts = inputs.query_start_loc.tolist()
    for index, length in enumerate(inputs.seq_lens.tolist()):
        rows = slice(starts[index], starts[index + 1])
        if rows.start == rows.stop:
            continue
        if not inputs.case.paged:
            key, value = inputs.key[rows], inputs.value[rows]
        else:
            ids = inputs.block_table[index]
            key = gather_kv(key_cache, ids, length, inputs.k_scale)
            value = gather_kv(value_cache, ids, length, inputs.v_scale)
        yield Request(index, rows, inputs.query[rows], key, value)


def expected(inputs: AttnInputs, query: torch.Tensor | None = None) -> Expected:
    """What the reference says of these inputs.

    Args:
        query: in place of the inputs' own, for a candidate whose layer quantizes it first, to
            multiply in the cache's dtype.
    """
    case = inputs.case
    dtype = TORCH_DTYPES[case.dtype]
    cache, storage = written_cache(inputs)
    arguments = semantics(inputs)
    shape = (case.num_tokens, case.num_heads)
    lse, lse_budget = inputs.query.new_zeros(2, *shape, dtype=torch.float64)
    output, bound, along_scale = inputs.query.new_zeros(
        3, *shape, case.head_size, dtype=torch.float64
    )
    variance = drift = step = 0.0
    for request in requests(inputs, cache):
        rows = request.query if query is None else query[request.rows]
        kv = request.key, request.value
        attended = attend(rows, *kv, **arguments)
        budget = attention_budget(
            attended,
            rows,
            *kv,
            scale=inputs.scale,
            dtype=dtype,
            softcap=case.softcap,
            quantized=case.quantized,
            operands=None if query is None else TORCH_DTYPES[case.kv_dtype],
        )
        output[request.rows], bound[request.rows] = attended.output, budget.output
        lse[request.rows], lse_budget[request.rows] = attended.lse, budget.lse

        scaled = attend(rows, *kv, **arguments | {"scale": SCALE_FAULT * inputs.scale})
        moved = scaled.output - attended.output
        # A matched filter: each element counts by how far it moves and how well it is known.
        w = torch.where(budget.output > 0, moved / budget.output.square(), 0.0)
        dequantized = []
        if case.quantized:
            key, value = (part.to(dtype) for part in kv)
            dequantized = [(key, request.value), (request.key, value)]
        spread = budget.along(w, [attend(rows, *kv, **arguments).output for kv in dequantized])
        along_scale[request.rows] = w
        step += float((moved * w).sum())
        variance += spread.variance
        drift += spread.drift
    scale_budget = SIGMAS * variance**0.5 + drift
    if step:
        along_scale, scale_budget = along_scale / step, scale_budget / step
    return Expected(output, bound, lse, lse_budget, storage, along_scale, scale_budget)
