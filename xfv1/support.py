"""Why xfv1 refuses a layer, or which ops serve it: one place for all who ask.

vLLM asks the backend before it makes a layer (`combination_reasons`, and `in_full` for vLLM's own
words). A layer's constructor asks about all that the backend is not asked (`model_reasons`,
`parallel_reasons`, `layer_reasons`). `python -m xfv1` asks about examples (`survey`).
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from xfv1 import cache, compat, dispatch
from xfv1.device import Device
from xfv1.kernels.paged.tiling import MAX_HEAD_SIZE
from xfv1.ops.base import Layer
from xfv1.phase import DECODE, ENCODER, PREFILL, Batch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KV_CACHE_DTYPES = ("auto", "float16", "bfloat16", *cache.FP8)
# A block size for questions that do not depend on it.
BLOCK_SIZE = 16


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# By vLLM's reason, which names no value: the argument, and which values are accepted.
ACCEPTED = {
    "head_size not supported": ("head_size", f"1 to {MAX_HEAD_SIZE}"),
    "dtype not supported": ("dtype", ", ".join(map(_short, DTYPES))),
    "kv_cache_dtype not supported": ("kv_cache_dtype", ", ".join(KV_CACHE_DTYPES)),
    "block_size not supported": ("block_size", "a multiple of 16"),
    "partial multimodal token full attention not supported": (
        "use_mm_prefix",
        "False: no image tokens that see each other",
    ),
    "MLA not supported": ("use_mla", "False: no multi-head latent attention"),
    "sparse not supported": ("use_sparse", "False: no sparse attention"),
    "per-head quant scales not supported": (
        "use_per_head_quant_scales",
        "False: one scale for all heads of a layer",
    ),
    "R-SWA not supported": ("use_rswa", "False: no windows beside a whole prompt"),
    "PCP not supported": ("use_pcp", "False: no prefill context parallelism"),
    "device-cpu query lens mismatch not supported, this is needed for adaptive verification": (
        "use_adaptive_verification",
        "False: the host must know each request's number of queries",
    ),
}


# vLLM asks the backend.


def in_full(reason: str, asked: dict[str, Any]) -> str:
    """One of vLLM's reasons, with the value that was asked for and what is accepted."""
    if reason not in ACCEPTED:
        return reason
    name, values = ACCEPTED[reason]
    value = asked.get(name)
    shown = _short(value) if isinstance(value, torch.dtype) else repr(value)
    return f"{name}={shown}: expected {values}"


def combination_reasons(
    head_size: int,
    dtype: torch.dtype,
    kv_cache_dtype: str | None,
    block_size: int | None,
    sinks: bool,
    device: Device,
) -> list[str]:
    """Why no op serves a layer of these facts."""
    try:
        stored = cache.kv_dtype(kv_cache_dtype or "auto", dtype)
    except NotImplementedError as error:
        return [str(error)]
    layer = Layer(
        num_heads=1,
        num_kv_heads=1,
        head_size=head_size,
        dtype=dtype,
        kv_dtype=stored,
        block_size=block_size or BLOCK_SIZE,
        sinks=sinks,
        batch_invariant=compat.batch_invariant(),
    )
    return layer_reasons(layer, device)


# A layer's constructor asks.


def model_reasons() -> list[str]:
    """Why xfv1 cannot serve this model in this server, for facts that no backend is asked about.

    Which facts these are depends on vLLM's release. On a CPU, vLLM asks a backend nothing.
    """
    config = compat.served_config()
    if config is None:
        return []
    reasons = []
    model = config.model_config
    if (window := getattr(model, "rswa_window", None)) is not None:
        reasons.append(f"rswa_window={window}: expected None: no windows beside a whole prompt")
    if getattr(model, "is_mm_prefix_lm", False):
        reasons.append(
            f"model {model.model}: its image tokens see each other (is_mm_prefix_lm=True): "
            "expected causal attention"
        )
    if getattr(config.cache_config, "kv_sharing_fast_prefill", False):
        # vLLM copies such a step's query_start_loc to the host without waiting for it.
        reasons.append("--kv-sharing-fast-prefill: expected a server without it")
    return reasons


