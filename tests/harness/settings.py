"""The environment variables that can change a verdict: the one list of them.

results.json holds those that are set, and the line that reruns a failure begins with them.
"""

import fnmatch
import os
import shlex

# Shell patterns.
VARIABLES = (
    # xfv1's own, and those of tests/site.
    "XFV1_*",
    # How many cases Hypothesis draws, and with which seed.
    "HYPOTHESIS_PROFILE",
    # Which kernels run, and how.
    "TRITON_INTERPRET",
    "TRITON_F32_DEFAULT",
    "XFORMERS_*",
    "FLASH_ATTENTION_TRITON_AMD_*",
    "VLLM_ATTENTION_BACKEND",
    "VLLM_BATCH_INVARIANT",
    "VLLM_FLASH_ATTN_*",
    "VLLM_KV_CACHE_LAYOUT",
    "VLLM_ROCM_*",
    "VLLM_USE_*",
    "VLLM_V1_*",
    # How libraries round.
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    # Which device runs, and which instructions of a processor.
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "ATEN_CPU_CAPABILITY",
    "MKL_ENABLE_INSTRUCTIONS",
    "NPY_DISABLE_CPU_FEATURES",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_CORETYPE",
)
# Folders of this machine that other tests read, and no conformance test.
FOLDERS = ("XFV1_CONTRACT_SOURCES", "XFV1_REAL_CHECKPOINT")


def settings() -> dict[str, str]:
    """By name, the values of those variables that are set; one that is set to nothing counts."""
    return {name: os.environ[name] for name in sorted(os.environ) if changes_verdicts(name)}


def changes_verdicts(name: str) -> bool:
    """Whether an environment variable of this name can change what a conformance test finds."""
    listed = any(fnmatch.fnmatchcase(name, pattern) for pattern in VARIABLES)
    return listed and name not in FOLDERS


def assignments(values: dict[str, str]) -> list[str]:
    """The settings as words of a shell, to stand before a command."""
    return [f"{name}={shlex.quote(value)}" for name, value in values.items()]
