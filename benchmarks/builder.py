"""Host cost of a step's metadata, and of the layers that use it, for xfv1 and vLLM's backends.

    python -m benchmarks.builder --json out.json

Each backend's own builder and impl, set up as for serving (captured graphs of decodes), are given
vLLM's description of a batch. build_us: one call of build(). first_layer_us: the host's time in the
step's first forward(), where xfv1 makes the plans that the other layers share. next_layer_us: in
any later one; a captured graph replays without either. All are medians; the device is idle before
each, so nothing waits for it unless the code itself does.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import RESULTS, environment, save, say
from benchmarks.kernels import driver_of
from fixtures.cases import AttnCase
from fixtures.inputs import TORCH_DTYPES, AttnInputs

BACKENDS = {
    "xfv1": "xfv1",
    "FLASH_ATTN": "vllm.v1.attention.backends.flash_attn:FlashAttentionBackend",
    "TRITON_ATTN": "vllm.v1.attention.backends.triton_attn:TritonAttentionBackend",
}
REQUESTS = (1, 64, 256)
KINDS = ("decode", "mixed")
KEYS, CHUNK = 1000, 512


def case_of(kind: str, requests: int, device: torch.device) -> AttnCase:
    """Llama-3.1-8B's heads. decode: a token each; mixed: the last is a chunk of a prompt."""
    cuda = device.type == "cuda"
    keys, chunk = (KEYS, CHUNK) if cuda else (KEYS // 20, CHUNK // 20)
    query_lens = [1] * requests
    if kind == "mixed":
        query_lens[-1] = chunk
    return AttnCase(
        query_lens=tuple(query_lens), seq_lens=(keys + chunk,) * requests, num_heads=32,
        num_kv_heads=8, head_size=128, block_size=16, dtype="bf16",
    )  # fmt: skip


def inputs_of(case: AttnCase, device: torch.device) -> AttnInputs:
    """Random tensors over pages in a random order."""
    dtype = TORCH_DTYPES[case.dtype]
    pages = -(-case.seq_lens[0] // case.block_size)
    requests = len(case.seq_lens)
    table = torch.randperm(requests * pages, device=device).int().view(requests, pages)
    shape = (requests * pages, case.block_size, case.num_kv_heads, 2 * case.head_size)
    cache = torch.randn(shape, device=device, dtype=dtype).transpose(1, 2)
    heads = {"query": case.num_heads, "key": case.num_kv_heads, "value": case.num_kv_heads}
    tensors = {
        name: torch.randn(case.num_tokens, count, case.head_size, device=device, dtype=dtype)
        for name, count in heads.items()
    }
    starts = torch.tensor((0, *case.query_lens), device=device).cumsum(0).int()
    return AttnInputs(
        case=case, **tensors, cache=cache, storage=cache, block_table=table,
        slot_mapping=torch.zeros(case.num_tokens, dtype=torch.int64, device=device),
        seq_lens=torch.tensor(case.seq_lens, dtype=torch.int32, device=device),
        query_start_loc=starts, scale=case.head_size**-0.5, alibi_slopes=None, sinks=None,
        k_scale=1.0, v_scale=1.0,
    )  # fmt: skip


def measure(backend: type[Any], inputs: AttnInputs, calls: int) -> dict[str, float]:
    """Median microseconds of the host."""
    from vllm.config import set_current_vllm_config

    from tests.harness.batch import common_metadata

    device = inputs.query.device
    driver = driver_of(backend, inputs.case, device)
    common = common_metadata(inputs)
    impl, layer, out = driver.layer.impl, driver.layer, torch.empty_like(inputs.query)
    times: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = call()
        times.setdefault(name, []).append((time.perf_counter() - start) * 1e6)
        return result

    def build() -> Any:
        return driver.builder.build(common_prefix_len=0, common_attn_metadata=common)

    def forward() -> None:
        impl.forward(
            layer, inputs.query, inputs.key, inputs.value, inputs.cache, metadata, output=out
        )

    with set_current_vllm_config(driver.config):
        for _ in range(calls):
            timed("build_us", build)
        for _ in range(max(calls // 10, 3)):
            metadata = build()
            timed("first_layer_us", forward)
            timed("next_layer_us", forward)
    # The first calls load and compile.
    return {
        name: round(statistics.median(found[min(3, len(found) - 1) :]), 1)
        for name, found in times.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backends", nargs="+", choices=[*BACKENDS], default=[*BACKENDS])
    parser.add_argument("--requests", nargs="+", type=int, default=[*REQUESTS])
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--json", type=Path, default=RESULTS / "builder.json")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run")
    args = parser.parse_args()
    from tests.harness.environment import prepare

    prepare()
    from tests.harness.loading import load_candidate

    device = torch.device(args.device)
    state: dict[str, Any] = {
        "environment": environment(),
        "method": " ".join((__doc__ or "").split()),
        "rows": [],
    }
    for kind in KINDS:
        for requests in args.requests:
            inputs = inputs_of(case_of(kind, requests, device), device)
            for name in args.backends:
                row: dict[str, Any] = {"backend": name, "kind": kind, "requests": requests}
                try:
                    row |= measure(load_candidate(BACKENDS[name]), inputs, args.calls)
                except Exception as error:
                    row["failed"] = f"{type(error).__name__}: {error}"
                state["rows"].append(row)
                save(args.json, state)
                say(" ".join(str(value) for value in row.values())[:200])
    say(f"results: {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
