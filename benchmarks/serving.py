"""vLLM's own engine over each backend: tokens a second, and whether the tokens are the same.

    python -m benchmarks.serving --backend CUSTOM FLASH_ATTN TRITON_ATTN --json out.json

Each backend has a process of its own, in which `LLM.generate` runs a model of Llama-3.1-8B's shape
with weights that vLLM draws, the same for all: random prompts given at once, greedy, no end of
sequence, no prefix caching. A shorter run of the same kind comes first, so that nothing is compiled
while the clock runs. CUSTOM is xfv1. The time is that of the whole call, prefills included.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.shapes import LLAMA_8B, SERVING
from tests.harness.output import save, say
from tests.harness.provenance import environment

BACKENDS = ("CUSTOM", "FLASH_ATTN", "TRITON_ATTN")
# In the first run, more prompts than run at a time: the rest join decodes that are under way.
LATECOMERS, WARM_TOKENS = 8, 16


def prompts_of(count: int, length: int, vocabulary: int, seed: int) -> list[dict[str, list[int]]]:
    rng = random.Random(seed)
    return [
        {"prompt_token_ids": [rng.randrange(vocabulary) for _ in range(length)]}
        for _ in range(count)
    ]


def serve(args: argparse.Namespace) -> dict[str, Any]:
    """One backend in this process.

    Raises:
        RuntimeError: if another backend than the one asked for ran.
    """
    from tests.harness.environment import prepare, register_models

    prepare()
    register_models("LlamaForCausalLM")
    import xfv1

    # Once more does no harm where the plugin is installed.
    xfv1.register()
    from vllm import LLM, SamplingParams

    backend = args.backend[0]
    config = dict(LLAMA_8B)
    if args.model_config:
        config |= json.loads(args.model_config.read_text())
    if args.layers:
        config["num_hidden_layers"] = args.layers
    total = args.prompt_len + args.output_len
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        llm = LLM(
            model=folder,
            tokenizer=folder,
            skip_tokenizer_init=True,
            load_format="dummy",
            generation_config="vllm",
            dtype=args.dtype,
            seed=0,
            max_model_len=1 << (total - 1).bit_length(),
            max_num_seqs=args.max_num_seqs,
            block_size=args.block_size,
            enable_prefix_caching=False,
            gpu_memory_utilization=args.gpu_memory_utilization,
            enforce_eager=args.enforce_eager,
            attention_config={"backend": backend},
            compilation_config=args.compilation_config,
        )
        start_s = time.perf_counter() - started
        impls = impls_of(llm)
        if backend == "CUSTOM" and impls not in (["XFormersImpl"], []):
            raise RuntimeError(f"asked for xfv1, but {impls} ran")

        def generate(prompts: list[dict[str, list[int]]], tokens: int) -> list[list[int]]:
            sampling = SamplingParams(
                temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
            )
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
            return [list(output.outputs[0].token_ids) for output in outputs]

        def drawn(count: int, seed: int) -> list[dict[str, list[int]]]:
            return prompts_of(count, args.prompt_len, config["vocab_size"], seed)

        warm = min(args.num_prompts, args.max_num_seqs + LATECOMERS)
        generate(drawn(warm, 1), min(WARM_TOKENS, args.output_len))
        prompts = drawn(args.num_prompts, 0)
        seconds = []
        for _ in range(args.repeats):
            begin = time.perf_counter()
            tokens = generate(prompts, args.output_len)
            seconds.append(time.perf_counter() - begin)
    count = sum(map(len, tokens))
    best = min(seconds)
    return {
        "backend": backend,
        "impls": impls,
        "start_s": round(start_s, 1),
        "seconds": [round(s, 3) for s in seconds],
        "output_tokens_per_s": round(count / best, 1),
        "total_tokens_per_s": round((count + args.num_prompts * args.prompt_len) / best, 1),
        "different_tokens": len({token for row in tokens for token in row}),
        "sha256": hashlib.sha256(json.dumps(tokens).encode()).hexdigest(),
        "tokens": tokens,
    }


def impls_of(llm: Any) -> list[str]:
    """Names of the attention implementations in the model's layers, as the engine built them."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return sorted(
        {type(layer.impl).__name__ for layer in layers.values() if hasattr(layer, "impl")}
    )


