"""Does the answer follow when the same question is asked in another way?"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from fixtures.cases import AttnCase
from fixtures.cases.tables import depth_tier
from fixtures.inputs.build import BATCH_TENSORS, AttnInputs
from fixtures.inputs.transforms import (
    as_captured,
    first_tokens,
    later_tokens,
    permute_blocks,
    select_requests,
    shorten,
)
from tests.harness.compare import check_cache, check_output
from tests.harness.driver import Driver
from tests.harness.memory import bits, new_output
from tests.harness.promises import every, promise
from tests.harness.record import Recorder
from tests.harness.truth import Truth
from tests.harness.verdicts import Mismatch, Outcome, Verdict

RUNS = 1000


# Which cases the tests take.


def _mixed(case: AttnCase) -> bool:
    """Mixed batches, one without features and one with most; each takes a CPU seconds."""
    return case in (
        AttnCase(scenario="mixed_small"),
        AttnCase(scenario="mixed_small", dtype="bf16"),
        AttnCase(scenario="mixed_fresh", sliding_window=13),
    )


def _several(case: AttnCase) -> bool:
    """Several requests, which a decoder's layer serves."""
    return len(case.query_lens) > 1 and case.attention in ("decoder", "noncausal")


def _steps(case: AttnCase) -> bool:
    """Batches that can be computed in two causal steps.

    A window frees blocks from step to step, so the poison of one step would be wrong in the other.
    """
    plain = case.attention == "decoder" and not case.kv_sharing and case.sliding_window is None
    return plain and min(case.query_lens) > 1 and not case.shared_prefix


def _graph(case: AttnCase) -> bool:
    """Batches that vLLM runs in full graphs: each request has one token, or one and its drafts.

    Padding's requests have as many.
    """
    query_len = 1 + case.drafts
    padded = case.pad_tokens >= case.pad_reqs * query_len
    return set(case.query_lens) == {query_len} and case.attention == "decoder" and padded


# The tests.


def _same_bits(case: AttnCase, one: torch.Tensor, other: torch.Tensor, what: str) -> Verdict:
    rows = case.num_tokens
    differs = bits(one[:rows]) != bits(other[:rows])
    if differs.any():
        token, head, dim = (int(i) for i in differs.nonzero()[0])
        raise Mismatch(
            f"{what}: {int(differs.sum())} of {differs.numel()} elements differ, first token"
            f" {token}, head {head}, dim {dim}: {float(one[token, head, dim])!r} and"
            f" {float(other[token, head, dim])!r}"
        )
    return Verdict(differs.numel())


def _check(driver: Driver, inputs: AttnInputs, truth: Truth) -> Verdict:
    """Run a batch and compare its output with the truth."""
    outcome = driver.run(inputs)
    return check_output(inputs, outcome, truth(inputs, outcome.query))


@promise("twice", cases=every, tier=depth_tier)
def test_same_run_twice_is_the_same_bit_for_bit(
    driver: Driver, inputs: AttnInputs, record: Recorder
) -> None:
    """Both runs use the same buffers, as vLLM keeps its own from step to step."""
    given = inputs.copied(driver.device)
    one = driver.step(given)
    given.storage.copy_(inputs.storage)
    other = driver.step(given)
    record(_same_bits(inputs.case, one.output, other.output, "two runs of one batch"))


@promise("thousand", cases=_mixed, tier="long")
def test_a_thousand_runs_are_the_same_bit_for_bit(
    driver: Driver, inputs: AttnInputs, record: Recorder
) -> None:
    """A kernel that adds parts in the order in which they finish seldom differs in two runs."""
    first = driver.run(inputs).output
    elements = 0
    for number in range(2, RUNS + 1):
        what = f"runs 1 and {number} of one batch"
        elements += _same_bits(inputs.case, first, driver.run(inputs).output, what).elements
    record(Verdict(elements))


@promise("moved_blocks", cases=every, tier=depth_tier)
def test_output_does_not_depend_on_where_blocks_lie(
    driver: Driver, inputs: AttnInputs, record: Recorder
) -> None:
    moved = permute_blocks(inputs, seed=inputs.case.seed)
    one, other = driver.run(inputs), driver.run(moved)
    record(_same_bits(inputs.case, one.output, other.output, "blocks moved"))


