"""Speed of the backend, its ops and its peers. Nothing here is asserted.

`python -m benchmarks.kernels`, `.builder`, `.serving` and `.suite` each write one JSON file. They
use the suite's harness, and no test uses them.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
