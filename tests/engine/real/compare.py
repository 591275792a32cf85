"""Do xfv1, vLLM's CPU_ATTN and Transformers read real weights alike?

    python -m tests.engine.real.compare CHECKPOINT --json docs/results/real-smollm2-cpu.json

SmolLM2-135M-Instruct (`checkpoint.py` makes the checkpoint) in float32 on a CPU: greedy answers to
26 English prompts of 10 to 800 tokens, all at once, with chunked prefill and prefix caching, and
the logprob of every token of a text of 2,000. Each side runs in a process of its own. xfv1 then
answers some prompts again with the newest key lost at decodes, which has to show.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tests.engine import agreement
from tests.engine.agreement import Agreement
from tests.engine.checkpoints import DECODE_FAULT
from tests.engine.engine import (
    ENVIRONMENT,
    ROOT,
    Answers,
    Process,
    Run,
    RunReport,
    Session,
    SessionError,
)
from tests.engine.models import Model
from tests.engine.real import answers as transformers_answers
from tests.engine.real import checkpoint as weights
from tests.engine.real import texts
from tests.engine.real.answers import NEW_TOKENS
from tests.harness.output import save, say
from tests.harness.provenance import environment

XFV1, CPU_ATTN, TRANSFORMERS = "xfv1", "CPU_ATTN", "transformers"
PAIRS = tuple(itertools.combinations((XFV1, CPU_ATTN, TRANSFORMERS), 2))
IMPLS = {
    XFV1: "xfv1.impl.XFormersImpl",
    CPU_ATTN: "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl",
}
GREEDY, TEXT, SOUND = "greedy", "text", "sound"
BUDGET = 256
# Prompts that the fault is planted for: a short one, one past a step's budget, and a chat. A
# sound run of the same prompts has to agree.
FEW, FEW_TOKENS = (0, 14, texts.CHAT), 8
TIMEOUT = 3600.0


@dataclass(frozen=True)
class Results:
    """answers: of each side, to the prompts ("greedy") and of the text. reports: of each engine's
    runs. bound: how far rounding explains logprobs to be apart."""

    answers: dict[str, dict[str, Answers]]
    reports: dict[str, dict[str, RunReport]]
    bound: float

    def agreement(self, run: str, one: str, other: str) -> Agreement:
        return agreement.compare(self.answers[one][run], self.answers[other][run], self.bound)

    def few(self, run: str) -> Agreement:
        """xfv1's run of a few prompts, with the fault or "sound", beside Transformers' answers."""
        expected = agreement.chosen(self.answers[TRANSFORMERS][GREEDY], FEW)
        return agreement.compare(self.reports[XFV1][run], expected, self.bound)

    def noticed(self) -> bool:
        """Whether the fault changes the answers where a sound run does not."""
        return self.few(DECODE_FAULT).unlike() and not self.few(SOUND).problems()


def run_all(checkpoint: Path, folder: Path) -> Results:
    """Every side's answers. folder: for the processes' files.

    Raises:
        SessionError: if a process failed.
    """
    tokenizer = texts.load_tokenizer(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    greedy = Run(
        Model(config, "float32", folder=str(checkpoint)),
        texts.prompts(tokenizer),
        NEW_TOKENS,
        max_num_batched_tokens=BUDGET,
        max_num_seqs=16,
        max_model_len=texts.TEXT_TOKENS + BUDGET,
        cached_tokens=1 << 15,
        prefix_caching=True,
    )
    text = replace(greedy, prompts=[texts.text(tokenizer)], max_tokens=1, prompt_logprobs=True)
    few = replace(greedy, prompts=[greedy.prompts[index] for index in FEW], max_tokens=FEW_TOKENS)
    own = {
        GREEDY: greedy, TEXT: text, SOUND: few, DECODE_FAULT: replace(few, fault=DECODE_FAULT),
    }  # fmt: skip
    sessions = {
        XFV1: Session(own, {"XFV1_CPU": "1"}),
        CPU_ATTN: Session({GREEDY: greedy, TEXT: text}),
    }
    processes = {side: Process(session, folder / side) for side, session in sessions.items()}
    try:
        reports = {side: process.report(TIMEOUT).runs for side, process in processes.items()}
    finally:
        for process in processes.values():
            process.stop()
    theirs, rounding = _transformers(checkpoint, reports[XFV1][GREEDY].tokens, folder)
    answers: dict[str, dict[str, Answers]] = {
        side: {run: runs[run] for run in (GREEDY, TEXT)} for side, runs in reports.items()
    }
    bound = agreement.float32_rounding(rounding)
    return Results({**answers, TRANSFORMERS: theirs}, reports, bound)


def _transformers(
    checkpoint: Path, drafts: list[list[int]], folder: Path
) -> tuple[dict[str, Answers], float]:
    """Transformers' answers, and their rounding; drafts only spare it time."""
    drafted, file, log = (folder / f"transformers-{name}" for name in ("drafts", "answers", "log"))
    drafted.write_text(json.dumps(drafts))
    arguments = [str(path) for path in (checkpoint, drafted, file)]
    command = [sys.executable, "-m", transformers_answers.__name__, *arguments]
    with log.open("w") as output:
        # No engine runs beside it, so that it may use two cores.
        code = subprocess.call(
            command, cwd=ROOT, env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "2"},
            stdout=output, stderr=subprocess.STDOUT, timeout=TIMEOUT,
        )  # fmt: skip
    if code:
        raise SessionError(f"Transformers ended with {code}: {log.read_text()[-4000:]}")
    content = json.loads(file.read_text())
    found = {GREEDY: Answers(**content["answers"]), TEXT: Answers(**content["text"])}
    return found, content["rounding"]


