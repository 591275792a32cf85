"""Does a device's description say what torch says of it?"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.cards.cards import CARDS, KIB
from xfv1.device import Device, device_of

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def ask_again() -> Iterator[None]:
    """The cache of `device_of` is empty before a test and after it."""
    device_of.cache_clear()
    yield
    device_of.cache_clear()


def on(monkeypatch: pytest.MonkeyPatch, hip: str | None, **properties: Any) -> list[torch.device]:
    """torch is on such a card; the devices that it is asked about land in the list."""
    asked: list[torch.device] = []

    def get_device_properties(device: torch.device) -> SimpleNamespace:
        asked.append(device)
        return SimpleNamespace(**properties)

    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", get_device_properties)
    return asked


def test_nvidias_block_has_what_it_may_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = on(
        monkeypatch,
        None,
        major=8,
        minor=6,
        gcnArchName="NVIDIA A10",
        shared_memory_per_block=48 * KIB,
        shared_memory_per_block_optin=99 * KIB,
        multi_processor_count=72,
        warp_size=32,
    )
    device = torch.device("cuda:1")
    assert device_of(device) == CARDS["sm_86"].device
    # torch is asked once, as each launch asks here.
    assert device_of(device) is device_of(device)
    assert asked == [device]


@pytest.mark.parametrize("optin", [{}, {"shared_memory_per_block_optin": 0}])
def test_amds_block_has_all_of_its_memory(
    monkeypatch: pytest.MonkeyPatch, optin: dict[str, int]
) -> None:
    """And the architecture is told without its features."""
    on(
        monkeypatch,
        "7.0",
        major=9,
        minor=4,
        gcnArchName="gfx942:sramecc+:xnack-",
        shared_memory_per_block=64 * KIB,
        multi_processor_count=304,
        warp_size=64,
        **optin,
    )
    assert device_of("cuda") == CARDS["gfx942"].device


@pytest.mark.parametrize(("setting", "interpreted"), [("1", True), ("0", False), ("", False)])
@pytest.mark.parametrize("kind", ["cpu", "meta"])
def test_a_cpu_runs_what_an_h100_runs(
    monkeypatch: pytest.MonkeyPatch, kind: str, setting: str, interpreted: bool
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", setting)
    h100 = CARDS["sm_90"].device
    expected = Device(
        "cpu",
        interpreted=interpreted,
        shared_memory=h100.shared_memory,
        multiprocessors=h100.multiprocessors,
        warp_size=h100.warp_size,
    )
    assert device_of(kind) == expected


def test_cards_with_instructions_for_e4m3_are_those_triton_has_them_for() -> None:
    """On NVIDIA's others it refuses the dtype, on AMD's it has many instructions do it."""
    with_them = {name for name, card in CARDS.items() if card.device.converts_e4m3}
    assert with_them == {"sm_89", "sm_90", "sm_100", "sm_120", "gfx950", "gfx1201"}
    assert Device("cpu", interpreted=True).converts_e4m3
