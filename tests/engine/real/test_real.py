"""Do real weights answer alike through xfv1, through CPU_ATTN and by Transformers?

`tox -e real` makes the checkpoint, sets XFV1_REAL_CHECKPOINT and runs these tests.
"""

import os
from pathlib import Path

import pytest

from tests.engine.real import texts
from tests.engine.real.checkpoint import VARIABLE
from tests.engine.real.compare import (
    BUDGET,
    CPU_ATTN,
    GREEDY,
    IMPLS,
    PAIRS,
    TEXT,
    TRANSFORMERS,
    XFV1,
    Results,
    perplexity,
    run_all,
)

pytestmark = pytest.mark.cpu

LAYERS = 30
# The perplexity of a text that the model cannot read is in the thousands.
LEGIBLE = 30.0


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    if VARIABLE not in os.environ:
        pytest.skip(f"needs real weights in {VARIABLE}: tox -e real downloads them")
    folder = Path(os.environ[VARIABLE]).resolve()
    if not folder.is_dir():
        pytest.fail(f"{VARIABLE}={folder}: expected the folder of a checkpoint (tox -e real)")
    return folder


@pytest.fixture(scope="module")
def results(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_all(checkpoint, tmp_path_factory.mktemp("real"))


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_greedy_answers_agree(results: Results, one: str, other: str) -> None:
    """Answers may part only where both sides prefer their own token by less than rounding."""
    found = results.agreement(GREEDY, one, other)
    assert found.problems() == []
    assert found.answers == len(texts.PROMPTS) + len(texts.SHARED) + len(texts.CHATS)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_logprobs_of_a_text_agree(results: Results, one: str, other: str) -> None:
    found = results.agreement(TEXT, one, other)
    assert found.problems() == []
    assert found.prompt_compared == texts.TEXT_TOKENS - 1


@pytest.mark.parametrize("side", [XFV1, CPU_ATTN])
def test_the_side_runs_in_every_layer(results: Results, side: str) -> None:
    for report in results.reports[side].values():
        assert report.impls == [IMPLS[side]] * LAYERS
        assert min(report.forwards) > 0
        assert sum(report.ops.values()) >= (sum(report.forwards) if side == XFV1 else 0)
        assert bool(report.ops) == (side == XFV1)


@pytest.mark.parametrize("side", [XFV1, CPU_ATTN])
def test_prefixes_come_from_the_cache(results: Results, side: str) -> None:
    assert sum(results.reports[side][GREEDY].cached) > 0


def test_long_prompts_are_cut(results: Results) -> None:
    longest = max(count for _, count in texts.PROMPTS)
    chunks = results.reports[XFV1][GREEDY].query_lens("torch", "prefill")
    assert max(chunks) <= BUDGET < longest


def test_the_answers_are_the_models(results: Results, checkpoint: Path) -> None:
    """The conversion did not harm the weights: the model answers a question and reads a text."""
    tokens = results.answers[TRANSFORMERS][GREEDY].tokens[texts.CHAT]
    assert texts.CAPITAL in texts.load_tokenizer(checkpoint).decode(tokens)
    assert perplexity(results.answers[TRANSFORMERS][TEXT]) < LEGIBLE


def test_a_key_lost_at_decodes_is_noticed(results: Results) -> None:
    assert results.noticed()