def first_difference(ours: list[list[int]], others: list[list[int]]) -> dict[str, int] | None:
    """Where two runs part: how many requests do, and the first such request's first token."""
    parted = [
        (request, next(i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]))
        for request, (a, b) in enumerate(zip(ours, others, strict=True))
        if a != b
    ]
    if not parted:
        return None
    request, token = parted[0]
    earliest = min(token for _, token in parted)
    return {
        "requests": len(parted), "first_request": request, "its_token": token,
        "earliest_token": earliest,
    }  # fmt: skip


def supervise(args: argparse.Namespace) -> int:
    """A process for each backend; results are written as they come."""
    state: dict[str, Any] = {
        "environment": environment(),
        "method": " ".join((__doc__ or "").split()),
        "setting": {
            name: getattr(args, name)
            for name in (
                "num_prompts", "prompt_len", "output_len", "max_num_seqs", "block_size", "dtype",
                "layers", "enforce_eager", "compilation_config", "gpu_memory_utilization",
            )
        },
        "recorded_output_tokens_per_s": dict(SERVING.recorded),
        "backends": {},
    }  # fmt: skip
    tokens: dict[str, list[list[int]]] = {}
    for backend in args.backend:
        result = child(backend, args.timeout)
        if "tokens" in result:
            tokens[backend] = result.pop("tokens")
            result["differs_from"] = {
                other: first_difference(tokens[backend], tokens[other])
                for other in tokens
                if other != backend
            }
        state["backends"][backend] = result
        save(args.json, state)
        say(f"{backend}: {json.dumps(result)[:1500]}")
    for backend, result in state["backends"].items():
        if "failed" in result:
            say(f"{backend:12s} failed: {result['failed'][-300:]}")
            continue
        same = [other for other, where in result["differs_from"].items() if where is None]
        say(
            f"{backend:12s} {result['output_tokens_per_s']:8.0f} output tokens/s"
            f" {result['total_tokens_per_s']:8.0f} total tokens/s  {result['sha256'][:12]}"
            + (f"  same tokens as {', '.join(same)}" if same else "")
        )
    say(f"results: {args.json}")
    return 0


def child(backend: str, timeout: float) -> dict[str, Any]:
    """Serve with one backend in a process of its own; its result, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        command = [sys.executable, "-m", "benchmarks.serving", *sys.argv[1:]]
        command += ["--worker", str(answer), "--backend", backend]
        log = Path(folder, "log")
        with log.open("wb") as stream:
            try:
                done = subprocess.run(
                    command, cwd=ROOT, stdout=stream, stderr=stream, timeout=timeout, check=False,
                )  # fmt: skip
                outcome = f"ended with {done.returncode}"
            except subprocess.TimeoutExpired:
                outcome = f"not done after {timeout:.0f} s"
        if answer.exists():
            result: dict[str, Any] = json.loads(answer.read_text())
            return result
        ending = log.read_text(errors="replace")[-3000:]
        return {"backend": backend, "failed": f"{outcome}: {ending}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", nargs="+", default=[*BACKENDS], metavar="NAME")
    parser.add_argument("--layers", type=int, help="fewer layers than the model's 32")
    parser.add_argument("--num-prompts", type=int, default=SERVING.num_prompts)
    parser.add_argument("--prompt-len", type=int, default=SERVING.prompt_len)
    parser.add_argument("--output-len", type=int, default=SERVING.output_len)
    parser.add_argument("--max-num-seqs", type=int, default=SERVING.max_num_seqs)
    parser.add_argument("--block-size", type=int, default=SERVING.block_size)
    parser.add_argument("--repeats", type=int, default=1, help="timed runs; the best counts")
    parser.add_argument("--model-config", type=Path, help="JSON to change the model's config by")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--enforce-eager", action="store_true", help="no graphs, no compilation")
    parser.add_argument("--compilation-config", type=json.loads, help="vLLM's, as JSON")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.85)
    parser.add_argument("--timeout", type=float, default=280.0, help="seconds for each backend")
    parser.add_argument("--json", type=Path, default=RESULTS / "serving.json")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is None:
        return supervise(args)
    save(args.worker, serve(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
