"""Compile what xfv1's own kernel launches on each card, without a card.

    python -m tests.cards.gate --all --json tests/cards/cards.json
    python -m tests.cards.gate --cards sm_86

One launch of each tile is compiled to the layout of shared memory, and so is a sample of the other
launches. A slice of the tiles is compiled to the end, which gives registers and spills; --all
compiles every tile to the end. LLVM may end its process, so each card has a process of its own.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fixtures.cases.tables import rows
from tests.cards.cards import CARDS
from tests.cards.launches import Launch, by_tile, launches_of
from tests.cards.picks import BATCHES, LAYERS, case_of, small
from tests.cards.tile import Tile
from tests.harness.output import say
from tests.harness.provenance import environment

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("cards.json")
# The sample: so many of a card's launches whose tile another launch already stands for.
SAMPLE = 12
# The slice that CI compiles to the end: for each entry, the tile with the most rows. An entry is a
# padded head size, the bytes of a query's element, and whether the cache is of float8.
SLICE = ((128, 2, False), (256, 2, False), (128, 2, True), (64, 4, False))

# By card, the most bytes that a thread of any tile spills now: bytes without room in registers.
# Hopper's tiles are the measured ones. Those of them that spill most multiply float32 with keys of
# float8, for which there are few registers.
SPILLED: dict[str, int] = {
    "sm_75": 0,
    "sm_80": 8,
    "sm_86": 12,
    "sm_89": 12,
    "sm_90": 784,
    "sm_100": 32,
    "sm_120": 0,
    "gfx90a": 4,
    "gfx942": 0,
    "gfx950": 0,
    "gfx1100": 568,
    "gfx1201": 520,
}


@dataclass(frozen=True)
class Compiled:
    """A tile as the compiler leaves it.

    launches: how many distinct ones have it.
    sampled: how many of them were compiled.
    shared: bytes of shared memory, the most of these. most: what xfv1 expects at most.
    registers, spilled: registers of a thread, and bytes of it that found no room in registers; None
        where it was not compiled to the end.
    """

    tile: str
    launches: int
    sampled: int = 0
    shared: int = 0
    most: int = 0
    registers: int | None = None
    spilled: int | None = None
    error: str = ""


def tiles_of(name: str) -> dict[Tile, list[Launch]]:
    """The launches on a card of the whole matrix and of the layers that picks.txt has, by tile."""
    served = [small(case_of(kind, phase), phase) for kind in LAYERS for phase in BATCHES]
    return by_tile(launches_of([*(row.case for row in rows()), *served], CARDS[name]))


def digest(launch: Launch) -> str:
    text = f"{launch.signature} {launch.constants} {launch.attributes}"
    return hashlib.sha256(text.encode()).hexdigest()


def distinct(launches: Sequence[Launch]) -> list[Launch]:
    """Each launch that Triton would compile, once.

    A launch that splits keys comes first, if there is one: its float32 sums may take more shared
    memory than the loop over keys. The order of the others means nothing.
    """
    found = {(not one.split, digest(one)): one for one in launches}
    first, *others = sorted(found)
    return [found[first], *(found[key] for key in sorted(others, key=lambda key: key[1]))]


def chosen(tiles: dict[Tile, list[Launch]]) -> set[Tile]:
    """The tiles that are compiled to the end in CI."""
    found = set()
    for part in SLICE:
        alike = [
            tile
            for tile in tiles
            if not tile.merges and (tile.head[0], tile.query_bytes, bool(tile.keys)) == part
        ]
        found.add(max(alike, key=lambda tile: (tile.config.block_m, str(tile))))
    return found


def compiled(name: str, every: bool = False, sample: int = SAMPLE) -> list[Compiled]:
    """All tiles of a card, compiled in processes of their own.

    every: to the end all of them, and not the slice alone. sample: see SAMPLE.
    """
    found: list[Compiled] = []
    while True:
        done, error = _run(name, every, sample, len(found))
        found += done
        if not error:
            return found
        # The tile that ended the process; the next one begins after it.
        found.append(error)


def problems(name: str, found: Sequence[Compiled]) -> list[str]:
    """A line for each tile that does not compile or fit, or takes or spills too much."""
    limit, wrong = CARDS[name].device.shared_memory, []
    for one in found:
        if one.error:
            wrong.append(f"{one.tile}: {one.error}")
        if one.shared > min(limit, one.most):
            wrong.append(f"{one.tile}: {one.shared} of {limit} bytes, expected {one.most}")
        if (one.spilled or 0) > SPILLED[name]:
            wrong.append(f"{one.tile}: {one.spilled} bytes spilled, expected {SPILLED[name]}")
    return wrong


def _run(name: str, every: bool, sample: int, first: int) -> tuple[list[Compiled], Compiled | None]:
    """The tiles from the first-th on, until one ends the process."""
    command = [sys.executable, "-m", "tests.cards.gate", "--worker", name, "--first", str(first)]
    command += ["--sample", str(sample), *(["--all"] if every else [])]
    with tempfile.TemporaryDirectory() as cache:
        # Kernels are compiled, not interpreted, and nothing comes from an earlier run.
        env = {**os.environ, "TRITON_CACHE_DIR": cache, "TRITON_DISABLE_LINE_INFO": "1"}
        env.pop("TRITON_INTERPRET", None)
        done = subprocess.run(
            command,
            cwd=ROOT, env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = [Compiled(**line) for line in lines if "shared" in line]
    if done.returncode == 0:
        return found, None
    begun = [line["begun"] for line in lines if "begun" in line]
    if len(begun) == len(found):
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    reason = f"exit status {done.returncode}: {done.stderr[-500:]}"
    return found, Compiled(begun[-1], launches=1, error=reason)


def _work(name: str, every: bool, sample: int, first: int) -> Iterator[str]:
    """A line when a tile is begun, another when it is done."""
    from tests.cards.compiling import binary, shared_memory

    device = CARDS[name].device
    tiles = tiles_of(name)
    ends = set(tiles) if every else chosen(tiles)
    others = [digest(one) for alike in tiles.values() for one in distinct(alike)[1:]]
    sampled = set(sorted(others)[:sample])
    for tile in sorted(tiles, key=str)[first:]:
        yield json.dumps({"begun": str(tile)})
        representative, *alike = distinct(tiles[tile])
        some = [one for one in alike if digest(one) in sampled]
        result = Compiled(str(tile), 1 + len(alike), 1 + len(some), most=tile.most(device))
        try:
            if tile in ends:
                made = binary(representative, device)
                result = dataclasses.replace(result, **dataclasses.asdict(made))
            else:
                result = dataclasses.replace(result, shared=shared_memory(representative, device))
            shared = max(result.shared, *(shared_memory(one, device) for one in some), 0)
            result = dataclasses.replace(result, shared=shared)
        except Exception as error:
            result = dataclasses.replace(result, error=f"{type(error).__name__}: {error}"[-1000:])
        yield json.dumps(dataclasses.asdict(result))


def as_json(results: dict[str, list[Compiled]]) -> str:
    """The results, a tile to a line."""
    cards = {
        name: ",\n".join(f"   {json.dumps(dataclasses.asdict(one))}" for one in found)
        for name, found in results.items()
    }
    lines = ",\n".join(f'  "{name}": [\n{tiles}\n  ]' for name, tiles in cards.items())
    facts = json.dumps(environment())
    return f'{{\n "environment": {facts},\n "cards": {{\n{lines}\n }}\n}}\n'


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cards", nargs="+", default=list(CARDS), choices=CARDS, metavar="CARD")
    parser.add_argument("--all", action="store_true", help="compile every tile to the end")
    parser.add_argument("--sample", type=int, default=SAMPLE, help="launches beside the tiles'")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        for line in _work(args.worker, args.all, args.sample, args.first):
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
        return 0
    with ThreadPoolExecutor(args.jobs) as pool:
        made = pool.map(lambda name: compiled(name, args.all, args.sample), args.cards)
        results = dict(zip(args.cards, made, strict=True))
    wrong = 0
    for name, found in results.items():
        most = max(one.shared for one in found)
        spilled = max(one.spilled or 0 for one in found)
        limit = CARDS[name].device.shared_memory
        say(f"{name}: {len(found)} tiles, shared {most} of {limit}, spilled {spilled}")
        for problem in problems(name, found):
            wrong += 1
            say(f"  {problem}")
    if args.json:
        # Cards that are not compiled for now keep what is recorded of them.
        kept = json.loads(args.json.read_text())["cards"] if args.json.is_file() else {}
        recorded = {name: [Compiled(**row) for row in rows] for name, rows in kept.items()}
        every = recorded | results
        args.json.write_text(as_json({name: every[name] for name in CARDS if name in every}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
