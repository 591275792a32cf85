"""xfv1: the xFormers attention backend for vLLM V1, out of tree.

Importing this package imports nothing heavy; vLLM calls `register` in each of its processes.
"""

__version__ = "0.1.0"

BACKEND = "xfv1.backend.XFormersAttentionBackend"
NAME = "XFORMERS"


def register() -> None:
    """vLLM's plugin entry point (group vllm.general_plugins): makes the backend known to vLLM.

    As XFORMERS where vLLM takes names of their own (0.32 on), and always as CUSTOM. vLLM's CPU
    platform takes nothing but CPU_ATTN, so XFV1_CPU=1 puts xfv1 in that place.

    Raises:
        RuntimeError: in a vLLM that is too old for xfv1.
        ValueError: if XFV1_CPU is neither 0 nor 1.
    """
    from xfv1 import settings
    from xfv1.compat import check_version

    on_cpu = settings.cpu()
    check_version()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    if on_cpu:
        register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)
    # vLLM runs its plugins once a process, but nothing keeps others from doing so again.
    if hasattr(AttentionBackendEnum, "register") and NAME not in AttentionBackendEnum.__members__:
        register_backend(NAME, BACKEND)


def registered_name() -> str:
    """The name under which vLLM knows the backend in this process."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return NAME if NAME in AttentionBackendEnum.__members__ else "CUSTOM"
