"""Do the engine tests' comparisons notice what they are for?"""

from dataclasses import replace
from typing import Any

import pytest

from tests.engine import agreement
from tests.engine.checkpoints import CHECKPOINTS
from tests.engine.engine import Run, RunReport
from tests.engine.models import LLAMA, prompt
from tests.programs.against_transformers import CROSS, IMPL, SOUND, Result, unserved
from tests.programs.against_transformers import XFV1 as BACKEND
from tests.programs.same_tokens import XFV1, unexercised

BOUND = 0.01


def report(*tokens: list[int], margin: float = 1.0) -> RunReport:
    """Answers to as many prompts, every token ahead by one margin."""
    return RunReport(
        prompts=list(range(len(tokens))),
        times=[1] * len(tokens),
        tokens=list(tokens),
        logprobs=[[-1.0] * len(row) for row in tokens],
        margins=[[margin] * len(row) for row in tokens],
        cached=[16] * len(tokens),
        impls=[XFV1] * LLAMA.num_layers,
        backends=["xfv1.backend.XFormersAttentionBackend"] * LLAMA.num_layers,
        forwards=[4] * LLAMA.num_layers,
        ops={"vllm_fa3 prefill 64": 4},
        captured={"triton decode 3": 4},
        graphs="FULL_DECODE_ONLY",
        replays=1,
        context_ranks=1,
        counters={
            "vllm:spec_decode_num_draft_tokens": 2,
            "vllm:spec_decode_num_accepted_tokens": 1,
        },
        start_s=0.0,
        serve_s=0.0,
    )


RIGHT = report(*[[7, 8, 9]] * 4)


def test_the_same_tokens_agree() -> None:
    result = agreement.compare(RIGHT, RIGHT, BOUND)
    assert result.problems() == []
    assert (result.identical, result.compared, result.apart) == (4, 12, 0.0)


def test_a_broken_near_tie_agrees_and_is_told() -> None:
    tied = report([7, 8, 9], [7, 6, 9], [7, 8, 9], [7, 8, 9], margin=BOUND / 2)
    result = agreement.compare(tied, report(*RIGHT.tokens, margin=BOUND / 2), BOUND)
    assert result.problems() == []
    # Tokens after the tie follow from it.
    assert (result.identical, result.compared) == (3, 10)
    parting = result.partings[0]
    assert (parting.prompt, parting.step, parting.token, parting.expected) == (1, 1, 6, 8)


@pytest.mark.parametrize("sure", ["ours", "reference"])
def test_another_token_by_more_than_rounding_is_a_problem(sure: str) -> None:
    wrong = report([7, 8, 9], [7, 6, 9], [7, 8, 9], [7, 8, 9], margin=BOUND / 2)
    right = report(*RIGHT.tokens, margin=BOUND / 2)
    margins = [[2 * BOUND] * 3] * 4
    pair = {"ours": (replace(wrong, margins=margins), right)}
    pair["reference"] = (wrong, replace(right, margins=margins))
    (problem,) = agreement.compare(*pair[sure], BOUND).problems()
    assert problem.startswith("prompt 1, step 1: 6 by ")


def test_ties_everywhere_are_a_problem() -> None:
    tied = report(*[[6, 8, 9]] * 3, [7, 8, 9], margin=0.0)
    problems = agreement.compare(tied, report(*RIGHT.tokens, margin=0.0), BOUND).problems()
    assert problems == ["1 of 4 answers alike to the last token"]


def test_logprobs_further_apart_than_rounding_are_a_problem() -> None:
    off = replace(RIGHT, logprobs=[[-1.0, -1.0 - 2 * BOUND, -1.0]] * 4)
    (problem,) = agreement.compare(off, RIGHT, BOUND).problems()
    assert problem.startswith("logprobs 2.00e-02 apart")


def test_prompts_logprobs_are_compared_where_both_sides_have_them() -> None:
    scored = replace(RIGHT, prompt_logprobs=[[-1.0, -2.0]] * 4)
    off = replace(RIGHT, prompt_logprobs=[[-1.0, -2.0]] * 3 + [[-1.0, -2.0 - 2 * BOUND]])
    assert agreement.compare(RIGHT, scored, BOUND).prompt_compared == 0
    assert agreement.compare(scored, scored, BOUND).prompt_compared == 8
    (problem,) = agreement.compare(off, scored, BOUND).problems()
    assert problem.startswith("logprobs 2.00e-02 apart")


