"""Which cases a conformance test takes, and in which tiers: said above its head, by `@promise`.

pytest reads it to parametrize the test; the museum and the mutants read it to run the very same
test on the very same cases.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TypeVar

from fixtures.cases import AttnCase
from fixtures.cases.tables import TIERS

Test = TypeVar("Test", bound=Callable[..., None])


@dataclass(frozen=True)
class Promise:
    """A conformance test and its cases.

    name: by which the museum's reports call the test. cases: whether the test takes a case.
    tier: the smallest tier in which it takes one; a case's own tier may be a larger one.
    """

    name: str
    test: Callable[..., None]
    cases: Callable[[AttnCase], bool]
    tier: Callable[[AttnCase], str]

    def tier_of(self, case: AttnCase, own: str) -> str:
        """The smallest tier in which the test takes a case, whose own tier is given."""
        return max(own, self.tier(case), key=TIERS.index)


_PROMISES: dict[Callable[..., None], Promise] = {}


def promise(
    name: str,
    *,
    cases: Callable[[AttnCase], bool],
    tier: Callable[[AttnCase], str] | str,
) -> Callable[[Test], Test]:
    """Say which cases the test below takes, and from which tier on.

    Args:
        name: see `Promise`.
        cases: whether the test takes a case.
        tier: a tier, or a function from a case to one.
    """

    def said(test: Test) -> Test:
        of_case = (lambda case: tier) if isinstance(tier, str) else tier
        _PROMISES[test] = Promise(name, test, cases, of_case)
        return test

    return said


def every(case: AttnCase) -> bool:
    """Whether a test takes the case, for a test that takes all."""
    return True


def promise_of(test: Callable[..., None]) -> Promise:
    """The promise said above a test.

    Raises:
        LookupError: if there is none.
    """
    if test not in _PROMISES:
        raise LookupError(f"{test.__module__}.{test.__name__} has a case: expected @promise on it")
    return _PROMISES[test]


def promises_in(*modules: ModuleType) -> list[Promise]:
    """The promises of these modules, in the order in which they are written."""
    return [
        found
        for module in modules
        for found in _PROMISES.values()
        if found.test.__module__ == module.__name__
    ]
