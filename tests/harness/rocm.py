"""Is what is installed built for AMD's cards? One line says what is not, and the status is 1.

python -m tests.harness.rocm
"""

import importlib.util
import sys

WHERE = (
    "install the builds for ROCm first (an image of AMD's with vLLM, or the wheel indexes for ROCm "
    "of vLLM and PyTorch), then run tox -e rocm there"
)


def problem() -> str:
    """One line that names what is missing or built for something else; empty if all is well."""
    for package in ("torch", "vllm"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: {WHERE}"
    import torch

    if torch.version.hip is None:
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
        return f"torch {torch.__version__} is a build {built}: {WHERE}"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no AMD card: check the driver and /dev/kfd"
    return ""


if __name__ == "__main__":
    sys.exit(problem() or 0)
