"""xfv1: the xFormers attention backend for vLLM V1, out of tree.

Importing this package imports nothing heavy; vLLM calls `announce` and `register` in each of its
processes.
"""

import os
from typing import Any

__version__ = "0.1.0"

BACKEND = "xfv1.backend.XFormersAttentionBackend"
NAME = "XFORMERS"
CPU_IGNORES = (
    "vLLM's CPU platform ignores --attention-backend. To serve with xfv1 on a CPU, set XFV1_CPU=1."
)


def announce() -> None:
    """vLLM's plugin entry point (group vllm.platform_plugins): makes the backend's names known.

    vLLM runs this group when a process first asks for its platform. That is before it parses a
    configuration, as `LLM(attention_config={"backend": "XFORMERS"})` needs it. xfv1 offers no
    platform, so this returns None. XFORMERS needs vLLM 0.32; earlier releases know CUSTOM alone.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    # vLLM runs its plugins once in a process, but others may call this again.
    if hasattr(AttentionBackendEnum, "register") and NAME not in AttentionBackendEnum.__members__:
        register_backend(NAME, BACKEND)
        _pickle_by_name(AttentionBackendEnum[NAME])


def register() -> None:
    """vLLM's plugin entry point (group vllm.general_plugins): makes the backend known to vLLM.

    The backend's name is XFORMERS in vLLM 0.32 and later, and CUSTOM in every release. On a CPU,
    vLLM uses no backend but its own CPU_ATTN; with XFV1_CPU=1, xfv1 takes that one's place.

    Raises:
        RuntimeError: if this vLLM is older than the oldest one that xfv1 works with.
        ValueError: if XFV1_CPU is neither 0 nor 1.
    """
    from xfv1 import compat, settings

    on_cpu = settings.cpu()
    compat.check_version()
    announce()
    if on_cpu:
        from xfv1 import cpu

        cpu.register(BACKEND)
    elif compat.device_kind() == "cpu":
        compat.warn_once(f"xfv1: {CPU_IGNORES}")
    asked = os.environ.get("VLLM_ATTENTION_BACKEND", "")
    if asked.upper() in (NAME, "CUSTOM"):
        compat.warn_once(
            "xfv1: vLLM no longer reads VLLM_ATTENTION_BACKEND=%s. Write --attention-backend %s.",
            asked,
            registered_name(),
        )


def registered_name() -> str:
    """The name under which vLLM knows the backend in this process."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return NAME if NAME in AttentionBackendEnum.__members__ else "CUSTOM"


def member(name: str) -> Any:
    """The member `name` of vLLM's AttentionBackendEnum, once xfv1's own are among them.

    A process that receives a pickled configuration calls this to read it.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    announce()
    return AttentionBackendEnum[name]


def _pickle_by_name(own: Any) -> None:
    """Have pickle write xfv1's member of vLLM's enum as a call of `member`.

    vLLM sends its configuration to new processes by pickle, and an enum's member as its value. No
    process knows that value before it has loaded plugins, and it reads the configuration first.
    """
    import copyreg

    enum = type(own)

    def reduce(given: Any) -> Any:
        if given is own:
            return member, (own.name,)
        return given.__reduce_ex__(2)

    copyreg.pickle(enum, reduce)
