"""A run's results.json without its rows: small enough to keep in a repository.

python -m tests.harness.summary report/results.json > docs/results/h100.json
"""

import argparse
import gzip
import hashlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORST = 20


def summary(raw: bytes) -> dict[str, Any]:
    """The facts about the run, and its rows in short.

    Args:
        raw: what results.json holds, uncompressed.

    Returns:
        The fields of results.json but `results`; how many rows of each test ended how; every row
        that did not pass; the 20 rows with the largest errors, in parts of their budget; and
        sha256 of `raw`, to know the file by.
    """
    facts: dict[str, Any] = json.loads(raw)
    rows: list[dict[str, Any]] = facts.pop("results")
    tests: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        tests[row["test"]][row["status"]] += 1
    measured = [row for row in rows if row["share"] is not None]
    worst = sorted(measured, key=lambda row: (-row["share"], row["test"], row["case"]))[:WORST]
    return {
        **facts,
        "tests": {test: dict(sorted(tests[test].items())) for test in sorted(tests)},
        "not_passed": [row for row in rows if row["status"] != "passed"],
        "worst": [{name: row[name] for name in ("test", "case", "share")} for row in worst],
        "raw_sha256": hashlib.sha256(raw).hexdigest(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="a run's results.json, or results.json.gz")
    path: Path = parser.parse_args(arguments).results
    try:
        raw = path.read_bytes()
        found = summary(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        parser.error(f"results={str(path)!r}: expected a run's results.json ({error!r})")
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
