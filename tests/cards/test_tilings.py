"""Does every tiling fit its card, and is an H100's what was measured?

Compared with xfv1's own bound on shared memory, which test_gate compares with the compiler.
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.cards.cards import CARDS, KIB
from tests.cards.tile import BYTES, Tile
from xfv1.device import Device
from xfv1.kernels.paged.tiling import (
    MAX_DECODE_ROWS,
    MAX_PREFILL_ROWS,
    Config,
    decode_config,
    head_parts,
    prefill_config,
    shared_memory,
)

pytestmark = pytest.mark.cpu

H100 = CARDS["sm_90"].device
INTERPRETER = Device("cpu", interpreted=True)
PHASES = {"decode": decode_config, "prefill": prefill_config}
# Padded head sizes, and rows: those of a tile, and past the largest.
HEADS = (*range(1, 17), 32, 64, 72, 80, 96, 128, 129, 160, 192, 224, 256, 257, 384, 400, 512)
ROWS = (1, 2, 8, 16, 17, 32, 33, 64, 65, 128, 129, 8192)
# Bytes of an element of the queries and of the keys: 16 bits, float32, and float8 beside each.
ITEM_SIZES = ((2, 2), (2, 1), (4, 4), (4, 1))
# (block_m, block_n, warps, stages) by phase, head size, rows and bytes of a query's element. The
# sweeps that found them are in benchmarks/results; the largest differ by their rows alone.
MEASURED = {
    ("decode", 64, 4, 2): (16, 64, 2, 3),
    ("decode", 80, 4, 2): (16, 32, 2, 3),
    ("decode", 128, 4, 2): (16, 32, 2, 3),
    ("decode", 128, 32, 2): (32, 64, 4, 3),
    ("decode", 128, 64, 2): (64, 64, 8, 3),
    ("decode", 192, 8, 2): (16, 16, 2, 3),
    ("decode", 256, 8, 2): (16, 16, 2, 3),
    ("decode", 256, 64, 2): (64, 32, 8, 3),
    ("decode", 512, 8, 2): (16, 32, 8, 2),
    ("decode", 512, 64, 2): (64, 32, 8, 2),
    ("decode", 64, 64, 4): (64, 32, 8, 2),
    ("decode", 128, 64, 4): (16, 32, 8, 2),
    ("decode", 256, 64, 4): (16, 16, 8, 2),
    ("prefill", 64, 4096, 2): (128, 64, 8, 3),
    ("prefill", 80, 4096, 2): (128, 64, 8, 3),
    ("prefill", 128, 4096, 2): (128, 64, 8, 3),
    ("prefill", 128, 20, 2): (32, 64, 8, 3),
    ("prefill", 192, 4096, 2): (128, 32, 8, 3),
    ("prefill", 256, 4096, 2): (128, 32, 8, 3),
    ("prefill", 512, 4096, 2): (64, 32, 8, 2),
    ("prefill", 64, 4096, 4): (64, 32, 8, 2),
    ("prefill", 128, 4096, 4): (16, 32, 8, 2),
    ("prefill", 512, 4096, 4): (16, 16, 8, 2),
}


@pytest.mark.parametrize("device", [H100, INTERPRETER], ids=["sm_90", "interpreter"])
@pytest.mark.parametrize("facts", MEASURED, ids=str)
def test_an_h100s_tilings_are_the_measured_ones(
    facts: tuple[str, int, int, int], device: Device
) -> None:
    """With float8 caches too, and the interpreter runs the same."""
    phase, head_size, rows, query_bytes = facts
    for key_bytes in (query_bytes, 1):
        config = PHASES[phase](device, head_size, rows, query_bytes, key_bytes)
        assert config == Config(*MEASURED[facts])


@pytest.mark.parametrize("name", CARDS)
def test_every_tiling_fits_its_card(name: str) -> None:
    device = CARDS[name].device
    for phase, head_size, rows, sizes in itertools.product(PHASES, HEADS, ROWS, ITEM_SIZES):
        config = PHASES[phase](device, head_size, rows, *sizes)
        assert shared_memory(device, config, head_size, *sizes) <= device.shared_memory
        # Powers of two; Triton's products take 16 keys of 16 bits at a time.
        assert all(n.bit_count() == 1 for n in (config.block_m, config.block_n, config.num_warps))
        assert config.block_m >= 8 and config.block_n >= 16 and config.num_stages >= 1
        most = MAX_DECODE_ROWS if phase == "decode" else MAX_PREFILL_ROWS
        assert config.block_m <= most


@pytest.mark.parametrize("name", CARDS)
def test_a_tile_is_no_larger_than_the_rows_there_are(name: str) -> None:
    for phase, head_size, rows in itertools.product(PHASES, HEADS, ROWS):
        config = PHASES[phase](CARDS[name].device, head_size, rows, 2, 2)
        assert config.block_m <= max(2 * rows - 1, 16)


@pytest.mark.parametrize(
    ("like", "capability", "arch", "limit_kib"),
    [
        ("sm_80", (8, 7), "", 163),
        ("sm_100", (10, 3), "", 227),
        ("sm_100", (11, 0), "", 227),
        ("sm_120", (12, 1), "", 99),
        ("gfx90a", (9, 0), "gfx908", 64),
        ("gfx1100", (10, 3), "gfx1030", 64),
        ("gfx1201", (12, 0), "gfx1200", 64),
    ],
)
def test_cards_that_are_not_in_the_table_are_given_what_fits(
    like: str, capability: tuple[int, int], arch: str, limit_kib: int
) -> None:
    device = dataclasses.replace(
        CARDS[like].device, capability=capability, arch=arch, shared_memory=limit_kib * KIB
    )
    for phase, head_size, rows, sizes in itertools.product(PHASES, HEADS, ROWS, ITEM_SIZES):
        config = PHASES[phase](device, head_size, rows, *sizes)
        assert shared_memory(device, config, head_size, *sizes) <= device.shared_memory


RESULTS = Path(__file__).with_name("cards.json")
RECORDED: dict[str, list[dict[str, Any]]] = json.loads(RESULTS.read_text())["cards"]


@pytest.mark.parametrize("name", CARDS)
def test_tilings_and_bounds_are_those_that_were_compiled(name: str) -> None:
    """The record of tests.cards.gate is about this source."""
    card = CARDS[name]
    e4m3 = "fp8e4b8" if card.fnuz else "fp8e4nv" if card.device.converts_e4m3 else "u8"
    made = {}
    for phase, head_size, rows, query_bytes, keys in itertools.product(
        PHASES, HEADS, ROWS, (2, 4), ("", e4m3, "fp8e5")
    ):
        key_bytes = BYTES[keys] if keys else query_bytes
        config = PHASES[phase](card.device, head_size, rows, query_bytes, key_bytes)
        tile = Tile(config, head_parts(head_size), query_bytes, keys)
        made[str(tile)] = tile.most(card.device)
    recorded = {row["tile"]: row["most"] for row in RECORDED[name]}
    attention = {tile for tile in recorded if not tile.startswith("merge")}
    assert attention <= made.keys()
    assert {tile: made[tile] for tile in attention} == {tile: recorded[tile] for tile in attention}
