"""Shared by all conformance tests: the fixtures, and how a refusal ends a test.

The fixtures have the names of `Trial`'s attributes, so that a trial can run a test without pytest.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fixtures.cases import AttnCase
from fixtures.inputs import AttnInputs
from tests.harness.driver import Driver
from tests.harness.trial import Trial
from tests.harness.truth import Truth, expected
from tests.harness.verdicts import Outcome, Refused


@pytest.fixture
def trial(candidate: Any, case: AttnCase, device: torch.device) -> Trial:
    """The candidate on the case: one object for all tests of the case, which follow each other."""
    return _trial(candidate, case, device)


@functools.lru_cache(maxsize=1)
def _trial(candidate: type[Any], case: AttnCase, device: torch.device) -> Trial:
    return Trial(candidate, case, device)


@pytest.fixture
def inputs(trial: Trial) -> AttnInputs:
    return trial.inputs


@pytest.fixture
def driver(trial: Trial) -> Driver:
    return trial.driver


@pytest.fixture
def outcome(trial: Trial) -> Outcome:
    return trial.outcome


@pytest.fixture
def written(trial: Trial) -> torch.Tensor:
    return trial.written


@pytest.fixture(scope="session")
def truth() -> Truth:
    """The reference, also for tests that draw their cases themselves and so have no trial."""
    return expected


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Any:
    with _refused_or_lost(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    with _refused_or_lost(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Any:
    result = yield
    _share_memory()
    return result


def _share_memory() -> None:
    """Free the GPU memory that PyTorch caches, if it is more than half of this worker's share."""
    if not torch.cuda.is_initialized():
        return
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    share = torch.cuda.get_device_properties().total_memory / workers
    if torch.cuda.memory_reserved() > share / 2:
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _refused_or_lost(item: pytest.Item) -> Iterator[None]:
    """A refusal skips the test with the candidate's reasons; a lost device ends the process."""
    try:
        yield
    except Refused as refusal:
        pytest.skip(f"refused: {refusal}")
    except RuntimeError as error:
        _leave_if_device_is_lost(item, error)
        raise


def _leave_if_device_is_lost(item: pytest.Item, error: RuntimeError) -> None:
    """End the process if its GPU is lost: after an illegal access nothing runs on it any more.

    An xdist worker then dies, so that its test alone fails and another worker takes the rest;
    a process of its own stops.
    """
    if "CUDA error" not in str(error):
        return
    sys.__stderr__.write(f"{item.nodeid}: {str(error).splitlines()[0]}\n")  # type: ignore[union-attr]
    if os.environ.get("PYTEST_XDIST_WORKER"):
        os._exit(3)
    pytest.exit(f"the GPU is lost to this process since {item.nodeid}", returncode=3)
