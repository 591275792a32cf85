"""Which kernels the matrix's cases would have Triton compile on a card that is not here.

xfv1's own op is called with meta tensors under a stand-in for Triton's driver. Triton's hook for
what it is about to compile keeps the launch, and stops it there.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fixtures.cases import AttnCase
from tests.cards.calls import META, calls
from tests.cards.cards import Card
from tests.cards.tile import BYTES, Tile
from xfv1.device import Device
from xfv1.kernels.paged import launch as host
from xfv1.kernels.paged.device import _merge_kernel
from xfv1.kernels.paged.tiling import MAX_PREFILL_ROWS, Config
from xfv1.ops.base import Call
from xfv1.ops.triton_paged import TritonPaged

# A context of so many keys is split over programs on every card.
LONG = 1 << 17


@dataclass(frozen=True)
class Launch:
    """A launch as Triton would compile it: the kernel, its arguments' types, and the constants."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, int]

    @property
    def fixed(self) -> dict[str, Any]:
        """The constant arguments by name."""
        return {self.kernel.arg_names[path[0]]: value for path, value in self.constants.items()}

    @property
    def split(self) -> bool:
        """Whether a row's keys are split over programs, which leave their sums in float32."""
        return bool(self.fixed.get("SPLIT"))

    @property
    def tile(self) -> Tile:
        fixed = self.fixed
        if self.kernel is _merge_kernel:
            config = Config(1, fixed["BLOCK_S"], *self.options.values())
            return Tile(config, (fixed["D"], 0), BYTES["fp32"], merges=True)
        query, keys = (
            self.signature[name].removeprefix("*") for name in ("query_ptr", "key_cache_ptr")
        )
        config = Config(fixed["BLOCK_M"], fixed["BLOCK_N"], *self.options.values())
        head = fixed["D1"], fixed["D2"]
        return Tile(config, head, BYTES[query], "" if keys == query else keys)


class StandIn:
    """Triton's driver, as far as Triton asks it while it prepares a launch."""

    def __init__(self, device: Device) -> None:
        arch: int | str = device.arch or 10 * device.capability[0] + device.capability[1]
        self.target = GPUTarget(device.kind, arch, device.warp_size)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target.arch)

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def recording(device: Device) -> Iterator[list[Launch]]:
    """Launches land in the list that this yields."""
    launches: list[Launch] = []

    def keep(*, fn: Any, compile: dict[str, Any], **others: Any) -> bool:
        options = {name: compile[name] for name in ("num_warps", "num_stages")}
        (attributes,) = compile["configs"]
        kernel, signature = fn.jit_function, compile["signature"]
        launches.append(Launch(kernel, signature, compile["constants"], attributes, options))
        # Nothing is compiled, and nothing launched.
        return True

    before = driver._active
    driver.set_active(StandIn(device))
    try:
        with (
            knobs.runtime.scope(),
            mock.patch.object(host, "device_of", return_value=device),
        ):
            knobs.runtime.jit_cache_hook = keep
            yield launches
    finally:
        driver.set_active(before)


def launches_of(cases: Iterable[AttnCase], card: Card) -> list[Launch]:
    """The launches that a card would compile for these cases.

    Each phase as it is; and, where a phase of that shape has not been yet, over contexts so long
    that their keys are split over programs, and batch invariant.
    """
    op, device = TritonPaged(), card.device
    shapes = set()

    def run(call: Call, **facts: Any) -> None:
        layer = dataclasses.replace(call.layer, **facts)
        # An encoder's row table, which PyTorch takes long to compute of meta tensors.
        size = call.batch.num_reqs, call.batch.max_query_len
        phase = call.phase.changed()
        phase.once("row_table", lambda: torch.empty(size, dtype=torch.int32, device=META))
        op.run(dataclasses.replace(call, layer=layer, phase=phase))

    with recording(device) as launches:
        for case in cases:
            for call in calls(case, META, fnuz=card.fnuz):
                layer, batch = call.layer, call.batch
                if op.not_supported_reasons(layer, batch, device):
                    continue
                run(call)
                rows = min(batch.max_query_len * layer.group, MAX_PREFILL_ROWS)
                shape = layer.head_size, layer.dtype, layer.kv_dtype, rows, batch.kind
                if shape not in shapes:
                    shapes.add(shape)
                    run(call, batch_invariant=True)
                    long = dataclasses.replace(batch, num_reqs=1, max_seq_len=LONG)
                    run(dataclasses.replace(call, phase=call.phase.changed(batch=long)))
    return launches


def by_tile(launches: Iterable[Launch]) -> dict[Tile, list[Launch]]:
    """Those of a tile together."""
    found: dict[Tile, list[Launch]] = {}
    for launch in launches:
        found.setdefault(launch.tile, []).append(launch)
    return found
