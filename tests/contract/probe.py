"""What xfv1 does with the vLLM that this process imports, as JSON: one section to a function.

    PYTHONPATH=<sources> python -m tests.contract.probe --report report.json

No section asserts anything: `test_contract` does. One that raises reports its traceback.
"""

import argparse
import contextlib
import functools
import importlib
import inspect
import json
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

from tests.harness.environment import prepare

prepare()

import torch  # noqa: E402

import xfv1  # noqa: E402
from fixtures.cases import AttnCase  # noqa: E402

BASE = AttnCase(scenario="mixed_small")
# Batches beside those in each layout that the version has.
CASES = {
    "decodes": AttnCase(scenario="small_decode"),
    "fresh prefills": AttnCase(scenario="fresh_prefill"),
    "padding": BASE.replace(pad_tokens=3),
    "sliding window": BASE.replace(sliding_window=17),
    "softcap": BASE.replace(softcap=30.0),
    "alibi": BASE.replace(alibi=True),
    "alibi sqrt": BASE.replace(alibi=True, alibi_sqrt=True),
    "sinks": BASE.replace(sinks=True),
    "fp8": BASE.replace(kv_dtype="fp8_e4m3"),
    "shared layer": BASE.replace(kv_sharing=True),
    "noncausal": BASE.replace(attention="noncausal"),
}
WRAPPED = {
    "encoder": AttnCase(scenario="fresh_prefill", attention="encoder"),
    "cross": BASE.replace(attention="cross"),
}
NUM_BLOCKS = 5
CUDA = ((7, 5), (8, 0), (9, 0), (10, 0))
# What a selector may ask of a layer of 64 in half precision, and xfv1 serves on every card.
SERVED: dict[str, dict[str, Any]] = {
    "plain": {},
    "head size 80": {"head_size": 80},
    "block size 32": {"block_size": 32},
    "sliding window": {"has_sliding_window": True},
    "sinks": {"has_sink": True},
    "noncausal": {"use_non_causal": True},
    "encoder": {"attn_type": "encoder_only"},
    "cross": {"attn_type": "encoder_decoder"},
    "KV connector": {"use_kv_connector": True},
    "batch invariance": {"use_batch_invariant": True},
}
# What it must refuse, where the version asks.
REFUSED: dict[str, dict[str, Any]] = {
    "head size 513": {"head_size": 513},
    "block size 24": {"block_size": 24},
    "cache": {"kv_cache_dtype": "int8_per_token_head"},
    "cache of another dtype": {"kv_cache_dtype": "bfloat16"},
    "MLA": {"use_mla": True},
    "sparse": {"use_sparse": True},
    "per-head scales": {"use_per_head_quant_scales": True},
    "multimodal prefix": {"use_mm_prefix": True},
    "PCP": {"use_pcp": True},
    "adaptive verification": {"use_adaptive_verification": True},
    "R-SWA": {"use_rswa": True},
}


def vllm() -> dict[str, Any]:
    """Which vLLM this is."""
    import vllm

    return {"version": vllm.__version__, "file": vllm.__file__}


def registration() -> dict[str, Any]:
    """What vLLM's registry says of xfv1 once, and once more, registered."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    xfv1.register()
    once = sorted(AttentionBackendEnum.__members__)
    xfv1.register()
    backend = _backend()
    names = {"CUSTOM", "CPU_ATTN", backend.get_name()}
    return {
        "takes names": hasattr(AttentionBackendEnum, "register"),
        "name": backend.get_name(),
        "classes": {name: _path(AttentionBackendEnum[name].get_class()) for name in names},
        "repeatable": sorted(AttentionBackendEnum.__members__) == once,
        "pickled": {name: _pickled(AttentionBackendEnum[name]) for name in names},
    }


def _pickled(member: Any) -> str:
    """The name of a member of vLLM's enum after its way into another process."""
    done = subprocess.run(
        [sys.executable, "-c", "import pickle, sys; print(pickle.load(sys.stdin.buffer).name)"],
        input=pickle.dumps(member),
        stdout=subprocess.PIPE,
        check=True,
    )
    return done.stdout.decode().split()[-1]


