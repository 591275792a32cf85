"""Attention by PyTorch's matrix products, on a CPU: slow, but it serves every feature."""

import torch

from xfv1.device import Device
from xfv1.ops.base import Call, Layer
from xfv1.phase import ENCODER, Batch

# Rows of logits that are held at a time, which bounds the memory of long contexts.
_QUERY_CHUNK = 256


class TorchCpu:
    name = "torch"
    ragged = True
    batch_invariant = False

    def not_supported_reasons(self, layer: Layer, batch: Batch, device: Device) -> list[str]:
        if device.kind != "cpu":
            return [f"runs on a CPU, not on {device.kind}"]
        return []

    def run(self, call: Call) -> None:
        starts = call.phase.query_start_loc.tolist()
        lengths = call.phase.seq_lens.tolist()
        for request, length in enumerate(lengths):
            first, last = starts[request], starts[request + 1]
            if first == last:
                continue
            key, value = self._keys_and_values(call, request, slice(first, last), length)
            for row in range(first, last, _QUERY_CHUNK):
                rows = slice(row, min(row + _QUERY_CHUNK, last))
                positions = torch.arange(rows.start, rows.stop) - last + length
                self._attend(call, rows, positions, key, value)

    def _keys_and_values(
        self, call: Call, request: int, rows: slice, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[length, num_kv_heads, head_size] float32, dequantized."""
        if call.batch.kind == ENCODER:
            assert call.key is not None and call.value is not None
            return call.key[rows].float(), call.value[rows].float()
        assert call.key_cache is not None and call.value_cache is not None
        size = call.key_cache.shape[1]
        ids = call.phase.block_table[request, : -(-length // size)].long()
        key = call.key_cache[ids].flatten(0, 1)[:length].float()
        value = call.value_cache[ids].flatten(0, 1)[:length].float()
        if call.layer.quantized:
            assert call.k_scale is not None and call.v_scale is not None
            key, value = key * call.k_scale, value * call.v_scale
        return key, value

    def _attend(
        self,
        call: Call,
        rows: slice,
        positions: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> None:
        layer = call.layer
        distance = positions[:, None] - torch.arange(key.shape[0])[None, :]
        hidden = distance < 0 if layer.causal else torch.zeros_like(distance, dtype=torch.bool)
        if layer.sliding_window is not None:
            hidden |= distance.abs() >= layer.sliding_window
        # Keys before every query's window are not read: vLLM has given their blocks away.
        seen = (~hidden).any(dim=0).nonzero().flatten()
        first, last = (int(seen[0]), int(seen[-1]) + 1) if seen.numel() else (0, 0)
        key, value = key[first:last], value[first:last]
        distance, hidden = distance[:, first:last], hidden[:, first:last]

        query = call.query[rows].float().unflatten(1, (layer.num_kv_heads, layer.group))
        logits = torch.einsum("qhgd,khd->hgqk", query, key).flatten(0, 1) * call.scale
        if layer.softcap is not None:
            logits = layer.softcap * torch.tanh(logits / layer.softcap)
        if call.alibi_slopes is not None:
            away = distance.abs().float()
            away = away.sqrt() if layer.alibi_sqrt else away
            logits = logits - call.alibi_slopes[:, None, None] * away
        logits = logits.masked_fill(hidden, float("-inf"))

        lse = torch.logsumexp(logits, dim=-1)
        if call.sinks is not None:
            lse = torch.logaddexp(lse, call.sinks.float()[:, None])
        weights = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
        grouped = weights.unflatten(0, (layer.num_kv_heads, layer.group))
        out = torch.einsum("hgqk,khd->qhgd", grouped, value).flatten(1, 2)
        call.out[rows] = out.to(call.out.dtype)
        if call.lse is not None:
            call.lse[rows] = lse.transpose(0, 1)
