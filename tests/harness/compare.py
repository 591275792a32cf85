"""Compare what a candidate did with the truth; where they differ, say in full what is wrong.

A check gets the truth as an argument and calls neither the reference nor a candidate.
"""

import torch

from fixtures.inputs import AttnInputs
from fixtures.inputs.build import BATCH_TENSORS
from fixtures.inputs.pages import physical_shape
from tests.harness.memory import UNTOUCHED, bits, raw
from tests.harness.truth import SCALE_FAULT, Expected
from tests.harness.verdicts import Mismatch, Outcome, Verdict

# Above this share of the budget a case fails.
LIMIT = 1.0


def check_output(inputs: AttnInputs, outcome: Outcome, expected: Expected) -> Verdict:
    """Every (token, head, dim) of the output is within its budget, and so is their sum along what
    a wrong softmax scale would do.

    A scale that is off by a percent moves no element by more than bf16 rounds; only the sum shows
    it.

    Raises:
        Mismatch: with the worst element, both values and the budget, or with the scale.
    """
    got = outcome.output[: inputs.case.num_tokens].double()
    error = (got - expected.output).abs()
    # NaN and inf are never within a budget; an exactly right infinity does not occur.
    # A row that sees nothing must be exactly zero: its budget is.
    share = torch.where(error == 0, 0.0, error / expected.budget)
    share = torch.where(torch.isfinite(got), share, float("inf"))
    worst = float(share.max()) if share.numel() else 0.0
    if share.numel() == 0:
        raise Mismatch("nothing was compared")
    if worst > LIMIT:
        raise Mismatch(_describe(inputs, share, got, expected))
    along = expected.scale_share(got)
    if along > LIMIT:
        off = expected.scale_error(got)
        raise Mismatch(
            f"each element is within its budget, yet all together they are those of a softmax scale"
            f" about {1 + off * (SCALE_FAULT - 1):.4g} times the right one\n"
            f"  projected on what a factor of {SCALE_FAULT} does, the error is {off!r} of that\n"
            f"  budget    {expected.scale_budget!r}: what rounding explains"
        )
    return Verdict(share.numel(), max(worst, along))


def _describe(
    inputs: AttnInputs, share: torch.Tensor, got: torch.Tensor, expected: Expected
) -> str:
    flat = int(share.argmax())
    token, head, dim = (int(i) for i in torch.unravel_index(torch.tensor(flat), share.shape))
    starts = inputs.query_start_loc.tolist()
    request = next(r for r in range(inputs.num_reqs) if starts[r] <= token < starts[r + 1])
    length, query_len = inputs.case.seq_lens[request], inputs.case.query_lens[request]
    position = length - query_len + token - starts[request]
    beyond = int((share > LIMIT).sum())
    heads = sorted({int(h) for h in (share > LIMIT).nonzero()[:, 1].unique()})
    return "\n".join(
        [
            f"output is not the reference's: {beyond} of {share.numel()} elements beyond budget,"
            f" on heads {_short(heads)}",
            f"  worst: request {request} (query {query_len}, keys {length}), token"
            f" {token - starts[request]} at position {position}, head {head}, dim {dim}",
            f"  candidate {float(got[token, head, dim])!r}",
            f"  reference {float(expected.output[token, head, dim])!r}",
            f"  budget    {float(expected.budget[token, head, dim])!r}"
            f" (error is {float(share.max()):.3g} of it)",
        ]
    )


def _short(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown}, ... ({len(numbers)})" if len(numbers) > 8 else shown


def check_lse(lse: torch.Tensor, expected: Expected) -> Verdict:
    """Every (token, head) of the LSE within its budget.

    Args:
        lse: [num_tokens, num_heads], natural logarithms, any float dtype.

    Raises:
        Mismatch: with the worst one, both values and the budget.
    """
    got = lse.double()
    # Where a query sees nothing both are minus infinity, whose difference is no number.
    error = torch.where(got == expected.lse, 0.0, (got - expected.lse).abs())
    share = (error / expected.lse_budget).nan_to_num(nan=float("inf"))
    worst = int(share.argmax())
    if float(share.max()) > LIMIT:
        token, head = (int(i) for i in torch.unravel_index(torch.tensor(worst), share.shape))
        raise Mismatch(
            f"LSE is not the reference's: {int((share > LIMIT).sum())} of {share.numel()} beyond"
            f" budget, worst: row {token}, head {head}\n"
            f"  candidate {float(got[token, head])!r}\n"
            f"  reference {float(expected.lse[token, head])!r}\n"
            f"  budget    {float(expected.lse_budget[token, head])!r}"
        )
    return Verdict(share.numel(), float(share.max()))


def check_padding(inputs: AttnInputs, outcome: Outcome) -> None:
    """Output rows past num_actual_tokens are as they were, bit for bit.

    A captured graph's batch counts its padding as tokens; of its output nothing is promised.

    Raises:
        Mismatch: naming the first row written.
    """
    case = inputs.case
    if case.pad_reqs or not case.pad_tokens:
        return
    rows = bits(outcome.output[case.num_tokens :])
    written = (rows != UNTOUCHED[outcome.output.itemsize]).flatten(1).any(dim=1)
    if written.any():
        row = case.num_tokens + int(written.nonzero()[0])
        raise Mismatch(f"output row {row} was written: num_actual_tokens is {case.num_tokens}")


def check_cache(inputs: AttnInputs, outcome: Outcome, expected_storage: torch.Tensor) -> None:
    """The cache holds the new keys and values bit for bit, and every other byte is unchanged.

    Raises:
        Mismatch: with how many elements differ, and the first, where in the cache it lies.
    """
    differs = bits(outcome.storage) != bits(expected_storage)
    if not differs.any():
        return
    layer, block, head, offset, content = _locate(inputs, int(differs.nonzero()[0]))
    case = inputs.case
    part = "key" if content < case.head_size else "value"
    slot = block * case.block_size + offset
    ours = (bits(outcome.storage) != bits(inputs.storage)) & differs
    raise Mismatch(
        f"the cache differs in {int(differs.sum())} elements ({int(ours.sum())} of them written"
        f" by the candidate): first layer {layer}, block {block}, slot {slot}, KV head {head},"
        f" {part} dim {content % case.head_size}"
    )


def _locate(inputs: AttnInputs, flat: int) -> tuple[int, int, int, int, int]:
    """(layer, block, head, offset, content) of a flat index into the storage."""
    order, shape = physical_shape(inputs.case, inputs.storage.numel())
    indices = [int(i) for i in torch.unravel_index(torch.tensor(flat), shape)]
    by_axis = dict(zip(order, indices, strict=True))
    return by_axis["L"], by_axis["B"], by_axis["H"], by_axis["N"], by_axis["C"]


def check_inputs_unchanged(inputs: AttnInputs, given: AttnInputs) -> None:
    """query, key, value and the tables that a candidate was given still hold what the inputs do.

    Raises:
        Mismatch: naming the tensor.
    """
    for name in BATCH_TENSORS:
        was, is_now = (raw(getattr(of, name)).to(inputs.device) for of in (inputs, given))
        if not torch.equal(was, is_now):
            raise Mismatch(f"the candidate changed its input {name}")
