"""Does a real V1 engine give, through xfv1, what it gives through vLLM's own CPU backend?"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine import agreement
from tests.engine.call_faults import KEY_FAULTS
from tests.engine.engine import Process, Run, RunReport, Session, SessionError
from tests.engine.models import LLAMA as SERVED
from tests.engine.models import prompt, tiny
from tests.harness.environment import has_xformers

pytestmark = [pytest.mark.cpu, pytest.mark.xdist_group("engine_cpu")]

CPU_ATTN = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"
XFV1 = "xfv1.backend.XFormersAttentionBackend"
IMPLS = {CPU_ATTN: f"{CPU_ATTN}Impl", XFV1: "xfv1.impl.XFormersImpl"}

LLAMA = replace(
    tiny(SERVED).sized(num_hidden_layers=2, num_attention_heads=8, head_dim=64), dtype="float32"
)
HALF = replace(LLAMA, dtype="float16")
WINDOW = 24
MISTRAL = LLAMA.sized(
    architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=WINDOW
)
TOKEN_BUDGET = Run.max_num_batched_tokens
# Around a block of 16, and past the token budget of a step; the last shares the longest's start.
LENGTHS = (1, 3, 16, 17, 33, 70, 130)
SHARED = 96
PROMPTS = [prompt(seed, length) for seed, length in enumerate(LENGTHS)]
PROMPTS.append(PROMPTS[-1][:SHARED] + prompt(len(LENGTHS), 20))
# The interpreter takes seconds for what a device does in microseconds: few prompts and tokens.
FEW, FEW_TOKENS, FEW_BUDGET = (1, 3, 4), 4, 32
# Long enough that drafts are proposed from its first tokens on.
REPETITIVE = (5,)
# Units in the last place: float32 rounds each term of its sums, of which the longest has hundreds.
JITTER = {LLAMA.dtype: 16.0, HALF.dtype: 1.0}


def of(report: RunReport, prompts: tuple[int, ...]) -> RunReport:
    """What a report says of some of its prompts."""
    return replace(
        report,
        prompts=list(range(len(prompts))),
        times=[report.times[i] for i in prompts],
        tokens=[report.tokens[i] for i in prompts],
        logprobs=[report.logprobs[i] for i in prompts],
        margins=[report.margins[i] for i in prompts],
    )


def sessions() -> dict[str, Session]:
    """The engines to run: vLLM's own backend, xfv1 on PyTorch, xfv1 on interpreted kernels."""
    few = [PROMPTS[i] for i in FEW]
    short = Run(LLAMA, few, FEW_TOKENS, block_size=16, max_num_batched_tokens=FEW_BUDGET)
    repetitive = [PROMPTS[i] for i in REPETITIVE]
    splitk = "xformers_splitk,torch"
    reference = {
        "reference": Run(LLAMA, PROMPTS),
        "reference float16": Run(HALF, PROMPTS),
        "reference window": Run(MISTRAL, PROMPTS),
    }
    for name, run in list(reference.items()):
        reference[f"{name} jitter"] = replace(run, jitter=JITTER[run.model.dtype])
    xfv1 = {
        "block 16": Run(LLAMA, PROMPTS, block_size=16),
        "block 64": Run(LLAMA, PROMPTS, block_size=64),
        "prefix caching": Run(LLAMA, PROMPTS, block_size=16, prefix_caching=True),
        "window": Run(MISTRAL, PROMPTS, block_size=16),
        "drafts": Run(LLAMA, PROMPTS, drafts=3),
        **{fault: Run(LLAMA, PROMPTS, fault=fault) for fault in KEY_FAULTS},
    }
    by_splitk = {
        "splitk": replace(short, model=HALF, ops=splitk),
        "splitk drafts": Run(HALF, repetitive, max_tokens=6, drafts=2, ops=splitk),
    }
    interpreted = {
        **(by_splitk if has_xformers() else {}),
        "triton": replace(short, ops="triton"),
        "triton window": replace(short, model=MISTRAL, ops="triton"),
    }
    return {
        "reference": Session(reference),
        # Whatever a server really hands over passes the checks.
        "xfv1": Session(xfv1, {"XFV1_CPU": "1", "XFV1_DEBUG": "1"}),
        "interpreted": Session(interpreted, {"XFV1_CPU": "1", "TRITON_INTERPRET": "1"}),
    }


Ran = Callable[[str], RunReport]
needs_xformers = pytest.mark.skipif(not has_xformers(), reason="xformers is not installed")


@pytest.fixture(scope="module", autouse=True)
def cpu_build() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("needs vLLM's build for CPUs")


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Process]]:
    """All sessions at once; a test waits for those it asks."""
    folder = tmp_path_factory.mktemp("engine")
    started: dict[str, Process] = {}
    try:
        for name, session in sessions().items():
            started[name] = Process(session, folder / name)
        yield started
    finally:
        for process in started.values():
            process.stop()


