"""The four things that can come of running a candidate on a case.

An `Outcome` is what it did. A `Refused` says that it does not serve the case. A `Mismatch` says
that it broke a promise. A `Verdict` says how near its answer is to the truth.
"""

from dataclasses import dataclass

import torch

from fixtures.inputs import AttnInputs


class Refused(Exception):
    """The candidate says that it cannot serve a case. reasons: in its own words."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


class Mismatch(AssertionError):
    """A candidate broke a promise; the message explains which, where and by how much."""


@dataclass(frozen=True)
class Outcome:
    """The tensors that a candidate left behind after a case.

    output: [num_rows, num_heads, head_size], all rows, padding's too. storage: the storage of the
    candidate's cache after the step. query: the query that the backend was given, if its layer
    quantized the inputs' own. given: the candidate's own copy of the batch after the step.
    """

    output: torch.Tensor
    storage: torch.Tensor
    query: torch.Tensor | None = None
    given: AttnInputs | None = None


@dataclass(frozen=True)
class Verdict:
    """An answer that holds.

    elements: how many numbers were compared. share: the worst error as a fraction of its budget,
    or None where bits were compared.
    """

    elements: int
    share: float | None = None
