"""The rows that speed is judged by, as data: decode, prefill and serving."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

K = 1024
DECODE, PREFILL, TURING = "decode", "prefill", "turing"


@dataclass(frozen=True)
class Row:
    """One batch of one kernel table.

    query_len: new tokens of each request. keys: keys of each request, the new tokens' included.
    spread: the requests' keys are spread from 0.5 to 1.4 of that figure instead.
    dtype: of the model, in the fixtures' words.
    recorded: earlier figures on an H100 80GB HBM3 by contender, microseconds (decode) or TFLOP/s
        (prefill), with torch 2.11.0+cu130, Triton 3.6.0, vLLM 0.26.0, xFormers 0.0.35 and
        FlashInfer 0.6.14, where the copy ceiling was 3.0 TB/s and the product's 785 TFLOP/s.
    """

    phase: str
    num_reqs: int
    query_len: int
    keys: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int
    spread: bool = False
    dtype: str = "bf16"
    recorded: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def context(self) -> int:
        return self.keys - self.query_len

    @property
    def label(self) -> str:
        """The row as the tables call it."""
        tail = f"{self.num_heads}/{self.num_kv_heads}, {self.head_size}, {self.block_size}"
        if self.phase == DECODE:
            size = f"{self.keys // K}k" if self.keys % K == 0 else str(self.keys)
            return f"{self.num_reqs} × {'~' if self.spread else ''}{size}, {tail}"
        context = f" + {self.context}" if self.context else ""
        return f"{self.num_reqs} × {self.query_len}{context}, {tail}"

    @property
    def id(self) -> str:
        """The row in words a shell leaves alone."""
        size = f"{self.query_len}+{self.context}" if self.phase != DECODE else str(self.keys)
        heads = f"h{self.num_heads}kv{self.num_kv_heads}-d{self.head_size}-b{self.block_size}"
        return f"{self.phase}-{self.num_reqs}x{size}-{heads}"

    @property
    def seq_lens(self) -> tuple[int, ...]:
        """Keys of each request, in an order of no meaning."""
        if not self.spread:
            return (self.keys,) * self.num_reqs
        step = 0.9 / max(self.num_reqs - 1, 1)
        lens = [round(self.keys * (0.5 + step * i)) for i in range(self.num_reqs)]
        random.Random(self.id).shuffle(lens)
        return tuple(lens)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that a layer must read at least."""
        width = 4 if self.dtype == "fp32" else 2
        return sum(self.seq_lens) * self.num_kv_heads * self.head_size * 2 * width

    @property
    def flops(self) -> int:
        """Of both products over the causal triangle, context included."""
        q = self.query_len
        pairs = sum(q * (keys - q) + q * (q + 1) // 2 for keys in self.seq_lens)
        return 4 * self.num_heads * self.head_size * pairs

    def shrunk(self) -> "Row":
        """A batch of the same kind that a CPU finishes."""
        query_len = min(self.query_len, 24)
        context = min(self.context, 40)
        return replace(
            self, num_reqs=min(self.num_reqs, 3), query_len=query_len, keys=query_len + context,
            num_heads=2 * self.num_heads // self.num_kv_heads, num_kv_heads=2, dtype="fp32",
        )  # fmt: skip


def _decode(
    num_reqs: int, keys: int, num_heads: int, num_kv_heads: int, head_size: int, block_size: int,
    **recorded: float,
) -> Row:  # fmt: skip
    return Row(
        DECODE, num_reqs, 1, keys, num_heads, num_kv_heads, head_size, block_size,
        spread=num_reqs > 1, recorded=recorded,
    )  # fmt: skip


def _prefill(
    num_reqs: int, query_len: int, context: int, num_heads: int, num_kv_heads: int,
    head_size: int, block_size: int, **recorded: float,
) -> Row:  # fmt: skip
    return Row(
        PREFILL, num_reqs, query_len, query_len + context, num_heads, num_kv_heads, head_size,
        block_size, recorded=recorded,
    )  # fmt: skip


# fmt: off
DECODE_ROWS = (
    _decode(1, 4 * K, 32, 8, 128, 16, fa3=14, flashinfer=16, splitk=19, unified=26),
    _decode(1, 32 * K, 32, 8, 128, 16, fa3=56, flashinfer=56, splitk=72, unified=166),
    _decode(8, 4 * K, 32, 8, 128, 16, fa3=62, flashinfer=54, splitk=62, unified=74),
    _decode(32, 2 * K, 32, 8, 128, 16, fa3=100, flashinfer=96, splitk=114, unified=157),
    _decode(64, 4 * K, 32, 8, 128, 16, fa3=353, flashinfer=358, splitk=401, unified=401),
    _decode(256, 1 * K, 32, 8, 128, 16, fa3=350, flashinfer=346, splitk=384, unified=379),
    _decode(8, 4 * K, 32, 8, 128, 128, fa3=67, flashinfer=53, splitk=59, unified=75),
    _decode(64, 2 * K, 32, 32, 128, 16, fa3=669, flashinfer=676, splitk=737, unified=739),
    _decode(64, 4 * K, 64, 8, 64, 16, fa3=227, flashinfer=198, splitk=233, unified=327),
    _decode(32, 4 * K, 16, 8, 256, 16, fa3=380, flashinfer=355, splitk=378, unified=478),
    # FlashInfer ended in an illegal instruction here, splitk refuses the head size.
    _decode(32, 4 * K, 32, 8, 80, 16, fa3=184, unified=307),
)
PREFILL_ROWS = (
    _prefill(1, 8192, 0, 32, 8, 128, 16, fa3=633, unified=72, xf_fa3_paged=514, xf_fa3=631, xf_fa2=289, xf_cutlass=150),  # noqa: E501
    _prefill(4, 2048, 0, 32, 8, 128, 16, fa3=446, unified=68, xf_fa3_paged=312, xf_fa3=418, xf_fa2=231, xf_cutlass=129),  # noqa: E501
    _prefill(16, 512, 0, 32, 8, 128, 16, fa3=243, unified=56, xf_fa3_paged=142, xf_fa3=162, xf_fa2=116, xf_cutlass=51),  # noqa: E501
    _prefill(16, 1000, 0, 32, 8, 128, 128, fa3=382, unified=68, xf_fa3_paged=320, xf_fa3=330, xf_fa2=185, xf_cutlass=115),  # noqa: E501
    _prefill(4, 512, 7680, 32, 8, 128, 16, fa3=614, unified=72, xf_fa3_paged=471),
    _prefill(64, 8, 2040, 32, 8, 128, 16, fa3=81, unified=51, xf_fa3_paged=63),
    _prefill(4, 2048, 0, 16, 8, 256, 16, fa3=526, unified=76, xf_fa3_paged=411, xf_fa3=432, xf_fa2=242, xf_cutlass=112),  # noqa: E501
    _prefill(4, 2048, 0, 32, 8, 80, 16, fa3=353, unified=41, xf_fa3_paged=193, xf_fa3=255, xf_fa2=170, xf_cutlass=78),  # noqa: E501
)
# fmt: on
# Turing has no bf16, and no op that reads pages but unified_attention and xfv1's own: the prefill
# rows again in fp16, over keys gathered from the pages.
TURING_ROWS = tuple(replace(row, phase=TURING, dtype="fp16", recorded={}) for row in PREFILL_ROWS)
ROWS = {DECODE: DECODE_ROWS, PREFILL: PREFILL_ROWS, TURING: TURING_ROWS}

# What the default dispatch is to reach: time over the fastest peer's, and for Turing's op
# unified_attention's time over its.
MAX_RATIO = 1.10
MIN_TURING_GAIN = 3.0


@dataclass(frozen=True)
class Serving:
    """One run of vLLM's engine: random prompts, all of them given at once.

    recorded: output tokens/s by backend, on the card and versions of `Row.recorded`.
    """

    num_prompts: int = 128
    prompt_len: int = 1000
    output_len: int = 300
    max_num_seqs: int = 64
    block_size: int = 16
    recorded: Mapping[str, float] = field(
        default_factory=lambda: {"FLASH_ATTN": 4248, "TRITON_ATTN": 4185}
    )


SERVING = Serving()
# Llama-3.1-8B's shape; weights are drawn by vLLM.
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}
