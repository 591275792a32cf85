"""XFV1_DEBUG=1: the arguments that vLLM hands over are checked before any kernel gets them.

A kernel that gets a wrong length or block id reads memory that is not its own: the answer is
wrong, or the device is lost and the error names some later call. These checks name the argument,
its value and what is accepted: TypeError for a dtype, ValueError for all else.

Values on the device are read, which waits for it. While a CUDA graph is captured they cannot be
read, and only what the host knows is checked. When a graph is replayed, only the builder's
arguments are checked.
"""

from typing import Any

import torch

from xfv1 import settings
from xfv1.ops.base import Layer
from xfv1.phase import Phase

Bound = int | torch.Tensor


def enabled() -> bool:
    """Whether XFV1_DEBUG asks for checks; a builder or a layer asks once, when it is made.

    Raises:
        ValueError: for a setting other than 0 and 1.
    """
    return settings.debug()


def check_batch(common: Any, host_lens: torch.Tensor | None, *, encoder: bool, cross: bool) -> None:
    """Check the lengths that a builder is given, in vLLM's CommonAttentionMetadata.

    host_lens: the builder's bounds on seq_lens, None if it has none.
    encoder: the layers have no cache, so each request has as many keys as queries.
    cross: seq_lens are an encoder's.
    """
    num_reqs, device = common.num_reqs, common.query_start_loc.device
    for name, least, where in (
        ("query_start_loc_cpu", num_reqs + 1, torch.device("cpu")),
        ("query_start_loc", num_reqs + 1, device),
        ("seq_lens", num_reqs, device),
    ):
        _check_vector(name, getattr(common, name), torch.int32, least, where)

    starts = common.query_start_loc_cpu[: num_reqs + 1]
    before = torch.cat([starts.new_zeros(1), starts[:-1]])
    first, tokens = int(starts[0]), common.num_actual_tokens
    _expect(first == 0, "query_start_loc_cpu[0]", first, "0")
    # Less than num_actual_tokens at the end: a graph's padding may be counted in that.
    _expect_each("query_start_loc_cpu", starts, before, tokens, "rising to num_actual_tokens")
    query_lens = starts.diff()
    longest = max(query_lens.tolist(), default=0)
    _expect(common.max_query_len >= longest, "max_query_len", common.max_query_len, f">= {longest}")
    if _capturing(device):
        return

    on_device = common.query_start_loc[: num_reqs + 1].cpu()
    _expect_each("query_start_loc", on_device, starts, starts, "as query_start_loc_cpu")
    seq_lens = common.seq_lens[:num_reqs].cpu()
    least = torch.zeros_like(query_lens) if cross else query_lens
    most = torch.full_like(query_lens, common.max_seq_len)
    if encoder:
        most = query_lens.where(query_lens > 0, most)
    _expect_each("seq_lens", seq_lens, least, most, "from its query tokens to max_seq_len")
    if host_lens is not None:
        name = "seq_lens_cpu_upper_bound"
        _expect_each(name, host_lens, seq_lens, None, "no less than seq_lens")


