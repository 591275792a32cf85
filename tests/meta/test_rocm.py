"""Does the lane for AMD's cards say in one line that another build is installed?"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.harness import rocm

ROOT = Path(__file__).resolve().parents[2]


def test_another_build_is_named_in_one_line() -> None:
    if torch.version.hip:
        pytest.skip("this torch is a build for ROCm")
    done = subprocess.run(
        [sys.executable, "-m", "tests.harness.rocm"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"torch {torch.__version__} is a build for ")
    assert "install the builds for ROCm first" in line


@pytest.mark.parametrize("package", ["torch", "vllm"])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else found(name)
    )
    assert rocm.problem().startswith(f"{package} is not installed: ")


def test_a_build_for_rocm_without_a_card_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no AMD card" in rocm.problem()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert rocm.problem() == ""