@promise("order", cases=_several, tier=depth_tier)
def test_requests_in_another_order_get_their_own_answers(
    driver: Driver, inputs: AttnInputs, truth: Truth, record: Recorder
) -> None:
    """The order is reversed, but decodes come before prefills, as vLLM orders a batch.

    A step with the first order comes before; nothing of it may be left.
    """
    lens = inputs.case.query_lens
    order = sorted(range(len(lens)), key=lambda r: (lens[r] > 1, -r))
    turned = select_requests(inputs, order)
    driver.run(inputs)
    record(_check(driver, turned, truth))


@promise("alone", cases=_several, tier=depth_tier)
def test_a_request_alone_gets_the_same_answer(
    driver: Driver, inputs: AttnInputs, truth: Truth, record: Recorder
) -> None:
    """The last request that has tokens, without the others, after a step with all of them."""
    last = max(r for r, q in enumerate(inputs.case.query_lens) if q)
    alone = select_requests(inputs, [last])
    driver.run(inputs)
    record(_check(driver, alone, truth))


@promise("two_steps", cases=_steps, tier=depth_tier)
def test_tokens_in_two_steps_get_the_same_answers(
    driver: Driver, inputs: AttnInputs, truth: Truth, record: Recorder
) -> None:
    """A first step with some of each request's tokens, then the rest over the cache it left."""
    counts = [max(1, q // 3) for q in inputs.case.query_lens]
    first = first_tokens(inputs, counts)
    done = driver.run(first)
    right = truth(first, done.query)
    check_output(first, done, right)
    check_cache(first, done, right.storage)
    later = later_tokens(inputs, counts, done.storage)
    record(_check(driver, later, truth))


@promise("captured", cases=_graph, tier=depth_tier)
def test_a_captured_graph_replays_like_eager(
    driver: Driver, inputs: AttnInputs, device: torch.device, truth: Truth, record: Recorder
) -> None:
    """Captured with vLLM's dummy batch, replayed on others with other lengths, blocks and contents.

    Without CUDA there is no graph. The step then runs with the metadata that was built for a
    capture: as in a graph, all that the host knows is about the dummy batch.
    """
    batches = [inputs, permute_blocks(inputs, seed=2)]
    if inputs.case.sliding_window is None and not inputs.case.shared_prefix:
        batches.append(shorten(inputs))
    # The graph's own tensors: it reads these, and the batches are copied into them.
    static = inputs.copied(device)
    output = new_output(static)
    graph = _captured(driver, static, output) if device.type == "cuda" else None
    for batch in batches:
        replay = graph or _built_to_capture(driver, static, output)
        _refill(static, batch, output)
        # vLLM builds metadata anew at every step, which refreshes in place what a graph reads.
        driver.metadata(static)
        quantized, to = replay(), batch.device
        query = None if quantized is None else quantized.to(to)
        done = Outcome(output.to(to), static.storage.to(to), query)
        record(check_output(batch, done, truth(batch, done.query)))


# A step that can be taken again; what it returns is the query, if the layer quantized it.
Replay = Callable[[], torch.Tensor | None]


def _captured(driver: Driver, static: AttnInputs, output: torch.Tensor) -> Replay:
    """A CUDA graph's replay of the driver's step; eager steps come first, as in vLLM."""
    dummy = as_captured(static)
    warm = driver.metadata(dummy, dummy=True)
    stream = torch.cuda.Stream(static.device)
    stream.wait_stream(torch.cuda.current_stream(static.device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            _step(driver, static, output, warm)
    torch.cuda.synchronize(static.device)
    metadata = driver.metadata_to_capture(dummy)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        quantized = _step(driver, static, output, metadata)

    def replay() -> torch.Tensor | None:
        graph.replay()
        torch.cuda.synchronize(static.device)
        return quantized

    return replay


def _built_to_capture(driver: Driver, static: AttnInputs, output: torch.Tensor) -> Replay:
    """The driver's step, its metadata built for a capture."""
    metadata = driver.metadata_to_capture(as_captured(static))
    return functools.partial(_step, driver, static, output, metadata)


def _step(
    driver: Driver, static: AttnInputs, output: torch.Tensor, metadata: Any
) -> torch.Tensor | None:
    driver.update_cache(static, static.cache)
    return driver.forward(static, static.cache, metadata, output)


def _refill(static: AttnInputs, batch: AttnInputs, output: torch.Tensor) -> None:
    """Put another batch into the tensors that a graph was captured over."""
    for name in BATCH_TENSORS:
        getattr(static, name).copy_(getattr(batch, name))
    static.storage.copy_(batch.storage)
    bits(output).fill_(0)
