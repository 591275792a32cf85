"""Does a server give through xfv1 the greedy tokens that it gives through vLLM's own backend?

    python -m tests.programs.same_served --json docs/results/h100-served.json    # on a GPU
    python -m tests.programs.same_served --ranks 2                               # on two GPUs
    python -m tests.programs.same_served --tiny                                  # on a CPU

`vllm serve` is started twice as README says, with `--attention-backend XFORMERS` (CUSTOM where vLLM
takes no other names) and with FLASH_ATTN (CPU_ATTN on a CPU), in vLLM's default mode: an engine of
its own process, torch.compile, CUDA graphs. xfv1 is the wheel that the checkout builds. The model
is a random checkpoint on disk. All prompts are sent at once. Tokens may part at near ties alone:
how near is measured on vLLM's own backend, whose attention is moved in the last place.
"""

import argparse
import dataclasses
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.engine import agreement
from tests.engine.checkpoint import VOCABULARY, save_llama
from tests.engine.engine import Answers
from tests.engine.installed import environment, install
from tests.engine.models import prompt
from tests.engine.server import Server, answers_of, run_script
from tests.harness.environment import prepare
from tests.harness.output import save, say
from tests.harness.provenance import environment as provenance

# Around blocks of 16, and past a step's budget.
LENGTHS = (1, 3, 15, 16, 17, 33, 64, 70, 130, 200, 255, 256, 257, 300, 400, 640) * 2
PROMPTS = [prompt(seed, length, VOCABULARY) for seed, length in enumerate(LENGTHS)]
MAX_TOKENS = 32
ENGINE: dict[str, Any] = {
    "max_model_len": 1024,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 1 << 30,
}
XFV1 = "xfv1.impl.XFormersImpl"
LAYERS = 4


def serve(
    folder: Path, site: Path, model: Path, backend: str, ranks: int, cpu: bool
) -> tuple[Answers, dict[str, Any]]:
    """Every prompt's answer by a server with that backend, and what its first worker says."""
    arguments = ["serve", str(model), "--worker-extension-cls", "observed.Worker"]
    arguments += ["--tensor-parallel-size", str(ranks)]
    for name, value in ENGINE.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    settings = {"VLLM_SERVER_DEV_MODE": "1"}
    own = backend in ("XFORMERS", "CUSTOM")
    if cpu:
        settings["XFV1_CPU"] = "1" if own else "0"
        arguments += ["--enforce-eager"]
    else:
        # Several servers and a script share the GPU.
        arguments += ["--gpu-memory-utilization", "0.1"]
        # vLLM's compiled graphs need a compiler that `environment` turns off for a CPU.
        settings["TORCHDYNAMO_DISABLE"] = "0"
    if own or not cpu:
        arguments += ["--attention-backend", backend]
    with Server(arguments, environment(site, **settings), folder) as server:
        server.wait()
        if own:
            server.workers("count_ops")
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            found = list(pool.map(lambda ids: server.complete(ids, MAX_TOKENS), PROMPTS))
        workers = server.workers("attention")
        code = server.stop()
    (impl,) = {impl for worker in workers for impl in worker["impls"]}
    facts = {
        "impl": impl,
        "ranks": len(workers),
        "layers": len(workers[0]["impls"]),
        "own process": all(worker["pid"] != server.process.pid for worker in workers),
        "calls outside of graphs": workers[0]["calls"],
        "exit status": code,
    }
    return answers_of(found), facts


def measure(folder: Path, ranks: int, tiny: bool, site: Path | None = None) -> dict[str, Any]:
    """All of it, as data; "problems" is empty if all is well.

    site: the folder where xfv1 is installed; None to build and install it.
    """
    import torch

    import xfv1

    cpu = not torch.cuda.is_available()
    site = site or install(folder / "installed")
    shape: dict[str, Any] = (
        {"heads": (4, 2), "head_size": 64}
        if tiny
        else {
            "heads": (16, 4),
            "head_size": 128,
            "dtype": "bfloat16",
        }
    )
    model = save_llama(folder / "model", layers=LAYERS, **shape)
    xfv1.register()
    own, reference = xfv1.registered_name(), "CPU_ATTN" if cpu else "FLASH_ATTN"
    eager = {"model": str(model), **ENGINE, "enforce_eager": True}
    if not cpu:
        eager |= {"attention_config": {"backend": reference}, "gpu_memory_utilization": 0.1}
    with ThreadPoolExecutor() as pool:
        servers = {
            name: pool.submit(serve, folder / name, site, model, name, ranks, cpu)
            for name in (own, reference)
        }
        scripts = {
            name: pool.submit(
                run_script, folder / name, environment(site), eager, PROMPTS, MAX_TOKENS, before
            )
            for name, before in {"plain": {}, "jitter": {"jitter": [1.0]}}.items()
        }
    plain, jittered = (scripts[name].result().answers for name in ("plain", "jitter"))
    bound = agreement.rounding(plain, jittered)
    (ours, facts), (theirs, their_facts) = (servers[n].result() for n in (own, reference))
    result = agreement.compare(ours, theirs, bound)
    checks = {
        f"{own} ran {facts['impl']}": facts["impl"] == XFV1,
        f"{reference} ran {their_facts['impl']}": their_facts["impl"] != XFV1,
        "the servers' engines were processes of their own": facts["own process"]
        and their_facts["own process"],
        f"{ranks} ranks": facts["ranks"] == their_facts["ranks"] == ranks,
        "both ended with status 0": facts["exit status"] == their_facts["exit status"] == 0,
    }
    problems = result.problems() + [f"not so: {what}" for what, held in checks.items() if not held]
    return {
        "problems": problems,
        "shape": shape,
        "prompts": len(PROMPTS),
        "tokens": MAX_TOKENS,
        **dataclasses.asdict(result),
        own: facts,
        reference: their_facts,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1, help="tensor parallel ranks, a GPU to each")
    parser.add_argument("--tiny", action="store_true", help="a narrow model, for a CPU")
    parser.add_argument("--site", type=Path, help="folder of an installed xfv1; else it is built")
    parser.add_argument("--json", type=Path, help="where the result is written")
    args = parser.parse_args()
    prepare()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args.ranks, args.tiny, args.site and args.site.resolve())
    if args.json:
        method = " ".join((__doc__ or "").split())
        save(args.json, {"environment": provenance(), "method": method, **result})
    say(
        f"{result['identical']} of {result['answers']} answers identical, logprobs at most"
        f" {result['apart']:.1e} apart (bound {result['bound']:.1e})"
    )
    for problem in result["problems"]:
        say(problem)
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
