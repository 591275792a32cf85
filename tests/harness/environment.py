"""Prepare a process before vLLM is imported in it."""

import importlib
import importlib.util
import os
import sys

INSTALL = 'pip install -e ".[cpu,test]" in the checkout, or with a GPU ".[cuda,test]"'


def not_installed(*packages: str) -> str:
    """A line that names the packages that are not installed; empty if all are installed."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}; to install: {INSTALL}" if absent else ""


def require(*packages: str) -> None:
    """End the process, with one line, if a package is not installed.

    For a conftest: whatever else is raised there, pytest shows with a traceback.
    """
    if line := not_installed(*packages):
        sys.stderr.write(f"ERROR: {line}\n")
        sys.exit(4)


def prepare() -> None:
    """Make vLLM importable offline and single-process; call it before anything imports vLLM."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # One process talks to itself; without a network, looking up its host's name takes minutes.
    os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if os.environ.get("TRITON_INTERPRET") == "1":
        # xFormers turns its Triton ops off where it sees no CUDA.
        os.environ.setdefault("XFORMERS_ENABLE_TRITON", "1")
    for package in ("torchvision", "torchaudio", "torchcodec"):
        _hide_if_broken(package)


def _hide_if_broken(package: str) -> None:
    """Transformers imports these if it finds them, and a build for another torch raises then; no
    attention needs them, so one that does not load is treated as not installed."""
    try:
        importlib.import_module(package)
    except (ImportError, OSError, RuntimeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]
        sys.modules[package] = None  # type: ignore[assignment]


def has_xformers() -> bool:
    """Whether xFormers is installed; it has builds for x86 processors alone."""
    return importlib.util.find_spec("xformers") is not None


def register_models(*names: str) -> None:
    """Make vLLM take these of its models from this process.

    It would otherwise import each in a process of its own to look at it, which costs 10 s and
    knows nothing of `prepare`.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models import registry

    for name in names:
        if name in _REGISTERED:
            continue
        module_name, model = registry._VLLM_MODELS[name]
        loaded = importlib.import_module(f"vllm.model_executor.models.{module_name}")
        ModelRegistry.register_model(name, getattr(loaded, model))
        _REGISTERED.add(name)


_REGISTERED: set[str] = set()
