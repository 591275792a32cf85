"""From test outcomes to a table, report/results.json and a verdict on the run itself."""

import contextlib
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from fixtures.cases import CUSTOM, AttnCase, CaseError
from fixtures.cases.space import FEATURES, features_of
from tests.harness.command_line import conforms
from tests.harness.provenance import environment
from tests.harness.record import PROBLEM, PROBLEMS, recorded
from tests.harness.settings import assignments, settings
from xfv1.wording import one_line, shown

PLAIN = "plain"
COLUMNS = (PLAIN, *FEATURES)
STATUSES = ("passed", "refused", "known", "failed")
# Exit statuses of a run that has ended: passed, failed, without tests.
ENDED = (0, 1, 5)
# The end of a failure's text holds what was wrong.
ERROR_CHARACTERS = 1500


@dataclass
class Result:
    """One test of one case. share: the worst error in budgets, None where none was measured.

    case: its id; of a test that draws its cases the one that failed, or nothing. seconds: its own
    and its setup's. at: seconds from the run's start to its end.
    """

    test: str
    case: str
    status: str
    elements: int = 0
    share: float | None = None
    reason: str = ""
    seconds: float = 0.0
    at: float = 0.0
    error: str = ""


def columns_of(case: AttnCase) -> list[str]:
    """The table's columns that a case counts in."""
    return features_of(case) or [PLAIN]


