"""Is the op that each card is given the one in the table, and does its library agree?"""

import pytest

from tests.cards.cards import CARDS
from tests.cards.picks import BATCHES, LAYERS, REFUSED, TABLE, case_of, picks, render
from tests.cards.support import MODULES, refused_by_library

pytestmark = pytest.mark.cpu

PICKS = picks()


def test_picks_are_those_of_the_table() -> None:
    """After a change that is meant: python -m tests.cards.picks > tests/cards/picks.txt"""
    assert render(PICKS) == TABLE.read_text()


def test_every_layer_is_served_on_every_card() -> None:
    """vLLM itself refuses bfloat16 before Ampere."""
    found = {op for rows in PICKS.values() for row in rows.values() for op in row.values()}
    assert REFUSED not in found
    assert found <= {*MODULES, "triton", "vllm_fa2", "vllm_fa3"}


@pytest.mark.parametrize("name", CARDS)
def test_a_picked_ops_library_serves_the_call(name: str) -> None:
    asked = {}
    for kind in LAYERS:
        for phase in BATCHES:
            op = PICKS[name][kind][phase]
            asked[kind, phase, op] = refused_by_library(
                op, case_of(kind, phase), phase, CARDS[name]
            )
    assert {cell: why for cell, why in asked.items() if why} == {}


@pytest.mark.parametrize(
    ("op", "name", "kind", "phase", "reason"),
    [
        ("xformers_cutlass", "sm_100", "fp32", "prefill", "too new"),
        ("xformers_cutlass", "sm_120", "fp16", "encoder", "too new"),
        ("xformers_fa2", "sm_75", "fp16", "prefill", "too old"),
        ("xformers_fa2", "sm_80", "fp32", "fresh", "dtype=torch.float32"),
        ("xformers_fa3", "sm_100", "fp16", "fresh", "too new"),
        ("xformers_splitk", "sm_75", "fp16", "decode", "too old"),
        ("xformers_splitk", "sm_80", "head 80", "decode", "Embed dim 80"),
        ("xformers_ck", "gfx942", "fp32", "fresh", "dtype=torch.float32"),
        ("xformers_cutlass", "sm_75", "bf16", "fresh", "bf16 is only supported on A100"),
        ("vllm_fa2", "sm_75", "fp16", "decode", "compute capability >= 8"),
        ("vllm_fa3", "sm_100", "fp16", "decode", "compute capability 9"),
        ("vllm_fa3", "sm_80", "fp16", "decode", "compute capability 9"),
    ],
)
def test_a_library_refuses_what_is_not_picked(
    op: str, name: str, kind: str, phase: str, reason: str
) -> None:
    """It would say so, if the table were wrong."""
    assert reason in refused_by_library(op, case_of(kind, phase), phase, CARDS[name])


def test_bounds_are_those_of_xformers_classes() -> None:
    """xfv1 and the installed xFormers state the same bounds of an op."""
    from xformers.ops import fmha

    from xfv1.ops.xformers.varlen import VARLEN_OPS

    for op in VARLEN_OPS:
        if "cuda" in op.devices:
            operator = getattr(fmha, op.module).FwOp
            last = operator.CUDA_MAXIMUM_COMPUTE_CAPABILITY or (99, 0)
            assert op.devices["cuda"] == (operator.CUDA_MINIMUM_COMPUTE_CAPABILITY, last)
            assert set(op.dtypes) <= operator.SUPPORTED_DTYPES
            assert op.max_head_size <= operator.SUPPORTED_MAX_K
