"""The reference's answer to a case's inputs, with the budget that goes with it."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fixtures.inputs import TORCH_DTYPES, AttnInputs
from reference import attend, gather_kv, write_kv
from reference.attention import Attended
from tests.harness.budget import SIGMAS, Budget, attention_budget

# A softmax scale wrong by one percent: a head size rounded up, a log2(e) of too few digits.
SCALE_FAULT = 1.01


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
        """<error, w> of a candidate's output, [num_tokens, num_heads, head_size]."""
        return float(((output.double() - self.output) * self.along_scale).sum())

    def scale_share(self, output: torch.Tensor) -> float:
        """The size of `scale_error` as a fraction of its budget."""
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
    """The reference's answer to these inputs, with its budget.

    Args:
        query: the query in place of the inputs' own, if the candidate's layer quantizes it to
            multiply in the cache's dtype.
    """
    case = inputs.case
    cache, storage = written_cache(inputs)
    shape = (case.num_tokens, case.num_heads)
    lse, lse_budget = inputs.query.new_zeros(2, *shape, dtype=torch.float64)
    output, bound, along_scale = inputs.query.new_zeros(
        3, *shape, case.head_size, dtype=torch.float64
    )
    variance = drift = step = 0.0
    for each in requests(inputs, cache):
        request = each if query is None else dataclasses.replace(each, query=query[each.rows])
        attended = _attended(inputs, request)
        budget = _budget(inputs, request, attended, quantized_query=query is not None)
        output[request.rows], bound[request.rows] = attended.output, budget.output
        lse[request.rows], lse_budget[request.rows] = attended.lse, budget.lse
        moved = _attended(inputs, request, scale=SCALE_FAULT * inputs.scale).output
        moved = moved - attended.output
        # A matched filter: each element counts by how far it moves and how well it is known.
        w = torch.where(budget.output > 0, moved / budget.output.square(), 0.0)
        spread = budget.along(w, _dequantized(inputs, request))
        along_scale[request.rows] = w
        step += float((moved * w).sum())
        variance += spread.variance
        drift += spread.drift
    scale_budget = SIGMAS * variance**0.5 + drift
    if step:
        along_scale, scale_budget = along_scale / step, scale_budget / step
    return Expected(output, bound, lse, lse_budget, storage, along_scale, scale_budget)


def _attended(inputs: AttnInputs, request: Request, **changes: Any) -> Attended:
    """`reference.attend` of one request. changes: arguments in place of the inputs' own."""
    arguments = semantics(inputs) | changes
    return attend(request.query, request.key, request.value, **arguments)


def _budget(
    inputs: AttnInputs, request: Request, attended: Attended, quantized_query: bool
) -> Budget:
    case = inputs.case
    return attention_budget(
        attended,
        request.query,
        request.key,
        request.value,
        scale=inputs.scale,
        dtype=TORCH_DTYPES[case.dtype],
        softcap=case.softcap,
        quantized=case.quantized,
        operands=TORCH_DTYPES[case.kv_dtype] if quantized_query else None,
    )


def _dequantized(inputs: AttnInputs, request: Request) -> list[torch.Tensor]:
    """The outputs of honest kernels that dequantize the keys, or the values, to the model's dtype.

    Empty for a cache that is not quantized.
    """
    if not inputs.case.quantized:
        return []
    dtype = TORCH_DTYPES[inputs.case.dtype]
    rounded = (
        dataclasses.replace(request, key=request.key.to(dtype)),
        dataclasses.replace(request, value=request.value.to(dtype)),
    )
    return [_attended(inputs, each).output for each in rounded]


# The reference as a test is given it: the truth about these inputs, and about a query in place of
# their own if there is one.
Truth = Callable[[AttnInputs, torch.Tensor | None], Expected]
