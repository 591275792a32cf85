"""The FlashAttention 2 and 3 that every CUDA wheel of vLLM carries, over the paged cache."""

import functools
import importlib.util
from typing import Any

import torch

from xfv1.device import Device
from xfv1.ops.base import ENCODER, Batch, Call, Layer, capability_reasons, feature_reasons
from xfv1.ops.xformers_base import dtype_reasons


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
        if batch.phase != ENCODER and layer.block_size % 16:
            reasons.append(f"block size {layer.block_size}: a multiple of 16")
        return reasons

    def run(self, call: Call) -> None:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        layer = call.layer
        window = [-1, -1]
        if layer.sliding_window is not None:
            reach = layer.sliding_window - 1
            window = [reach, 0 if layer.causal else reach]
        keys: dict[str, Any]
        if call.batch.phase == ENCODER:
            keys = {"k": call.key, "v": call.value, "cu_seqlens_k": call.query_start_loc}
        else:
            keys = {
                "k": call.key_cache,
                "v": call.value_cache,
                "seqused_k": call.seq_lens,
                "block_table": call.block_table,
            }
        result = flash_attn_varlen_func(
            q=call.query,
            out=call.out,
            cu_seqlens_q=call.query_start_loc,
            max_seqlen_q=call.batch.max_query_len,
            max_seqlen_k=call.batch.max_seq_len,
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
    """What FlashAttention 2 leaves out, by its source or as seen on an H100."""
    reasons = []
    if batch.max_query_len == 1 and not batch.uniform:
        # One query to a request it takes as a row to a request.
        reasons.append("no request without a token beside those of one")
    if batch.lse and layer.alibi:
        reasons.append("no LSE with ALiBi: it leaves out a part that is the same for all keys")
    if batch.phase == ENCODER:
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
    if call.batch.phase == ENCODER:
        return None
    key = ("fa3_schedule", call.layer, torch.cuda.is_current_stream_capturing())
    if key not in call.plans:
        from vllm.vllm_flash_attn import get_scheduler_metadata

        layer = call.layer
        call.plans[key] = get_scheduler_metadata(
            batch_size=call.seq_lens.numel(),
            max_seqlen_q=call.batch.max_query_len,
            max_seqlen_k=call.batch.max_seq_len,
            num_heads_q=layer.num_heads,
            num_heads_kv=layer.num_kv_heads,
            headdim=layer.head_size,
            cache_seqlens=call.seq_lens,
            qkv_dtype=layer.dtype,
            cu_seqlens_q=call.query_start_loc,
            page_size=layer.block_size,
            causal=layer.causal,
            window_size=window,
            has_softcap=layer.softcap is not None,
        )
    plan: torch.Tensor = call.plans[key]
    return plan
