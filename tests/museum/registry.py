"""The registry of planted faults: each has one name, one description, and a rule of where it shows.

A fault is planted in one of two places. `tests.museum.faults` plants it in a backend, which
`--candidate` can name. `tests.museum.reference_faults` plants it in the question that the reference
is asked, so that the reference computes the fault's answer.
"""

from dataclasses import dataclass
from typing import TypeVar

from fixtures.cases import AttnCase
from fixtures.cases.effects import Hidden


@dataclass(frozen=True)
class Fault:
    """One planted fault.

    name: unique among all faults.
    what: what the fault does, in words that a report can show.
    hidden: why the fault cannot change a case's output, or None where it can.
    """

    name: str
    what: str
    hidden: Hidden

    def shows(self, case: AttnCase) -> bool:
        """Whether the fault can change this case's output."""
        return self.hidden(case) is None


FAULTS: dict[str, Fault] = {}

Kind = TypeVar("Kind", bound=Fault)


def enter(fault: Kind) -> Kind:
    """Enter a fault into the registry.

    Raises:
        ValueError: if another fault has its name.
    """
    if fault.name in FAULTS:
        raise ValueError(f"fault {fault.name}: expected a name that no other fault has")
    FAULTS[fault.name] = fault
    return fault
