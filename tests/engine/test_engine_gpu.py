"""Does a real V1 engine on a GPU give, through xfv1, what it gives through vLLM's own backend?"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.models import MODELS
from tests.programs.same_tokens import FAULT, FAULTY_MODEL, JOBS, TIMEOUT, measure, problems

pytestmark = pytest.mark.gpu

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        pytest.skip("needs vLLM's build for a GPU")
    folder = tmp_path_factory.mktemp("engine")
    return dict(measure([*MODELS], folder, small=False, jobs=JOBS, timeout=TIMEOUT))


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_vllms_own_backend(results: Results, name: str) -> None:
    assert problems(results[name]) == []
    assert len(results[name]["runs"]) == 2 + (name == FAULTY_MODEL)


def test_one_lost_key_changes_the_tokens(results: Results) -> None:
    fault = results[FAULTY_MODEL]["runs"][FAULT]
    assert fault["identical"] < fault["answers"] / 2


def test_tokens_of_two_ranks_that_share_a_cache(tmp_path: Path) -> None:
    """Decode context parallelism, over NCCL."""
    if (found := torch.cuda.device_count()) < 2:
        pytest.skip(f"needs two GPUs: {found} found")
    measured = measure([FAULTY_MODEL], tmp_path, small=False, jobs=JOBS, timeout=TIMEOUT, ranks=2)
    ((_, result),) = measured
    assert problems(result) == []
    assert len(result["runs"]) == 3
