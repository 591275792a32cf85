"""A device's kind, and how much of it one block of threads may have: torch is asked once."""

import functools
import os
from dataclasses import dataclass

import torch

# The first and the last compute capability of some cards, as (major, minor).
Capabilities = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Device:
    """Where the tensors are.

    kind: "cuda" (NVIDIA), "hip" (AMD) or "cpu".
    capability: (major, minor) as torch gives it, (0, 0) on a CPU.
    interpreted: Triton kernels run in Triton's interpreter, on CPU tensors.
    arch: AMD's name of the architecture, without its features ("gfx942"); empty elsewhere.
    shared_memory: bytes that one block of threads may have; AMD calls it LDS.
    multiprocessors: NVIDIA's SMs, AMD's CUs.
    warp_size: threads of a warp; AMD calls it a wavefront.

    The defaults are an H100's: Triton's interpreter has no limits, and runs what an H100 runs.
    """

    kind: str
    capability: tuple[int, int] = (0, 0)
    interpreted: bool = False
    arch: str = ""
    shared_memory: int = 232_448
    multiprocessors: int = 132
    warp_size: int = 32

    @property
    def converts_e4m3(self) -> bool:
        """Whether Triton turns float8_e4m3fn into wider dtypes by the card's own instructions.

        On NVIDIA's other cards it refuses to, on AMD's it has many instructions do it.
        """
        if self.kind == "cuda":
            return self.capability >= (8, 9)
        return self.kind == "cpu" or self.arch.startswith(("gfx95", "gfx12"))


@functools.cache
def device_of(device: torch.device | str) -> Device:
    """The facts of a torch device, or of a device type: "cuda" is the current one."""
    device = torch.device(device)
    if device.type != "cuda":
        return Device("cpu", interpreted=os.environ.get("TRITON_INTERPRET") == "1")
    properties = torch.cuda.get_device_properties(device)
    hip = torch.version.hip is not None
    return Device(
        kind="hip" if hip else "cuda",
        capability=(properties.major, properties.minor),
        arch=properties.gcnArchName.partition(":")[0] if hip else "",
        # On NVIDIA a block has this much if it asks for it. AMD has one limit only.
        shared_memory=getattr(properties, "shared_memory_per_block_optin", 0)
        or properties.shared_memory_per_block,
        multiprocessors=properties.multi_processor_count,
        warp_size=properties.warp_size,
    )