def parallel_reasons(
    layer: Layer, prefill_ranks: int, decode_ranks: int, *, cross: bool, shares_cache: bool
) -> list[str]:
    """Why the layer cannot be served in the context parallel groups there are.

    prefill_ranks, decode_ranks: the groups' sizes; 1 for a layer that is not spread over a group.
    """
    reasons = []
    if prefill_ranks > 1:
        reasons.append(f"prefill_context_parallel_size={prefill_ranks}: expected 1")
    if decode_ranks == 1:
        return reasons
    refused = {
        # A rank's keys do not lie at consecutive positions.
        "sliding windows": layer.sliding_window is not None,
        "ALiBi": layer.alibi,
        "cross attention": cross,
        "layers that read another's cache": shares_cache,
        # With more KV heads, the query heads of all ranks are not ordered by KV head.
        f"num_kv_heads={layer.num_kv_heads}, only 1": layer.num_kv_heads != 1,
        # vLLM merges new and cached keys, so the order of summation depends on where a prompt was
        # cut.
        "batch invariance": layer.batch_invariant,
        # vLLM's merge needs these.
        f"head_size={layer.head_size}, only powers of two": layer.head_size.bit_count() != 1,
        "groups other than of powers of two": decode_ranks.bit_count() != 1,
        "merge without Triton": not compat.vllm_has_triton(),
    }
    words = [word for word, is_so in refused.items() if is_so]
    return reasons + [f"decode_context_parallel_size={decode_ranks}: no {word}" for word in words]


def typical_batches(
    *, encoder: bool = False, host_lens: bool = True, lse: bool = False
) -> list[Batch]:
    """A layer's batches that ask most of an op, ragged and with context: one of each kind."""
    ragged = Batch(PREFILL, num_reqs=2, max_query_len=64, max_seq_len=128, uniform=False, lse=lse)
    if encoder:
        return [replace(ragged, kind=ENCODER, max_seq_len=64)]
    return [
        Batch(DECODE, num_reqs=2, max_seq_len=128, host_lens=host_lens, lse=lse),
        replace(ragged, host_lens=host_lens),
    ]


def layer_reasons(layer: Layer, device: Device, **use: bool) -> list[str]:
    """Why a layer cannot be served at all: one reason for each kind of batch that no op serves.

    use: see `typical_batches`, here and in `summary`.
    """
    refused = []
    for batch in typical_batches(**use):
        try:
            dispatch.choose(layer, batch, device)
        except dispatch.NoOp as error:
            refused.append(str(error))
    return refused


def summary(layer: Layer, device: Device, **use: bool) -> str:
    """Which op serves each kind of batch of a layer, in words; the layer must be servable."""
    batches = typical_batches(**use)
    return ", ".join(f"{b.kind} by {dispatch.choose(layer, b, device).name}" for b in batches)


# `python -m xfv1` asks.


def survey(
    layer: Layer, device: Device, encoder: bool = False
) -> Iterator[tuple[str, str | None, dict[str, list[str]]]]:
    """(phase, op, refusals) of a layer's decodes, prompts and chunks of prompts.

    encoder: the layer has no cache, and one phase alone.
    op: the name of the op that is chosen, None if no op serves the phase.
    refusals: by the names of the other ops, why not.
    """
    prompts = Batch(
        PREFILL, num_reqs=4, max_query_len=2048, max_seq_len=2048, uniform=False, fresh=True
    )
    phases = {
        "decode": Batch(DECODE, num_reqs=64, max_seq_len=4096),
        "prefill": prompts,
        "chunked prefill": replace(prompts, max_seq_len=8192, fresh=False),
    }
    if encoder:
        phases = {"encoder": replace(prompts, kind=ENCODER)}
    for phase, batch in phases.items():
        tried = dispatch.reasons(layer, batch, device)
        op = next((name for name, why in tried.items() if not why), None)
        yield phase, op, {name: why for name, why in tried.items() if why}
