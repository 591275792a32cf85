"""Does a library serve what xfv1 would call it with, on a card that is not here? Its own words.

xFormers' functions are asked on tensors that say they are on a GPU, with the calls that xfv1's ops
really make; only its kernels are replaced.
"""

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from fixtures.cases import AttnCase
from tests.cards.calls import calls
from tests.cards.cards import Card
from tests.cards.picks import small
from tests.contract.probe import cuda
from xfv1.dispatch import OPS
from xfv1.ops.base import Call

MODULES = {
    "xformers_splitk": "triton_splitk",
    "xformers_fa3": "flash3",
    "xformers_fa2": "flash",
    "xformers_cutlass": "cutlass",
    "xformers_ck": "ck",
}
SMALL = 1 << 16


class OnCard(torch.Tensor):
    """A tensor of the CPU that says it is a GPU's."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")


def on_card(call: Call) -> Call:
    """The call with what its op looks at on a GPU. What it makes tensors beside stays."""
    names = ("query", "key", "value", "key_cache", "value_cache", "out")
    moved = {
        name: tensor.as_subclass(OnCard)
        for name in names
        if (tensor := getattr(call, name)) is not None
    }
    starts = call.phase.query_start_loc.as_subclass(OnCard)
    return dataclasses.replace(call, phase=call.phase.changed(query_start_loc=starts), **moved)


def call_of(case: AttnCase, phase: str, card: Card) -> Call:
    """A small call of a phase."""
    call = list(calls(small(case, phase), torch.device("cpu"), SMALL, card.fnuz))[-1]
    batch = dataclasses.replace(call.batch, fresh=phase in ("fresh", "encoder"))
    return dataclasses.replace(call, phase=call.phase.changed(batch=batch))


def refused_by_library(op: str, case: AttnCase, phase: str, card: Card) -> str:
    """Why the library behind an op would refuse the call; empty if it would not."""
    if op in MODULES:
        return _refused_by_xformers(op, call_of(case, phase, card), card)
    if op.startswith("vllm_fa"):
        return _refused_by_vllm(int(op[-1]), card)
    return ""


def _refused_by_xformers(op: str, call: Call, card: Card) -> str:
    module = importlib.import_module(f"xformers.ops.fmha.{MODULES[op]}")
    with _as_on(card), _without_kernel(module.FwOp) as ran:
        try:
            OPS[op].run(on_card(call))
        except ValueError as error:
            return str(error)
    # If xFormers was not called, it has not said whether it serves the call.
    return "" if ran else f"{op} did not call xFormers"


@contextlib.contextmanager
def _as_on(card: Card) -> Iterator[None]:
    """torch answers xFormers as it would on the card."""
    hip = "7.0" if card.device.kind == "hip" else None
    capability = card.device.capability
    with (
        mock.patch("xformers.ops.fmha.common._built_with_cuda", True),
        mock.patch("torch.cuda.get_device_capability", return_value=capability),
        mock.patch("torch.version.hip", hip),
        mock.patch("torch.version.cuda", None if hip else "13.0"),
    ):
        yield


@contextlib.contextmanager
def _without_kernel(operator: Any) -> Iterator[list[Any]]:
    """xFormers' op answers nothing where its kernel would run, once it has said that it can."""
    ran: list[Any] = []

    def apply(inputs: Any, needs_gradient: bool) -> tuple[torch.Tensor, None]:
        ran.append(inputs)
        return torch.empty_like(inputs.query), None

    with (
        mock.patch.object(operator, "apply", apply),
        mock.patch.object(operator, "is_available", return_value=True),
    ):
        yield ran


def _refused_by_vllm(version: int, card: Card) -> str:
    package = "vllm.vllm_flash_attn"
    # The compiled modules, which the build for CPUs has not.
    empty = {name: ModuleType(name) for name in (f"{package}._vllm_fa{n}_C" for n in (2, 3))}
    with cuda(card.device.capability), mock.patch.dict(sys.modules, empty):
        interface = importlib.import_module(f"{package}.flash_attn_interface")
        return interface.fa_version_unsupported_reason(version) or ""
