"""Drive any V1 attention backend the way vLLM's model runner does.

The real `Attention` layer, `VllmConfig`, `AttentionSpec` and `CommonAttentionMetadata`; the
backend's own builder and impl; each candidate on its own copy of the cache.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fixtures.cases import AttnCase
from fixtures.inputs.build import GUARD_ROWS, K_SCALE, Q_SCALE, V_SCALE, AttnInputs
from fixtures.inputs.draw import TORCH_DTYPES, build_sinks, build_slopes
from tests.harness.environment import register_models
from tests.harness.wording import cause, did_you_mean, shown

XFV1 = "xfv1.backend:XFormersAttentionBackend"
# A NaN with a payload of its own: an output row nobody may write keeps these very bits.
UNTOUCHED = {1: 0x7D, 2: 0x7FDB, 4: 0x7FDBDBDB}
# Requests, and tokens of a graph: no case has more decodes.
MAX_CAPTURED = 512


class CandidateError(ValueError):
    """--candidate names nothing that can be tested; the message says why."""


class Mismatch(AssertionError):
    """A candidate broke a promise; the message explains which, where and by how much."""


class Refused(Exception):
    """The candidate says that it cannot serve a case. reasons: in its own words."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


def named(name: str) -> tuple[str, str]:
    """Module and class that ``--candidate`` names: "xfv1", or "package.module:Class".

    Raises:
        CandidateError: for another form.
    """
    module_name, _, class_name = (XFV1 if name == "xfv1" else name).partition(":")
    if module_name and module_name[0] != "." and class_name.isidentifier():
        return module_name, class_name
    # vLLM's own settings have a dot before the class.
    dotted = [":".join(name.rsplit(".", 1))] if "." in name and ":" not in name else []
    near = did_you_mean(name, ("xfv1", *dotted))
    raise CandidateError(f"--candidate={name}: expected xfv1 or package.module:Class{near}")


def load_candidate(name: str) -> type[Any]:
    """The backend class that ``--candidate`` names.

    Raises:
        CandidateError: one clear line, for a wrong form, an import error, a missing name, a class
            that is no AttentionBackend, or one that does not say its name, impl and builder.
    """
    module_name, class_name = named(name)
    with _explained(f"--candidate={name}: cannot import {module_name}"):
        module = importlib.import_module(module_name)
    with _explained(f"--candidate={name}: {module_name} gives no {class_name}"):
        candidate = getattr(module, class_name, None)
    if candidate is None:
        near = did_you_mean(class_name, dir(module))
        raise CandidateError(f"--candidate={name}: {module_name} has no {class_name}{near}")
    from vllm.v1.attention.backend import AttentionBackend

    if not (isinstance(candidate, type) and issubclass(candidate, AttentionBackend)):
        raise CandidateError(f"--candidate={name}: {class_name} is no subclass of AttentionBackend")
    _check_methods(name, candidate)
    return candidate


def _check_methods(name: str, candidate: type[Any]) -> None:
    """A backend says its name, and the classes of its impl and its builder."""
    for method, kind, needs in (
        ("get_name", str, ()),
        ("get_impl_cls", type, ("forward",)),
        ("get_builder_cls", type, ("build",)),
    ):
        with _explained(f"--candidate={name}: {method}() raises"):
            answer = getattr(candidate, method)()
        if not isinstance(answer, kind):
            wanted = "a name" if kind is str else "a class"
            raise CandidateError(
                f"--candidate={name}: {method}()={shown(answer)}: expected {wanted}"
            )
        absent = {need for need in needs if not callable(getattr(answer, need, None))}
        absent |= getattr(answer, "__abstractmethods__", frozenset())
        if absent:
            methods = ", ".join(sorted(absent))
            raise CandidateError(f"--candidate={name}: {method}()={shown(answer)} has no {methods}")


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn whatever a candidate raises, but an interrupt by the user, into a CandidateError."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise CandidateError(f"{what}: {cause(error)}") from error


@dataclass(frozen=True)
class Outcome:
    """What a candidate did with a case.

    output: [num_rows, num_heads, head_size], all rows, padding too. storage: the candidate's
    cache storage afterwards. query: what it was given, if its layer quantized the inputs' own.
    given: its own copy of the batch, as it left it.
    """

    output: torch.Tensor
    storage: torch.Tensor
    query: torch.Tensor | None = None
    given: AttnInputs | None = None