def abstract() -> dict[str, list[str]]:
    """Abstract methods that are left, by class."""
    classes = (_backend(), _backend().get_impl_cls(), _backend().get_builder_cls())
    return {_path(cls): sorted(cls.__abstractmethods__) for cls in classes}


def signatures() -> dict[str, list[str]]:
    """Calls that vLLM's declarations allow and xfv1's methods do not take, by class.

    Declared by the base classes; and, for what they leave undeclared, by FLASH_ATTN's impl.
    """
    from vllm.v1.attention import backend
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    ours = _backend()
    impl, builder = ours.get_impl_cls(), ours.get_builder_cls()
    flash = ("__init__", "do_kv_cache_update", "forward", "process_weights_after_loading")
    return {
        "backend": _refused_calls(backend.AttentionBackend, ours),
        "impl": _refused_calls(backend.AttentionImpl, impl),
        "builder": _refused_calls(backend.AttentionMetadataBuilder, builder),
        "FLASH_ATTN": _refused_calls(FlashAttentionImpl, impl, flash),
    }


def _refused_calls(declaring: type[Any], ours: type[Any], names: tuple[str, ...] = ()) -> list[str]:
    refused = []
    for name in names or dir(declaring):
        declared, defined = getattr(declaring, name), getattr(ours, name, None)
        own = name == "__init__" or not name.startswith("__")
        if not own or not inspect.isroutine(declared) or _function(declared) is _function(defined):
            continue
        if why := _refused_call(declared, defined):
            refused.append(f"{name}{inspect.signature(declared)}: {why}")
    return refused


def _function(method: Any) -> Any:
    return getattr(method, "__func__", method)


def _refused_call(declared: Any, defined: Any) -> str:
    """Why a method does not take what another declares: by position, by name, the least."""
    if defined is None:
        return "not defined"
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = [
        p for p in inspect.signature(declared).parameters.values() if p.kind not in variable
    ]
    names = [p.name for p in parameters]
    required = [p.name for p in parameters if p.default is p.empty]
    calls: list[tuple[list[str], list[str]]] = [(names, []), ([], names), (required, [])]
    for positional, keywords in calls:
        try:
            bound = inspect.signature(defined).bind(*positional, **{n: n for n in keywords})
        except TypeError as error:
            return str(error)
        given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        if astray := [n for n in (*positional, *keywords) if given.get(n, n) != n]:
            return f"{', '.join(astray)} in another place"
    return ""


def layouts() -> dict[str, Any]:
    """The cache as this vLLM views it, in each layout that xfv1 declares, the preferred first.

    "views": shape of a layer's view, and its axes by stride, the largest first. "every": the
    layouts there are.
    """
    from vllm.v1.attention.backend import AttentionBackend

    if hasattr(AttentionBackend, "get_kv_cache_shape"):
        return _stated_layouts()
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts
    from vllm.v1.kv_cache_interface import (
        KVCacheLayout,
        KVCacheTensor,
        compute_layout_strides,
        create_kv_cache_views,
    )

    spec = _spec()
    views = {}
    supported = get_supported_kv_cache_layouts([_backend()])
    for layout in supported:
        layers, blocks, *_ = compute_layout_strides(spec, NUM_BLOCKS, 2, layout)
        size = 2 * NUM_BLOCKS * spec.page_size_bytes
        facts = {
            "size": size,
            "layers": ["0", "1"],
            "shared_by": ["0", "1"],
            "offset": 0,
            "layer_stride": layers,
            "block_stride": blocks,
        }
        tensor = KVCacheTensor(**_known(KVCacheTensor, facts))
        raw = torch.zeros(size, dtype=torch.int8)
        _, view = create_kv_cache_views(raw, spec, NUM_BLOCKS, layout, tensor)
        views[layout.name] = _described(view)
    return {"views": views, "every": [layout.name for layout in KVCacheLayout]}


