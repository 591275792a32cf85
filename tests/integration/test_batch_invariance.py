"""With VLLM_BATCH_INVARIANT, are a token's bits its own, whatever is computed with it?

Without a GPU these tests run once more in a process where Triton interprets the kernel.
"""

from pathlib import Path

import pytest
import torch

from fixtures.cases import AttnCase
from fixtures.inputs import AttnInputs, build_inputs
from fixtures.inputs.transforms import first_tokens, later_tokens, select_requests
from tests.harness.compare import check_output
from tests.harness.driver import drive
from tests.harness.memory import bits
from tests.harness.record import Recorder
from tests.harness.truth import expected
from tests.harness.verdicts import Outcome, Refused
from tests.integration.interpreted import passed_in_interpreter
from xfv1.backend import XFormersAttentionBackend
from xfv1.device import device_of

CASES = (
    AttnCase(scenario="mixed_small", dtype="fp32"),
    AttnCase(scenario="mixed_deep"),
    # Alone, the first of the 20 tokens sees a whole tile of 32 keys; with the next 15, none does.
    AttnCase(query_lens=(1, 20, 37), seq_lens=(90, 139, 173), sliding_window=64, dtype="fp32"),
    AttnCase(scenario="spec_ragged", softcap=30.0, sinks=True),
    AttnCase(scenario="edge_chunked", alibi=True, num_heads=6, head_size=40),
    AttnCase(scenario="mixed_fresh", kv_dtype="fp8_e4m3"),
    AttnCase(scenario="fresh_prefill", attention="noncausal", sliding_window=37),
)


@pytest.fixture
def invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    monkeypatch.delenv("XFV1_OPS", raising=False)


@pytest.fixture
def own_kernel(device: torch.device) -> None:
    if device.type == "cpu" and not device_of("cpu").interpreted:
        pytest.skip("needs Triton: test_bits_are_a_tokens_own_in_the_interpreter runs these")


def run(inputs: AttnInputs) -> Outcome:
    driver = drive(XFormersAttentionBackend, inputs.case, inputs.query.device, inputs.sinks)
    return driver.run(inputs)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((bits(one) == bits(other)).all())


@pytest.mark.usefixtures("own_kernel", "invariant")
@pytest.mark.parametrize("sample", CASES, ids=lambda case: case.id)
def test_a_requests_bits_are_the_same_alone(sample: AttnCase, device: torch.device) -> None:
    inputs = build_inputs(sample, device)
    together = run(inputs)
    starts = inputs.query_start_loc.tolist()
    for request in range(inputs.num_reqs):
        alone = run(select_requests(inputs, [request])).output
        assert same_bits(alone, together.output[starts[request] : starts[request + 1]])


@pytest.mark.usefixtures("own_kernel", "invariant")
@pytest.mark.parametrize("sample", CASES[:-1], ids=lambda case: case.id)
def test_a_requests_bits_are_the_same_in_two_steps(sample: AttnCase, device: torch.device) -> None:
    """The first token, then the rest: what was a prefill's token is a decode's."""
    inputs = build_inputs(sample, device)
    together = run(inputs).output
    starts = inputs.query_start_loc.tolist()
    cut = [request for request, query_len in enumerate(sample.query_lens) if query_len > 1]
    assert cut
    for request in cut:
        alone = select_requests(inputs, [request])
        before = run(first_tokens(alone, [1]))
        after = run(later_tokens(alone, [1], before.storage))
        steps = torch.cat([before.output, after.output])
        assert same_bits(steps, together[starts[request] : starts[request + 1]])


@pytest.mark.usefixtures("own_kernel", "invariant")
@pytest.mark.parametrize("sample", CASES, ids=lambda case: case.id)
def test_answers_are_right(sample: AttnCase, device: torch.device, record: Recorder) -> None:
    inputs = build_inputs(sample, device)
    outcome = run(inputs)
    record(check_output(inputs, outcome, expected(inputs, outcome.query)))


@pytest.mark.usefixtures("own_kernel")
def test_bits_differ_where_nobody_asked(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """What the tests above would see: in this batch the longest decides how keys are split."""
    monkeypatch.setenv("XFV1_OPS", "triton")
    inputs = build_inputs(AttnCase(scenario="deep_decode"), device)
    alone = run(select_requests(inputs, [0])).output
    assert not same_bits(alone, run(inputs).output[:1])


@pytest.mark.usefixtures("invariant")
def test_other_ops_are_refused(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    assert XFormersAttentionBackend.supports_batch_invariance()
    monkeypatch.setenv("XFV1_OPS", "torch,vllm_fa3,xformers_splitk")
    with pytest.raises(Refused, match=r"torch: .*its bits depend on what else is in the batch"):
        drive(XFormersAttentionBackend, CASES[0], device)


def test_bits_are_a_tokens_own_in_the_interpreter(device: torch.device, tmp_path: Path) -> None:
    if device.type == "cuda":
        pytest.skip("the GPU runs them")
    assert passed_in_interpreter(__file__, tmp_path) > len(CASES)
