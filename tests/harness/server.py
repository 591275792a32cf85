"""The parts of a vLLM server that a backend meets: its config, a layer, and the cache's group.

All are vLLM's own classes: `VllmConfig`, `Attention`, `AttentionSpec`.
"""

import contextlib
import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fixtures.cases import AttnCase
from fixtures.inputs.build import K_SCALE, Q_SCALE, V_SCALE
from fixtures.inputs.draw import TORCH_DTYPES, build_sinks, build_slopes
from tests.harness.environment import register_models
from tests.harness.verdicts import Mismatch
from xfv1.wording import cause

# The largest number of requests, and of a graph's tokens: no case has more decodes.
MAX_CAPTURED = 512


# The config.


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
    """A VllmConfig of a two-layer Llama of these shapes; no weights, no tokenizer, no network."""
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
        # Some builders keep the tensors that a graph reads only if the config asks for graphs.
        # vLLM itself turns the mode off where the platform has none.
        compilation_config=CompilationConfig(
            cudagraph_mode=CUDAGraphMode.FULL_DECODE_ONLY, max_cudagraph_capture_size=MAX_CAPTURED
        ),
    )
    config.scheduler_config.max_num_seqs = MAX_CAPTURED
    return config


@contextlib.contextmanager
def in_server(config: Any) -> Iterator[None]:
    """Run the candidate's code as a server would: vLLM knows the config, no exit ends the process.

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


# The layer.


def attn_type(case: AttnCase) -> str:
    """vLLM's name for the kind of a case's attention."""
    from vllm.v1.attention.backend import AttentionType

    kinds: dict[str, str] = {
        "decoder": AttentionType.DECODER,
        "noncausal": AttentionType.DECODER,
        "encoder": AttentionType.ENCODER_ONLY,
        "cross": AttentionType.ENCODER_DECODER,
    }
    return kinds[case.attention]


def wrapped(backend: type[Any], case: AttnCase) -> type[Any]:
    """The backend as the case's kind of layer uses it: encoder and cross layers subclass it."""
    from vllm.model_executor.layers.attention import cross_attention, encoder_only_attention

    result: type[Any] = backend
    if case.attention == "encoder":
        result = encoder_only_attention.create_encoder_only_attention_backend(backend)
    if case.attention == "cross":
        result = cross_attention.create_cross_attention_backend(backend)
    return result


def attention_layer(
    backend: type[Any],
    case: AttnCase,
    config: Any,
    device: torch.device,
    sinks: torch.Tensor | None = None,
) -> Any:
    """vLLM's own Attention layer over the backend, with the case's scales set.

    Args:
        sinks: [num_heads] in place of the case's own.
    """
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
    # vLLM's loader makes a model within the device and the dtype too, so an impl's own tensors,
    # which are no parameters, lie on the device as well.
    with _default_dtype(TORCH_DTYPES[case.dtype]), device:
        layer = make("model.layers.0.self_attn.attn")
        if case.kv_sharing:
            layer = make("model.layers.1.self_attn.attn", layer.layer_name)
    layer = layer.to(device)
    if case.quantized:
        _set_scales(layer)
    layer.impl.process_weights_after_loading(TORCH_DTYPES[case.dtype])
    return layer


def _set_scales(layer: Any) -> None:
    """Set the layer's scales to the inputs', in each of the forms in which vLLM keeps them."""
    for name, scale in (("q", Q_SCALE), ("k", K_SCALE), ("v", V_SCALE)):
        getattr(layer, f"_{name}_scale").fill_(scale)
        setattr(layer, f"_{name}_scale_float", scale)
        if hasattr(layer, f"_{name}_scale_cpu"):
            getattr(layer, f"_{name}_scale_cpu").fill_(scale)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# The cache's group.


def cache_spec(case: AttnCase) -> Any:
    """The AttentionSpec by which vLLM allocates the case's cache and groups layers."""
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
