"""The way from a test to the report: pytest's user properties, which xdist carries too."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.harness.verdicts import Verdict

PROPERTY = "conformance"
PROBLEM = "conformance_problems"
PROBLEMS = pytest.StashKey[list[str]]()


class Recorder:
    """Takes a test's verdicts."""

    def __init__(self, node: pytest.Item) -> None:
        self.node = node

    def __call__(self, verdict: Verdict) -> None:
        measured = {"elements": verdict.elements, "share": verdict.share}
        self.node.user_properties.append((PROPERTY, measured))


def record_drawn(
    node: pytest.Item,
    verdict: Verdict | None = None,
    *,
    refused: int = 0,
    known: str = "",
    failed: str = "",
) -> None:
    """Add one case that a test drew itself to what the test reports, in one user property.

    Args:
        verdict: of a case that passed.
        refused: 1 if the candidate refused the case.
        known: the ledger's reason, if the case fails and is known to.
        failed: the case's id, if the test fails by it.
    """
    found = [value for name, value in node.user_properties if name == PROPERTY]
    if not found:
        counts: dict[str, Any] = {"drawn": 0, "refused": 0, "known": 0}
        found.append({"elements": 0, "share": None, "reason": "", "failed": "", **counts})
        node.user_properties.append((PROPERTY, found[0]))
    total = found[0]
    assert isinstance(total, dict)
    if verdict:
        total["elements"] += verdict.elements
        total["share"] = _worst(total["share"], verdict.share)
    total["drawn"] += 1
    total["refused"] += refused
    total["known"] += bool(known)
    total["reason"] = known or total["reason"]
    # Hypothesis ends with the least case that fails.
    total["failed"] = failed or total["failed"]


@dataclass
class Recorded:
    """All that a test handed over.

    elements, share: of all its verdicts. failed: the id of the drawn case that failed, or nothing.
    drawn: how many cases it drew and how they ended, in words; empty if it drew none.
    known: the ledger's reason, if a drawn case failed and is known to.
    """

    elements: int = 0
    share: float | None = None
    failed: str = ""
    drawn: str = ""
    known: str = ""


def recorded(properties: Iterable[tuple[str, object]]) -> Recorded:
    """The user properties of a test, read back."""
    total = Recorded()
    for name, value in properties:
        if name == PROPERTY and isinstance(value, dict):
            total.elements += value["elements"]
            total.share = _worst(total.share, value["share"])
            total.failed = total.failed or value.get("failed", "")
            if "drawn" in value:
                counts = (f"{value[s]} {s}" for s in ("refused", "known") if value[s])
                total.drawn = ", ".join([f"{value['drawn']} drawn", *counts])
                total.known = value["reason"]
    return total


def _worst(*shares: float | None) -> float | None:
    return max((share for share in shares if share is not None), default=None)


def add_problem(config: pytest.Config, problem: str) -> None:
    """Make the run fail whatever its tests say; from an xdist worker too."""
    if hasattr(config, "workeroutput"):
        config.workeroutput.setdefault(PROBLEM, []).append(problem)
    else:
        config.stash.setdefault(PROBLEMS, []).append(problem)
