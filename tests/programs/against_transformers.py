"""Do a V1 engine's logprobs through xfv1 equal those of Transformers' eager attention?

    python -m tests.programs.against_transformers --json docs/results/transformers-cpu.json

Eleven tiny checkpoints (`checkpoints.py`), on a CPU, in float32. Transformers answers in a process
of its own. Then one process runs an engine of each checkpoint in turn, over the real loader and
with xfv1 in CPU_ATTN's place: the logprob of every prompt token and of every greedy token is
compared. An engine then answers some prompts again with a fault planted in xfv1's calls, and each
fault has to show. A mistake of meaning that xfv1, the suite's oracle and our reading of vLLM have
in common shows here alone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from tests.engine import agreement, checkpoints
from tests.engine.agreement import Agreement
from tests.engine.checkpoints import CHECKPOINTS, NEW_TOKENS, Checkpoint
from tests.engine.engine import (
    ENVIRONMENT,
    ROOT,
    Answers,
    Process,
    Run,
    RunReport,
    Session,
    SessionError,
    read_report,
)
from tests.engine.models import Model
from tests.harness.output import save, say
from tests.harness.provenance import environment

BUDGET, BLOCK = 64, 16
# vLLM cuts no prompt of an encoder-decoder model: its steps must have room for whole sequences.
UNCUT = 256
# Prompts that faults are planted for: one longer than the window, and one that the budget cuts. A
# sound run of the same prompts has to agree.
FEW, FEW_TOKENS = (6, 8), 6
SOUND = "sound"
# vLLM reads no cached prefix for a request that wants prompt logprobs. So prefix caching has a run
# of its own. Every prompt comes twice there: the second time its start lies in the cache.
PLAIN, CACHED = "plain", "cached"
XFV1, IMPL = "XFormersAttentionBackend", "xfv1.impl.XFormersImpl"
# vLLM derives cross attention's backend from the one that is selected.
CROSS = f"CrossAttention_{XFV1}"
TIMEOUT = 600.0


@dataclass(frozen=True)
class Result:
    """One checkpoint's runs, by name ("plain", "cached", "sound", or a fault): the engine's report,
    and how it agrees with Transformers' answers. bound: how far rounding explains logprobs to be
    apart."""

    expected: Answers
    bound: float
    reports: dict[str, RunReport]
    agreements: dict[str, Agreement]

    def noticed(self, fault: str) -> bool:
        """Whether a fault puts a run further from Transformers' than rounding explains."""
        return self.agreements[fault].unlike() and not self.agreements[SOUND].unlike()


def model_of(checkpoint: Checkpoint, folder: Path) -> Model:
    """A saved checkpoint as the engine's process takes it."""
    return Model(
        json.loads((folder / "config.json").read_text()),
        "float32",
        folder=str(folder),
        overrides=checkpoint.overrides,
        implementation=checkpoint.implementation,
    )


def runs_of(checkpoint: Checkpoint, folder: Path) -> dict[str, Run]:
    """A checkpoint's runs, all by one engine."""
    plain = Run(
        model_of(checkpoint, folder),
        checkpoints.prompts(checkpoint),
        NEW_TOKENS,
        block_size=BLOCK,
        max_num_batched_tokens=UNCUT if checkpoint.audio else BUDGET,
        max_model_len=UNCUT,
        # vLLM caches no prefixes of encoder-decoder models.
        prefix_caching=not checkpoint.audio,
        prompt_logprobs=True,
        audio=list(checkpoint.audio),
    )
    few = replace(
        plain,
        prompts=[plain.prompts[index] for index in FEW],
        audio=[plain.audio[index] for index in FEW if plain.audio],
        max_tokens=FEW_TOKENS,
    )
    runs = {PLAIN: plain, SOUND: few}
    if plain.prefix_caching:
        runs[CACHED] = replace(plain, prompts=plain.prompts * 2, prompt_logprobs=False)
    return runs | {fault: replace(few, fault=fault) for fault in checkpoint.all_faults}


