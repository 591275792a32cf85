"""Does a real V1 engine give, through xfv1, what it gives through vLLM's own CPU backend?"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.integration.checkpoint import Checkpoint, prompt
from tests.integration.engine import FAULTS, Process, Run, RunReport, Session

pytestmark = pytest.mark.cpu

CPU_ATTN = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"
XFV1 = "xfv1.backend.XFormersAttentionBackend"
IMPLS = {CPU_ATTN: f"{CPU_ATTN}Impl", XFV1: "xfv1.impl.XFormersImpl"}

LLAMA = Checkpoint()
MISTRAL = Checkpoint(sliding_window=24)
TOKEN_BUDGET = Run.max_num_batched_tokens
# Around a block of 16, and past the token budget of a step; the last shares the longest's start.
LENGTHS = (1, 3, 16, 17, 33, 70, 130)
SHARED = 96
PROMPTS = [prompt(seed, length) for seed, length in enumerate(LENGTHS)]
PROMPTS.append(PROMPTS[-1][:SHARED] + prompt(len(LENGTHS), 20))
# The interpreter takes seconds for what a device does in microseconds: few prompts and tokens.
FEW, FEW_TOKENS, FEW_BUDGET = (1, 3, 4), 4, 32
# Its continuation repeats itself, so that drafts are proposed from its first tokens on.
REPETITIVE = (5,)

# Roundings a value passes on its way to the logits, in each layer: two norms and their weights,
# query, key, value, RoPE, softmax, attention, its projection, two residuals, gate, up, down.
ROUNDINGS = 16 * LLAMA.num_layers
# Terms of the longest sum, each rounded on its own where the sum's dtype is the values' own.
TERMS = LLAMA.num_heads * LLAMA.head_size
# Logits are normal of deviation 1: the norm's output times rows of unit length.
LARGEST_LOGIT = 4.5


def logprob_bound(dtype: str) -> float:
    """How far apart rounding can put the logprobs of two backends.

    Each rounding is of one unit in the last place and independent of the others; a logprob is the
    difference of two values as large as the largest logit. Half precision sums in float32.
    """
    steps = ROUNDINGS * (TERMS if dtype == "float32" else 1)
    eps: float = torch.finfo(getattr(torch, dtype)).eps
    return 2 * LARGEST_LOGIT * eps * float(steps**0.5)


def of(report: RunReport, prompts: tuple[int, ...]) -> RunReport:
    """What a report says of some of its prompts."""
    return dataclasses.replace(
        report,
        tokens=[report.tokens[i] for i in prompts],
        logprobs=[report.logprobs[i] for i in prompts],
        margins=[report.margins[i] for i in prompts],
    )


def assert_same(report: RunReport, reference: RunReport, dtype: str) -> None:
    """Same tokens and, within rounding, logprobs, up to where a tie within rounding is broken."""
    bound = logprob_bound(dtype)
    assert len(report.tokens) == len(reference.tokens)
    compared = 0
    for index, (tokens, expected) in enumerate(zip(report.tokens, reference.tokens, strict=True)):
        for step, (token, right) in enumerate(zip(tokens, expected, strict=False)):
            where = f"prompt {index}, step {step}"
            if token != right:
                margin = reference.margins[index][step]
                assert margin <= 2 * bound, f"{where}: {token}, expected {right} by {margin:.2e}"
                break
            apart = abs(report.logprobs[index][step] - reference.logprobs[index][step])
            assert apart <= bound, f"{where}: logprobs {apart:.2e} apart, bound {bound:.2e}"
            compared += 1
    assert compared > sum(map(len, report.tokens)) / 2, "ties everywhere: nothing was compared"


def sessions(folder: Path) -> dict[str, Session]:
    """The engines to run: vLLM's own backend, xfv1 on PyTorch, xfv1 on interpreted kernels."""
    llama, mistral = (str(c.save(folder / c.architecture)) for c in (LLAMA, MISTRAL))
    architectures = [LLAMA.architecture, MISTRAL.architecture]
    few = [PROMPTS[i] for i in FEW]
    splitk = "xformers_splitk,torch"
    reference = {
        "reference": Run(llama, PROMPTS),
        "reference float16": Run(llama, PROMPTS, dtype="float16"),
        "reference window": Run(mistral, PROMPTS),
    }
    xfv1 = {
        "block 16": Run(llama, PROMPTS, block_size=16),
        "block 64": Run(llama, PROMPTS, block_size=64),
        "prefix caching": Run(llama, PROMPTS, block_size=16, prefix_caching=True),
        "window": Run(mistral, PROMPTS, block_size=16),
        "drafts": Run(llama, PROMPTS, drafts=3),
        **{fault: Run(llama, PROMPTS, fault=fault) for fault in FAULTS},
    }
    interpreted = {
        "splitk": Run(llama, few, FEW_TOKENS, "float16", 16, FEW_BUDGET, ops=splitk),
        "splitk drafts": Run(
            llama, [PROMPTS[i] for i in REPETITIVE], 6, "float16", drafts=2, ops=splitk
        ),
        "triton": Run(llama, few, FEW_TOKENS, block_size=16, ops="triton"),
        "triton window": Run(mistral, few, FEW_TOKENS, block_size=16, ops="triton"),
    }
    return {
        "reference": Session(reference, architectures),
        # Whatever a server really hands over passes the checks.
        "xfv1": Session(xfv1, architectures, {"XFV1_CPU": "1", "XFV1_DEBUG": "1"}),
        "interpreted": Session(
            interpreted, architectures, {"XFV1_CPU": "1", "TRITON_INTERPRET": "1"}
        ),
    }


