"""Which vLLM does xfv1 take: those tested in silence, newer ones with a warning, older ones not?"""

import logging
from collections.abc import Iterator

import pytest

import xfv1
from xfv1 import compat

pytestmark = pytest.mark.cpu


@pytest.fixture
def log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.LogCaptureFixture]:
    """What xfv1 logs, whether vLLM's loggers propagate to pytest's or not."""
    logger = logging.getLogger("vllm.xfv1")
    logger.addHandler(caplog.handler)
    monkeypatch.setattr(logger, "propagate", False)
    caplog.set_level(logging.WARNING, logger=logger.name)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    compat.check_version.cache_clear()
    yield
    compat.check_version.cache_clear()


@pytest.mark.parametrize(
    "version", ["0.26.0", "0.26.1rc2.dev3+g1a2b3c", "0.29.1", "0.33.0", "0.33.2+cu130"]
)
def test_tested_version_is_taken(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture, version: str
) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    compat.check_version()
    assert log.messages == []


@pytest.mark.parametrize("version", ["0.34.0", "0.34.0rc1", "1.0.0", "0.1.dev9+g1a2b3c", "dev"])
def test_untested_version_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture, version: str
) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    compat.check_version()
    compat.check_version()
    (message,) = log.messages
    assert message == f"xfv1 is tested with vLLM 0.26 to 0.33, not with vLLM {version}"


@pytest.mark.parametrize("version", ["0.25.2", "0.9.0", "0.11.0rc1"])
def test_old_version_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"needs vLLM 0\.26 to 0\.33, found vLLM {version}"):
            xfv1.register()


def test_layouts_are_vllms_own_where_it_has_them() -> None:
    """An enum of the same names is no layout to vLLM from 0.29 on."""
    from vllm.v1 import kv_cache_interface

    layouts = compat.kv_cache_layouts()
    assert len(layouts) == len(compat.LAYOUTS)
    own = getattr(kv_cache_interface, "KVCacheLayout", None)
    assert own is None or all(isinstance(layout, own) for layout in layouts)