def run_all(folder: Path) -> dict[str, Result]:
    """Every checkpoint's result; made once in a folder that several processes share.

    Raises:
        SessionError: if a process failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "done"
    with FileLock(folder / "lock"):
        if not done.exists():
            _transformers(folder)
            _engines(folder)
            done.touch()
    report = read_report(folder / "engine" / "report-0.json")
    return {name: _result(folder / name, name, report.runs) for name in CHECKPOINTS}


def _transformers(folder: Path) -> None:
    log = folder / "transformers-log"
    command = [sys.executable, "-m", checkpoints.__name__, str(folder)]
    with log.open("w") as output:
        code = subprocess.call(
            command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stdout=output,
            stderr=subprocess.STDOUT, timeout=TIMEOUT,
        )  # fmt: skip
    if code:
        raise SessionError(f"Transformers ended with {code}: {log.read_text()[-4000:]}")


def _engines(folder: Path) -> None:
    runs = {
        f"{name} {run}": details
        for name, checkpoint in CHECKPOINTS.items()
        for run, details in runs_of(checkpoint, folder / name).items()
    }
    process = Process(Session(runs, {"XFV1_CPU": "1"}), folder / "engine")
    try:
        process.report(TIMEOUT)
    finally:
        process.stop()


def _result(folder: Path, name: str, reports: dict[str, RunReport]) -> Result:
    expected, rounding = checkpoints.read(folder)
    bound = agreement.float32_rounding(rounding)
    own = {run: reports[f"{name} {run}"] for run in runs_of(CHECKPOINTS[name], folder)}
    every = range(len(expected.prompts))
    given = {PLAIN: every, CACHED: [*every, *every]}
    agreements = {
        run: agreement.compare(report, agreement.chosen(expected, given.get(run, FEW)), bound)
        for run, report in own.items()
    }
    return Result(expected, bound, own, agreements)


def unserved(checkpoint: Checkpoint, report: RunReport) -> list[str]:
    """Signs that xfv1 did not serve all attention layers, in words; empty if it served all.

    Every second layer of a model with an encoder is cross attention.
    """
    backends = (
        [XFV1, CROSS] * (checkpoint.layers // 2)
        if checkpoint.audio
        else ([XFV1] * checkpoint.layers)
    )
    found = [backend.rpartition(".")[2] for backend in report.backends]
    checks = {
        f"backends {found}, expected {backends}": found == backends,
        f"classes {report.impls}, expected {IMPL}": set(report.impls) == {IMPL},
        f"{report.forwards} calls of the layers": min(report.forwards) > 0,
        f"{report.ops} calls of xfv1's ops": sum(report.ops.values()) >= sum(report.forwards),
    }
    return [what for what, held in checks.items() if not held]


def summary(name: str, result: Result) -> dict[str, Any]:
    """A checkpoint's result without its tokens."""
    checkpoint = CHECKPOINTS[name]
    plain = result.agreements[PLAIN]
    content: dict[str, Any] = {
        "features": checkpoint.features,
        "config": {"class": checkpoint.config, **checkpoint.facts},
        "differs": checkpoint.differs,
        "backends": sorted(set(result.reports[PLAIN].backends)),
        "prompts": plain.answers,
        "prompt_tokens_compared": plain.prompt_compared,
        "greedy_tokens_compared": plain.compared,
        "greedy_tokens_equal": plain.identical == plain.answers,
        "largest_difference": plain.apart,
        "bound": result.bound,
        "smallest_margin": min(min(row) for row in result.expected.margins),
        "faults": {
            fault: {
                "noticed": result.noticed(fault),
                "largest_difference": result.agreements[fault].apart,
                "answers_changed": result.agreements[fault].answers
                - result.agreements[fault].identical,
            }
            for fault in checkpoint.all_faults
        },
        "seconds": round(sum(r.start_s + r.serve_s for r in result.reports.values()), 1),
    }
    if CACHED in result.agreements:
        content["cached"] = {
            "greedy_tokens_compared": result.agreements[CACHED].compared,
            "largest_difference": result.agreements[CACHED].apart,
            "prompt_tokens_from_the_cache": sum(result.reports[CACHED].cached),
        }
    return content


def problems(name: str, result: Result) -> list[str]:
    """All that is wrong with a checkpoint's result, in words."""
    found = [
        f"{name} {run}: {problem}"
        for run in (PLAIN, CACHED, SOUND)
        if run in result.agreements
        for problem in result.agreements[run].problems()
    ]
    faults = CHECKPOINTS[name].all_faults
    found += [f"{name}: {fault} is not noticed" for fault in faults if not result.noticed(fault)]
    return found + [
        f"{name} {run}: {what}"
        for run, report in result.reports.items()
        for what in unserved(CHECKPOINTS[name], report)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the results are written")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = run_all(Path(folder))
    state = {
        "environment": environment(),
        "method": " ".join((__doc__ or "").split()),
        "rounding_factor": agreement.FLOAT32,
        "prompt_lengths": [len(ids) for ids in checkpoints.PROMPTS],
        "new_tokens": NEW_TOKENS,
        "models": {name: summary(name, result) for name, result in results.items()},
    }
    if args.json:
        save(args.json, state)
    wrong = [problem for name, result in results.items() for problem in problems(name, result)]
    for name, result in results.items():
        told = summary(name, result)
        faults = told["faults"].values()
        say(
            f"{name:12s} {told['prompt_tokens_compared']} + {told['greedy_tokens_compared']}"
            " tokens,"
            f" at most {told['largest_difference']:.1e} apart (bound {result.bound:.1e}),"
            f" {sum(fault['noticed'] for fault in faults)} of {len(faults)} faults noticed,"
            f" the least by {min(fault['largest_difference'] for fault in faults):.1e};"
            f" {told['seconds']} s"
        )
    for problem in wrong:
        say(problem)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