@dataclass
class Driver:
    """A candidate set up for one case's shapes: its layer, builder and impl, ready to be called."""

    backend: type[Any]
    case: AttnCase
    device: torch.device
    config: Any = field(repr=False)
    layer: Any = field(repr=False)
    builder: Any = field(repr=False)

    def metadata(self, inputs: AttnInputs, dummy: bool = False) -> Any:
        """The backend's metadata for a batch. dummy: see `common_metadata`."""
        with _vllm_config(self.config):
            return self.builder.build(
                common_prefix_len=0, common_attn_metadata=common_metadata(inputs, dummy)
            )

    def metadata_to_capture(self, inputs: AttnInputs) -> Any:
        """The backend's metadata for a uniform batch whose step is captured in a CUDA graph.

        Its longest request is said to be the model's longest, as the graph must serve that too.

        Raises:
            Refused: where the builder says that vLLM must not capture such a batch.
        """
        from vllm.v1.attention.backend import AttentionCGSupport

        single = max(inputs.case.query_lens) == 1
        least = (
            AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
            if single
            else AttentionCGSupport.UNIFORM_BATCH
        )
        support = self.builder.get_cudagraph_support(self.config, self.builder.kv_cache_spec)
        if support.value < least.value:
            raise Refused([f"CUDA graphs: {support.name}"])
        common = common_metadata(inputs, dummy=True)
        common.max_seq_len = self.config.model_config.max_model_len
        with _vllm_config(self.config):
            return self.builder.build_for_cudagraph_capture(common)

    def update_cache(self, inputs: AttnInputs, cache: torch.Tensor) -> None:
        """Write the batch's keys and values, where the backend leaves that to vLLM's layer."""
        if self.backend.forward_includes_kv_cache_update or self.case.kv_sharing:
            return
        if self.case.attention in ("encoder", "cross"):
            return
        with _vllm_config(self.config):
            self.layer.impl.do_kv_cache_update(
                self.layer, inputs.key, inputs.value, cache, inputs.slot_mapping
            )

    def forward(
        self, inputs: AttnInputs, cache: torch.Tensor, metadata: Any, output: torch.Tensor
    ) -> torch.Tensor | None:
        """One call of the impl's forward; returns the query if the layer quantized it."""
        query, quantized = inputs.query, None
        if self.layer.query_quant is not None:
            query, _ = self.layer.query_quant(query, self.layer._q_scale)
            quantized = query.float() * self.layer._q_scale
        with _vllm_config(self.config):
            self.layer.impl.forward(
                self.layer, query, inputs.key, inputs.value, cache, metadata, output=output
            )
        return quantized

    def run(self, inputs: AttnInputs) -> Outcome:
        """A whole step on the candidate's own copy of batch and cache; the outcome lies where the
        inputs do.

        Raises:
            Mismatch: see `step`.
        """
        done, to = self.step(inputs.copied(self.device)), inputs.device
        query = None if done.query is None else done.query.to(to)
        return Outcome(done.output.to(to), done.storage.to(to), query, done.given)

    def step(self, given: AttnInputs, metadata: Any = None) -> Outcome:
        """Build, write, attend; the cache is written in place.

        Args:
            metadata: in place of what the builder makes of the batch.

        Raises:
            Mismatch: if the output is written outside its rows, or if the backend raises
                NotImplementedError: it has accepted the layer, and a server would die of it in
                the middle of its service.
        """
        output = new_output(given)
        try:
            metadata = metadata or self.metadata(given)
            self.update_cache(given, given.cache)
            query = self.forward(given, given.cache, metadata, output)
        except NotImplementedError as error:
            raise Mismatch(f"accepted the layer, then refused a batch: {error}") from error
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        check_guards(output)
        return Outcome(output, given.storage, query, given)


def new_output(inputs: AttnInputs) -> torch.Tensor:
    """An output as vLLM allocates it, between guard rows; every element the UNTOUCHED pattern."""
    rows, *row = inputs.query.shape
    whole = inputs.query.new_empty(rows + 2 * GUARD_ROWS, *row)
    bits(whole).fill_(UNTOUCHED[whole.itemsize])
    return whole[GUARD_ROWS : GUARD_ROWS + rows]


