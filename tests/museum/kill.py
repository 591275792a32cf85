"""Which of the museum's faulty backends the suite's own tests notice, and how soon.

    python -m tests.museum.kill --json tests/museum/museum.json

Every fault is put through the conformance tests, the very functions, on the cases that can tell
it from the truth, the lightest of the smallest tier first, until one fails.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.harness.environment import prepare

prepare()

import torch  # noqa: E402

from fixtures.cases import AttnCase  # noqa: E402
from fixtures.cases.covering import covering_cases  # noqa: E402
from fixtures.cases.tables import TIERS, Row, rows, work  # noqa: E402
from tests.conformance import (  # noqa: E402
    test_addressing,
    test_cache,
    test_invariance,
    test_output,
    test_poison,
    test_visibility,
)
from tests.harness.loading import load_candidate  # noqa: E402
from tests.harness.promises import Promise, promises_in  # noqa: E402
from tests.harness.provenance import environment  # noqa: E402
from tests.harness.trial import Trial, case_inputs  # noqa: E402
from tests.harness.verdicts import Refused, Verdict  # noqa: E402
from tests.museum.faults import BACKEND_FAULTS, BackendFault  # noqa: E402
from tests.museum.plain import Plain  # noqa: E402

CPU = torch.device("cpu")
RESULTS = Path(__file__).with_name("museum.json")
PROMISES = promises_in(
    test_output, test_visibility, test_poison, test_cache, test_invariance, test_addressing
)
# By name, in the order in which they are run. A thousand runs of a case take too long here.
KINDS: dict[str, Promise] = {each.name: each for each in PROMISES if each.name != "thousand"}
# Cases a fault is tried with before it counts as one that survives.
TRIES = 6
PASSED, REFUSED, KILLED, SURVIVED = "passed", "refused", "killed", "survived"


@dataclass(frozen=True)
class Attempt:
    """One test of one case. outcome: passed, refused or killed. message: what was wrong."""

    kind: str
    case: str
    outcome: str
    seconds: float
    message: str


@dataclass(frozen=True)
class Exhibit:
    """What came of a fault. verdict: killed, survived, or passed (a control). kinds: all that
    notice it on the case that kills it. attempts: how many tests it took; refused: how many of
    them were refused."""

    name: str
    source: str
    what: str
    model: str
    control: bool
    verdict: str
    kind: str
    kinds: list[str]
    case: str
    tier: str
    seconds: float
    attempts: int
    refused: int
    message: str


# Faults follow each other on the same few cases.
_inputs = functools.lru_cache(maxsize=64)(case_inputs)


def _unrecorded(verdict: Verdict) -> None:
    """Stands in place of a report."""


def applies(kind: str, case: AttnCase) -> bool:
    """Whether the matrix asks this of a case at all."""
    return KINDS[kind].cases(case)


def asked_in(kind: str, row: Row) -> str:
    """The smallest tier in which the matrix asks this of a row's case."""
    return KINDS[kind].tier_of(row.case, row.tier)


def attempt(candidate: type[Any], kind: str, case: AttnCase, steps: int = 1) -> Attempt:
    """Run one conformance test on a candidate, as often as steps that it may take to fail."""
    test, start = KINDS[kind].test, time.perf_counter()
    outcome, message = PASSED, ""
    try:
        for _ in range(steps):
            Trial(candidate, case, CPU, _inputs).run(test, record=_unrecorded)
    except Refused as refusal:
        outcome, message = REFUSED, str(refusal)
    except Exception as error:
        # Whatever a candidate raises fails a test.
        outcome, message = KILLED, f"{type(error).__name__}: {error}"
    seconds = round(time.perf_counter() - start, 3)
    return Attempt(kind, case.id, outcome, seconds, message.partition("\n")[0])


@functools.cache
def sound(kind: str, case: AttnCase) -> bool:
    """Whether the correct candidate passes: only then does it say anything that a fault fails."""
    return attempt(Plain, kind, case).outcome == PASSED


def telling_rows(fault: BackendFault) -> list[Row]:
    """The rows that can tell a fault: by tier, rows of their own before those that are there to
    cover combinations, the lightest first."""
    covering = {case.id for tier in ("cpu", "gpu") for case in covering_cases(tier)}
    found = [row for row in rows() if fault.shows(row.case)]
    found.sort(key=lambda r: (TIERS.index(r.tier), r.case.id in covering, work(r.case)))
    return found


