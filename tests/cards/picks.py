"""Which op is picked on each card, for each phase of each kind of layer: a table to read.

    python -m tests.cards.picks > tests/cards/picks.txt

As on a machine with vLLM's wheel and an xFormers that is built for the card, without flash_attn_3.
"""

import contextlib
import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from fixtures.cases import AttnCase
from tests.backend.calls import layer_of
from tests.cards.cards import CARDS, Card
from xfv1 import dispatch
from xfv1.ops import vllm_fa
from xfv1.ops.base import Layer
from xfv1.ops.xformers import base as xformers
from xfv1.phase import DECODE, ENCODER, PREFILL, Batch

TABLE = Path(__file__).with_name("picks.txt")
INSTALLED = {"vllm": True, "xformers": True, "triton": True, "flash_attn_3": False}

# A served model's layer; each row changes one thing of it.
PLAIN = AttnCase(
    query_lens=(1,), seq_lens=(1,), num_heads=32, num_kv_heads=8, head_size=128, block_size=16
)
LAYERS: dict[str, dict[str, Any]] = {
    "fp16": {},
    "bf16": {"dtype": "bf16"},
    "fp32": {"dtype": "fp32"},
    "head 64": {"head_size": 64},
    "head 80": {"head_size": 80},
    "head 256": {"head_size": 256},
    "head 512": {"head_size": 512},
    "window": {"sliding_window": 128},
    "softcap": {"softcap": 30.0},
    "ALiBi": {"alibi": True},
    "ALiBi sqrt": {"alibi": True, "alibi_sqrt": True},
    "sinks": {"sinks": True},
    "sinks, bf16": {"sinks": True, "dtype": "bf16"},
    "fp8_e4m3": {"kv_dtype": "fp8_e4m3"},
    "fp8_e5m2": {"kv_dtype": "fp8_e5m2"},
    "invariant": {},
}
_PREFILL = Batch(PREFILL, num_reqs=4, max_query_len=512, max_seq_len=4096, uniform=False)
_WHOLE = dataclasses.replace(_PREFILL, max_seq_len=512, fresh=True)
BATCHES = {
    "decode": Batch(DECODE, num_reqs=32, max_seq_len=4096),
    "verify": Batch(DECODE, num_reqs=8, max_query_len=4, max_seq_len=4096),
    "prefill": _PREFILL,
    "short": dataclasses.replace(_PREFILL, max_query_len=8),
    "fresh": _WHOLE,
    "encoder": dataclasses.replace(_WHOLE, kind=ENCODER),
}
MEANING = {
    "decode": "32 requests of one token over 4096 keys",
    "verify": "8 requests of four tokens over 4096 keys, drafts to verify",
    "prefill": "4 requests of up to 512 tokens over 4096 keys",
    "short": "4 requests of up to 8 tokens over 4096 keys",
    "fresh": "4 whole prompts of up to 512 tokens",
    "encoder": "the same without causality or cache",
}
# A small batch of each phase.
SCENARIOS = {
    "decode": "small_decode",
    "verify": "spec_uniform5",
    "prefill": "chunked_prefill",
    "short": "medium_prefill",
    "fresh": "fresh_prefill",
    "encoder": "encoder_small",
}
REFUSED = "-"


@contextlib.contextmanager
def everything_installed() -> Iterator[None]:
    """Ops find the packages of INSTALLED, with all that these may have."""
    found = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        if name in INSTALLED:
            return object() if INSTALLED[name] else None
        return found(name, package)

    dispatch._choose.cache_clear()
    with (
        mock.patch.object(importlib.util, "find_spec", find_spec),
        mock.patch.object(vllm_fa, "_unavailable", return_value=None),
        mock.patch.object(xformers, "_unavailable", return_value=None),
        mock.patch.dict("os.environ", {"XFV1_OPS": ""}),
    ):
        yield
    dispatch._choose.cache_clear()


def case_of(kind: str, phase: str) -> AttnCase:
    """A layer's case in a phase; an encoder has no cache."""
    choices = dict(LAYERS[kind])
    if phase == "encoder":
        choices |= {"attention": "encoder", "kv_dtype": "auto"}
    return PLAIN.replace(**choices)


def small(case: AttnCase, phase: str) -> AttnCase:
    """The case with a small batch of the phase."""
    return case.replace(scenario=SCENARIOS[phase], query_lens=(), seq_lens=())


def layer_in(kind: str, phase: str, card: Card) -> Layer:
    layer = layer_of(case_of(kind, phase), card.fnuz)
    return dataclasses.replace(layer, batch_invariant=kind == "invariant")


def picked(card: Card, kind: str, phase: str) -> str:
    """The op's name, or REFUSED."""
    try:
        return dispatch.choose(layer_in(kind, phase, card), BATCHES[phase], card.device).name
    except dispatch.NoOp:
        return REFUSED


def picks() -> dict[str, dict[str, dict[str, str]]]:
    """By card, layer and phase."""
    with everything_installed():
        return {
            name: {kind: {phase: picked(card, kind, phase) for phase in BATCHES} for kind in LAYERS}
            for name, card in CARDS.items()
        }


def render(found: dict[str, dict[str, dict[str, str]]]) -> str:
    """The table as text."""
    lines = [f"{phase}: {words}" for phase, words in MEANING.items()]
    for name, rows in found.items():
        body = [[f"{name} ({CARDS[name].product})", *BATCHES]]
        body += [[kind, *row.values()] for kind, row in rows.items()]
        widths = [22] + [18] * len(BATCHES)
        lines.append("")
        lines += [
            "".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
            for row in body
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(render(picks()))
