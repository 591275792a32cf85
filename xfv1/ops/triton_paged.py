"""xfv1's own Triton kernel over the paged cache. It serves whatever other ops refuse."""

import importlib.util

import torch

from xfv1.device import Device
from xfv1.kernels.paged.tiling import MAX_HEAD_SIZE
from xfv1.ops.base import Call, Layer
from xfv1.phase import ENCODER, Batch, Phase


class TritonPaged:
    name = "triton"
    # In one call with prefills, the keys of decodes would not be split: two calls are faster.
    ragged = False
    batch_invariant = True

    def not_supported_reasons(self, layer: Layer, batch: Batch, device: Device) -> list[str]:
        reasons = []
        if importlib.util.find_spec("triton") is None:
            reasons.append("triton is not installed")
        if device.kind == "cpu" and not device.interpreted:
            reasons.append("runs on a CPU only under TRITON_INTERPRET=1")
        if device.kind == "cpu" and torch.bfloat16 in (layer.dtype, layer.kv_dtype):
            reasons.append("Triton's interpreter multiplies bfloat16 wrongly")
        if layer.kv_dtype == torch.float8_e4m3fnuz and device.kind != "hip":
            reasons.append("float8_e4m3fnuz: on AMD's cards only")
        if not 1 <= layer.head_size <= MAX_HEAD_SIZE:
            reasons.append(f"head size {layer.head_size}: 1 to {MAX_HEAD_SIZE}")
        return reasons

    def run(self, call: Call) -> None:
        from xfv1.kernels.paged.launch import paged_attention

        layer, phase, batch = call.layer, call.phase, call.batch
        key_cache, value_cache, block_table = call.key_cache, call.value_cache, phase.block_table
        if batch.kind == ENCODER:
            # An encoder's keys lie in the rows of its queries: pages of one token each.
            assert call.key is not None and call.value is not None
            key_cache, value_cache = call.key[:, None], call.value[:, None]
            block_table = phase.once("row_table", lambda: _row_table(phase))
        assert key_cache is not None and value_cache is not None
        paged_attention(
            call.query,
            key_cache,
            value_cache,
            out=call.out,
            block_table=block_table,
            seq_lens=phase.seq_lens,
            query_start_loc=phase.query_start_loc,
            max_query_len=batch.max_query_len,
            max_seq_len=batch.max_seq_len,
            scale=call.scale,
            causal=layer.causal,
            sliding_window=layer.sliding_window,
            softcap=layer.softcap,
            alibi_slopes=call.alibi_slopes,
            alibi_sqrt=layer.alibi_sqrt,
            sinks=call.sinks,
            k_scale=call.k_scale if layer.quantized else None,
            v_scale=call.v_scale if layer.quantized else None,
            lse=call.lse,
            batch_invariant=layer.batch_invariant,
        )


def _row_table(phase: Phase) -> torch.Tensor:
    """[num_reqs, max_query_len] int32: the row of each request's each token."""
    starts = phase.query_start_loc
    steps = torch.arange(phase.batch.max_query_len, dtype=torch.int32, device=starts.device)
    return starts[:-1, None] + steps
