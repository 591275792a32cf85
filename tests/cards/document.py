"""docs/cards.md, from the gate's results, the table of picks and the rules.

python -m tests.cards.document > docs/cards.md
"""

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.cards.cards import CARDS, KIB
from tests.cards.gate import RESULTS, ROOT
from tests.cards.picks import BATCHES, MEANING, picks
from xfv1.rules import RULES, Rule

PAGE = ROOT / "docs" / "cards.md"
# Cards on which the whole matrix has run, and where that is recorded.
RUN = {"sm_90": "docs/results/h100-ops.json"}
RAN, FITS, WORD = "run", "compiled and fits", "by its op's word"
TEXT = """\
# Cards

`python -m tests.cards.document` writes this page; a test compares it. xfv1 has run on an H100
alone. For the other cards, the page says how far each op is proven:

- **{ran}**: the whole matrix has run there, op by op ({run}).
- **{fits}**: Triton {triton} has compiled xfv1's own kernel for the card, without a GPU. It was
  compiled with each tile that a case of the matrix, or a layer of this page, launches. No tile
  takes more shared memory than a block may have. The kernel has not run there.
- **{word}**: the library's own function says that it serves the call: xFormers'
  `not_supported_reasons`, asked with the call that xfv1 makes, or vLLM's
  `fa_version_unsupported_reason`. Nothing was compiled, and nothing has run there.

## xfv1's own kernel

{kernels}

"Shared memory" is what one block may have, "most taken" what the largest tile takes. "Spilled" is
how many bytes of a thread have no room in registers, in the tile that spills most, and how many
tiles spill. All numbers are in `tests/cards/cards.json`. CI compiles all tiles as far as the layout
of shared memory, and some to the end. `tox -e cards` compiles all of them to the end.

## Which op serves what

These are the ops where vLLM's wheel is installed, and an xFormers that is built for the card, but
not flash_attn_3. An op that is not installed is passed over; xfv1's own kernel (triton) serves
everything.

{phases}

{served}
## Why in that order

{rules}
"""


def proof(card: str, op: str) -> str:
    """How far an op is proven on a card."""
    if card in RUN:
        return RAN
    return FITS if op == "triton" else WORD


def page(results: dict[str, Any]) -> str:
    """The page as Markdown."""
    return TEXT.format(
        ran=RAN,
        fits=FITS,
        word=WORD,
        run=", ".join(RUN.values()),
        triton=results["environment"]["versions"]["triton"],
        kernels="\n".join(_kernels(results)),
        phases="\n".join(f"- {phase}: {words}" for phase, words in MEANING.items()),
        served="\n".join(_served()),
        rules="\n".join(_rules()),
    )


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _kernels(results: dict[str, Any]) -> list[str]:
    rows = []
    for name, card in CARDS.items():
        tiles = results["cards"][name]
        most = max(tile["shared"] for tile in tiles)
        spilled = max(tiles, key=lambda tile: tile["spilled"])
        spilling = sum(tile["spilled"] > 0 for tile in tiles)
        words = (
            f"{spilled['spilled']} ({spilled['tile']}), {spilling} of {len(tiles)}"
            if spilling
            else "0"
        )
        rows.append(
            [
                f"{name} ({card.product})",
                f"{card.device.shared_memory // KIB} KiB",
                f"{most / KIB:.0f} KiB",
                str(len(tiles)),
                words if spilling else "0",
                "by instructions" if card.device.converts_e4m3 or card.fnuz else "by integers",
                RAN if name in RUN else FITS,
            ]
        )
    head = ["card", "shared memory", "most taken", "tiles", "spilled", "float8 e4m3", "proven"]
    return _table(head, rows)


def _served() -> Iterator[str]:
    """A table for the cards that are served alike; layers that are served alike share a row."""
    found = picks()
    cards: dict[str, list[str]] = {}
    for name, rows in found.items():
        cards.setdefault(json.dumps(rows), []).append(name)
    for alike, names in cards.items():
        kinds: dict[tuple[str, ...], list[str]] = {}
        for kind, row in json.loads(alike).items():
            kinds.setdefault(tuple(row.values()), []).append(kind)
        ops = sorted({op for row in kinds for op in row})
        yield f"### {', '.join(f'{name} ({CARDS[name].product})' for name in names)}"
        yield ""
        yield from _table(
            ["layers", *BATCHES], [[", ".join(ks), *row] for row, ks in kinds.items()]
        )
        yield ""
        yield "; ".join(f"{op}: {proof(names[0], op)}" for op in ops) + "."
        yield ""


def _rules() -> Iterator[str]:
    """Each rule on a line, those of the same cards together."""

    def cards(rule: Rule) -> str:
        fitting = [
            name
            for name, card in CARDS.items()
            if card.device.kind in rule.devices
            and rule.capability[0] <= card.device.capability <= rule.capability[1]
        ]
        return ", ".join(fitting)

    for names, rules in itertools.groupby(RULES, cards):
        if not names:
            continue
        yield f"- {names}"
        for rule in rules:
            order = ", ".join(op for op in rule.order if op != "torch")
            yield f"  - {rule.kind}{_bounds(rule)}: {order}. Why: {rule.why}."


def _bounds(rule: Rule) -> str:
    """The bounds of a rule that are not the defaults, in words."""
    words = []
    if rule.head_sizes != Rule.head_sizes:
        words.append(f"head size {rule.head_sizes[0]}")
    if rule.num_reqs != Rule.num_reqs:
        words.append("{} to {} requests".format(*rule.num_reqs))
    if rule.query_lens != Rule.query_lens:
        words.append(f"up to {rule.query_lens[1]} queries of {rule.seq_lens[0]} keys or more")
    if rule.dtypes:
        words.append(" or ".join(str(dtype).removeprefix("torch.") for dtype in rule.dtypes))
    return f" ({', '.join(words)})" if words else ""


def load(path: Path = RESULTS) -> dict[str, Any]:
    """The gate's results."""
    results: dict[str, Any] = json.loads(path.read_text())
    return results


if __name__ == "__main__":
    sys.stdout.write(page(load()))
