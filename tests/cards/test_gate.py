"""Every launch of the matrix compiles for every card, and fits it.

Where a tile is new, or takes more than is recorded, these tests fail. Then:
python -m tests.cards.gate --all --json tests/cards/cards.json, about ten minutes of two cores.
"""

import dataclasses
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from fixtures.cases import AttnCase
from tests.cards import gate
from tests.cards.calls import META, calls
from tests.cards.cards import CARDS
from tests.cards.document import PAGE, load, page
from tests.cards.gate import SPILLED, Compiled, compiled, problems
from tests.cards.launches import recording
from tests.cards.picks import BATCHES, LAYERS, case_of, picks, small
from xfv1.kernels.paged import launch as host
from xfv1.kernels.paged.device import _attention_kernel
from xfv1.kernels.paged.tiling import Config, prefill_config
from xfv1.ops.triton_paged import TritonPaged

RESULTS = load()
RERUN = "run: python -m tests.cards.gate --all --json tests/cards/cards.json"


@pytest.mark.parametrize("name", CARDS)
def test_every_launch_of_a_card_compiles_and_fits(name: str) -> None:
    """No tile takes more shared memory than is recorded. Some tiles' spills are compared too."""
    found = compiled(name)
    assert problems(name, found) == []
    recorded = {row["tile"]: row for row in RESULTS["cards"][name]}
    assert {one.tile for one in found} == recorded.keys(), RERUN
    ends = [one for one in found if one.spilled is not None]
    assert len(ends) >= len(gate.SLICE)
    for one in found:
        assert one.shared <= recorded[one.tile]["shared"], f"{one.tile}: {RERUN}"
    for one in ends:
        assert one.spilled == recorded[one.tile]["spilled"], f"{one.tile}: {RERUN}"


@pytest.mark.parametrize("name", CARDS)
def test_what_is_recorded_fits_too(name: str) -> None:
    """The record, of a longer run than CI's, has registers and spills of every tile."""
    rows = RESULTS["cards"][name]
    assert len({row["tile"] for row in rows}) == len(rows) >= 50
    assert problems(name, [Compiled(**row) for row in rows]) == []
    assert all(row["registers"] > 0 for row in rows)
    # One merge of splits needs no shared memory.
    assert all(row["shared"] > 0 for row in rows if not row["tile"].startswith("merge"))
    # No more room is left than there has to be.
    assert max(row["spilled"] for row in rows) in (SPILLED[name], 0)


@pytest.mark.parametrize("name", CARDS)
def test_own_kernels_picks_are_tiles_that_fit(name: str) -> None:
    """Where the table of picks says triton, what is launched is among what was compiled."""
    card, op, found = CARDS[name], TritonPaged(), picks()[name]
    own = [(kind, phase) for kind in LAYERS for phase in BATCHES if found[kind][phase] == "triton"]
    assert own
    with recording(card.device) as launches:
        for kind, phase in own:
            for call in calls(small(case_of(kind, phase), phase), META, fnuz=card.fnuz):
                op.run(call)
    tiles = {row["tile"] for row in RESULTS["cards"][name]}
    assert len(launches) >= len(own)
    assert {str(launch.tile) for launch in launches} <= tiles


def test_the_page_is_of_these_results() -> None:
    """After a change: python -m tests.cards.document > docs/cards.md"""
    assert PAGE.read_text() == page(RESULTS)


# The gate can fail.


def test_an_h100s_tile_is_seen_not_to_fit_an_a10(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Compiled for it, the tile takes more than a block may have, as xfv1 expects of it."""
    from tests.cards.compiling import shared_memory

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    device = CARDS["sm_86"].device
    config = prefill_config(CARDS["sm_90"].device, 256, 4096, 2, 2)
    assert config == Config(128, 32, 8, 3)
    case = AttnCase(scenario="tall_prefill", head_size=256)
    with (
        recording(device) as launches,
        mock.patch.object(host, "prefill_config", return_value=config),
    ):
        for call in calls(case, META):
            TritonPaged().run(call)
    (launch,) = (launch for launch in launches if launch.kernel is _attention_kernel)
    assert device.shared_memory < shared_memory(launch, device) <= launch.tile.most(device)


GOOD = Compiled("tile", launches=1, sampled=1, shared=1000, most=2000, registers=64, spilled=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"shared": 2001}, "2001 of 101376 bytes, expected 2000"),
        ({"shared": 101377, "most": 200000}, "101377 of 101376 bytes"),
        ({"spilled": 100000}, "100000 bytes spilled"),
        ({"error": "LLVM ERROR"}, "LLVM ERROR"),
    ],
)
def test_what_is_wrong_is_said(changes: dict[str, Any], said: str | None) -> None:
    found = problems("sm_86", [GOOD, dataclasses.replace(GOOD, **changes)])
    assert len(found) == (said is not None)
    assert all(said is not None and said in line for line in found)


def test_a_tile_that_ends_the_compiler_is_named_and_the_next_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As LLVM does by an abort."""
    tiles = ["first", "second", "third"]
    started: list[int] = []

    def run(command: list[str], **options: Any) -> Any:
        first = int(command[command.index("--first") + 1])
        started.append(first)
        lines: list[dict[str, Any]] = []
        for tile in tiles[first:]:
            lines.append({"begun": tile})
            if tile == "second":
                break
            lines.append(dataclasses.asdict(dataclasses.replace(GOOD, tile=tile)))
        aborted = "second" in tiles[first:]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        return SimpleNamespace(stdout=text, stderr="LLVM ERROR", returncode=-6 if aborted else 0)

    monkeypatch.setattr(subprocess, "run", run)
    found = compiled("sm_86")
    assert started == [0, 2]
    assert [one.tile for one in found] == tiles
    assert [bool(one.error) for one in found] == [False, True, False]
    assert "LLVM ERROR" in found[1].error


def test_a_program_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    done = SimpleNamespace(stdout="", stderr="No module named triton", returncode=1)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: done)
    with pytest.raises(RuntimeError, match="sm_86: No module named triton"):
        compiled("sm_86")