def check_guards(output: torch.Tensor) -> None:
    """The rows before and after an output are as `new_output` left them.

    Raises:
        Mismatch: if any was written.
    """
    memory = torch.empty(0, dtype=output.dtype, device=output.device)
    whole = bits(memory.set_(output.untyped_storage()))
    first, last = output.storage_offset(), output.storage_offset() + output.numel()
    for where, guard in (("before its first", whole[:first]), ("after its last", whole[last:])):
        if (guard != UNTOUCHED[output.itemsize]).any():
            raise Mismatch(f"the output was written {where} row")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes as integers of its element size, so that NaN compares equal to itself."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.itemsize])


def drive(
    backend: type[Any],
    case: AttnCase,
    device: torch.device,
    sinks: torch.Tensor | None = None,
    config: Any = None,
) -> Driver:
    """Set a backend up for a case.

    Args:
        sinks: [num_heads] in place of the case's own.
        config: a VllmConfig in place of `config_of` the case.

    Raises:
        Refused: with the backend's reasons, from validate_configuration, from the layouts it
            declares, or from its impl's constructor.
    """
    config = config or config_of(case)
    with _vllm_config(config):
        if reasons := configuration_reasons(backend, case, device):
            raise Refused(reasons)
        if reasons := layout_reasons(backend, case):
            raise Refused(reasons)
        wrapped = _wrapped(backend, case)
        try:
            layer = _layer(wrapped, case, config, device, sinks)
        except (NotImplementedError, ValueError, AssertionError) as error:
            raise Refused([str(error) or type(error).__name__]) from error
        spec = _spec(case)
        builder = wrapped.get_builder_cls()(spec, [layer.layer_name], config, device)
    return Driver(wrapped, case, device, config, layer, builder)


def configuration_reasons(backend: type[Any], case: AttnCase, device: torch.device) -> list[str]:
    """What the backend's validate_configuration says of a case, in this vLLM's signature."""
    from vllm.platforms.interface import DeviceCapability

    capability = DeviceCapability(0, 0)
    if device.type == "cuda":
        capability = DeviceCapability(*torch.cuda.get_device_capability(device))
    facts: dict[str, Any] = {
        "head_size": case.head_size,
        "dtype": TORCH_DTYPES[case.dtype],
        "kv_cache_dtype": case.kv_dtype,
        "block_size": case.block_size,
        "use_mla": False,
        "has_sink": case.sinks,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": capability,
        "attn_type": attn_type(case),
        "has_sliding_window": case.sliding_window is not None,
        "use_non_causal": case.attention == "noncausal",
    }
    known = inspect.signature(backend.validate_configuration).parameters
    reasons: list[str] = backend.validate_configuration(
        **{name: value for name, value in facts.items() if name in known}
    )
    if case.alibi_sqrt and not backend.supports_alibi_sqrt():
        reasons.append("ALiBi's sqrt form not supported")
    return reasons


def layout_reasons(backend: type[Any], case: AttnCase) -> list[str]:
    """Why the backend would never be given a case's cache layout, or nothing."""
    if case.attention == "encoder":
        return []
    if hasattr(backend, "supported_kv_cache_layouts"):
        layouts = backend.supported_kv_cache_layouts()
        names = None if layouts is None else [layout.name for layout in layouts]
    else:
        names = _layouts_by_stride_order(backend)
    if names is not None and case.kv_layout not in names:
        return [f"KV cache layout {case.kv_layout} not among {', '.join(names)}"]
    return []


def _layouts_by_stride_order(backend: type[Any]) -> list[str]:
    """The layouts that a backend of vLLM before 0.29 names by its stride orders."""
    from vllm.v1.attention.backends import utils

    names = []
    for setting in ("NHD", "HND"):
        utils.set_kv_cache_layout(setting)
        try:
            for layered in (False, True):
                try:
                    order = backend.get_kv_cache_stride_order(include_num_layers_dimension=layered)
                except (NotImplementedError, AttributeError, ValueError):
                    order = (0, 1, 2, 3) if not layered else ()
                axes = "LBHNC" if len(order) == 5 else "BHNC"
                if order:
                    name = "".join(axes[axis] for axis in order)
                    names.append(name if layered else f"L{name}")
        finally:
            utils.set_kv_cache_layout(None)
    return sorted(set(names))


def attn_type(case: AttnCase) -> str:
    from vllm.v1.attention.backend import AttentionType

    kinds: dict[str, str] = {
        "decoder": AttentionType.DECODER,
        "noncausal": AttentionType.DECODER,
        "encoder": AttentionType.ENCODER_ONLY,
        "cross": AttentionType.ENCODER_DECODER,
    }
    return kinds[case.attention]


