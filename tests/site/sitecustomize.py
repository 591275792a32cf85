"""Python runs this first in a process that has this folder on its PYTHONPATH.

XFV1_HIDDEN_PACKAGES: names, separated by commas, that the process takes as not installed.
Transformers imports torchvision and torchaudio wherever it finds them, and a build for another
torch raises there.

XFV1_PROCESSOR=avx2: torch says that the processor has no AVX-512, so that vLLM loads its library
for AVX2. Other libraries have environment variables of their own for that (tox.ini).
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

WITHOUT_AVX512 = ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_vnni_supported")
WITHOUT_AMX = ("_is_amx_tile_supported", "_is_amx_fp16_supported")


class AfterTorchCpu(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Changes `torch.cpu` as soon as it is imported, and imports nothing itself."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torch.cpu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            self.loader = spec.loader
            spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        for name in (*WITHOUT_AVX512, *WITHOUT_AMX):
            if hasattr(module, name):
                setattr(module, name, _no)


def _no(*args: Any) -> bool:
    return False


for package in filter(None, os.environ.get("XFV1_HIDDEN_PACKAGES", "").split(",")):
    sys.modules[package] = None  # type: ignore[assignment]
if os.environ.get("XFV1_PROCESSOR") == "avx2":
    sys.meta_path.insert(0, AfterTorchCpu())
