"""Does xfv1 still give the same tokens after minutes of requests that come, wait and are evicted?

    python -m tests.programs.soak --minutes 10 --json docs/results/h100-soak.json    # on a GPU
    python -m tests.programs.soak --minutes 2 --tiny                                 # on a CPU

An engine under xfv1 is given requests of random lengths as they come, drawn from a pool, many with
a start in common, over a cache too small for those that run: prefix caching, preemption, n-gram
drafts, and CUDA graphs on a GPU. Every answer is compared with that of vLLM's own backend, which
answers each of the pool once, in a process beside it. `--minutes` bounds all of it.
"""

import argparse
import dataclasses
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.engine import agreement
from tests.engine.engine import Process, Run, Session
from tests.engine.models import MODELS, Model, prompt, tiny
from tests.harness.output import save, say
from tests.harness.provenance import environment
from tests.programs.same_tokens import IMPLS, XFV1, facts, reference_backend, unexercised

# Seconds before the end at which the last step is made, to write and to compare what came of it,
# on a machine that does other things too.
CLOSING = 20.0
FAMILIES, MOST_SHARED, LONGEST = 8, 320, 500


def pool(size: int, most_tokens: int) -> tuple[list[list[int]], list[int]]:
    """Prompts, two of three with the start of one of a few families, and the tokens to answer."""
    rng = random.Random(size)
    families = [prompt(1000 + family, MOST_SHARED) for family in range(FAMILIES)]
    prompts, lengths = [], []
    for seed in range(size):
        shared = rng.choice(families)[: rng.randint(32, MOST_SHARED)] if seed % 3 else []
        prompts.append(shared + prompt(seed, rng.randint(1, LONGEST - len(shared))))
        lengths.append(rng.randint(1, most_tokens))
    return prompts, lengths


def sessions(model: Model, size: int, most_tokens: int, end: float, *, cpu: bool) -> list[Session]:
    """xfv1's session, then the reference's."""
    prompts, lengths = pool(size, most_tokens)
    reference = Run(
        model, prompts, lengths, max_num_batched_tokens=256, max_num_seqs=16, max_model_len=1024,
        block_size=32 if cpu else 16, cached_tokens=1 << 14, graphs=not cpu,
        backend="" if cpu else reference_backend(model, cpu=cpu),
    )  # fmt: skip
    soak = dataclasses.replace(
        reference, until=end - CLOSING, prefix_caching=True, drafts=2,
        # Room for few of the sixteen that may run.
        cached_tokens=2048, backend="" if cpu else "CUSTOM",
    )  # fmt: skip
    # The same right answers in other steps: what those of the soak may be off by.
    jitter = dataclasses.replace(
        reference, jitter=1.0, graphs=False, max_num_batched_tokens=100, max_num_seqs=5
    )
    return [
        Session({"soak": soak}, {"XFV1_CPU": "1"} if cpu else {}),
        Session({"reference": reference, "jitter": jitter}),
    ]


def soak(model: Model, size: int, most_tokens: int, end: float, folder: Path) -> dict[str, Any]:
    """What came of it, as data; "problems" is empty if all is well.

    size: of the pool. most_tokens: that a request asks for. end: seconds since 1970 at which all
    is done.

    Raises:
        SessionError: if an engine failed.
    """
    from vllm.platforms import current_platform

    cpu = current_platform.is_cpu()
    own, other = sessions(model, size, most_tokens, end, cpu=cpu)
    processes = [Process(session, folder / f"{at}") for at, session in enumerate((own, other))]
    try:
        expected = processes[1].report(max(end - time.time(), 0)).runs
        ours = processes[0].report(max(end - time.time(), 0)).runs["soak"]
    finally:
        for process in processes:
            process.stop()
    bound = agreement.rounding(expected["reference"], expected["jitter"])
    result = agreement.compare(ours, expected["reference"], bound)
    backend = reference_backend(model, cpu=cpu)
    problems = result.problems()
    problems += [f"xfv1: no {what}" for what in unexercised(own.runs["soak"], ours, XFV1)]
    problems += [
        f"{backend}: no {what}"
        for what in unexercised(other.runs["reference"], expected["reference"], IMPLS[backend])
    ]
    if not ours.counters.get("vllm:num_preemptions"):
        problems.append("xfv1: no request was preempted")
    return {
        "problems": problems,
        **dataclasses.asdict(result),
        "xfv1": facts(ours),
        "reference": facts(expected["reference"]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="for all, starts included")
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--tiny", action="store_true", help="a narrow model, for a CPU")
    parser.add_argument("--pool", type=int, default=256, help="different requests")
    parser.add_argument("--most-tokens", type=int, default=128, help="that a request asks for")
    parser.add_argument("--json", type=Path, help="where the result is written")
    args = parser.parse_args()
    end = time.time() + 60 * args.minutes
    from tests.harness.environment import prepare

    prepare()
    model = tiny(MODELS[args.model]) if args.tiny else MODELS[args.model]
    with tempfile.TemporaryDirectory() as folder:
        result = soak(model, args.pool, args.most_tokens, end, Path(folder))
    if args.json:
        setting = {name: getattr(args, name) for name in ("minutes", "pool", "most_tokens")}
        state = {
            "environment": environment(),
            "method": " ".join((__doc__ or "").split()),
            "setting": {"model": args.model, "config": model.config, **setting},
            "result": result,
        }
        save(args.json, state)
    counts = result["xfv1"]["counters"]
    say(
        f"{result['answers']} answers, {result['identical']} identical, logprobs at most"
        f" {result['apart']:.1e} apart (bound {result['bound']:.1e});"
        f" {counts.get('vllm:num_preemptions', 0)} preemptions,"
        f" {counts.get('vllm:prefix_cache_hits', 0)} cached tokens,"
        f" {counts.get('vllm:spec_decode_num_accepted_tokens', 0)} drafts accepted"
    )
    for problem in result["problems"]:
        say(problem)
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
