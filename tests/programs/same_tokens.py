"""Does vLLM's engine give through xfv1 the greedy tokens that its own backend gives?

    python -m tests.programs.same_tokens --json docs/results/h100-engine.json    # on a GPU
    python -m tests.programs.same_tokens --tiny                                  # on a CPU
    python -m tests.programs.same_tokens --ranks 2                               # on two GPUs

Four models' shapes, weights drawn, served by xfv1 and by vLLM's FLASH_ATTN (TRITON_ATTN for ALiBi,
CPU_ATTN on a CPU): "plain" with chunked prefill and full CUDA graphs for decodes, "everything" with
prefix caching and n-gram drafts too. That each of these happened is asked of what ran. A process
for each backend and model, several at a time; results are written as they come.

Of several ranks, each a process with a GPU and a share of the heads, xfv1's share the cache too
(decode context parallelism), and vLLM's backend's each have all of it. The model is then Llama's
with one KV head, as vLLM spreads a cache over ranks only where they would hold the same.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tests.engine import agreement
from tests.engine.engine import (
    Answers,
    Process,
    Report,
    Run,
    RunReport,
    Session,
    SessionError,
)
from tests.engine.models import MODELS, Model, prompt, tiny
from tests.harness.output import save, say
from tests.harness.provenance import environment

BUDGET = 256
# Around blocks of 16 and past the budget of a step; the last ones share the longest's start.
LENGTHS = (1, 3, 16, 17, 33, 70, 130, 200, 255, 256, 257, 300, 400, 640)
SHARED, TAILS = 320, (1, 5, 16, 17, 40, 80, 120, 150, 190, 250)
PROMPTS = [prompt(seed, length) for seed, length in enumerate(LENGTHS)]
PROMPTS += [PROMPTS[-1][:SHARED] + prompt(100 + length, length) for length in TAILS]
DRAFTS = 2
SIDES = ("xfv1", "reference")
# The fault that a run has to show: tokens compared tell nothing where it changes none.
FAULT, FAULTY_MODEL = "newest_key_lost", "llama-3.1-8b"
# Processes at a time, and seconds for each.
JOBS, TIMEOUT = 8, 200.0
PLAIN, EVERYTHING, JITTER = "plain", "everything", "jitter"
XFV1 = "xfv1.impl.XFormersImpl"
_BACKENDS = "vllm.v1.attention.backends"
IMPLS = {
    "CPU_ATTN": f"{_BACKENDS}.cpu_attn.CPUAttentionBackendImpl",
    "FLASH_ATTN": f"{_BACKENDS}.flash_attn.FlashAttentionImpl",
    "TRITON_ATTN": f"{_BACKENDS}.triton_attn.TritonAttentionImpl",
}


def reference_backend(model: Model, *, cpu: bool) -> str:
    """vLLM's own backend for a model. FlashAttention 3 has no ALiBi."""
    if cpu:
        return "CPU_ATTN"
    return "TRITON_ATTN" if model.config["model_type"] == "bloom" else "FLASH_ATTN"


def session(name: str, model: Model, side: str, *, cpu: bool, ranks: int = 1) -> Session:
    """One model's runs by one backend: "plain", "everything", and what they are judged by."""
    own = side == "xfv1"
    backend = "CUSTOM" if own else reference_backend(model, cpu=cpu)
    plain = Run(
        model, PROMPTS, max_tokens=24, max_num_batched_tokens=BUDGET, max_num_seqs=16,
        # CPU_ATTN takes no blocks of 16.
        block_size=32 if cpu else 16, max_model_len=1024, cached_tokens=1 << 14, graphs=not cpu,
        # vLLM's CPU platform offers one backend, which XFV1_CPU replaces.
        backend="" if cpu else backend, context_parallel=ranks if own else 1,
    )  # fmt: skip
    runs = {
        PLAIN: plain,
        EVERYTHING: dataclasses.replace(plain, prefix_caching=True, drafts=DRAFTS),
    }
    if not own:
        runs[JITTER] = dataclasses.replace(plain, graphs=False, jitter=1.0)
    elif name == FAULTY_MODEL:
        runs[FAULT] = dataclasses.replace(plain, graphs=False, fault=FAULT)
    return Session(runs, {"XFV1_CPU": "1"} if cpu and own else {}, ranks)


def unexercised(run: Run, report: RunReport, impl: str) -> list[str]:
    """What a run was to use and did not, in words; empty if it used all."""
    own = impl == XFV1
    decode = 1 + run.drafts
    chunks = [length for op in report.ops if " prefill " in op for length in [int(op.split()[-1])]]
    decodes = report.captured if run.graphs else report.ops
    decoded = {int(op.split()[-1]) for op in decodes if " decode " in op}
    drafted = "vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens"
    checks = {
        f"{impl} in every layer: {set(report.impls)}": set(report.impls) == {impl}
        and len(report.impls) == run.model.num_layers,
        f"cache over {run.context_parallel} ranks: {report.context_ranks}": report.context_ranks
        == run.context_parallel,
        "steps outside of graphs": min(report.forwards) > 0,
        f"full CUDA graphs: {report.graphs}, {report.replays} replays": not run.graphs
        or (report.graphs == "FULL_DECODE_ONLY" and report.replays > 0),
        f"prompts cut to {run.max_num_batched_tokens} tokens: {chunks}": not own
        or 1 < max(chunks, default=0) <= run.max_num_batched_tokens < max(map(len, run.prompts)),
        "answer to every prompt": sorted(set(report.prompts)) == [*range(len(run.prompts))]
        or run.until > 0,
        f"decodes of {decode} tokens: {sorted(decoded)}": not own or decode in decoded,
        "cached prefixes": not run.prefix_caching or sum(report.cached) > 0,
        "drafts, proposed and accepted": not run.drafts
        or all(report.counters.get(name, 0) > 0 for name in drafted),
    }
    return [what for what, held in checks.items() if not held]


