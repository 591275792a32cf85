"""In which order ops are tried, by card and batch: data, each rule with its reason."""

from dataclasses import dataclass, replace

import torch

from xfv1.device import Capabilities, Device
from xfv1.kernels.paged.tiling import MAX_HEAD_SIZE
from xfv1.ops.base import Layer
from xfv1.phase import DECODE, ENCODER, PREFILL, Batch


@dataclass(frozen=True)
class Rule:
    """Ops in the order to try them, where a batch's facts lie within bounds (inclusive).

    kind: the batch's.
    why: the reason for the order.
    num_reqs, seq_lens: rounded up to powers of two; seq_lens and query_lens: the longest request's.
    dtypes: the model's; empty for any.
    devices: kinds of devices; empty for any.
    """

    kind: str
    order: tuple[str, ...]
    why: str = ""
    head_sizes: tuple[int, int] = (1, MAX_HEAD_SIZE)
    num_reqs: tuple[int, int] = (0, 1 << 30)
    seq_lens: tuple[int, int] = (0, 1 << 30)
    query_lens: tuple[int, int] = (0, 1 << 30)
    dtypes: tuple[torch.dtype, ...] = ()
    devices: tuple[str, ...] = ()
    capability: Capabilities = ((0, 0), (99, 0))

    def fits(self, layer: Layer, batch: Batch, device: Device) -> bool:
        return (
            self.kind == batch.kind
            and self.head_sizes[0] <= layer.head_size <= self.head_sizes[1]
            and self.num_reqs[0] <= batch.num_reqs <= self.num_reqs[1]
            and self.seq_lens[0] <= batch.max_seq_len <= self.seq_lens[1]
            and self.query_lens[0] <= batch.max_query_len <= self.query_lens[1]
            and (not self.dtypes or layer.dtype in self.dtypes)
            and (not self.devices or device.kind in self.devices)
            and self.capability[0] <= device.capability <= self.capability[1]
        )


def _on(device: str, capability: Capabilities, *rules: Rule) -> tuple[Rule, ...]:
    """The rules, for these cards alone. device: their kind."""
    return tuple(replace(rule, devices=(device,), capability=capability) for rule in rules)


def _few_queries(*order: str) -> Rule:
    """Prefills of few queries over long requests."""
    why = (
        "few queries of long requests: 64 of 8 queries over 2048 keys took an H100 256 us by the"
        " own kernel, which reads pages, and 1194 us with their keys gathered first"
    )
    return Rule(PREFILL, order, why, query_lens=(0, 32), seq_lens=(256, 1 << 30))


TURING, AMPERE = ((0, 0), (7, 9)), ((8, 0), (8, 9))
HOPPER, BLACKWELL = ((9, 0), (9, 9)), ((10, 0), (99, 0))
CDNA, RDNA, ANY = ((0, 0), (9, 9)), ((10, 0), (99, 0)), ((0, 0), (99, 0))
HALF = (torch.float16, torch.bfloat16)
# Over contiguous keys: a prefill's own, or gathered from the pages.
GATHERED = ("xformers_fa2", "xformers_cutlass")

