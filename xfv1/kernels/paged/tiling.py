"""How a launch of the own kernel is tiled on each card, and how much shared memory that takes.

The tilings for tensor cores were measured on an H100 (benchmarks/results, sweep). Those of other
cards are derived from them, or from what the compiler spills, each by the reason beside it; they
have never been timed. tests/cards compiles all of them, and compares `shared_memory` with what the
compiler takes.
"""

import functools
from dataclasses import dataclass, replace

from xfv1.device import Device

# Larger heads fit no tile.
MAX_HEAD_SIZE = 512
# Up to this many rows of a request and KV head count as decode: bound by memory, one tile of rows.
MAX_DECODE_ROWS = 64
MAX_PREFILL_ROWS = 128
# So many small tiles of a decode should fit into a multiprocessor's shared memory together.
DECODE_PROGRAMS = 3
# sm_86, sm_89 and sm_120 have less than this, Ampere's sm_80 more.
SMALL_SHARED_MEMORY = 128 * 1024
# A tile has this many rows, and keys, at least; only registers make it smaller.
SMALLEST = 16
# The head size, and the bytes of an element of the queries and of the keys.
Sizes = tuple[int, int, int]


@dataclass(frozen=True)
class Config:
    """How a launch is tiled: rows and keys per tile, powers of two, and Triton's knobs."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Tiles of cards whose operands lie in registers. The first number of each entry is the largest
# padded head size that it is for. Then come the most rows, the keys and the fewest warps of a tile.
# These are the largest tiles that spill little or nothing (docs/cards.md).
Registers = tuple[tuple[int, int, int, int], ...]
TURING: Registers = ((64, 64, 32, 8), (128, 32, 32, 8), (256, 16, 16, 4), (512, 8, 16, 8))
TURING_FLOAT32: Registers = ((64, 64, 32, 8), (256, 16, 16, 8), (512, 8, 16, 8))
RDNA: Registers = ((64, 128, 32, 2), (128, 64, 16, 2), (256, 64, 16, 4), (512, 16, 16, 8))
RDNA_FLOAT32: Registers = ((64, 32, 16, 8), (512, 16, 16, 8))


def decode_config(
    device: Device, head_size: int, rows: int, query_bytes: int, key_bytes: int
) -> Config:
    """Tiling where few rows share the keys and memory is the limit.

    Args:
        rows: query tokens of a request times query heads of a KV head.
        query_bytes: of an element of the queries, in whose dtype products are computed.
        key_bytes: of an element of the cache.
    """
    return _config(device, head_size, min(rows, MAX_DECODE_ROWS), query_bytes, key_bytes, True)


def prefill_config(
    device: Device, head_size: int, rows: int, query_bytes: int, key_bytes: int
) -> Config:
    """Tiling where many rows share the keys and arithmetic is the limit; see `decode_config`."""
    return _config(device, head_size, min(rows, MAX_PREFILL_ROWS), query_bytes, key_bytes, False)


@functools.lru_cache(maxsize=4096)
def _config(
    device: Device, head_size: int, rows: int, query_bytes: int, key_bytes: int, decode: bool
) -> Config:
    sizes = head_size, query_bytes, key_bytes
    float32 = query_bytes == 4
    if _is_turing(device):
        config = _in_registers(TURING_FLOAT32 if float32 else TURING, head_size, rows)
    elif _is_rdna(device):
        config = _in_registers(RDNA_FLOAT32 if float32 else RDNA, head_size, rows)
    else:
        if float32:
            config = _float32(head_size, rows)
        else:
            config = (_decode if decode else _prefill)(head_size, rows)
        if device.kind == "hip":
            # A wavefront is two warps: as many threads as on an H100. One stage, as vLLM's own
            # Triton kernels have on ROCm (vllm/v1/attention/ops/prefix_prefill.py).
            config = replace(config, num_warps=config.num_warps // 2, num_stages=1)
        elif device.kind == "cuda" and not _is_hopper(device):
            if float32 and key_bytes == 1:
                # Two stages of float8 beside float32 spill.
                config = replace(config, num_stages=1)
            if _is_ampere_like(device):
                config = _ampere(config, device, sizes, decode)
    return _cut(config, device, sizes)


def _ampere(config: Config, device: Device, sizes: Sizes, decode: bool) -> Config:
    """An H100's tiling, smaller where registers hold the tensor cores' operands.

    It has fewer stages where a multiprocessor has less shared memory.
    """
    head_size, query_bytes, key_bytes = sizes
    programs = 1
    if decode and config.block_m == SMALLEST and head_size <= 256:
        programs = DECODE_PROGRAMS
    # An H100's rows of large heads would spill, and its keys of smaller ones.
    if head_size > 256:
        config = replace(config, block_m=min(config.block_m, 32))
    elif head_size > 128 and not decode:
        config = replace(config, block_m=min(config.block_m, 64))
    elif head_size > 64 and not decode and query_bytes == 2:
        # FlashAttention 2 found this to be the fastest on sm_86, two programs to a multiprocessor
        # (csrc/flash_attn/src/flash_fwd_launch_template.h).
        config = replace(config, block_n=32)
        programs = 2 if device.shared_memory < SMALL_SHARED_MEMORY else 1
    if config.block_m == 64 and head_parts(head_size)[1]:
        config = replace(config, block_n=SMALLEST)
    # Float8 that is decoded in registers spills as well, unless there are fewer keys.
    if key_bytes == 1 and not device.converts_e4m3:
        config = replace(config, block_n=max(config.block_n // 2, SMALLEST))
    if config.num_stages > 2 and programs * _operands(device, config, sizes) > device.shared_memory:
        config = replace(config, num_stages=2)
    return config


def _is_turing(device: Device) -> bool:
    """Whether Triton uses no tensor cores: it does from Ampere on."""
    return device.kind == "cuda" and device.capability < (8, 0)


def _is_hopper(device: Device) -> bool:
    return device.kind == "cuda" and (9, 0) <= device.capability < (10, 0)


def _is_ampere_like(device: Device) -> bool:
    """Whether tensor cores take their operands from registers, as on Ampere, Ada and the smaller
    Blackwell; Hopper's and the larger Blackwell's take them from shared memory."""
    return device.kind == "cuda" and not (9, 0) <= device.capability < (12, 0)


def _is_rdna(device: Device) -> bool:
    """Whether it is one of AMD's cards for desktops: their warps have 32 threads, and registers
    hold a matrix operand twice."""
    return device.kind == "hip" and device.warp_size == 32


def _decode(head_size: int, rows: int) -> Config:
    """Few rows want small tiles, 8 KiB of keys, and many small programs to a multiprocessor; where
    the rows fill a tile, 16 KiB, of which ``num_stages - 1`` are in flight."""
    block_m = _row_tile(rows, MAX_DECODE_ROWS)
    if head_size > 256:
        return Config(block_m, 32, 8, 2)
    keys = 8192 // max(power_of_2(head_size), 64)
    if block_m == SMALLEST:
        return Config(block_m, keys // 2, 2, 3)
    return Config(block_m, keys, 8 if block_m == 64 else 4, 3)


def _prefill(head_size: int, rows: int) -> Config:
    if head_size > 256:
        return Config(_row_tile(rows, 64), 32, 8, 2)
    return Config(_row_tile(rows, MAX_PREFILL_ROWS), 64 if head_size <= 128 else 32, 8, 3)


def _float32(head_size: int, rows: int) -> Config:
    """Tensor cores do not multiply IEEE float32: tiles lie in registers, and must be small."""
    block_m = _row_tile(rows, 64 if head_size <= 64 else 16)
    return Config(block_m, 32 if head_size <= 128 else 16, 8, 2)


def _in_registers(table: Registers, head_size: int, rows: int) -> Config:
    """One stage: nothing is copied asynchronously, so a second one would wait in registers too."""
    _, most, keys, warps = next(row for row in table if head_size <= row[0])
    block_m = _row_tile(rows, most)
    return Config(block_m, keys, max(warps, min(block_m // 8, 8)), 1)


def _cut(config: Config, device: Device, sizes: Sizes) -> Config:
    """The tiling, made smaller until it fits: stages, then rows beyond 64, keys, rows, the last
    stage."""
    while shared_memory(device, config, *sizes) > device.shared_memory:
        m, n, warps, stages = config.block_m, config.block_n, config.num_warps, config.num_stages
        if stages > 2:
            config = replace(config, num_stages=stages - 1)
        elif m > 64:
            config = replace(config, block_m=m // 2, num_warps=max(warps // 2, 4))
        elif n > SMALLEST:
            config = replace(config, block_n=n // 2)
        elif m > SMALLEST:
            config = replace(config, block_m=m // 2, num_warps=max(warps // 2, 2))
        elif stages > 1:
            config = replace(config, num_stages=1)
        else:
            break
    return config


def shared_memory(
    device: Device, config: Config, head_size: int, query_bytes: int, key_bytes: int
) -> int:
    """Bytes of shared memory that a launch takes at most, as Triton 3.8 lays it out.

    The loop over keys holds operands there. After it, the rows' sums are rearranged there to be
    stored, in float32 if keys are split over programs.
    """
    sums = config.block_m * sum(head_parts(head_size)) * 4
    return max(_operands(device, config, (head_size, query_bytes, key_bytes)), sums)


def _operands(device: Device, config: Config, sizes: Sizes) -> int:
    """Bytes of shared memory that the loop over keys takes at most."""
    head_size, query_bytes, key_bytes = sizes
    d = sum(head_parts(head_size))
    m, n, stages = config.block_m, config.block_n, config.num_stages
    queries, logits = m * d * query_bytes, m * n * query_bytes
    keys = n * d * key_bytes
    # Keys of float8 are stored once more as what they are multiplied as.
    converted = n * d * query_bytes if key_bytes < query_bytes else 0
    if device.kind == "hip":
        # One stage, and queries that make room for the keys.
        return max(queries, keys, converted) + logits
    if _is_turing(device):
        operands = (m + n) * d * 4 + (logits + 256 if query_bytes == 4 else 0)
        return max(operands, 2 * m * n * 4)
    buffers, barriers = (stages - 1, 256) if _is_ampere_like(device) else (stages, 1024)
    # In one stage the values come after the keys, and lie where these were.
    held = 2 * buffers * keys if stages > 1 else keys
    wide = m < 16 * config.num_warps or d > 128
    return queries + held + converted + (logits if wide else 0) + barriers


def power_of_2(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


def _row_tile(rows: int, most: int) -> int:
    """Rows of a tile, up to `most`."""
    return min(max(power_of_2(rows), SMALLEST), most)


def head_parts(head_size: int) -> tuple[int, int]:
    """(D1, D2), powers of two that cover the head size: 192 = 128 + 64, 80 = 128 + 0.

    A second part below 64 would save work, but compiled for sm_90 by Triton 3.6 it gives wrong
    numbers for some tilings (head sizes 40, 72, 80, 96 and 160 on an H100).
    """
    padded = max(power_of_2(head_size), 16)
    part1 = padded // 2
    part2 = power_of_2(max(head_size - part1, 1))
    return (part1, part2) if 64 <= part2 < part1 else (padded, 0)
