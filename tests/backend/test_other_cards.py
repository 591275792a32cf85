"""Does the own kernel give the reference's answer by the tilings, and the decoding of float8, that
other cards are given?

A GPU runs them too: any NVIDIA card with an H100's shared memory takes every other card's tilings.
Without a GPU these tests run once more in a process where Triton interprets the kernel.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fixtures.cases import AttnCase
from tests.backend.interpreted import passed_in_interpreter
from tests.backend.test_splits import DECODES, check_answer
from tests.cards.cards import CARDS
from xfv1.device import device_of
from xfv1.kernels.paged import device, launch

# One card for each way to tile that is not an H100's: no tensor cores, less shared memory,
# wavefronts of 64, few registers.
OTHERS = ("sm_75", "sm_86", "gfx942", "gfx1100")
# Programs that share a row's keys.
SPLITS = 3
PROMPTS: dict[str, Any] = DECODES | {"query_lens": (3, 5, 33)}
CASES = {
    "decodes": AttnCase(**DECODES),
    "prompts": AttnCase(**PROMPTS, head_size=128),
    "16 bits": AttnCase(**PROMPTS | {"dtype": "fp16"}, head_size=128),
    "large heads": AttnCase(**DECODES, head_size=320),
    "two parts": AttnCase(**PROMPTS | {"dtype": "fp16"}, head_size=192, sinks=True),
    "float8": AttnCase(**PROMPTS | {"dtype": "fp16"}, kv_dtype="fp8_e4m3", sliding_window=37),
    "float8 beside float32": AttnCase(**DECODES, kv_dtype="fp8_e4m3", head_size=80),
    "float8, e5m2": AttnCase(**DECODES, kv_dtype="fp8_e5m2"),
}


@pytest.fixture
def own_kernel(device: torch.device) -> None:
    if device.type == "cpu" and not device_of("cpu").interpreted:
        pytest.skip("needs Triton: test_other_cards_agree_in_the_interpreter runs these")


@pytest.mark.usefixtures("own_kernel")
@pytest.mark.parametrize("sample", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", OTHERS)
def test_another_cards_tilings_give_the_references_answer(
    name: str, sample: AttnCase, device: torch.device
) -> None:
    with mock.patch.object(launch, "device_of", return_value=CARDS[name].device):
        check_answer(sample, SPLITS, device)


@pytest.mark.usefixtures("own_kernel")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_float8_is_decoded_exactly(dtype: torch.dtype, device: torch.device) -> None:
    """All 256 bytes, bit for bit as PyTorch converts them: subnormal numbers and both zeros too.
    The two NaNs are NaN."""
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    decoded = decode(codes, dtype)
    expected = codes.view(torch.float8_e4m3fn).to(dtype)
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    nan = expected.isnan()
    assert nan.nonzero().flatten().tolist() == [0x7F, 0xFF]
    assert bool(decoded[nan].isnan().all())
    assert torch.equal(decoded.view(bits)[~nan], expected.view(bits)[~nan])


def decode(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bytes, decoded by the kernel's own function."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(codes, decoded, COUNT: tl.constexpr):
        at = tl.arange(0, COUNT)
        tl.store(decoded + at, device._widened(tl.load(codes + at), decoded.dtype.element_ty))

    decoded = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    kernel[(1,)](codes, decoded, codes.numel())
    return decoded


def test_other_cards_agree_in_the_interpreter(device: torch.device, tmp_path: Path) -> None:
    if device.type == "cuda":
        pytest.skip("the GPU runs them")
    assert passed_in_interpreter(__file__, tmp_path) > len(CASES) * len(OTHERS)
