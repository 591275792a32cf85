"""What every conformance test shares: a case's inputs, a driver for it, and its refusal."""

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fixtures.cases import AttnCase
from fixtures.inputs import AttnInputs, Poison, build_inputs
from tests.harness.candidate import Driver, Outcome, Refused, drive
from tests.harness.oracle import reference_device


@functools.lru_cache(maxsize=2)
def _inputs(case: AttnCase, device: torch.device, poison: Poison) -> AttnInputs:
    return build_inputs(case, reference_device(case, device), poison)


@pytest.fixture
def inputs(case: AttnCase, device: torch.device) -> AttnInputs:
    """The case's inputs, poisoned as vLLM's contract allows."""
    return _inputs(case, device, Poison.CONTRACT)


@pytest.fixture
def driver(candidate: type[Any], case: AttnCase, device: torch.device) -> Driver:
    """The candidate set up for the case."""
    return drive(candidate, case, device)


@pytest.fixture
def outcome(candidate: Any, case: AttnCase, device: torch.device) -> Outcome:
    """The candidate's answer to the case: run once, looked at by several tests."""
    return _outcome(candidate, case, device)


@functools.lru_cache(maxsize=1)
def _outcome(candidate: type[Any], case: AttnCase, device: torch.device) -> Outcome:
    driver = drive(candidate, case, device)
    return driver.run(_inputs(case, device, Poison.CONTRACT))


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
    """Give back what PyTorch keeps for later where that is more than this worker's share."""
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
    """After an illegal access nothing runs any more on this process's GPU.

    An xdist worker then dies, so that its test alone fails and another worker takes the rest;
    a process of its own stops.
    """
    if "CUDA error" not in str(error):
        return
    sys.__stderr__.write(f"{item.nodeid}: {str(error).splitlines()[0]}\n")  # type: ignore[union-attr]
    if os.environ.get("PYTEST_XDIST_WORKER"):
        os._exit(3)
    pytest.exit(f"the GPU is lost to this process since {item.nodeid}", returncode=3)
