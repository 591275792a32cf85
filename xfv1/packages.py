"""Packages that Transformers imports wherever it finds them, and that may not load.

PyPI's builds are for CUDA: beside a build of torch for CPUs, they raise when they are imported.
"""

import importlib
import sys
from collections.abc import Callable
from typing import Any

# No attention needs these.
OPTIONAL = ("torchvision", "torchaudio", "torchcodec")


def hide_broken() -> None:
    """Make this process take each of `OPTIONAL` that does not load as not installed."""
    for package in OPTIONAL:
        try:
            importlib.import_module(package)
        except (ImportError, OSError, RuntimeError):
            for name in [name for name in sys.modules if name.partition(".")[0] == package]:
                del sys.modules[name]
            sys.modules[package] = None  # type: ignore[assignment]


def import_without_ops() -> None:
    """Import torchvision even where its compiled ops do not load, for its Python code alone.

    Transformers' image processors need that code. torchvision's import fails where it tells torch
    what an op that is not there would return.
    """
    import torch

    register = torch.library.register_fake

    def if_there(op: Any, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        # torchvision uses it as a decorator.
        decorate: Callable[[Any], Any] = register(op, *args, **kwargs)

        def decorated(function: Any) -> Any:
            try:
                return decorate(function)
            except RuntimeError:
                return function

        return decorated

    torch.library.register_fake = if_there
    try:
        importlib.import_module("torchvision")
    except (ImportError, OSError, RuntimeError):
        return
    finally:
        torch.library.register_fake = register
