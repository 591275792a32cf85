"""The cards that xfv1 is compiled and dispatched for: one usual product of each architecture.

Shared memory of a block: CUDA C++ Programming Guide, "Compute Capabilities", and AMD's "GPU
specifications" (LDS). Multiprocessors: the product's data sheet; AMD's RDNA counts two compute
units as one, as torch reports them (`torch.cuda.get_device_properties`).
"""

from dataclasses import dataclass

from xfv1.device import Device

KIB = 1024


@dataclass(frozen=True)
class Card:
    """product: what is sold. device: what torch would say of it."""

    product: str
    device: Device

    @property
    def fnuz(self) -> bool:
        """Whether vLLM's float8 is e4m3fnuz there (vllm/platforms/rocm.py)."""
        return self.device.arch.startswith("gfx94")


def _nvidia(product: str, capability: tuple[int, int], shared_kib: int, sms: int) -> Card:
    return Card(product, Device("cuda", capability, False, "", shared_kib * KIB, sms, 32))


def _amd(
    product: str, arch: str, capability: tuple[int, int], lds_kib: int, cus: int, wavefront: int
) -> Card:
    return Card(product, Device("hip", capability, False, arch, lds_kib * KIB, cus, wavefront))


CARDS: dict[str, Card] = {
    "sm_75": _nvidia("T4", (7, 5), 64, 40),
    "sm_80": _nvidia("A100", (8, 0), 163, 108),
    "sm_86": _nvidia("A10", (8, 6), 99, 72),
    "sm_89": _nvidia("L4", (8, 9), 99, 58),
    "sm_90": _nvidia("H100", (9, 0), 227, 132),
    "sm_100": _nvidia("B200", (10, 0), 227, 148),
    "sm_120": _nvidia("RTX 5090", (12, 0), 99, 170),
    "gfx90a": _amd("MI250X", "gfx90a", (9, 0), 64, 110, 64),
    "gfx942": _amd("MI300X", "gfx942", (9, 4), 64, 304, 64),
    "gfx950": _amd("MI355X", "gfx950", (9, 5), 160, 256, 64),
    "gfx1100": _amd("RX 7900 XTX", "gfx1100", (11, 0), 64, 48, 32),
    "gfx1201": _amd("RX 9070 XT", "gfx1201", (12, 0), 64, 32, 32),
}