@pytest.fixture(scope="module")
def ran(processes: dict[str, Process]) -> Ran:
    """A run's report, by the run's name."""
    owners = {run: name for name, session in sessions().items() for run in session.runs}
    return lambda run: processes[owners[run]].report().runs[run]


def agreed(
    ran: Ran, run: str, reference: str, prompts: tuple[int, ...] = ()
) -> agreement.Agreement:
    """A run beside its reference's run of the same prompts, all of them unless some are named."""
    expected, jittered = ran(reference), ran(f"{reference} jitter")
    bound = agreement.rounding(expected, jittered)
    return agreement.compare(ran(run), of(expected, prompts) if prompts else expected, bound)


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
        assert run.forwards == [run.forwards[0]] * LLAMA.num_layers
        assert run.forwards[0] > 0
        assert sum(run.ops.values()) >= (sum(run.forwards) if backend == XFV1 else 0)
        assert bool(run.ops) == (backend == XFV1)


@pytest.mark.parametrize("run", ["reference", "reference window"])
def test_float32_rounding_cannot_change_a_token(ran: Ran, run: str) -> None:
    margins = [margin for steps in ran(run).margins for margin in steps]
    assert min(margins) > agreement.rounding(ran(run), ran(f"{run} jitter")) > 0


@pytest.mark.parametrize("run", ["block 16", "block 64"])
def test_chunked_prefill_matches_cpu_attn(ran: Ran, run: str) -> None:
    assert agreed(ran, run, "reference").problems() == []
    report = ran(run)
    longest = max(report.query_lens("torch", "prefill"))
    assert longest <= TOKEN_BUDGET < max(LENGTHS)
    assert report.query_lens("torch", "decode") == {1}


def test_prefix_caching_matches_cpu_attn(ran: Ran) -> None:
    assert agreed(ran, "prefix caching", "reference").problems() == []
    assert ran("prefix caching").cached == [0] * len(LENGTHS) + [SHARED]


def test_sliding_window_matches_cpu_attn(ran: Ran) -> None:
    assert agreed(ran, "window", "reference window").problems() == []


def test_sliding_window_changes_the_tokens_of_long_prompts(ran: Ran) -> None:
    # The weights are the same, so a window that is ignored gives the other model's tokens.
    windowed, full = ran("reference window").tokens, ran("reference").tokens
    for tokens, whole, ids in zip(windowed, full, PROMPTS, strict=True):
        if len(ids) > WINDOW:
            assert tokens != whole


def test_ngram_speculation_gives_the_same_tokens(ran: Ran) -> None:
    assert agreed(ran, "drafts", "reference").problems() == []
    # Verified as decodes, several tokens to a request.
    assert max(ran("drafts").query_lens("torch", "decode")) > 1


@pytest.mark.parametrize("fault", KEY_FAULTS)
def test_one_wrong_key_changes_the_tokens(ran: Ran, fault: str) -> None:
    agreement = agreed(ran, fault, "reference")
    assert agreement.problems()
    assert agreement.identical < agreement.answers / 2


@needs_xformers
def test_splitk_decodes_match_cpu_attn(ran: Ran) -> None:
    assert agreed(ran, "splitk", "reference float16", FEW).problems() == []
    report = ran("splitk")
    assert report.query_lens("xformers_splitk", "decode") == {1}
    assert report.query_lens("torch", "decode") == set()
    # A step that both decodes and prefills calls an op for each.
    assert sum(report.ops.values()) > sum(report.forwards)


@needs_xformers
def test_splitk_verifies_drafts(ran: Ran) -> None:
    assert agreed(ran, "splitk drafts", "reference float16", REPETITIVE).problems() == []
    assert max(ran("splitk drafts").query_lens("xformers_splitk", "decode")) > 1


@pytest.mark.parametrize(
    ("run", "reference"), [("triton", "reference"), ("triton window", "reference window")]
)
def test_own_kernel_matches_cpu_attn(ran: Ran, run: str, reference: str) -> None:
    assert agreed(ran, run, reference, FEW).problems() == []
    report = ran(run)
    assert report.query_lens("triton", "decode") == {1}
    assert max(report.query_lens("triton", "prefill")) > 1


def test_a_cache_over_ranks_is_refused_where_nothing_merges(tmp_path: Path) -> None:
    """By both ranks' engines, before they serve."""
    run = Run(LLAMA.sized(num_key_value_heads=1), PROMPTS, context_parallel=2)
    process = Process(Session({"shared": run}, {"XFV1_CPU": "1"}, ranks=2), tmp_path)
    try:
        with pytest.raises(SessionError, match="decode_context_parallel_size=2: no merge without"):
            process.report()
    finally:
        process.stop()
    assert not process.so_far().runs
