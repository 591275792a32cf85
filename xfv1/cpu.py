"""vLLM's CPU platform, which uses no attention backend but its own: xfv1 in its place.

XFV1_CPU=1 asks for it. vLLM then asks this module's attributes for its MLA backends.
"""

from typing import Any

from xfv1 import compat

# vLLM's backends for multi-head latent attention on a CPU. Which of them exist depends on vLLM.
MLA = ("CPU_MLA", "AMX_MLA")


def register(backend: str) -> None:
    """Have vLLM use `backend`, a class's path, for attention on a CPU.

    vLLM uses other backends for multi-head latent attention (MLA). They stay, but say that they
    run in place of xfv1.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, backend)
    for name in MLA:
        if name in AttentionBackendEnum.__members__:
            register_backend(AttentionBackendEnum[name], f"{__name__}.{name}")


def __getattr__(name: str) -> Any:
    """vLLM's own class for one of `MLA`; a line in the log says that xfv1 does not run."""
    if name not in MLA:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    compat.log_once(
        "xfv1: this model's multi-head latent attention (MLA) runs on vLLM's own %s. XFV1_CPU=1 "
        "has no effect on it.",
        name,
    )
    return resolve_obj_by_qualname(AttentionBackendEnum[name].value)