def common_metadata(inputs: AttnInputs, dummy: bool = False) -> Any:
    """The batch as vLLM's model runner describes it to every backend.

    dummy: it is vLLM's own, which has no prompts.
    """
    from vllm.v1.attention.backend import CommonAttentionMetadata

    case = inputs.case
    # The host's own, whatever is written to the batch's tensors later.
    starts_cpu = inputs.query_start_loc.to("cpu", copy=True)
    lengths_cpu = inputs.seq_lens.to("cpu", copy=True)
    cross = case.attention == "cross"
    query_lens = starts_cpu[1:] - starts_cpu[:-1]
    # A decoder's own lengths; for cross attention the first step, before anything is cached.
    own = query_lens if cross else lengths_cpu
    # A graph's batch counts its padding as tokens, any other does not.
    rows = inputs.query.shape[0] if case.pad_reqs else case.num_tokens
    positions = [
        torch.arange(int(k) - int(q), int(k)) for q, k in zip(query_lens, own, strict=True)
    ]
    prefilling, bound = query_lens > 1, own
    if case.drafts:
        # How many drafts of the step before were accepted only the device knows by now: the host
        # takes it that all were.
        prefilling = (query_lens > 1 + case.drafts) | ((query_lens == own) & (own > 0))
        rejected = torch.arange(len(own), dtype=own.dtype).flip(0) % (1 + case.drafts)
        bound = torch.where(prefilling | (query_lens == 0), own, own + rejected)
    if dummy:
        prefilling = torch.zeros_like(prefilling)
    fields: dict[str, Any] = {
        "query_start_loc": inputs.query_start_loc,
        "query_start_loc_cpu": starts_cpu,
        # The batch's own tensor: a captured graph reads what is written to it later.
        "seq_lens": own.to(inputs.seq_lens.device) if cross else inputs.seq_lens,
        "_seq_lens_cpu": None if case.drafts else own,
        "seq_lens_cpu_upper_bound": bound,
        "num_reqs": inputs.num_reqs,
        "num_actual_tokens": rows,
        "max_query_len": max(case.query_lens),
        "max_seq_len": int(bound.max()),
        "block_table_tensor": inputs.block_table,
        "slot_mapping": inputs.slot_mapping[:rows],
        "causal": case.attention != "noncausal",
        "positions": torch.cat(positions).to(inputs.seq_lens.device),
        "is_prefilling": prefilling,
    }
    if cross:
        fields["encoder_seq_lens"] = inputs.seq_lens
        fields["encoder_seq_lens_cpu"] = lengths_cpu.numpy()
    known = {f.name for f in dataclasses.fields(CommonAttentionMetadata)}
    return CommonAttentionMetadata(**{k: v for k, v in fields.items() if k in known})


def _wrapped(backend: type[Any], case: AttnCase) -> type[Any]:
    """The backend as vLLM's encoder-only and cross attention layers use it."""
    from vllm.model_executor.layers.attention import cross_attention, encoder_only_attention

    result: type[Any] = backend
    if case.attention == "encoder":
        result = encoder_only_attention.create_encoder_only_attention_backend(backend)
    if case.attention == "cross":
        result = cross_attention.create_cross_attention_backend(backend)
    return result


def _spec(case: AttnCase) -> Any:
    from vllm.v1 import kv_cache_interface as kv

    cache_dtype = TORCH_DTYPES[case.dtype]
    if case.quantized:
        # vLLM allocates fp8 caches as bytes; backends view them.
        cache_dtype = torch.uint8
    common: dict[str, Any] = {
        "block_size": case.block_size,
        "num_kv_heads": case.num_kv_heads,
        "head_size": case.head_size,
        "dtype": cache_dtype,
    }
    common["kv_quant_mode"] = kv.get_kv_quant_mode(case.kv_dtype)
    if case.attention == "encoder":
        return kv.EncoderOnlyAttentionSpec(**common)
    if case.attention == "cross":
        return kv.CrossAttentionSpec(**common)
    if case.sliding_window is not None:
        return kv.SlidingWindowSpec(**common, sliding_window=case.sliding_window)
    return kv.FullAttentionSpec(**common)