def problems(results: Results) -> list[str]:
    """All that is wrong, in words."""
    found = [
        f"{one} and {other}, {run}: {problem}"
        for one, other in PAIRS
        for run in (GREEDY, TEXT)
        for problem in results.agreement(run, one, other).problems()
    ]
    found += [
        f"{side}: ran on {set(report.impls)}"
        for side, runs in results.reports.items()
        for report in runs.values()
        if set(report.impls) != {IMPLS[side]} or min(report.forwards) == 0
    ]
    return found if results.noticed() else [*found, f"{DECODE_FAULT} is not noticed"]


def summary(results: Results) -> dict[str, Any]:
    """The results without their tokens."""
    fault = results.few(DECODE_FAULT)
    return {
        "bound": results.bound,
        "pairs": {
            f"{one} / {other}": {
                run: {
                    name: value
                    for name, value in asdict(results.agreement(run, one, other)).items()
                    if name != "bound"
                }
                for run in (GREEDY, TEXT)
            }
            for one, other in PAIRS
        },
        "perplexity_of_the_text": {
            side: perplexity(answers[TEXT]) for side, answers in results.answers.items()
        },
        "prompt_tokens_from_the_cache": {
            side: sum(runs[GREEDY].cached) for side, runs in results.reports.items()
        },
        "longest_step_of_a_prompt": max(
            results.reports[XFV1][GREEDY].query_lens("torch", "prefill")
        ),
        "layers": {side: len(runs[GREEDY].impls) for side, runs in results.reports.items()},
        "fault": {
            "name": DECODE_FAULT,
            "noticed": results.noticed(),
            "largest_difference": fault.apart,
            "answers_changed": fault.answers - fault.identical,
            "answers": fault.answers,
        },
        "seconds": {
            side: round(sum(run.start_s + run.serve_s for run in runs.values()), 1)
            for side, runs in results.reports.items()
        },
    }


def perplexity(text: Answers) -> float:
    (logprobs,) = text.prompt_logprobs
    return math.exp(-sum(logprobs) / len(logprobs))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--json", type=Path, help="where the results are written")
    args = parser.parse_args()
    if not args.checkpoint.is_dir():
        parser.error(
            f"checkpoint {args.checkpoint}: expected a folder that {weights.__name__} made"
        )
    with tempfile.TemporaryDirectory() as folder:
        results = run_all(args.checkpoint.resolve(), Path(folder))
    tokenizer = texts.load_tokenizer(args.checkpoint)
    state = {
        "environment": environment(),
        "method": " ".join((__doc__ or "").split()),
        "weights": {"package": weights.WEIGHTS, "file": weights.GGUF, "sha256": weights.SHA256},
        "prompt_lengths": [len(ids) for ids in texts.prompts(tokenizer)],
        "new_tokens": NEW_TOKENS,
        "text_tokens": texts.TEXT_TOKENS,
        "rounding_factor": agreement.FLOAT32,
        **summary(results),
    }
    if args.json:
        save(args.json, state)
    for one, other in PAIRS:
        greedy, text = (results.agreement(run, one, other) for run in (GREEDY, TEXT))
        say(
            f"{one} and {other}: {greedy.identical} of {greedy.answers} answers identical,"
            f" {greedy.compared} tokens at most {greedy.apart:.1e} apart;"
            f" the text's {text.prompt_compared} at most {text.apart:.1e} (bound {text.bound:.1e})"
        )
    say(f"{DECODE_FAULT}: {results.few(DECODE_FAULT).apart:.1e} apart")
    wrong = problems(results)
    for problem in wrong:
        say(problem)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
