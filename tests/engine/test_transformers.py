"""Does a V1 engine give through xfv1 the logprobs that Transformers' eager attention gives?

`checkpoints.py` describes the eleven tiny checkpoints, and says where vLLM's model differs from
Transformers' apart from attention. MPT's class is our own (`mpt.py`): vLLM dropped MPT in 0.28, and
with model_impl="transformers" it refuses MPT as "not compatible with vLLM".
"""

import json
import os
from pathlib import Path

import pytest

from tests.engine import checkpoints
from tests.engine.checkpoints import CHECKPOINTS, NEW_TOKENS
from tests.harness.provenance import ROOT
from tests.programs.against_transformers import (
    BUDGET,
    CACHED,
    PLAIN,
    Result,
    run_all,
    unserved,
)

pytestmark = [pytest.mark.cpu, pytest.mark.xdist_group("transformers")]

# vLLM neither cuts the prompts of an encoder-decoder model nor caches their prefixes.
DECODERS = [name for name, checkpoint in CHECKPOINTS.items() if not checkpoint.audio]
FAULTS = [(name, fault) for name, made in CHECKPOINTS.items() for fault in made.all_faults]
RECORDED = ROOT / "docs" / "results" / "transformers-cpu.json"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """The results of all checkpoints. Workers of xdist that run tests of this file share them."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("needs vLLM's build for CPUs")
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    return run_all(Path(shared, "against-transformers"))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_logprob_is_transformers(results: dict[str, Result], name: str) -> None:
    """The logprobs of all prompt tokens and greedy tokens agree; the greedy tokens are equal."""
    found = results[name].agreements[PLAIN]
    assert found.problems() == []
    assert found.identical == found.answers == len(checkpoints.PROMPTS)
    assert found.compared == NEW_TOKENS * found.answers
    assert found.prompt_compared == sum(len(ids) - 1 for ids in checkpoints.PROMPTS)


@pytest.mark.parametrize("name", DECODERS)
def test_a_cached_prefix_changes_no_answer(results: dict[str, Result], name: str) -> None:
    found = results[name].agreements[CACHED]
    assert found.problems() == []
    assert found.identical == found.answers == 2 * len(checkpoints.PROMPTS)
    assert sum(results[name].reports[CACHED].cached) > 0


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_xfv1_serves_every_attention_layer(results: dict[str, Result], name: str) -> None:
    for run, report in results[name].reports.items():
        assert unserved(CHECKPOINTS[name], report) == [], run


@pytest.mark.parametrize("name", DECODERS)
def test_long_prompts_are_cut(results: dict[str, Result], name: str) -> None:
    report = results[name].reports[PLAIN]
    assert max(report.query_lens("torch", "prefill")) <= BUDGET < max(checkpoints.LENGTHS)
    assert report.query_lens("torch", "decode") == {1}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_rounding_can_break_no_tie(results: dict[str, Result], name: str) -> None:
    margins = [margin for row in results[name].expected.margins for margin in row]
    # A margin is a difference of two logprobs.
    assert min(margins) > 2 * results[name].bound > 0


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_a_planted_fault_is_noticed(results: dict[str, Result], name: str, fault: str) -> None:
    assert results[name].noticed(fault)


def test_the_recorded_result_is_of_these_checkpoints() -> None:
    recorded = json.loads(RECORDED.read_text())["models"]
    assert {name: [*model["faults"]] for name, model in recorded.items()} == {
        name: [*made.all_faults] for name, made in CHECKPOINTS.items()
    }