def _stated_layouts() -> dict[str, Any]:
    """The same where the backend states its cache's shape and stride order."""
    from vllm.v1.attention.backends import utils
    from vllm.v1.worker.gpu.attn_utils import _reshape_attention_kv_cache

    backend, spec = _backend(), _spec()
    shape = backend.get_kv_cache_shape(
        NUM_BLOCKS, BASE.block_size, BASE.num_kv_heads, BASE.head_size, cache_dtype_str="auto"
    )
    views, layered, strided = {}, {}, {}
    for setting in ("NHD", "HND"):
        utils.set_kv_cache_layout(setting)
        raw = torch.zeros(NUM_BLOCKS * spec.page_size_bytes, dtype=torch.int8)
        order = backend.get_kv_cache_stride_order()
        view = _reshape_attention_kv_cache(raw, spec, shape, order, NUM_BLOCKS, None)
        views["L" + "".join("BHNC"[axis] for axis in order)] = _described(view)
        order = backend.get_kv_cache_stride_order(include_num_layers_dimension=True)
        layered[setting] = "".join("LBHNC"[axis] for axis in order)
        strided[setting] = backend.indexes_kv_by_block_stride()
    utils.set_kv_cache_layout(None)
    return {
        "views": views,
        "every": ["LBNHC", "LBHNC"],
        "layered": layered,
        "indexes_kv_by_block_stride": strided,
        "block_dim": backend.get_kv_cache_block_dim(16, 2, 64),
    }


def _described(view: torch.Tensor) -> dict[str, Any]:
    axes = sorted("BHNC", key=lambda axis: -view.stride("BHNC".index(axis)))
    return {"shape": list(view.shape), "axes": "".join(axes)}


def batches() -> dict[str, str]:
    """Batches through this version's own `Attention` layer, against the reference.

    By name: "" for one within its budget, else what is wrong.
    """
    cases = {f"layout {name}": BASE.replace(kv_layout=name) for name in layouts()["views"]} | CASES
    judged = {name: _judged(case, _run_layer) for name, case in cases.items()}
    return judged | {name: _judged(case, _run_impl) for name, case in WRAPPED.items()}


def _judged(case: AttnCase, run: Callable[[Any, Any], Any]) -> str:
    from fixtures.inputs import build_inputs
    from tests.harness.compare import check_cache, check_output
    from tests.harness.driver import drive
    from tests.harness.truth import expected, written_cache
    from tests.harness.verdicts import Mismatch, Refused

    inputs = build_inputs(case)
    try:
        outcome = run(drive(_backend(), case, torch.device("cpu")), inputs)
        check_output(inputs, outcome, expected(inputs))
        check_cache(inputs, outcome, written_cache(inputs)[1])
    except (Mismatch, Refused) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _run_impl(driver: Any, inputs: Any) -> Any:
    return driver.run(inputs)


def _run_layer(driver: Any, inputs: Any) -> Any:
    """A step through the layer's forward: vLLM's own ops call the impl."""
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context

    from tests.harness.verdicts import Outcome

    layer, config, case = driver.layer, driver.config, inputs.case
    layer.kv_cache, storage = inputs.new_cache()
    metadata = {layer.layer_name: driver.metadata(inputs)}
    slots = {layer.layer_name: inputs.slot_mapping[: case.num_tokens]}
    with (
        set_current_vllm_config(config),
        set_forward_context(metadata, config, num_tokens=case.num_tokens, slot_mapping=slots),
    ):
        output = layer(*(getattr(inputs, name).flatten(1) for name in ("query", "key", "value")))
    return Outcome(output.view(-1, case.num_heads, case.head_size), storage)