def _layer(
    backend: type[Any],
    case: AttnCase,
    config: Any,
    device: torch.device,
    sinks: torch.Tensor | None,
) -> Any:
    """A real `vllm` Attention layer over the backend, with the case's scales set."""
    from vllm.model_executor.layers.attention import Attention

    extra: dict[str, Any] = {}
    if case.sinks:
        extra["sinks"] = (build_sinks(case) if sinks is None else sinks).to(device)
    slopes = build_slopes(case)

    def make(prefix: str, target: str | None = None) -> Any:
        return Attention(
            num_heads=case.num_heads,
            head_size=case.head_size,
            scale=case.head_size**-0.5,
            num_kv_heads=case.num_kv_heads,
            alibi_slopes=None if slopes is None else slopes.tolist(),
            use_alibi_sqrt=case.alibi_sqrt,
            cache_config=config.cache_config,
            logits_soft_cap=case.softcap,
            per_layer_sliding_window=case.sliding_window,
            prefix=prefix,
            attn_type=attn_type(case),
            kv_sharing_target_layer_name=target,
            attn_backend=backend,
            **extra,
        )

    config.compilation_config.static_forward_context.clear()
    # As vLLM's loader makes a model: what an impl keeps beside its parameters is there too.
    with _default_dtype(TORCH_DTYPES[case.dtype]), device:
        layer = make("model.layers.0.self_attn.attn")
        if case.kv_sharing:
            layer = make("model.layers.1.self_attn.attn", layer.layer_name)
    layer = layer.to(device)
    if case.quantized:
        for name, scale in (("q", Q_SCALE), ("k", K_SCALE), ("v", V_SCALE)):
            getattr(layer, f"_{name}_scale").fill_(scale)
            setattr(layer, f"_{name}_scale_float", scale)
            if hasattr(layer, f"_{name}_scale_cpu"):
                getattr(layer, f"_{name}_scale_cpu").fill_(scale)
    layer.impl.process_weights_after_loading(TORCH_DTYPES[case.dtype])
    return layer


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _vllm_config(config: Any) -> Iterator[None]:
    """Where the candidate's code runs: vLLM knows the config, and no exit ends the process.

    Raises:
        Mismatch: in place of a SystemExit, after which pytest could run no further test.
    """
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(config):
        try:
            yield
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise Mismatch(f"the candidate raised {cause(error)}") from error


def config_of(case: AttnCase) -> Any:
    """The VllmConfig of a server for a case: the same object for every case of the same shapes."""
    return vllm_config(
        case.num_heads,
        case.num_kv_heads,
        case.head_size,
        case.dtype,
        case.block_size,
        case.kv_dtype,
        case.sliding_window,
        case.drafts,
    )


@functools.lru_cache(maxsize=64)
def vllm_config(
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    dtype: str,
    block_size: int,
    kv_dtype: str,
    sliding_window: int | None,
    drafts: int = 0,
) -> Any:
    """A VllmConfig of a one-layer Llama of these shapes; no weights, no tokenizer, no network."""
    from vllm.config import CacheConfig, ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
    from vllm.config.compilation import CompilationConfig, CUDAGraphMode

    register_models("LlamaForCausalLM")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": num_heads * head_size,
        "head_dim": head_size,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "vocab_size": 64,
        "max_position_embeddings": 65536,
        "torch_dtype": {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[dtype],
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        model = ModelConfig(
            model=folder,
            tokenizer=folder,
            skip_tokenizer_init=True,
            dtype=TORCH_DTYPES[dtype],
            max_model_len=65536,
        )
    cache = CacheConfig(
        block_size=block_size,
        cache_dtype=kv_dtype,
        sliding_window=sliding_window,
    )
    parallel = ParallelConfig()
    speculative = None
    if drafts:
        speculative = SpeculativeConfig(
            method="ngram",
            num_speculative_tokens=drafts,
            target_model_config=model,
            target_parallel_config=parallel,
        )
    config = VllmConfig(
        model_config=model,
        cache_config=cache,
        parallel_config=parallel,
        speculative_config=speculative,
        # Some builders keep what a graph reads only where they are told of graphs. vLLM itself
        # takes this back where there are none.
        compilation_config=CompilationConfig(
            cudagraph_mode=CUDAGraphMode.FULL_DECODE_ONLY, max_cudagraph_capture_size=MAX_CAPTURED
        ),
    )
    config.scheduler_config.max_num_seqs = MAX_CAPTURED
    return config
