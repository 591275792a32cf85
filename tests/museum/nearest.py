"""After a mismatch: the planted fault whose answer is the candidate's.

The reference computes the case once more with each of its faults that can show in the case. This
happens after a failure alone. Two things bound its time. A fault is dropped at the first request
that it does not explain. A case of more than MOST_WORK multiplications is not looked at.
"""

import math
from dataclasses import dataclass, replace

import torch

from fixtures.cases.tables import work
from fixtures.inputs import TORCH_DTYPES, AttnInputs
from reference.attention import Attended
from tests.harness.budget import attention_budget, worst_share
from tests.harness.truth import Expected, Request, requests, written_cache
from tests.harness.verdicts import Outcome
from tests.museum.reference_faults import (
    REFERENCE_FAULTS,
    Question,
    ReferenceFault,
    answer,
    question,
)

# A CPU takes at most about ten seconds of one core for all faults of such a case.
MOST_WORK = 1e9
# An output that is within one budget of the truth is not within one of an answer farther away.
APART = 2.0


@dataclass
class _Trial:
    """How far a candidate's output is from a fault's answer, over the requests looked at so far.

    off: the largest share of the budget of the fault's answer.
    off_scale: the difference, summed along what a wrong softmax scale does.
    moved, moved_scale: the same for the fault's answer and the truth, in the truth's budget.
    """

    fault: ReferenceFault
    off: float = 0.0
    off_scale: float = 0.0
    moved: float = 0.0
    moved_scale: float = 0.0

    def share(self, expected: Expected, small: bool) -> float:
        """How far the candidate is from the fault's answer, in budgets.

        small: the candidate has no element beyond the truth's budget, so that the sum decides. Then
            the truth's budget for the sum is that of the fault's answer too.
        """
        return max(self.off, _in_budget(self.off_scale, expected)) if small else self.off

    def differs(self, expected: Expected) -> bool:
        """Whether the fault's answer is certainly not the truth's."""
        return max(self.moved, _in_budget(self.moved_scale, expected)) > APART


def _in_budget(off_scale: float, expected: Expected) -> float:
    return abs(off_scale) / expected.scale_budget if off_scale else 0.0


def named_fault(inputs: AttnInputs, outcome: Outcome, expected: Expected) -> str:
    """A line for a mismatch's message, which names the fault; empty if there is none."""
    output = outcome.output[: inputs.case.num_tokens]
    fault = nearest_fault(inputs, output, expected, outcome.query)
    return f"the answer is that of: {fault.what}" if fault else ""


def nearest_fault(
    inputs: AttnInputs, output: torch.Tensor, expected: Expected, query: torch.Tensor | None = None
) -> ReferenceFault | None:
    """The planted fault whose answer an output is, within the budget of that answer.

    An element that is no number tells one fault from another only if the fault reads no poison
    there.

    Args:
        output: [num_tokens, num_heads, head_size] of the candidate.
        expected: the truth for these inputs.
        query: what the candidate was given, if its layer quantized the inputs' own query.
    """
    case = inputs.case
    if work(case) > MOST_WORK:
        return None
    quantized_query = query is not None
    asked = inputs if query is None else replace(inputs, query=query)
    trials = [_Trial(fault) for fault in REFERENCE_FAULTS.values() if fault.shows(case)]
    for request in requests(asked, written_cache(asked)[0]):
        got = output[request.rows].double()
        for trial in trials:
            _try(trial, asked, request, got, expected, quantized_query)
        trials = [trial for trial in trials if trial.off <= 1.0]
    small = worst_share(output, expected.output, expected.budget) <= 1.0
    shares = [(trial.share(expected, small), trial) for trial in trials if trial.differs(expected)]
    share, nearest = min(shares, key=lambda pair: pair[0], default=(math.inf, None))
    return nearest.fault if nearest and share <= 1.0 else None


def _try(
    trial: _Trial,
    inputs: AttnInputs,
    request: Request,
    got: torch.Tensor,
    expected: Expected,
    quantized_query: bool,
) -> None:
    """Compare one request's output, [num_queries, num_heads, head_size], with a fault's answer."""
    wrong = trial.fault.change(question(inputs, request))
    attended = answer(wrong)
    number = got.isfinite()
    if not number.all():
        poisoned = answer(trial.fault.change(question(inputs, request, poison=True))).output
        if poisoned[~number].isfinite().any():
            trial.off = float("inf")
            return
    near = attended.output
    # An element that is no number is not compared.
    got = torch.where(number, got, near)
    truth = torch.where(number, expected.output[request.rows], near)
    along = expected.along_scale[request.rows]
    budget = _budget(inputs, wrong, attended, quantized_query)
    trial.off = max(trial.off, worst_share(got, near, budget))
    trial.off_scale += float(((got - near) * along).sum())
    trial.moved = max(trial.moved, worst_share(near, truth, expected.budget[request.rows]))
    trial.moved_scale += float(((near - truth) * along).sum())


def _budget(
    inputs: AttnInputs, asked: Question, attended: Attended, quantized_query: bool
) -> torch.Tensor:
    """How far an honest kernel with a fault may be from the fault's own answer."""
    case = inputs.case
    return attention_budget(
        attended,
        asked.query,
        asked.key,
        asked.value,
        scale=asked.arguments["scale"],
        dtype=TORCH_DTYPES[case.dtype],
        softcap=asked.arguments["softcap"],
        quantized=case.quantized,
        operands=TORCH_DTYPES[case.kv_dtype] if quantized_query else None,
    ).output
