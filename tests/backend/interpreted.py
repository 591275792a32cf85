"""Runs tests once more where Triton interprets its kernels, vLLM's own among them."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# vLLM's Triton kernels exist where it sees a driver. Triton's interpreter needs none, and lacks
# what vLLM reads of a compiled kernel.
#
# The interpreter multiplies matrices by NumPy, whose library adds a row's products in an order that
# depends on where the row lies in its tile, and on the processor. A GPU's matrix units add every
# row's in the same order, and so does the product here: one term after another.
WITH_TRITON = """
import sys, types, pytest
import numpy as np
from triton import backends
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

def product(a, b, dtype):
    a, b = a.astype(dtype), b.astype(dtype)
    total = np.zeros((*a.shape[:-1], b.shape[-1]), dtype)
    for k in range(a.shape[-1]):
        total += a[..., :, k, None] * b[..., k, None, :]
    return total

interpreter.np = types.ModuleType("numpy")
interpreter.np.__dict__.update(vars(np))
interpreter.np.matmul = product

driver = types.SimpleNamespace(is_active=lambda: True)
backends.backends["cpu"] = types.SimpleNamespace(driver=driver)
InterpretedFunction.constexprs = property(
    lambda self: [n for n, kind in self.fn.__annotations__.items() if "constexpr" in str(kind)]
)
sys.exit(pytest.main(sys.argv[1:]))
"""


def passed_in_interpreter(module: str, folder: Path) -> int:
    """How many of a module's tests pass there, those named for the interpreter left out.

    Args:
        folder: for the run's own report.

    Raises:
        AssertionError: with what pytest printed, if one fails.
    """
    own = Path(module).relative_to(ROOT).as_posix()
    options = ["-p", "no:xdist", "-p", "no:cacheprovider", f"--junitxml={folder}/junit.xml"]
    done = subprocess.run(
        [sys.executable, "-c", WITH_TRITON, own, "-k", "not interpreter", *options],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    return int(passed[1]) if passed else 0