def builder() -> dict[str, Any]:
    """What the builder makes of a mixed batch, in each way vLLM asks it to."""
    from fixtures.inputs import build_inputs
    from tests.harness.batch import common_metadata
    from tests.harness.driver import drive

    inputs = build_inputs(BASE)
    driver = drive(_backend(), BASE, torch.device("cpu"))
    common = common_metadata(inputs)
    built = driver.metadata(inputs)
    table, slots = inputs.block_table + 1, inputs.slot_mapping + 1
    updated = driver.builder.update_block_table(built, table, slots)
    made = {
        "build": built,
        "capture": driver.builder.build_for_cudagraph_capture(common),
        "drafting": driver.builder.build_for_drafting(common_attn_metadata=common, draft_index=0),
        "update_block_table": updated,
        "unpadded": driver.builder.build(0, common.unpadded(BASE.num_tokens, inputs.num_reqs)),
    }
    support = driver.builder.get_cudagraph_support(driver.config, _spec())
    return {
        "cudagraph support": support.name,
        # The table is a view of the memory that vLLM gave.
        "updated": updated.block_table.data_ptr() == table.data_ptr()
        and torch.equal(updated.block_table, table)
        and updated.slot_mapping is slots,
        "phases": {
            name: [(p.batch.kind, p.batch.num_reqs) for p in metadata.phases]
            for name, metadata in made.items()
        },
    }


def context_parallelism() -> str:
    """What this version's own check says of xfv1's layer where decodes are shared out (DCP)."""
    from vllm.v1.worker.cp_utils import check_attention_cp_compatibility

    from tests.harness.driver import drive

    config = SimpleNamespace(
        compilation_config=drive(_backend(), BASE, torch.device("cpu")).config.compilation_config,
        parallel_config=SimpleNamespace(
            prefill_context_parallel_size=1,
            decode_context_parallel_size=2,
            cp_kv_cache_interleave_size=1,
        ),
        speculative_config=None,
    )
    try:
        check_attention_cp_compatibility(config)
    except AssertionError as error:
        return str(error)
    return ""


def cpu_selection() -> str:
    """The backend of a layer for which this version's selector chose, where CPU_ATTN is xfv1."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention

    from tests.harness.server import vllm_config

    config = vllm_config(8, 2, 64, "fp32", 16, "auto", None)
    with set_current_vllm_config(config):
        layer = Attention(8, 64, 0.125, 2, prefix="model.layers.7.self_attn.attn")
    return _path(layer.get_attn_backend())


def gpu_selection() -> dict[str, Any]:
    """What each platform's own `get_attn_backend_cls` answers, by device: a class or an error."""
    asked: dict[str, Callable[[], Any]] = {
        f"cuda {major}.{minor}": functools.partial(cuda, (major, minor)) for major, minor in CUDA
    }
    asked["rocm gfx942"] = functools.partial(rocm, "gfx942")
    answers = {}
    for name, device in asked.items():
        with device() as platform:
            answers[name] = _answers(platform)
    return answers


def _answers(platform: Any) -> dict[str, Any]:
    with mock.patch.dict(os.environ, XFV1_OPS="xformers_splitk"):
        restricted = _selected(platform, "CUSTOM", {"head_size": 80})
    return {
        "served": {
            name: {what: _selected(platform, name, facts) for what, facts in SERVED.items()}
            for name in {"CUSTOM", _backend().get_name()}
        },
        "refused": {
            what: answer
            for what, facts in REFUSED.items()
            if (answer := _selected(platform, "CUSTOM", facts)) is not None
        },
        "splitk alone": restricted,
    }


