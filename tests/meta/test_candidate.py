"""Is a candidate asked for what vLLM would ask of it, and no more?"""

from typing import Any

import pytest
import torch

from fixtures.cases import AttnCase
from fixtures.inputs import build_inputs
from fixtures.inputs.transforms import as_captured
from tests.harness.driver import Driver, drive
from tests.harness.verdicts import Refused
from xfv1.backend import XFormersAttentionBackend

CPU = torch.device("cpu")
SINGLE, DRAFTS = AttnCase(scenario="small_decode"), AttnCase(scenario="spec_uniform5")


def driven(case: AttnCase, support: str, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """xfv1's driver, whose builder says that it can be captured so far."""
    from vllm.v1.attention.backend import AttentionCGSupport

    driver = drive(XFormersAttentionBackend, case, CPU)
    monkeypatch.setattr(type(driver.builder), "_cudagraph_support", AttentionCGSupport[support])
    return driver


@pytest.mark.parametrize(
    ("sample", "support"),
    [
        (SINGLE, "ALWAYS"),
        (DRAFTS, "ALWAYS"),
        (SINGLE, "UNIFORM_BATCH"),
        (DRAFTS, "UNIFORM_BATCH"),
        (SINGLE, "UNIFORM_SINGLE_TOKEN_DECODE"),
    ],
)
def test_batches_are_captured_as_far_as_the_builder_says(
    sample: AttnCase, support: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the builder's own method for that."""
    driver = driven(sample, support, monkeypatch)
    given: list[Any] = []
    monkeypatch.setattr(driver.builder, "build_for_cudagraph_capture", given.append)
    driver.metadata_to_capture(as_captured(build_inputs(sample, CPU)))
    (common,) = given
    assert common.max_query_len == 1 + sample.drafts
    # A graph serves requests as long as the model takes.
    assert common.max_seq_len == driver.config.model_config.max_model_len
    assert not common.is_prefilling.any()


@pytest.mark.parametrize(
    ("sample", "support"),
    [(SINGLE, "NEVER"), (DRAFTS, "NEVER"), (DRAFTS, "UNIFORM_SINGLE_TOKEN_DECODE")],
)
def test_batches_are_captured_no_further(
    sample: AttnCase, support: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = driven(sample, support, monkeypatch)
    with pytest.raises(Refused, match=f"CUDA graphs: {support}"):
        driver.metadata_to_capture(build_inputs(sample, CPU))
