"""Shared by the xFormers ops: shapes, descriptions of lengths without a sync, and the call."""

import functools
import importlib.util
from typing import Any

import torch

from xfv1.ops.base import Call
from xfv1.phase import Phase


def installed_reasons(module: str) -> list[str]:
    """Why the xFormers that is installed has no op of a module of xformers.ops.fmha."""
    if importlib.util.find_spec("xformers") is None:
        return ["xformers is not installed"]
    missing = _unavailable(module)
    return [missing] if missing else []


@functools.cache
def _unavailable(module: str) -> str | None:
    """Why this build of xFormers cannot run the op of a module, or None. Imports xFormers."""
    try:
        found = importlib.import_module(f"xformers.ops.fmha.{module}")
        available: bool = found.FwOp.is_available()
    except Exception as error:
        # A build for another torch or Triton fails in many ways.
        return f"xformers does not load: {type(error).__name__}: {error}"
    if not available:
        return "this build of xformers lacks the op (see python -m xformers.info)"
    if getattr(found, "_fwd_kernel_splitK", found) is None:
        return "xformers has turned its Triton ops off (XFORMERS_ENABLE_TRITON=1 turns them on)"
    return None


def grouped(call: Call) -> torch.Tensor:
    """query as xFormers' [1, num_tokens, num_kv_heads, group, head_size].

    A graph's padding is left out: xFormers insists on as many rows as its lengths add up to.
    """
    rows = call.query[: call.phase.num_tokens]
    query: torch.Tensor = rows.unflatten(1, (call.layer.num_kv_heads, call.layer.group))
    return query[None]


def shared(tensor: torch.Tensor, group: int) -> torch.Tensor:
    """[tokens, num_kv_heads, head_size] as [1, tokens, num_kv_heads, group, head_size], no copy."""
    return tensor[None, :, :, None].expand(-1, -1, -1, group, -1)


def query_info(phase: Phase) -> Any:
    """xFormers' description of the queries' lengths."""
    from xformers.ops.fmha.attn_bias import _SeqLenInfo

    starts = phase.query_start_loc_cpu
    lens = starts[1:] - starts[:-1]
    return _SeqLenInfo(
        seqstart=phase.query_start_loc,
        max_seqlen=phase.batch.max_query_len,
        min_seqlen=int(lens.min()),
        seqstart_py=starts.tolist(),
    )


def pages_info(phase: Phase, width: int) -> Any:
    """xFormers' description of the keys' lengths in pages; the lengths stay on the device.

    width: tokens that a row of the block table has room for.
    """
    from xformers.ops.fmha.attn_bias import _PaddedSeqLenInfo

    num_reqs = phase.seq_lens.numel()
    starts = list(range(0, width * num_reqs + 1, width))
    return _PaddedSeqLenInfo(
        seqstart=torch.arange(0, len(starts), device=phase.seq_lens.device, dtype=torch.int32)
        * width,
        # xFormers reads no length on the host but the maximum, for which a bound will do.
        max_seqlen=phase.batch.max_seq_len,
        min_seqlen=0,
        seqstart_py=starts,
        seqlen=phase.seq_lens,
        seqlen_py=[phase.batch.max_seq_len] * num_reqs,
        padding=width,
    )


def paged_inputs(call: Call) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """(key, value, bias) over the paged cache: no copy, no sync. The bias is made once a step."""
    assert call.key_cache is not None and call.value_cache is not None
    num_blocks, block_size, num_kv_heads, head_size = call.key_cache.shape
    # One query sees all keys up to its own either way; the plain mask is cheaper.
    causal = call.layer.causal and call.batch.max_query_len > 1
    phase = call.phase
    bias = phase.once(("paged_bias", causal), lambda: _paged_bias(phase, block_size, causal))
    flat = (num_blocks * block_size, num_kv_heads, head_size)
    key = shared(call.key_cache.view(flat), call.layer.group)
    value = shared(call.value_cache.view(flat), call.layer.group)
    return key, value, bias


def _paged_bias(phase: Phase, block_size: int, causal: bool) -> Any:
    from xformers.ops.fmha.attn_bias import (
        PagedBlockDiagonalCausalWithOffsetPaddedKeysMask,
        PagedBlockDiagonalPaddedKeysMask,
    )

    # Splits are cut from the table's width, so none is left wider than the longest request.
    pages = -(-phase.batch.max_seq_len // block_size)
    table = phase.block_table[:, :pages]
    kind = (
        PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
        if causal
        else PagedBlockDiagonalPaddedKeysMask
    )
    return kind(
        q_seqinfo=query_info(phase),
        k_seqinfo=pages_info(phase, table.shape[1] * block_size),
        block_tables=table,
        page_size=block_size,
    )


def attend(call: Call, op: Any, key: torch.Tensor, value: torch.Tensor, bias: Any) -> None:
    """Run one xFormers op without xFormers' dispatch, which refuses more than 32 decodes."""
    from xformers.ops import fmha

    query = grouped(call)
    if call.lse is None:
        out = fmha.memory_efficient_attention_forward(
            query, key, value, attn_bias=bias, scale=call.scale, op=op
        )
    else:
        out, lse = fmha.memory_efficient_attention_forward_requires_grad(
            query, key, value, attn_bias=bias, scale=call.scale, op=op
        )
        rows = query.shape[1]
        call.lse[:rows] = packed_lse(call, lse, packed=op.VARLEN_LSE_PACKED)[:rows]
    call.out[: query.shape[1]] = out[0].flatten(1, 2)


def packed_lse(call: Call, lse: torch.Tensor, *, packed: bool) -> torch.Tensor:
    """xFormers' LSE as [num_tokens, num_heads].

    lse: [1, num_kv_heads, group, num_tokens] if packed, else, as cutlass leaves it, [num_reqs,
    num_kv_heads, group, at least the longest query].
    """
    if packed:
        return lse[0].flatten(0, 1).transpose(0, 1)
    requests, positions = call.phase.once("lse_rows", lambda: _lse_rows(call.phase))
    return lse[requests, :, :, positions].flatten(1)


def _lse_rows(phase: Phase) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's request, and its place among that request's tokens: [num_tokens] each."""
    starts, rows = phase.query_start_loc, phase.num_tokens
    requests = torch.arange(starts.numel() - 1, device=starts.device)
    # `output_size` avoids a sync: repeat_interleave would read the counts to size its result.
    requests = torch.repeat_interleave(requests, starts.diff(), output_size=rows)
    return requests, torch.arange(rows, device=starts.device) - starts[requests]