def check_update(
    layer: Layer,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Check the arguments of do_kv_cache_update."""
    _check_vector("slot_mapping", slot_mapping, torch.int64, 0, key.device)
    for name, tensor in (("key", key), ("value", value)):
        _check_heads(name, tensor, len(slot_mapping), layer.num_kv_heads, layer.head_size, key)
        # vLLM's op assumes that the heads of a token lie next to each other.
        packed = layer.num_kv_heads == 1 or tensor.stride(1) == layer.head_size
        _expect(packed, f"{name}.stride()", tensor.stride(), f"(any, {layer.head_size}, 1)")
    _check_cache(layer, kv_cache, key)
    if not _capturing(key.device):
        last = kv_cache.shape[0] * kv_cache.shape[2] - 1
        _expect_each("slot_mapping", slot_mapping.cpu(), -1, last, "a slot of kv_cache, -1: none")


def check_forward(
    layer: Layer,
    phase: Phase,
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    kv_cache: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    output: torch.Tensor,
    *,
    cross: bool,
) -> None:
    """Check the arguments of forward, and its metadata: all requests in one phase, and the slots.

    kv_cache: None for an encoder. cross: the keys are an encoder's.
    """
    rows, num_reqs = phase.rows.stop, phase.batch.num_reqs
    _check_heads("query", query, rows, layer.num_heads, layer.head_size, query)
    _check_heads("output", output, len(query), layer.num_heads, layer.head_size, query)
    _expect(len(output) == len(query), "output.shape", tuple(output.shape), f"{tuple(query.shape)}")
    # Cross attention's keys are as many as its encoder's tokens, and are written in one step only.
    rows = 0 if cross else rows
    for name, tensor in (("key", key), ("value", value)):
        if tensor is not None:
            _check_heads(name, tensor, rows, layer.num_kv_heads, layer.head_size, query)
    if kv_cache is None:
        return

    _check_cache(layer, kv_cache, query)
    _check_vector("slot_mapping", slot_mapping, torch.int64, rows, query.device)
    block_table, seq_lens = phase.block_table, phase.seq_lens
    shape, (num_blocks, _, block_size, _) = tuple(block_table.shape), kv_cache.shape
    fits = len(shape) == 2 and shape[0] == num_reqs
    _check_tensor("block_table", block_table, query.device, torch.int32)
    _expect(fits, "block_table.shape", shape, f"[{num_reqs}, blocks], a row to a request")
    if _capturing(query.device):
        return
    block_table, seq_lens = block_table.cpu(), seq_lens.cpu()
    longest = max(seq_lens.tolist(), default=0)
    width = -(-longest // block_size)
    enough = f"{width} columns or more for seq_lens to {longest} in blocks of {block_size}"
    _expect(shape[1] >= width, "block_table.shape", shape, enough)
    used = torch.arange(shape[1]) * block_size < seq_lens[:, None]
    _expect_each("block_table", block_table.where(used, 0), 0, num_blocks - 1, "blocks of kv_cache")


def _check_cache(layer: Layer, kv_cache: torch.Tensor, like: torch.Tensor) -> None:
    heads, content, shape = layer.num_kv_heads, 2 * layer.head_size, tuple(kv_cache.shape)
    fits = len(shape) == 4 and (shape[1], shape[3]) == (heads, content) and shape[2] > 0
    # vLLM allocates a quantized cache as bytes.
    stored = (torch.uint8, layer.kv_dtype) if layer.quantized else (like.dtype,)
    _check_tensor("kv_cache", kv_cache, like.device, *stored)
    _expect(fits, "kv_cache.shape", shape, f"[num_blocks, {heads}, block_size, {content}]")


def _check_heads(
    name: str, tensor: torch.Tensor, rows: int, heads: int, head_size: int, like: torch.Tensor
) -> None:
    """tensor: [rows or more, heads, head_size], of the dtype and on the device of ``like``."""
    shape = tuple(tensor.shape)
    fits = len(shape) == 3 and shape[0] >= rows and shape[1:] == (heads, head_size)
    _check_tensor(name, tensor, like.device, like.dtype)
    _expect(fits, f"{name}.shape", shape, f"[>= {rows}, {heads}, {head_size}]")


def _check_vector(
    name: str, vector: torch.Tensor, dtype: torch.dtype, least: int, device: torch.device
) -> None:
    """vector: [least or more]."""
    fits = vector.dim() == 1 and len(vector) >= least
    _check_tensor(name, vector, device, dtype)
    _expect(fits, f"{name}.shape", tuple(vector.shape), f"[>= {least}]")


def _check_tensor(
    name: str, tensor: torch.Tensor, device: torch.device, *dtypes: torch.dtype
) -> None:
    known, strides = " or ".join(map(str, dtypes)), tensor.stride()
    _expect(tensor.device == device, f"{name}.device", tensor.device, str(device))
    _expect(tensor.dtype in dtypes, f"{name}.dtype", tensor.dtype, known, TypeError)
    _expect(strides[-1:] == (1,), f"{name}.stride()", strides, "1 in the last dimension")


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _expect(
    holds: bool, name: str, value: object, accepted: str, error: type[Exception] = ValueError
) -> None:
    if not holds:
        raise error(f"{name}={value}: expected {accepted}")


def _expect_each(
    name: str, values: torch.Tensor, least: Bound, most: Bound | None, why: str
) -> None:
    """least <= values <= most in every element, all on the host; the first outside is named."""
    low = torch.as_tensor(least).expand_as(values)
    high = None if most is None else torch.as_tensor(most).expand_as(values)
    outside = values < low if high is None else (values < low) | (values > high)
    if outside.any():
        index = outside.nonzero()[0].tolist()
        at = tuple(index)
        upto = "or more" if high is None else f"to {int(high[at])}"
        raise ValueError(f"{name}{index}={int(values[at])}: expected {int(low[at])} {upto}, {why}")