def attempts(fault: BackendFault, tries: int) -> Iterator[tuple[Row, Attempt]]:
    """Each test of the first so many rows that can tell a fault, in the tier they are in."""
    candidate = load_candidate(fault.candidate)
    for row in telling_rows(fault)[:tries]:
        for kind in KINDS:
            if applies(kind, row.case) and asked_in(kind, row) == row.tier:
                yield row, attempt(candidate, kind, row.case, fault.steps)


def examine(fault: BackendFault, tries: int = TRIES) -> Exhibit:
    """Try a fault until a test notices it.

    Raises:
        RuntimeError: if that test fails for the correct candidate too.
    """
    made: list[Attempt] = []
    kinds: list[str] = []
    killer: tuple[Row, Attempt] | None = None
    for row, each in attempts(fault, tries):
        if killer and row is not killer[0]:
            break
        if each.outcome == KILLED:
            if not sound(each.kind, row.case):
                raise RuntimeError(f"the correct candidate fails {each.kind} of {each.case}")
            killer = killer or (row, each)
            kinds.append(each.kind)
        if not killer or each is killer[1]:
            made.append(each)
    verdict = KILLED if killer else PASSED if fault.control else SURVIVED
    last = killer[1] if killer else None
    return Exhibit(
        name=fault.name,
        source=fault.source,
        what=fault.what,
        model=fault.model,
        control=fault.control,
        verdict=verdict,
        kind=last.kind if last else "",
        kinds=kinds,
        case=last.case if last else "",
        tier=killer[0].tier if killer else "",
        seconds=last.seconds if last else round(sum(each.seconds for each in made), 3),
        attempts=len(made),
        refused=sum(each.outcome == REFUSED for each in made),
        message=last.message if last else "",
    )


def table(exhibits: list[Exhibit]) -> list[str]:
    """One line for each fault."""
    body = [("fault", "verdict", "by", "tier", "seconds", "tests", "refused", "case")]
    for e in exhibits:
        counts = f"{e.seconds:.2f}", str(e.attempts), str(e.refused)
        body.append((e.name, e.verdict, e.kind or "-", e.tier or "-", *counts, e.case or "-"))
    widths = [max(len(row[i]) for row in body) for i in range(len(body[0]))]
    return ["  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)) for row in body]


def report(exhibits: list[Exhibit], seconds: float) -> dict[str, Any]:
    """What --json writes."""
    faults = [e for e in exhibits if not e.control]
    return {
        **environment(),
        "seconds": round(seconds, 1),
        "faults": len(faults),
        "killed": sum(e.verdict == KILLED for e in faults),
        "survived": [e.name for e in faults if e.verdict != KILLED],
        "controls": len(exhibits) - len(faults),
        "exhibits": [asdict(e) for e in exhibits],
    }


def main(arguments: list[str] | None = None) -> int:
    """0 if all faults are killed, and all controls pass."""
    parser = argparse.ArgumentParser(prog="python -m tests.museum.kill", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write a report")
    parser.add_argument("--tries", type=int, default=TRIES, help="cases to a fault (%(default)s)")
    parser.add_argument("names", nargs="*", metavar="FAULT", help="these alone")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in BACKEND_FAULTS]:
        parser.error(f"no fault {', '.join(unknown)}: expected among {', '.join(BACKEND_FAULTS)}")
    start = time.perf_counter()
    chosen = [
        BACKEND_FAULTS[name] for name in BACKEND_FAULTS if name in (options.names or BACKEND_FAULTS)
    ]
    exhibits = [examine(fault, options.tries) for fault in chosen]
    content = report(exhibits, time.perf_counter() - start)
    print("\n".join(table(exhibits)))
    print(
        f"{content['killed']} of {content['faults']} faults killed, survived:"
        f" {', '.join(content['survived']) or 'none'}; {content['controls']} controls;"
        f" {content['seconds']} s"
    )
    if options.json:
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if any((e.verdict == KILLED) == e.control for e in exhibits) else 0


if __name__ == "__main__":
    sys.exit(main())
