"""Triton's compiler, for a card that is not here: to the layout of shared memory, or to the end."""

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton import knobs
from triton._C.libtriton import amd, ir, nvidia, passes
from triton.backends.nvidia.compiler import get_ptx_version_from_options
from triton.compiler import ASTSource

from tests.cards.launches import Launch, StandIn
from xfv1.device import Device


@dataclass(frozen=True)
class Binary:
    """The resources of a compiled kernel.

    shared: bytes of shared memory. registers: of a thread. spilled: bytes of a thread that did not
    fit into its registers, stored to memory and loaded again.
    """

    shared: int
    registers: int
    spilled: int


class _LaidOut(Exception):
    """Shared memory is laid out; there is no need to compile any further."""

    def __init__(self, shared: int) -> None:
        self.shared = shared


def shared_memory(launch: Launch, device: Device) -> int:
    """Bytes of shared memory, as Triton compares them with the card's limit at a launch."""
    try:
        with _stages(device.kind, _lay_out_nvidia if device.kind == "cuda" else _lay_out_amd):
            _compile(launch, device)
    except _LaidOut as laid:
        return laid.shared
    raise AssertionError("compiled past the layout of shared memory")


def binary(launch: Launch, device: Device) -> Binary:
    """The compiled kernel's resources, as ptxas or LLVM's notes in AMD's assembly state them."""
    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        # A kernel from Triton's cache has no log.
        knobs.compilation.always_compile = True
        kernel = _compile(launch, device)
    if device.kind == "cuda":
        text = log.getvalue()
        spilled = re.findall(r"(\d+) bytes spill stores", text)
        registers = re.findall(r"Used (\d+) registers", text)
        return Binary(kernel.metadata.shared, max(map(int, registers)), max(map(int, spilled)))
    text = kernel.asm["amdgcn"]
    notes = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text))
    return Binary(
        kernel.metadata.shared, int(notes["vgpr_count"]), 4 * int(notes["vgpr_spill_count"])
    )


def _compile(launch: Launch, device: Device) -> Any:
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    return triton.compile(source, target=StandIn(device).target, options=launch.options)


@contextlib.contextmanager
def _stages(kind: str, lay_out: Callable[..., None]) -> Iterator[None]:
    """`triton.compile` stops where it has the layout of shared memory."""

    def hook(
        backend: Any = None,
        stages: Any = None,
        options: Any = None,
        language: Any = None,
        capability: Any = None,
    ) -> tuple[str, str] | None:
        if stages is None:
            # Triton asks for a key to its cache.
            return "laid out", "laid out"
        stages["llir"] = lambda source, metadata: lay_out(source, options, capability)
        return None

    with knobs.runtime.scope():
        knobs.runtime.add_stages_inspection_hook = hook
        yield


def _lay_out_nvidia(source: Any, options: Any, capability: int) -> None:
    """The first passes of `CUDABackend.make_llir`."""
    version = get_ptx_version_from_options(options, capability)
    manager = ir.pass_manager(source.context)
    passes.ttgpuir.add_combine_tensor_select_and_if(manager)
    passes.ttgpuir.add_allocate_warp_groups(manager, False)
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, capability, version)
    manager.run(source, "lay_out")
    raise _LaidOut(source.get_int_attr("ttg.shared"))


def _lay_out_amd(source: Any, options: Any, capability: None) -> None:
    """The first passes of `HIPBackend.make_llir`."""
    manager = ir.pass_manager(source.context)
    amd.passes.ttgpuir.add_update_async_wait_count(manager, options.arch)
    amd.passes.ttgpuir.add_warp_pipeline_conversion(manager, options.arch)
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    passes.convert.add_index_to_llvmir(manager)
    amd.passes.ttgpuir.add_allocate_shared_memory(manager, options.arch)
    manager.run(source, "lay_out")
    raise _LaidOut(source.get_int_attr("ttg.shared"))