def test_nothing_compared_is_a_problem() -> None:
    nothing = report()
    assert agreement.compare(nothing, nothing, BOUND).problems() == ["nothing was compared"]


def test_an_answer_that_came_often_counts_as_often() -> None:
    often = replace(report([7, 8, 9], [7, 6, 9], margin=0.0), prompts=[0, 0], times=[9, 1])
    result = agreement.compare(often, report([7, 8, 9], margin=0.0), BOUND)
    assert (result.answers, result.identical) == (10, 9)


def test_rounding_is_what_the_reference_makes_of_it() -> None:
    moved = replace(RIGHT, logprobs=[[-1.0, -1.25, -1.0]] * 4)
    assert agreement.rounding(RIGHT, moved) == agreement.MARGIN * 0.25


RUN = Run(
    LLAMA, [prompt(0, 100)] * 4, 3, max_num_batched_tokens=64, graphs=True, prefix_caching=True,
    drafts=2,
)  # fmt: skip


def test_a_run_that_used_all_is_complete() -> None:
    assert unexercised(RUN, RIGHT, XFV1) == []


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({"impls": ["vllm.Other"] * LLAMA.num_layers}, "in every layer"),
        ({"impls": [XFV1]}, "in every layer"),
        ({"graphs": "NONE"}, "full CUDA graphs"),
        ({"replays": 0}, "full CUDA graphs"),
        ({"captured": {"triton decode 1": 4}}, "decodes of 3 tokens"),
        ({"ops": {}}, "prompts cut to 64 tokens"),
        ({"ops": {"triton prefill 100": 4}}, "prompts cut to 64 tokens"),
        ({"cached": [0] * 4}, "cached prefixes"),
        ({"counters": {"vllm:spec_decode_num_draft_tokens": 2}}, "drafts"),
        ({"prompts": [0, 1, 2, 2]}, "answer to every prompt"),
        ({"context_ranks": 2}, "cache over 1 ranks"),
        ({"forwards": [4, 0]}, "steps outside of graphs"),
    ],
)
def test_what_a_run_did_not_use_is_told(changed: dict[str, Any], missed: str) -> None:
    (told,) = unexercised(RUN, replace(RIGHT, **changed), XFV1)
    assert missed in told


SERVED = replace(RIGHT, impls=[IMPL] * 2, backends=[f"xfv1.backend.{BACKEND}"] * 2, forwards=[2, 2])


def test_layers_that_xfv1_serves_are_told_from_others() -> None:
    assert unserved(CHECKPOINTS["llama"], SERVED) == []
    crossed = [f"xfv1.backend.{BACKEND}", f"abc.{CROSS}"] * 2
    whisper = replace(SERVED, impls=[IMPL] * 4, backends=crossed, forwards=[1] * 4)
    assert unserved(CHECKPOINTS["whisper"], whisper) == []
    assert unserved(CHECKPOINTS["whisper"], replace(whisper, backends=crossed[:1] * 4))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"backends": [f"xfv1.backend.{BACKEND}", "vllm.CPUAttentionBackend"]}, "backends"),
        ({"backends": [f"xfv1.backend.{BACKEND}"]}, "backends"),
        ({"impls": [IMPL, "vllm.CPUAttentionBackendImpl"]}, "classes"),
        ({"forwards": [4, 0]}, "calls of the layers"),
        ({"ops": {"torch prefill 64": 3}}, "calls of xfv1's ops"),
    ],
)
def test_a_layer_that_xfv1_does_not_serve_is_told(changed: dict[str, Any], told: str) -> None:
    (found,) = unserved(CHECKPOINTS["llama"], replace(SERVED, **changed))
    assert told in found


def test_a_fault_is_noticed_by_another_logprob_or_another_token() -> None:
    runs = {
        SOUND: RIGHT,
        "logprob": replace(RIGHT, logprobs=[[-1.0, -1.0, -1.0 - 2 * BOUND]] * 4),
        "token": report([7, 8, 9], [7, 6, 9], [7, 8, 9], [7, 8, 9]),
    }
    agreements = {name: agreement.compare(run, RIGHT, BOUND) for name, run in runs.items()}
    result = Result(RIGHT, BOUND, runs, agreements)
    assert [result.noticed(name) for name in runs] == [False, True, True]
    # A comparison that nothing passes notices nothing.
    agreements[SOUND] = agreements["token"]
    assert not result.noticed("logprob")
