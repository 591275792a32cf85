"""Ops asked for the LSE give the reference's, which merging parts of a context depends on.

Ops alone: a backend's forward returns none (docs/contract.md).
"""

import os
from pathlib import Path

import pytest
import torch

from fixtures.cases import AttnCase
from fixtures.cases.covering import covering_cases
from fixtures.cases.tables import work
from fixtures.inputs import build_inputs
from tests.harness.compare import check_lse
from tests.harness.environment import has_xformers
from tests.harness.truth import expected
from tests.harness.verdicts import Mismatch
from tests.integration.calls import whole_call
from tests.integration.interpreted import passed_in_interpreter
from xfv1.device import device_of
from xfv1.dispatch import OPS
from xfv1.ops.base import Call, Op

# On a GPU they are asked of all ops.
pytestmark = [pytest.mark.cpu, pytest.mark.gpu]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Multiplications that Triton's interpreter does in about a second.
INTERPRETABLE = 2e6

PLAIN = (
    AttnCase(scenario="edge_decode"),
    AttnCase(scenario="edge_decode", head_size=32, block_size=32),
    AttnCase(scenario="deep_decode", block_size=64),
    AttnCase(scenario="spec_uniform5"),
    AttnCase(scenario="mixed_small", sliding_window=17, dtype="bf16"),
    AttnCase(scenario="mixed_small", softcap=30.0),
    AttnCase(scenario="chunked_prefill", alibi=True),
    AttnCase(scenario="mixed_fresh", sinks=True),
    AttnCase(scenario="mixed_small", kv_dtype="fp8_e4m3"),
)
CASES = [
    *PLAIN,
    *(c for c in covering_cases("cpu") if not INTERPRETED or work(c) < INTERPRETABLE),
]


def _serving(call: Call) -> list[Op]:
    """The ops that would take a call on this device."""
    device = device_of(call.query.device.type)
    return [
        op for op in OPS.values() if not op.not_supported_reasons(call.layer, call.batch, device)
    ]


@pytest.mark.parametrize("sample", CASES, ids=lambda case: case.id)
def test_lse_is_the_references(sample: AttnCase, device: torch.device) -> None:
    """|lse - truth| within its budget for every (token, head), by each op that takes the case."""
    inputs = build_inputs(sample, device)
    truth = expected(inputs)
    ops = _serving(whole_call(inputs))
    assert ops
    for op in ops:
        call = whole_call(inputs)
        op.run(call)
        assert call.lse is not None
        try:
            check_lse(call.lse, truth)
        except Mismatch as mismatch:
            raise Mismatch(f"{op.name}: {mismatch}") from None


def test_every_op_that_runs_here_serves_a_case(device: torch.device) -> None:
    """None is left out for want of a case: a plain decode or prompt is some op's only kind."""
    asked = {op.name for case in PLAIN for op in _serving(whole_call(build_inputs(case, device)))}
    if device.type == "cpu":
        kernels = {"triton", "xformers_splitk"} if has_xformers() else {"triton"}
        assert asked == {"torch"} | (kernels if INTERPRETED else set())
    else:
        assert {"triton", "xformers_splitk"} <= asked


def _decodes(name: str, device: torch.device) -> Call:
    """A call for an op; the test is skipped where it takes none."""
    call = whole_call(build_inputs(AttnCase(scenario="small_decode"), device))
    if reasons := OPS[name].not_supported_reasons(call.layer, call.batch, device_of(device.type)):
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    return call


@pytest.mark.parametrize("sink", [None, 0.5, float("-inf")])
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_a_query_that_sees_no_key_gives_zeros(
    name: str, sink: float | None, device: torch.device
) -> None:
    """And an LSE of minus infinity, or of the sink: what merging it with other keys needs."""
    call = _decodes(name, device)
    call.phase.seq_lens = torch.zeros_like(call.phase.seq_lens)
    if sink is not None:
        call.sinks = torch.full(call.query.shape[1:2], sink, device=device)
    OPS[name].run(call)
    assert call.lse is not None
    lse = torch.full_like(call.lse, float("-inf") if sink is None else sink)
    assert torch.equal(call.out, torch.zeros_like(call.out))
    assert torch.allclose(call.lse, lse, rtol=1e-6)


@pytest.mark.parametrize("name", ["xformers_splitk", "vllm_fa3"])
def test_a_query_that_sees_no_key_weighs_nothing(name: str, device: torch.device) -> None:
    """Merged with the keys of another rank, of which it may have none here."""
    call = _decodes(name, device)
    call.phase.seq_lens = call.phase.seq_lens.clone()
    call.phase.seq_lens[1] = 0
    OPS[name].run(call)
    assert call.lse is not None
    empty = torch.arange(len(call.lse), device=device) == 1
    assert torch.equal(call.lse == float("-inf"), empty[:, None].expand_as(call.lse))
    assert call.out.isfinite().all()


def test_kernels_give_it_in_the_interpreter(device: torch.device, tmp_path: Path) -> None:
    if device.type == "cuda":
        pytest.skip("the GPU runs them")
    assert passed_in_interpreter(__file__, tmp_path) > len(PLAIN)