# The first rule that fits decides. Only Hopper's are measured (benchmarks/results,
# h100-kernels.json); the others are inferred, by the reason given.
RULES: tuple[Rule, ...] = (
    *_on(
        "cuda",
        TURING,
        Rule(DECODE, ("triton", "torch"), "no other op serves decodes on Turing"),
        _few_queries("triton", "xformers_cutlass", "torch"),
        *(
            Rule(
                kind,
                ("xformers_cutlass", "triton", "torch"),
                "cutlass uses Turing's tensor cores, which Triton does not",
            )
            for kind in (PREFILL, ENCODER)
        ),
    ),
    # Ampere and Ada.
    *_on(
        "cuda",
        AMPERE,
        Rule(
            DECODE,
            ("vllm_fa2", "triton", "xformers_splitk", "torch"),
            "FlashAttention 2 was written for Ampere, and vLLM itself takes it there; next is the"
            " own kernel, which beat split-K in nine rows of ten on an H100, by instructions that"
            " Ampere has",
        ),
        _few_queries("vllm_fa2", "triton", *GATHERED, "torch"),
        *(
            Rule(
                kind,
                ("vllm_fa2", *GATHERED, "triton", "torch"),
                "FlashAttention 2 was written for Ampere; vLLM's build reads the pages",
            )
            for kind in (PREFILL, ENCODER)
        ),
    ),
    # vLLM's FlashAttention 2 is built for sm_80 and as PTX: on later cards the driver compiles it
    # at first use, which can take minutes. xfv1's own kernel takes seconds.
    *_on(
        "cuda",
        HOPPER,
        Rule(
            DECODE,
            ("triton", "vllm_fa3", "xformers_fa3", "xformers_splitk", "vllm_fa2", "torch"),
            "measured: 8 requests of 4k keys take FlashAttention 3 60 us, the own kernel 54",
            head_sizes=(128, 128),
            num_reqs=(2, 16),
            dtypes=HALF,
        ),
        Rule(
            DECODE,
            ("triton", "vllm_fa3", "xformers_fa3", "xformers_splitk", "vllm_fa2", "torch"),
            "measured: 32 requests of 4k keys take FlashAttention 3 172 us, the own kernel 143",
            head_sizes=(80, 80),
            num_reqs=(2, 64),
            dtypes=HALF,
        ),
        Rule(
            DECODE,
            ("vllm_fa3", "triton", "xformers_fa3", "xformers_splitk", "vllm_fa2", "torch"),
            "measured: in all other rows FlashAttention 3 is the fastest, or within 1 us of it",
        ),
        Rule(
            PREFILL,
            ("vllm_fa3", "xformers_fa3", "triton", *GATHERED, "vllm_fa2", "torch"),
            "measured: 4 prompts of 2048 take FlashAttention 3 268 us, the own kernel 460,"
            " PyTorch's FlashAttention 2 537",
            dtypes=HALF,
        ),
        _few_queries("triton", *GATHERED, "torch"),
        Rule(
            PREFILL,
            (*GATHERED, "triton", "torch"),
            "float32 is cutlass's or the own kernel's; the order is not measured",
        ),
        Rule(
            ENCODER,
            ("xformers_fa3", "vllm_fa3", *GATHERED, "triton", "vllm_fa2", "torch"),
            "as prefills; no keys have to be gathered",
        ),
    ),
    *_on(
        "cuda",
        BLACKWELL,
        Rule(
            DECODE,
            ("triton", "xformers_splitk", "vllm_fa2", "torch"),
            "FlashAttention 3 is Hopper's alone; the own kernel was the next on an H100",
        ),
        Rule(
            PREFILL,
            ("triton", "xformers_fa2", "vllm_fa2", "torch"),
            "FlashAttention 3 is Hopper's alone, and cutlass ends with Hopper; the own kernel was"
            " the next on an H100",
        ),
        Rule(
            ENCODER,
            ("xformers_fa2", "triton", "vllm_fa2", "torch"),
            "FlashAttention 2 reads contiguous keys as they lie; the own kernel takes them for"
            " pages of one token",
        ),
    ),
    *_on(
        "hip",
        CDNA,
        Rule(
            DECODE,
            ("xformers_splitk", "triton", "torch"),
            "xFormers' authors ran split-K on an MI300X; the own kernel has not run on AMD",
        ),
    ),
    *_on(
        "hip",
        RDNA,
        Rule(
            DECODE,
            ("triton", "xformers_splitk", "torch"),
            "the own kernel's tiles are cut for RDNA's registers; split-K's were chosen on an"
            " MI300X",
        ),
    ),
    *_on(
        "hip",
        ANY,
        _few_queries("triton", "xformers_ck", "torch"),
        *(
            Rule(
                kind,
                ("xformers_ck", "triton", "torch"),
                "ck is AMD's own kernel, and has run there; to gather keys took 1 to 16 % of a"
                " prefill on an H100",
            )
            for kind in (PREFILL, ENCODER)
        ),
    ),
    # In Triton's interpreter, so that tests see these ops.
    *_on(
        "cpu",
        ANY,
        *(
            Rule(
                kind,
                ("xformers_splitk", "triton", "torch"),
                "Triton's kernels where its interpreter runs them, else PyTorch",
            )
            for kind in (DECODE, PREFILL, ENCODER)
        ),
    ),
)
