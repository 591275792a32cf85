"""The FlashAttention 2 and 3 that every CUDA wheel of vLLM carries, over the paged cache."""

import functools
import importlib.util
from typing import Any

import torch

from xfv1.device import Device
from xfv1.ops.base import Call, Layer, capability_reasons, dtype_reasons, feature_reasons
from xfv1.phase import ENCODER, Batch, Phase


@functools.cache
def _unavailable(version: int) -> str | None:
    """Why vLLM's build of FlashAttention `version` cannot run here, or None."""
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed"
    try:
        from vllm.vllm_flash_attn.flash_attn_interface import fa_version_unsupported_reason
    except (ImportError, OSError) as error:
        return f"vLLM's FlashAttention does not load: {error}"
    reason: str | None = fa_version_unsupported_reason(version)
    return reason


class VllmFlashAttention:
    ragged = True
    batch_invariant = False

    def __init__(self, version: int) -> None:
        self.version = version
        self.name = f"vllm_fa{version}"

    def not_supported_reasons(self, layer: Layer, batch: Batch, device: Device) -> list[str]:
        if device.kind != "cuda":
            return [f"runs on cuda, not on {device.kind}"]
        bounds = ((9, 0), (9, 0)) if self.version == 3 else ((8, 0), (99, 0))
        reasons = capability_reasons(device, *bounds)
        if not reasons and (missing := _unavailable(self.version)):
            reasons.append(missing)
        reasons += dtype_reasons(layer, torch.float16, torch.bfloat16)
        more = ("alibi",) if self.version == 2 else ("sinks",)
        reasons += feature_reasons(layer, "sliding_window", "softcap", "noncausal", *more)
        if self.version == 2:
            reasons += _fa2_reasons(layer, batch)
        if layer.sinks and layer.dtype != torch.bfloat16:
            reasons.append("takes sinks in bfloat16 only")
        if layer.head_size % 8 or layer.head_size > 256:
            reasons.append(f"head size {layer.head_size}: multiples of 8 to 256")
        if batch.kind != ENCODER and layer.block_size % 16:
            reasons.append(f"block size {layer.block_size}: a multiple of 16")
        return reasons

    def run(self, call: Call) -> None:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        layer, phase = call.layer, call.phase
        window = [-1, -1]
        if layer.sliding_window is not None:
            reach = layer.sliding_window - 1
            window = [reach, 0 if layer.causal else reach]
        keys: dict[str, Any]
        if phase.batch.kind == ENCODER:
            keys = {"k": call.key, "v": call.value, "cu_seqlens_k": phase.query_start_loc}
        else:
            keys = {
                "k": call.key_cache,
                "v": call.value_cache,
                "seqused_k": phase.seq_lens,
                "block_table": phase.block_table,
            }
        result = flash_attn_varlen_func(
            q=call.query,
            out=call.out,
            cu_seqlens_q=phase.query_start_loc,
            max_seqlen_q=phase.batch.max_query_len,
            max_seqlen_k=phase.batch.max_seq_len,
            softmax_scale=call.scale,
            causal=layer.causal,
            window_size=window,
            softcap=layer.softcap or 0.0,
            alibi_slopes=call.alibi_slopes,
            s_aux=call.sinks,
            return_softmax_lse=call.lse is not None,
            fa_version=self.version,
            scheduler_metadata=_schedule(call, window) if self.version == 3 else None,
            **keys,
        )
        if call.lse is not None:
            call.lse.copy_(result[1].transpose(0, 1)[: call.lse.shape[0]])


def _fa2_reasons(layer: Layer, batch: Batch) -> list[str]:
    """Why FlashAttention 2 cannot serve the batch, by its source or as seen on an H100."""
    reasons = []
    if batch.max_query_len == 1 and not batch.uniform:
        # With max_query_len 1, FA2 assumes one row to each request: an empty request shifts all
        # later ones.
        reasons.append("no request without a token beside those of one")
    if batch.lse and layer.alibi:
        reasons.append("no LSE with ALiBi: it leaves out a part that is the same for all keys")
    if batch.kind == ENCODER:
        return reasons
    if layer.sliding_window is not None:
        reasons.append("no windows: NaN in the blocks before them reaches its output")
    if batch.lse:
        reasons.append("no LSE: it leaves out those of queries that see no key")
    return reasons


def _schedule(call: Call, window: list[int]) -> torch.Tensor | None:
    """FlashAttention 3's plan of its tiles, made by the first layer of a step for all like it.

    It is a small kernel over seq_lens. Captured in a graph it runs again at every replay, so a
    plan made before the capture must not serve in it.
    """
    if call.batch.kind == ENCODER:
        return None
    key = ("fa3_schedule", call.layer, torch.cuda.is_current_stream_capturing())
    return call.phase.once(key, lambda: _new_schedule(call.layer, call.phase, window))


def _new_schedule(layer: Layer, phase: Phase, window: list[int]) -> torch.Tensor:
    from vllm.vllm_flash_attn import get_scheduler_metadata

    schedule: torch.Tensor = get_scheduler_metadata(
        batch_size=phase.seq_lens.numel(),
        max_seqlen_q=phase.batch.max_query_len,
        max_seqlen_k=phase.batch.max_seq_len,
        num_heads_q=layer.num_heads,
        num_heads_kv=layer.num_kv_heads,
        headdim=layer.head_size,
        cache_seqlens=phase.seq_lens,
        qkv_dtype=layer.dtype,
        cu_seqlens_q=phase.query_start_loc,
        page_size=layer.block_size,
        causal=layer.causal,
        window_size=window,
        has_softcap=layer.softcap is not None,
    )
    return schedule