Ran = Callable[[str], RunReport]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Process]]:
    """All sessions at once; a test waits for those it asks."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("needs vLLM's build for CPUs")
    folder = tmp_path_factory.mktemp("engine")
    started: dict[str, Process] = {}
    try:
        for name, session in sessions(folder).items():
            started[name] = Process(session, folder / name)
        yield started
    finally:
        for process in started.values():
            process.stop()


@pytest.fixture(scope="module")
def ran(processes: dict[str, Process], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A run's report, by the run's name."""
    owners = {
        run: name
        for name, session in sessions(tmp_path_factory.mktemp("names")).items()
        for run in session.runs
    }
    return lambda run: processes[owners[run]].report().runs[run]


@pytest.mark.parametrize(
    ("session", "backend"), [("reference", CPU_ATTN), ("xfv1", XFV1), ("interpreted", XFV1)]
)
def test_selected_backend_runs_in_every_layer(
    processes: dict[str, Process], session: str, backend: str
) -> None:
    for run in processes[session].report().runs.values():
        assert run.backends == [backend] * LLAMA.num_layers
        assert run.impls == [IMPLS[backend]] * LLAMA.num_layers
        # Every layer is called as often as the others.
        assert run.forwards > 0
        assert run.forwards % LLAMA.num_layers == 0
        assert sum(run.ops.values()) >= (run.forwards if backend == XFV1 else 0)
        assert bool(run.ops) == (backend == XFV1)


@pytest.mark.parametrize("run", ["reference", "reference window"])
def test_float32_rounding_cannot_change_a_token(ran: Ran, run: str) -> None:
    margins = [margin for steps in ran(run).margins for margin in steps]
    assert min(margins) > 2 * logprob_bound("float32")


@pytest.mark.parametrize("run", ["block 16", "block 64"])
def test_chunked_prefill_matches_cpu_attn(ran: Ran, run: str) -> None:
    report = ran(run)
    assert_same(report, ran("reference"), "float32")
    longest = max(report.query_lens("torch", "prefill"))
    assert longest <= TOKEN_BUDGET < max(LENGTHS)
    assert report.query_lens("torch", "decode") == {1}


def test_prefix_caching_matches_cpu_attn(ran: Ran) -> None:
    report = ran("prefix caching")
    assert_same(report, ran("reference"), "float32")
    assert report.cached == [0] * len(LENGTHS) + [SHARED]


def test_sliding_window_matches_cpu_attn(ran: Ran) -> None:
    assert_same(ran("window"), ran("reference window"), "float32")


def test_sliding_window_changes_the_tokens_of_long_prompts(ran: Ran) -> None:
    # The weights are the same, so a window that is ignored gives the other model's tokens.
    assert MISTRAL.sliding_window is not None
    windowed, full = ran("reference window").tokens, ran("reference").tokens
    for tokens, whole, ids in zip(windowed, full, PROMPTS, strict=True):
        if len(ids) > MISTRAL.sliding_window:
            assert tokens != whole


def test_ngram_speculation_gives_the_same_tokens(ran: Ran) -> None:
    report = ran("drafts")
    assert_same(report, ran("reference"), "float32")
    # Verified as decodes, several tokens to a request.
    assert max(report.query_lens("torch", "decode")) > 1


@pytest.mark.parametrize("fault", FAULTS)
def test_one_wrong_key_changes_the_tokens(ran: Ran, fault: str) -> None:
    report, reference = ran(fault), ran("reference")
    with pytest.raises(AssertionError):
        assert_same(report, reference, "float32")
    pairs = zip(report.tokens, reference.tokens, strict=True)
    changed = sum(tokens != expected for tokens, expected in pairs)
    assert changed > len(PROMPTS) / 2


def test_splitk_decodes_match_cpu_attn(ran: Ran) -> None:
    report = ran("splitk")
    assert_same(report, of(ran("reference float16"), FEW), "float16")
    assert report.query_lens("xformers_splitk", "decode") == {1}
    assert report.query_lens("torch", "decode") == set()
    # A step that both decodes and prefills calls an op for each.
    assert sum(report.ops.values()) > report.forwards


def test_splitk_verifies_drafts(ran: Ran) -> None:
    report = ran("splitk drafts")
    assert_same(report, of(ran("reference float16"), REPETITIVE), "float16")
    assert max(report.query_lens("xformers_splitk", "decode")) > 1


@pytest.mark.parametrize(
    ("run", "reference"), [("triton", "reference"), ("triton window", "reference window")]
)
def test_own_kernel_matches_cpu_attn(ran: Ran, run: str, reference: str) -> None:
    report = ran(run)
    assert_same(report, of(ran(reference), FEW), "float32")
    assert report.query_lens("triton", "decode") == {1}
    assert max(report.query_lens("triton", "prefill")) > 1
