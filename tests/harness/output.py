"""Output of the programs that are run by hand: lines, and a JSON file."""

import json
import os
import sys
from pathlib import Path
from typing import Any


def save(path: Path, content: Any) -> None:
    """Write JSON in one step: a program that is killed meanwhile leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps(content, indent=1) + "\n")
    scratch.replace(path)


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