def compared(
    run: Run, ours: RunReport, reference: RunReport, backend: str, bound: float
) -> dict[str, Any]:
    """One run by both backends, as data; "problems" is empty if all is well."""
    result = agreement.compare(ours, reference, bound)
    if run.fault:
        noticed = bool(result.problems()) and result.identical < result.answers / 2
        problems = [] if noticed else [f"{run.fault} changed too little"]
    else:
        problems = result.problems()
        problems += [f"xfv1: no {what}" for what in unexercised(run, ours, XFV1)]
        whole = dataclasses.replace(run, context_parallel=1)
        problems += [
            f"{backend}: no {what}" for what in unexercised(whole, reference, IMPLS[backend])
        ]
    return {
        "problems": problems,
        **dataclasses.asdict(result),
        "xfv1": facts(ours),
        "reference": facts(reference),
    }


def facts(report: RunReport) -> dict[str, Any]:
    """What of a run is not per token."""
    left_out = {field.name for field in dataclasses.fields(Answers)} | {"impls", "backends"}
    content = dataclasses.asdict(report)
    return {
        "impls": sorted(set(report.impls)),
        "smallest_margin": min(min(steps) for steps in report.margins),
        **{name: value for name, value in content.items() if name not in left_out},
    }


def measure(
    names: list[str], folder: Path, *, small: bool, jobs: int, timeout: float, ranks: int = 1
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each model's results, as they come: its runs, or why a process failed."""
    from vllm.platforms import current_platform

    cpu = current_platform.is_cpu()
    models = {name: tiny(MODELS[name]) if small else MODELS[name] for name in names}
    if ranks > 1:
        models = {name: model.sized(num_key_value_heads=1) for name, model in models.items()}
    sessions = {
        (name, side): session(name, model, side, cpu=cpu, ranks=ranks)
        for name, model in models.items()
        for side in SIDES
    }
    served: dict[tuple[str, str], Served] = {}
    with ThreadPoolExecutor(jobs) as pool:
        started = {
            pool.submit(_served, sessions[key], folder / "-".join(key), timeout): key
            for key in sessions
        }
        for future in as_completed(started):
            name, _ = started[future]
            served[started[future]] = future.result()
            if all((name, side) in served for side in SIDES):
                backend = reference_backend(models[name], cpu=cpu)
                both = {side: served[name, side] for side in SIDES}
                yield name, _result(sessions[name, "xfv1"], both, backend)


# The runs that came through, and why not all did.
Served = tuple[Report, str]


def _served(session: Session, folder: Path, timeout: float) -> Served:
    process = Process(session, folder)
    try:
        return process.report(timeout), ""
    except SessionError as error:
        return process.so_far(), str(error)
    finally:
        process.stop()


def _result(session: Session, both: dict[str, Served], backend: str) -> dict[str, Any]:
    model = session.runs[PLAIN].model
    answers, expected = (both[side][0].runs for side in SIDES)
    result: dict[str, Any] = {
        "config": model.config,
        "dtype": model.dtype,
        "weights": dataclasses.asdict(model.weights),
        "backend": backend,
        "failed": {side: why for side, (_, why) in both.items() if why},
        "runs": {},
    }
    if JITTER in expected:
        bound = agreement.rounding(expected[PLAIN], expected[JITTER])
        for name, run in session.runs.items():
            # A run with a fault stands beside the sound one.
            sound = PLAIN if run.fault else name
            if name in answers and sound in expected:
                result["runs"][name] = compared(run, answers[name], expected[sound], backend, bound)
    return result


def problems(result: dict[str, Any]) -> list[str]:
    """All that is wrong with a model's result, in words."""
    failed = [f"{side} failed: {why}" for side, why in result["failed"].items()]
    return failed + [
        f"{name}: {problem}" for name, run in result["runs"].items() for problem in run["problems"]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, help=f"all, or of ranks {FAULTY_MODEL}"
    )
    parser.add_argument("--ranks", type=int, default=1, help="GPUs that share a cache")
    parser.add_argument("--tiny", action="store_true", help="narrow models, for a CPU")
    parser.add_argument("--jobs", type=int, default=JOBS, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for each")
    parser.add_argument("--json", type=Path, help="where results are written as they come")
    args = parser.parse_args()
    names = args.models or ([FAULTY_MODEL] if args.ranks > 1 else [*MODELS])
    if args.ranks > 1 and names != [FAULTY_MODEL]:
        parser.error(f"--models {' '.join(names)}: of several ranks, {FAULTY_MODEL} alone")
    from tests.harness.environment import prepare

    prepare()
    state: dict[str, Any] = {
        "environment": environment(),
        "method": " ".join((__doc__ or "").split()),
        "ranks": args.ranks,
        "prompt_lengths": [len(ids) for ids in PROMPTS],
        "models": {},
    }
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(
            names, Path(folder), small=args.tiny, jobs=args.jobs, timeout=args.timeout,
            ranks=args.ranks,
        )  # fmt: skip
        for name, result in measured:
            state["models"][name] = result
            if args.json:
                save(args.json, state)
            for run, found in result["runs"].items():
                say(
                    f"{name:14s} {run:16s} {found['identical']:2d} of {found['answers']} prompts"
                    f" identical, logprobs at most {found['apart']:.1e} apart"
                    f" (bound {found['bound']:.1e})"
                )
            for problem in problems(result):
                wrong += 1
                say(f"{name}: {problem}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
