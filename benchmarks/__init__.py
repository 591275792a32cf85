"""Speed of the backend, its ops and its peers; what all benchmarks share. Nothing here is asserted.

`python -m benchmarks.kernels`, `.builder`, `.serving` and `.suite` each write one JSON file.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.harness.provenance import environment

__all__ = ["RESULTS", "ROOT", "environment", "save", "say"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def save(path: Path, content: Any) -> None:
    """Write JSON in one step, so that whoever is killed meanwhile leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps(content, indent=1) + "\n")
    scratch.replace(path)


def say(text: str) -> None:
    """A line for whoever watches, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
