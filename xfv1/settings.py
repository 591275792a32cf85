"""xfv1's settings: the environment variables XFV1_OPS, XFV1_DEBUG and XFV1_CPU.

Each is read whenever it is asked for. Reading one imports neither torch nor vLLM, so a command
can check the settings before it imports these.
"""

import os

from xfv1.wording import did_you_mean, shown

# The names that XFV1_OPS accepts; `xfv1.dispatch.OPS` has an op for each, in this order.
OPS = (
    "xformers_splitk",
    "xformers_fa3",
    "xformers_fa2",
    "xformers_cutlass",
    "xformers_ck",
    "vllm_fa3",
    "vllm_fa2",
    "triton",
    "torch",
)


def ops() -> tuple[str, ...] | None:
    """The names in XFV1_OPS, in its order; None if it is unset or blank.

    Raises:
        ValueError: for a name that is no op's, or a setting without any name.
    """
    setting = os.environ.get("XFV1_OPS", "")
    if not setting.strip():
        return None
    names = tuple(name.strip() for name in setting.split(",") if name.strip())
    accepted = f"expected names among {', '.join(OPS)}, separated by commas"
    if not names:
        raise ValueError(f"XFV1_OPS={shown(setting)}: {accepted}")
    for name in names:
        if name not in OPS:
            near = did_you_mean(name, OPS)
            raise ValueError(f"XFV1_OPS={shown(setting)}: no op {shown(name)}{near}, {accepted}")
    return names


def debug() -> bool:
    """Whether XFV1_DEBUG turns the checks of `xfv1.debug` on.

    Raises:
        ValueError: for a setting other than 0 and 1.
    """
    return _switch("XFV1_DEBUG")


def cpu() -> bool:
    """Whether XFV1_CPU puts xfv1 in the place of vLLM's own backend for CPUs.

    Raises:
        ValueError: for a setting other than 0 and 1.
    """
    return _switch("XFV1_CPU")


def check() -> None:
    """Read every setting.

    Raises:
        ValueError: for the first that is wrong: its name, its value and what is accepted.
    """
    ops()
    debug()
    cpu()


def _switch(name: str) -> bool:
    setting = os.environ.get(name, "")
    if setting not in ("", "0", "1"):
        raise ValueError(f"{name}={shown(setting)}: expected 0 or 1")
    return setting == "1"