def _selected(platform: Any, name: str, facts: dict[str, Any]) -> str | None:
    """The class's path, or the ValueError; None where this vLLM does not ask such a thing."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    plain = {"head_size": 64, "dtype": torch.float16, "kv_cache_dtype": "auto", "block_size": None}
    if not facts.keys() <= set(AttentionSelectorConfig._fields):
        return None
    config = AttentionSelectorConfig(**(plain | facts))
    try:
        answer: str = platform.get_attn_backend_cls(AttentionBackendEnum[name], config, num_heads=8)
    except ValueError as error:
        return f"ValueError: {error}"
    return answer


def _properties(capability: tuple[int, int], **others: Any) -> SimpleNamespace:
    """The properties of a card that torch is asked for."""
    major, minor = capability
    facts: dict[str, Any] = {"warp_size": 32, "multi_processor_count": 64, **others}
    return SimpleNamespace(major=major, minor=minor, **facts)


@contextlib.contextmanager
def cuda(capability: tuple[int, int]) -> Iterator[Any]:
    """vLLM's own platform for NVIDIA's cards, in force over one that is not there."""
    properties = _properties(capability, shared_memory_per_block_optin=99 * 1024)
    with (
        _stubbed("vllm._C_stable_libtorch", "vllm._C"),
        mock.patch("torch.cuda.get_device_properties", return_value=properties),
        mock.patch("torch.cuda.get_device_capability", return_value=capability),
    ):
        module = importlib.import_module("vllm.platforms.cuda")
        with _in_force(module.NonNvmlCudaPlatform):
            yield module.NonNvmlCudaPlatform


@contextlib.contextmanager
def rocm(arch: str) -> Iterator[Any]:
    """vLLM's own platform for AMD's cards, in force over one that is not there."""
    capability = (int(arch[3:-2]), int(arch[-2], 16))
    properties = _properties(
        capability, gcnArchName=arch, warp_size=64, shared_memory_per_block=64 * 1024
    )
    with (
        _stubbed("vllm._C_stable_libtorch", "vllm._C", "vllm._rocm_C"),
        mock.patch("torch.version.hip", "7.0"),
        mock.patch("torch.cuda.get_device_properties", return_value=properties),
        mock.patch("torch.cuda.get_device_capability", return_value=capability),
    ):
        module = importlib.import_module("vllm.platforms.rocm")
        with _in_force(module.RocmPlatform):
            yield module.RocmPlatform


@contextlib.contextmanager
def _in_force(platform: type[Any]) -> Iterator[None]:
    """vLLM and xfv1 see this platform; what they remember of another is forgotten."""
    from xfv1 import compat
    from xfv1.device import device_of

    def forget() -> None:
        for answer in (platform.get_device_capability, compat.device_kind, device_of):
            answer.cache_clear()

    forget()
    with mock.patch("vllm.platforms._current_platform", platform()):
        yield
    forget()


@contextlib.contextmanager
def _stubbed(*names: str) -> Iterator[None]:
    """Empty modules in place of compiled ones that the process has not loaded.

    vLLM's build for CPUs has several libraries, one to a kind of processor. They register the same
    operators, so a process that loads a second one ends. The other modules that are imported
    meanwhile stay: vLLM cannot be imported twice.
    """
    empty = {name: ModuleType(name) for name in names if name not in sys.modules}
    sys.modules.update(empty)
    try:
        yield
    finally:
        for name in empty:
            del sys.modules[name]


def _backend() -> Any:
    from xfv1.backend import XFormersAttentionBackend

    return XFormersAttentionBackend


def _path(cls: type[Any]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _spec() -> Any:
    """The spec that this version's layer asks a cache by."""
    from tests.harness.driver import drive

    driver = drive(_backend(), BASE, torch.device("cpu"))
    return driver.layer.get_kv_cache_spec(driver.config)


def _known(cls: type[Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Those facts that a class's constructor takes."""
    return {n: facts[n] for n in inspect.signature(cls).parameters if n in facts}


SECTIONS: tuple[Callable[[], Any], ...] = (
    vllm,
    registration,
    abstract,
    signatures,
    layouts,
    batches,
    builder,
    context_parallelism,
    cpu_selection,
    gpu_selection,
)


def probe() -> dict[str, dict[str, Any]]:
    """Every section's answer: {"answer": ...}, or {"error": a traceback}."""
    report: dict[str, dict[str, Any]] = {}
    for section in SECTIONS:
        try:
            report[section.__name__] = {"answer": section()}
        except Exception:
            report[section.__name__] = {"error": traceback.format_exc()}
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, required=True)
    parser.parse_args().report.write_text(json.dumps(probe(), indent=1))