class ReportPlugin:
    """Collects results on the controlling process and reports them when all is done.

    candidate: as --candidate names it. tier: of the tests that are run. folder: of the report.
    settings: the environment variables that can change a verdict, of those that are set.
    running: ids of tests, or names of other steps, that have begun and not ended.
    """

    def __init__(self, config: pytest.Config, candidate: str, tier: str) -> None:
        self.config = config
        self.candidate, self.tier = candidate, tier
        self.settings = settings()
        given: str = config.getoption("--report")
        self.folder = config.invocation_params.dir / os.path.expanduser(given)
        self.results: list[Result] = []
        self.setups: dict[str, float] = {}
        self.running: dict[str, None] = {}
        self.stopped_by = ""
        self.began = time.perf_counter()
        self.problems = config.stash.setdefault(PROBLEMS, [])
        # The report of an earlier run, and folders that were not there.
        self.earlier: dict[Path, bytes] = {}
        self.made: list[Path] = []
        self.begun = False

    def begin(self) -> None:
        """Replace the report of an earlier run by one that says that this run has not ended.

        Raises:
            pytest.UsageError: if --report is no folder that can be written to.
        """
        where = f"--report={self.config.getoption('--report')}"
        try:
            for path in self._files():
                if path.parent != self.folder:
                    where = f"--junitxml={self.config.option.xmlpath}"
                self._clear(path)
            self.begun = True
            self._note()
        except OSError as error:
            with contextlib.suppress(OSError):
                self.undo()
            why = f"{error.strerror} ({shown(error.filename)})"
            expected = "expected a folder that can be written to"
            raise pytest.UsageError(one_line(f"{where}: {why}: {expected}")) from error

    def _clear(self, path: Path) -> None:
        """Remove a file that can be written afterwards; `undo` puts it back."""
        folders = (path.parent, *path.parent.parents)
        self.made += [folder for folder in folders if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self.earlier[path] = path.read_bytes()
        path.touch()
        path.unlink()

    def undo(self) -> None:
        """Put back what was there before `begin`."""
        for path in self._files() if self.begun else ():
            path.unlink(missing_ok=True)
        for path, content in self.earlier.items():
            path.write_bytes(content)
        for path in self.made:
            # It may never have been made, or hold what the candidate put there.
            with contextlib.suppress(OSError):
                path.rmdir()
        self.begun = False

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Put on record that the run is in this block, for the case that the process dies there."""
        self._note(what)
        yield
        self.running.pop(what)
        self._note()

    def _note(self, *started: str) -> None:
        self.running |= dict.fromkeys(started)
        if not self.begun:
            return
        running = f"; running: {', '.join(self.running)}" if self.running else ""
        problem = f"this run has not ended, or its process died{running}"
        self._save(complete=False, problems=[problem])

    def _files(self) -> list[Path]:
        """All that a run writes."""
        names = [self.folder / "results.json", self.folder / "results.jsonl"]
        junit = getattr(self.config.option, "xmlpath", None)
        # As pytest reads it.
        return [*names, Path(os.path.expanduser(os.path.expandvars(junit)))] if junit else names

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._note(nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.running.pop(nodeid, None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A parameter may hold anything, a path or "::" too.
        path, _, name = report.nodeid.partition("::")
        if not conforms(self.config.rootpath / path):
            return
        # Tests can be named in ways that the command line does not show, by --pyargs for one.
        if not self.begun:
            self.begin()
        # A test's outcome is its call's, or its setup's where that did not pass.
        if report.when != "call" and report.passed:
            if report.when == "setup":
                self.setups[report.nodeid] = report.duration
            return
        test, _, rest = name.partition("[")
        found = recorded(report.user_properties)
        status, reason = _status(report)
        reason = reason or found.drawn
        if found.known and status == "passed":
            status, reason = "known", f"{reason}: {found.known}"
        self.results.append(
            Result(
                test=test,
                case=_case_id(rest.removesuffix("]").partition("@")[0]) or found.failed,
                status=status,
                elements=found.elements,
                share=found.share,
                reason=reason,
                seconds=round(report.duration + self.setups.pop(report.nodeid, 0.0), 4),
                at=round(time.perf_counter() - self.began, 2),
                error=report.longreprtext[-ERROR_CHARACTERS:] if status == "failed" else "",
            )
        )
        # xdist reports no end of a test in which its worker died.
        self.running.pop(report.nodeid, None)
        # A run that is cut short keeps what it has found.
        with (self.folder / "results.jsonl").open("a") as stream:
            stream.write(json.dumps(asdict(self.results[-1])) + "\n")

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        # Every worker collects the same, and so finds the same.
        found = getattr(node, "workeroutput", {}).get(PROBLEM, [])
        self.problems += [problem for problem in found if problem not in self.problems]

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        # By the user, by -x, or by a test that ends the session.
        self.stopped_by = str(excinfo.value) or excinfo.typename

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(
        self, session: pytest.Session, exitstatus: int
    ) -> Generator[None, object, object]:
        """After other plugins have written what they write, or have failed to."""
        try:
            return (yield)
        finally:
            if exitstatus == pytest.ExitCode.USAGE_ERROR:
                self.undo()
            if self.begun:
                self._end(session, exitstatus)

    def _end(self, session: pytest.Session, exitstatus: int) -> None:
        # A failure, known or not, has been compared with what is right.
        if not any(r.elements or r.status in ("known", "failed") for r in self.results):
            self.problems.append("nothing was compared: every case was refused or none was run")
        stopped = str(session.shouldfail or session.shouldstop or self.stopped_by)
        complete = exitstatus in ENDED and not stopped
        if not complete:
            why = stopped or f"exit status {int(exitstatus)}"
            self.problems.append(f"this run was cut short: {why}")
        if self.problems and self.results and exitstatus in (0, 5):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        counts = Counter(result.status for result in self.results)
        self._save(
            complete=complete,
            **environment(),
            workers=getattr(self.config.option, "numprocesses", None) or 1,
            seconds=round(time.perf_counter() - self.began, 1),
            counts={status: counts[status] for status in STATUSES},
            cases=len({result.case for result in self.results} - {""}),
            elements=sum(result.elements for result in self.results),
            problems=self.problems,
            coverage=self._coverage(),
            results=[asdict(result) for result in self.results],
        )

    def _save(self, **facts: Any) -> None:
        """Write results.json, whole or not at all."""
        own = {"candidate": self.candidate, "tier": self.tier, "settings": self.settings}
        content = {**own, **facts}
        target = self.folder / "results.json"
        partial = target.with_suffix(".tmp")
        partial.write_text(json.dumps(content, indent=1))
        partial.replace(target)

    def _coverage(self) -> str:
        """A line about what a whole tier's run covered; empty if only a part of a tier was run."""
        from fixtures.cases.covering import coverage_line

        option = self.config.option
        tier = {"cpu": "cpu", "gpu": "gpu", "long": "gpu"}.get(self.tier)
        if tier is None or option.keyword or option.case:
            return ""
        asked = [r for r in self.results if r.test == "test_output_matches_reference"]
        passed = {result.case for result in asked if result.status == "passed"}
        return coverage_line(tier, passed) if asked else ""

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self.results:
            return
        write = terminalreporter.write_line
        terminalreporter.section(f"candidate {self.candidate}")
        for line in table(self.results):
            write(line)
        for status in ("refused", "known"):
            reasons = Counter(r.reason for r in self.results if r.status == status)
            for reason, count in reasons.most_common():
                write(f"{status} {count}: {reason}")
        failed = [result for result in self.results if result.status == "failed"]
        again = [f"--case={r.case}" if r.case else f"-k {r.test}" for r in failed]
        # Each case once, whichever of its tests fail.
        for chosen in dict.fromkeys(again):
            words = (*assignments(self.settings), "pytest", f"--candidate={self.candidate}", chosen)
            write(f"rerun: {' '.join(words)}")
        if line := self._coverage():
            write(line)
        for problem in self.problems:
            write(f"PROBLEM: {problem}")
        counts = Counter(result.status for result in self.results)
        shares = [result.share for result in self.results if result.share is not None]
        write(
            ", ".join(f"{counts[status]} {status}" for status in STATUSES)
            + (f"; worst error {max(shares):.2f} of its budget" if shares else "")
            + f"; {self.config.getoption('--report')}/results.json"
        )


def _case_id(text: str) -> str:
    """The text, if it is a case's id: other tests may have other parameters, or none."""
    try:
        return AttnCase.from_id(text).id
    except CaseError:
        return ""


def _status(report: pytest.TestReport) -> tuple[str, str]:
    if hasattr(report, "wasxfail"):
        # xfail_strict turns an unexpected pass into a failure.
        return (
            ("known", str(report.wasxfail)) if report.skipped else ("failed", "passed unexpectedly")
        )
    if report.skipped:
        text = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else ""
        return "refused", text.removeprefix("Skipped: ").removeprefix("refused: ")
    return ("passed", "") if report.passed else ("failed", "")


def table(results: list[Result]) -> list[str]:
    """Scenario by feature: how many tests passed, were refused, known or failed; worst share.

    Cases that a test draws are of every kind: custom, other.
    """
    cells: dict[tuple[str, str], list[Result]] = defaultdict(list)
    scenarios: list[str] = []
    for result in results:
        case = AttnCase.from_id(result.case) if result.case else None
        scenario = case.scenario if case else CUSTOM
        if scenario not in scenarios:
            scenarios.append(scenario)
        for column in columns_of(case) if case else ["other"]:
            cells[scenario, column].append(result)
    columns = [c for c in COLUMNS if any((s, c) in cells for s in scenarios)]
    body = [["scenario", *columns]]
    body += [[s, *(_cell(cells.get((s, c), [])) for c in columns)] for s in sorted(scenarios)]
    widths = [max(len(row[i]) for row in body) for i in range(len(body[0]))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in body
    ]


def _cell(results: list[Result]) -> str:
    if not results:
        return "."
    counts = Counter(result.status for result in results)
    parts = [f"{counts['passed']}"] if counts["passed"] else []
    parts += [f"{counts[s]} {s.upper() if s == 'failed' else s}" for s in STATUSES[1:] if counts[s]]
    shares = [result.share for result in results if result.share is not None]
    if shares:
        parts.append(f"{max(shares):.2f}")
    return " ".join(parts)
