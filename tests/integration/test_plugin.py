"""Does vLLM find xfv1, choose it where it should, and hear why where it cannot serve?"""

import inspect
import pkgutil
import re
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

    from tests.harness.server import vllm_config

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


@pytest.mark.parametrize(
    ("group", "function"),
    [("vllm.platform_plugins", xfv1.announce), ("vllm.general_plugins", xfv1.register)],
)
def test_entry_points_name_what_vllm_runs(group: str, function: Any) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # vLLM selects plugins by their names, in all groups alike.
    assert project["entry-points"][group].keys() == {"xfv1"}
    assert pkgutil.resolve_name(project["entry-points"][group]["xfv1"]) is function


def test_no_platform_is_offered() -> None:
    xfv1.announce()
    assert inspect.signature(xfv1.announce).return_annotation is None


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


@pytest.mark.usefixtures("on_cpu")
def test_mla_on_a_cpu_runs_vllms_own_backend_and_says_so(
    enum: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from xfv1 import compat, cpu

    said: list[str] = []
    monkeypatch.setattr(compat, "log_once", lambda text, *args: said.append(text % args))
    monkeypatch.setenv("XFV1_CPU", "1")
    xfv1.register()
    names = [name for name in cpu.MLA if name in enum.__members__]
    assert names
    for name in names:
        assert enum[name].get_class() is resolve_obj_by_qualname(enum[name].value)
    assert said == [
        f"xfv1: this model's multi-head latent attention (MLA) runs on vLLM's own {name}. "
        "XFV1_CPU=1 has no effect on it."
        for name in names
    ]
    with pytest.raises(AttributeError, match="no attribute 'CPU_ATTN'"):
        cpu.CPU_ATTN  # noqa: B018


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
        pytest.param({"head_size": 513}, "head_size=513: expected 1 to 512", id="head size"),
        pytest.param(
            {"dtype": torch.float64},
            "dtype=float64: expected float16, bfloat16, float32",
            id="dtype",
        ),
        pytest.param(
            {"kv_cache_dtype": "int4_per_token_head"},
            "kv_cache_dtype='int4_per_token_head': expected auto, float16, ",
            id="cache",
        ),
        pytest.param(
            {"kv_cache_dtype": "bfloat16"},
            "kv_cache_dtype='bfloat16': expected the model's own dtype, float32, or fp8",
            id="cache of another dtype",
        ),
        pytest.param({"block_size": 24}, "block_size=24: expected a multiple", id="block size"),
        pytest.param({"use_mm_prefix": True}, "use_mm_prefix=True: expected False", id="images"),
        pytest.param({"use_mla": True}, "use_mla=True: expected False", id="MLA"),
        pytest.param({"use_sparse": True}, "use_sparse=True: expected False", id="sparse"),
    ],
)
def test_configuration_is_refused_with_the_value_and_what_is_accepted(
    facts: dict[str, Any], reason: str
) -> None:
    assert any(why.startswith(reason) for why in refusals(**facts))


def test_configuration_it_serves_is_not_refused() -> None:
    assert refusals() == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype='int8': expected auto, "),
        # The first step would fail otherwise: the default dtype is the model's, here float32.
        ({"kv_cache_dtype": "float16"}, "kv_cache_dtype='float16': expected the model's own"),
        ({"chunk_lookback": 1}, "chunk_lookback=1: expected -1"),
    ],
    ids=["quantized in another way", "of another dtype", "chunks"],
)
def test_a_layer_is_refused_when_it_is_made(arguments: dict[str, Any], reason: str) -> None:
    from xfv1.impl import XFormersImpl

    with pytest.raises(NotImplementedError, match=f"^{re.escape(reason)}"):
        XFormersImpl(8, 64, 0.125, 2, **arguments)


def test_a_layer_without_chunks_is_none_that_looks_back() -> None:
    from xfv1.impl import XFormersImpl

    assert XFormersImpl(8, 64, 0.125, 2, chunk_lookback=-1).num_heads == 8


@pytest.mark.parametrize(
    ("owner", "fact", "reason"),
    [
        ("model_config", "is_mm_prefix_lm", "its image tokens see each other"),
        ("cache_config", "kv_sharing_fast_prefill", "--kv-sharing-fast-prefill: expected a server"),
    ],
)
def test_a_server_that_vllm_asks_nobody_about_is_refused(
    monkeypatch: pytest.MonkeyPatch, owner: str, fact: str, reason: str
) -> None:
    """As on a CPU, whose platform asks a backend nothing."""
    from vllm.config import set_current_vllm_config

    from tests.harness.server import vllm_config
    from xfv1.impl import XFormersImpl

    config = vllm_config(8, 2, 64, "fp32", 32, "auto", None)
    holder = getattr(config, owner)
    computed = isinstance(getattr(type(holder), fact, None), property)
    monkeypatch.setattr(type(holder) if computed else holder, fact, True)
    with (
        set_current_vllm_config(config),
        pytest.raises(NotImplementedError, match=f"^xfv1: .*{reason}"),
    ):
        XFormersImpl(8, 64, 0.125, 2)
