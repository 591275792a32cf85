"""Does vLLM find xfv1, choose it where it should, and hear why where it cannot serve?"""

import inspect
import pkgutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import xfv1

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def enum(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """vLLM's backends; what a test registers is undone, but for new names."""
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends import registry

    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", dict(registry._ATTN_OVERRIDES))
    monkeypatch.delenv("XFV1_CPU", raising=False)
    monkeypatch.delenv("XFV1_OPS", raising=False)
    selector._cached_get_attn_backend.cache_clear()
    yield registry.AttentionBackendEnum
    selector._cached_get_attn_backend.cache_clear()


def selected() -> type[Any]:
    """The backend that vLLM's platform chooses for a layer."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    from tests.harness.candidate import vllm_config

    with set_current_vllm_config(vllm_config(8, 2, 64, "fp32", 32, "auto", None)):
        backend: type[Any] = get_attn_backend(64, torch.float32, "auto")
    return backend


def refusals(**facts: Any) -> list[str]:
    """What the backend says of a layer of 64 and float32, but for the facts given."""
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backend import AttentionType

    from xfv1.backend import XFormersAttentionBackend

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    asked: dict[str, Any] = {
        "head_size": 64,
        "dtype": torch.float32,
        "kv_cache_dtype": "auto",
        "block_size": 16,
        "device_capability": DeviceCapability(*capability),
        "attn_type": AttentionType.DECODER,
        **facts,
    }
    validate = XFormersAttentionBackend.validate_configuration
    for name, parameter in inspect.signature(validate).parameters.items():
        if parameter.default is parameter.empty:
            asked.setdefault(name, False)
    reasons: list[str] = validate(**asked)
    return reasons


@pytest.fixture
def on_cpu() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("needs vLLM's build for CPUs")


def test_entry_point_names_register() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (entry_point,) = project["entry-points"]["vllm.general_plugins"].values()
    assert pkgutil.resolve_name(entry_point) is xfv1.register


def test_import_loads_neither_torch_nor_vllm() -> None:
    code = "import sys, xfv1; print(*{'torch', 'vllm', 'xformers', 'triton'} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_register_makes_custom_and_its_own_name_known(enum: Any) -> None:
    from xfv1.backend import XFormersAttentionBackend

    xfv1.register()
    assert enum.CUSTOM.get_class() is XFormersAttentionBackend
    if hasattr(enum, "register"):
        assert enum[xfv1.NAME].get_class() is XFormersAttentionBackend
        assert xfv1.registered_name() == xfv1.NAME
    else:
        assert xfv1.registered_name() == "CUSTOM"


def test_users_can_name_it(enum: Any) -> None:
    from vllm.config import AttentionConfig

    xfv1.register()
    for name in {"CUSTOM", xfv1.registered_name()}:
        assert AttentionConfig(backend=name).backend is enum[name]


def test_register_is_idempotent(enum: Any) -> None:
    from vllm.v1.attention.backends import registry

    xfv1.register()
    once = dict(registry._ATTN_OVERRIDES), list(enum.__members__)
    xfv1.register()
    assert (registry._ATTN_OVERRIDES, list(enum.__members__)) == once


def test_backend_is_called_by_a_name_vllm_knows(enum: Any) -> None:
    from xfv1.backend import XFormersAttentionBackend

    xfv1.register()
    assert XFormersAttentionBackend.get_name() in enum.__members__


@pytest.mark.usefixtures("on_cpu", "enum")
def test_cpu_platform_keeps_its_own_backend() -> None:
    xfv1.register()
    assert selected().get_name() == "CPU_ATTN"


@pytest.mark.usefixtures("on_cpu", "enum")
def test_cpu_platform_takes_xfv1_where_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from xfv1.backend import XFormersAttentionBackend

    monkeypatch.setenv("XFV1_CPU", "1")
    xfv1.register()
    assert selected() is XFormersAttentionBackend


def test_unknown_op_is_answered_with_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from xfv1.dispatch import OPS
    from xfv1.impl import XFormersImpl

    monkeypatch.setenv("XFV1_OPS", "torch,splitk")
    with pytest.raises(ValueError, match="'splitk'") as raised:
        XFormersImpl(8, 64, 0.125, 2)
    assert all(name in str(raised.value) for name in OPS)


def test_layer_no_op_serves_is_refused_with_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    from xfv1.impl import XFormersImpl

    monkeypatch.setenv("XFV1_OPS", "xformers_splitk")
    # Split-K serves no prefills, whatever the device.
    (reason,) = refusals()
    assert "no op serves prefill: xformers_splitk: " in reason
    with pytest.raises(NotImplementedError, match="no op serves prefill: xformers_splitk: "):
        XFormersImpl(8, 64, 0.125, 2)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        pytest.param({"head_size": 513}, "head_size", id="head size"),
        pytest.param({"dtype": torch.float64}, "dtype", id="dtype"),
        pytest.param({"kv_cache_dtype": "int4_per_token_head"}, "kv_cache_dtype", id="cache"),
        pytest.param({"block_size": 24}, "block_size", id="block size"),
        pytest.param({"use_mla": True}, "MLA", id="MLA"),
        pytest.param({"use_sparse": True}, "sparse", id="sparse"),
    ],
)
def test_configuration_is_refused_with_reasons(facts: dict[str, Any], reason: str) -> None:
    assert any(reason in why for why in refusals(**facts))


def test_configuration_it_serves_is_not_refused() -> None:
    assert refusals() == []


def test_impl_refuses_caches_quantized_in_other_ways() -> None:
    from xfv1.impl import XFormersImpl

    with pytest.raises(NotImplementedError, match="kv_cache_dtype='int8'"):
        XFormersImpl(8, 64, 0.125, 2, kv_cache_dtype="int8")
