"""The facts about a launch that decide how much shared memory it takes."""

from dataclasses import dataclass

from xfv1.device import Device
from xfv1.kernels.paged.tiling import Config, shared_memory

# Triton's names of what keys are stored as; "u8" are bytes of float8_e4m3fn, decoded by xfv1.
BYTES = {"fp16": 2, "bf16": 2, "fp32": 4, "fp8e4nv": 1, "fp8e4b8": 1, "fp8e5": 1, "u8": 1}


@dataclass(frozen=True)
class Tile:
    """A tile of the attention kernel, or of the merge of its splits.

    head: the two parts of the padded head size. query_bytes: of an element of the queries. keys:
    what the cache stores, by Triton's name; empty for the queries' own dtype. merges: the splits of
    one row are added up, block_n of them at a time.
    """

    config: Config
    head: tuple[int, int]
    query_bytes: int
    keys: str = ""
    merges: bool = False

    def most(self, device: Device) -> int:
        """Bytes of shared memory that xfv1 expects at most."""
        # The parts' sum is a size that is padded to these parts.
        head_size = sum(self.head)
        if self.merges:
            return self.config.block_n * head_size * self.query_bytes
        key_bytes = BYTES[self.keys] if self.keys else self.query_bytes
        return shared_memory(device, self.config, head_size, self.query_bytes, key_bytes)

    def __str__(self) -> str:
        config, (part1, part2) = self.config, self.head
        words = ["merge"] if self.merges else []
        words += [f"{config.block_m}x{config.block_n}"]
        words += [f"head{part1}+{part2}" if part2 else f"head{part1}"]
        words += [f"warps{config.num_warps}", f"stages{config.num_stages}", f"q{self.query_bytes}"]
        return "-".join([*words, *([self.keys] if self.keys else [])])
