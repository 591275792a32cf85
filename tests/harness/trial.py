"""One candidate, one case, one device: all that a conformance test can ask for about them.

pytest's fixtures of these names hand it to the tests; without pytest, `Trial.run` does.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fixtures.cases import AttnCase
from fixtures.cases.tables import work
from fixtures.inputs import AttnInputs, Poison, build_inputs
from tests.harness.driver import Driver, drive
from tests.harness.truth import Truth, expected, written_cache
from tests.harness.verdicts import Outcome

# Multiplications that take one core a tenth of a second, as float64 and all that goes with them.
HOST_WORK = 2e8


def reference_device(case: AttnCase, device: torch.device) -> torch.device:
    """Where a case's inputs are made and its truth is worked out: on the CPU, unless that is much.

    On a GPU, which the workers share, a small case is a hundred small waits.
    """
    return device if work(case) > HOST_WORK else torch.device("cpu")


def case_inputs(
    case: AttnCase, device: torch.device, poison: Poison = Poison.CONTRACT
) -> AttnInputs:
    """The case's inputs, where its truth is worked out."""
    return build_inputs(case, reference_device(case, device), poison)


@dataclass(frozen=True)
class Trial:
    """A candidate on a case.

    prepare: makes the inputs. A caller that needs them for several trials keeps what it made.
    """

    candidate: type[Any]
    case: AttnCase
    device: torch.device
    prepare: Callable[[AttnCase, torch.device], AttnInputs] = case_inputs

    @cached_property
    def inputs(self) -> AttnInputs:
        """The case's inputs, poisoned as vLLM's contract allows."""
        return self.prepare(self.case, self.device)

    @property
    def driver(self) -> Driver:
        """The candidate set up for the case, anew each time."""
        return drive(self.candidate, self.case, self.device)

    @cached_property
    def outcome(self) -> Outcome:
        """The candidate's answer to the case."""
        return self.driver.run(self.inputs)

    @property
    def truth(self) -> Truth:
        """The reference."""
        return expected

    @property
    def written(self) -> torch.Tensor:
        """The cache's storage as the step has to leave it."""
        return written_cache(self.inputs)[1]

    def run(self, test: Callable[..., None], **others: Any) -> None:
        """Call a conformance test with the arguments that it names.

        Args:
            others: arguments that are not the trial's.
        """
        names = inspect.signature(test).parameters
        test(**{name: others[name] if name in others else getattr(self, name) for name in names})
