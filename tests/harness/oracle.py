"""The reference's answer to a case's inputs, with the budget that goes with it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fixtures.cases import AttnCase
from fixtures.inputs import TORCH_DTYPES, AttnInputs
from fixtures.tables import work
from reference import attend, gather_kv, write_kv
from tests.harness.budget import attention_budget

# Multiplications that take one core a tenth of a second, as float64 and all that goes with them.
HOST_WORK = 2e8


@dataclass(frozen=True)
class Expected:
    """output, budget: [num_tokens, num_heads, head_size]; lse, lse_budget: [num_tokens, num_heads].

    All float64. storage: what the cache's storage must hold afterwards, bit for bit.
    """

    output: torch.Tensor
    budget: torch.Tensor
    lse: torch.Tensor
    lse_budget: torch.Tensor
    storage: torch.Tensor


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
    if case.attention != "encoder" and not case.kv_sharing:
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
        if inputs.case.attention == "encoder":
            key, value = inputs.key[rows], inputs.value[rows]
        else:
            ids = inputs.block_table[index]
            key = gather_kv(key_cache, ids, length, inputs.k_scale)
            value = gather_kv(value_cache, ids, length, inputs.v_scale)
        yield Request(index, rows, inputs.query[rows], key, value)


def expected(inputs: AttnInputs, query: torch.Tensor | None = None) -> Expected:
    """What the reference says of these inputs.

    Args:
        query: in place of the inputs' own, for a candidate whose layer quantizes it first.
    """
    case = inputs.case
    cache, storage = written_cache(inputs)
    shape = (case.num_tokens, case.num_heads)
    zeros = torch.zeros(*shape, dtype=torch.float64, device=inputs.query.device)
    result = Expected(
        output=zeros[..., None].repeat(1, 1, case.head_size),
        budget=zeros[..., None].repeat(1, 1, case.head_size),
        lse=zeros.clone(),
        lse_budget=zeros.clone(),
        storage=storage,
    )
    for request in requests(inputs, cache):
        rows = request.query if query is None else query[request.rows]
        attended = attend(rows, request.key, request.value, **semantics(inputs))
        budget = attention_budget(
            attended,
            rows,
            request.key,
            request.value,
            scale=inputs.scale,
            dtype=TORCH_DTYPES[case.dtype],
            softcap=case.softcap,
            quantized=case.kv_dtype != "auto",
        )
        result.output[request.rows] = attended.output
        result.lse[request.rows] = attended.lse
        result.budget[request.rows] = budget.output
        result.lse_budget[request.rows] = budget.lse
    return result
