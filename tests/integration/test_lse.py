"""Ops asked for the LSE give the reference's, which merging parts of a context depends on.

Ops alone: a backend's forward returns none (docs/contract.md).
"""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.cases import AttnCase
from fixtures.covering import covering_cases
from fixtures.inputs import TORCH_DTYPES, AttnInputs, build_inputs
from fixtures.tables import work
from tests.harness.candidate import Mismatch
from tests.harness.compare import check_lse
from tests.harness.oracle import expected, written_cache
from tests.meta.runs import run_once
from xfv1.dispatch import OPS
from xfv1.ops.base import DECODE, ENCODER, PREFILL, Batch, Call, Layer, Op, device_of

# On a GPU they are asked of all ops.
pytestmark = [
    pytest.mark.cpu,
    pytest.mark.gpu,
    pytest.mark.long,
    # NumPy, which interprets Triton, warns where a GPU gives an infinity.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

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


def _call(inputs: AttnInputs) -> Call:
    """The whole batch in one call, as one phase."""
    case = inputs.case
    dtype = TORCH_DTYPES[case.dtype]
    encoder, rows = case.attention == "encoder", slice(case.num_tokens)
    longest = max(case.query_lens)
    cache = written_cache(inputs)[0]
    caches = (None, None) if encoder else inputs.split_cache(cache)
    own = case.attention != "cross"
    scales: dict[str, Any] = {
        name: torch.tensor([getattr(inputs, name)], device=inputs.query.device)
        for name in ("k_scale", "v_scale")
    }
    return Call(
        layer=Layer(
            num_heads=case.num_heads,
            num_kv_heads=case.num_kv_heads,
            head_size=case.head_size,
            dtype=dtype,
            kv_dtype=dtype if case.kv_dtype == "auto" else TORCH_DTYPES[case.kv_dtype],
            block_size=0 if encoder else case.block_size,
            sliding_window=case.sliding_window,
            softcap=case.softcap,
            alibi=case.alibi,
            alibi_sqrt=case.alibi_sqrt,
            sinks=case.sinks,
            causal=case.causal,
        ),
        batch=Batch(
            ENCODER if encoder else DECODE if len(set(case.query_lens)) == 1 else PREFILL,
            num_reqs=inputs.num_reqs,
            max_query_len=longest,
            max_seq_len=max(case.seq_lens),
            uniform=len({*case.query_lens, *(0,) * case.pad_reqs}) == 1,
            fresh=encoder,
            token_major=cache.stride(0) == cache.stride(2) * case.block_size,
            lse=True,
        ),
        query=inputs.query[rows],
        key=inputs.key[rows] if own else None,
        value=inputs.value[rows] if own else None,
        key_cache=caches[0],
        value_cache=caches[1],
        out=torch.empty_like(inputs.query[rows]),
        query_start_loc=inputs.query_start_loc,
        seq_lens=inputs.seq_lens,
        block_table=inputs.block_table,
        query_start_loc_cpu=inputs.query_start_loc.cpu(),
        seq_lens_cpu=inputs.seq_lens.cpu(),
        scale=inputs.scale,
        alibi_slopes=inputs.alibi_slopes,
        sinks=inputs.sinks,
        lse=torch.full((case.num_tokens, case.num_heads), float("nan"), device=inputs.query.device),
        **scales,
    )


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
    ops = _serving(_call(inputs))
    assert ops
    for op in ops:
        call = _call(inputs)
        op.run(call)
        assert call.lse is not None
        try:
            check_lse(call.lse, truth)
        except Mismatch as mismatch:
            raise Mismatch(f"{op.name}: {mismatch}") from None


def test_every_op_that_runs_here_serves_a_case(device: torch.device) -> None:
    """None is left out for want of a case: a plain decode or prompt is some op's only kind."""
    asked = {op.name for case in PLAIN for op in _serving(_call(build_inputs(case, device)))}
    if device.type == "cpu":
        assert asked == ({"torch", "triton", "xformers_splitk"} if INTERPRETED else {"torch"})
    else:
        assert {"triton", "xformers_splitk"} <= asked


@pytest.mark.skipif(INTERPRETED, reason="this is the run it starts")
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's kernels run on the GPU itself")
def test_triton_kernels_give_it_in_the_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests above, in a process of its own: Triton looks at its environment once."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    run = run_once(tmp_path, "tests/integration/test_lse.py", "-p", "no:xdist")
    assert run.status == 0, run.output
    assert re.search(r"= \d+ passed, 1 skipped", run.output), run.output


@pytest.mark.parametrize("sink", [None, 0.5, float("-inf")])
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_a_query_that_sees_no_key_gives_zeros(
    name: str, sink: float | None, device: torch.device
) -> None:
    """And an LSE of minus infinity, or of the sink: what merging it with other keys needs."""
    call = _call(build_inputs(AttnCase(scenario="small_decode"), device))
    if reasons := OPS[name].not_supported_reasons(call.layer, call.batch, device_of(device.type)):
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    call.seq_lens = torch.zeros_like(call.seq_lens)
    if sink is not None:
        call.sinks = torch.full(call.query.shape[1:2], sink, device=device)
    OPS[name].run(call)
    assert call.lse is not None
    lse = torch.full_like(call.lse, float("-inf") if sink is None else sink)
    assert torch.equal(call.out, torch.zeros_like(call.out))
    assert torch.allclose(call.lse, lse, rtol=1e-6)
