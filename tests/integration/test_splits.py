"""Cut over several programs, or in two parts of a head, does the own kernel give the same answer?

Short contexts are not split by themselves, and long ones take Triton's interpreter too long.
Without a GPU these tests run once more in a process where Triton interprets the kernel.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.cases import AttnCase
from fixtures.inputs import build_inputs
from tests.harness.compare import check_lse, check_output
from tests.harness.memory import new_output
from tests.harness.truth import expected, written_cache
from tests.harness.verdicts import Outcome
from tests.integration import sanitize
from tests.integration.interpreted import passed_in_interpreter
from xfv1.device import device_of

DECODES: dict[str, Any] = {
    "query_lens": (1, 1, 1), "seq_lens": (70, 5, 33), "num_heads": 4, "num_kv_heads": 2,
    "dtype": "fp32",
}  # fmt: skip
CASES = {
    "plain": AttnCase(**DECODES),
    "windows": AttnCase(**DECODES, sliding_window=37),
    "sinks": AttnCase(**DECODES, sinks=True),
    "fp8": AttnCase(**DECODES, kv_dtype="fp8_e4m3"),
    "padded": AttnCase(**DECODES, head_size=80),
    "two parts": AttnCase(**DECODES, head_size=192),
    "prompts": AttnCase(**DECODES | {"query_lens": (3, 5, 33)}),
}
# One, several, and more than there are tiles, or that the merge loads at a time.
SPLITS = (1, 3, 20)


@pytest.fixture
def own_kernel(device: torch.device) -> None:
    if device.type == "cpu" and not device_of("cpu").interpreted:
        pytest.skip("needs Triton: test_splits_agree_in_the_interpreter runs these")


@pytest.mark.usefixtures("own_kernel")
@pytest.mark.parametrize("num_splits", SPLITS)
@pytest.mark.parametrize("name", CASES)
def test_any_number_of_splits_gives_the_references_answer(
    name: str, num_splits: int, device: torch.device
) -> None:
    check_answer(CASES[name], num_splits, device)


@pytest.mark.usefixtures("own_kernel")
def test_more_splits_than_are_merged_at_a_time(device: torch.device) -> None:
    check_answer(AttnCase(**DECODES | {"seq_lens": (640, 65, 350), "num_heads": 2}), 20, device)


@pytest.mark.usefixtures("own_kernel")
def test_what_a_sanitizer_is_shown_is_right() -> None:
    """One case of it: whole, cut over programs, batch invariant."""
    assert sanitize.main(["--part", "4/201"]) == 0


def check_answer(case: AttnCase, num_splits: int, device: torch.device) -> None:
    from xfv1.kernels.paged.launch import paged_attention

    inputs = build_inputs(case, device)
    cache, storage = written_cache(inputs)
    key_cache, value_cache = inputs.split_cache(cache)
    output = new_output(inputs)
    # Head after head: a row of it is not what lies side by side.
    lse = torch.full((case.num_heads, case.num_tokens), float("nan"), device=device).t()
    paged_attention(
        inputs.query,
        key_cache,
        value_cache,
        out=output,
        block_table=inputs.block_table,
        seq_lens=inputs.seq_lens,
        query_start_loc=inputs.query_start_loc,
        max_query_len=max(case.query_lens),
        max_seq_len=max(case.seq_lens),
        scale=inputs.scale,
        # vLLM spells "none" both ways.
        sliding_window=case.sliding_window or 0,
        sinks=inputs.sinks,
        k_scale=torch.tensor([inputs.k_scale], device=device) if case.quantized else None,
        v_scale=torch.tensor([inputs.v_scale], device=device) if case.quantized else None,
        lse=lse,
        num_splits=num_splits,
    )
    truth = expected(inputs)
    check_output(inputs, Outcome(output, storage), truth)
    check_lse(lse, truth)


def test_splits_agree_in_the_interpreter(device: torch.device, tmp_path: Path) -> None:
    if device.type == "cuda":
        pytest.skip("the GPU runs them")
    assert passed_in_interpreter(__file__, tmp_path) > len(CASES) * len(SPLITS)
