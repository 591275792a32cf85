"""How fast the conformance suite is: cases a second, and the time to its first result.

    python -m benchmarks.suite --tier smoke --json out.json

Runs pytest on tests/conformance in a process of its own and reads its report. first_result_s runs
from the start of that process, imports and collection included, to the first test's outcome.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, ROOT
from tests.harness.output import save, say
from tests.harness.provenance import environment

TIERS = ("smoke", "cpu", "gpu")
OUTCOME = re.compile(r"\b(PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b")


def measure(tier: str, options: list[str]) -> dict[str, Any]:
    """One run of the suite.

    Raises:
        RuntimeError: with the end of pytest's output, if it leaves no report of a whole run.
    """
    lines: list[str] = []
    first: float | None = None
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "pytest", "tests/conformance", "-m", tier, "-v", "--no-header",
            f"--report={folder}", *options,
        ]  # fmt: skip
        start = time.perf_counter()
        with subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            for line in process.stdout:
                if first is None and OUTCOME.search(line):
                    first = time.perf_counter() - start
                lines.append(line)
        seconds = time.perf_counter() - start
        results = Path(folder, "results.json")
        report = json.loads(results.read_text()) if results.exists() else {}
        if not report.get("complete"):
            raise RuntimeError("".join(lines[-30:]))
    tests = len(report["results"])
    return {
        "tier": tier,
        "options": options,
        "exit": process.returncode,
        "cases": report["cases"],
        "tests": tests,
        "counts": report["counts"],
        "elements": report["elements"],
        "seconds": round(seconds, 2),
        "first_result_s": None if first is None else round(first, 2),
        "cases_per_s": round(report["cases"] / seconds, 2),
        "tests_per_s": round(tests / seconds, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tier", nargs="+", choices=TIERS, default=["smoke"])
    parser.add_argument("--json", type=Path, default=RESULTS / "suite.json")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="more for pytest")
    args = parser.parse_args()
    state: dict[str, Any] = {
        "environment": environment(),
        "method": " ".join((__doc__ or "").split()),
        "runs": [],
    }
    for tier in args.tier:
        run = measure(tier, args.pytest)
        state["runs"].append(run)
        save(args.json, state)
        say(
            f"{tier}: {run['cases']} cases, {run['tests']} tests in {run['seconds']} s"
            f" ({run['cases_per_s']} cases/s), first result after {run['first_result_s']} s,"
            f" {run['counts']}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
