"""Real V1 engines in a process of their own, one after another: `Session` in, `Report` out.

    python -m tests.integration.engine --session session.json --report report.json

What vLLM and Triton read at import is the session's; the rest differs from run to run. Nothing
heavy is imported before the session's environment is set.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib.metadata
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
ENTRY_POINT = ("vllm.general_plugins", "xfv1:register")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Several sessions share the machine's cores, and sums keep one order.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Eager all through: compiling one small function for the logprobs takes seconds.
    "TORCHDYNAMO_DISABLE": "1",
}
# Room for every prompt at once, and no gibibyte to fill with zeros.
CACHED_TOKENS = 8192
# What a session does not take over from the process that starts it.
OWN = ("XFV1_CPU", "XFV1_DEBUG", "XFV1_OPS", "TRITON_INTERPRET", "XFORMERS_ENABLE_TRITON")
# Faults planted in xfv1's torch op: how far each query's position is moved against the keys'.
FAULTS = {"newest_key_lost": -1, "one_key_ahead": 1}


@dataclass(frozen=True)
class Run:
    """One engine and one batch of prompts, decoded greedily.

    ops: XFV1_OPS. drafts: tokens an n-gram speculator proposes at most, 0 for none. fault: a name
    among `FAULTS`.
    """

    model: str
    prompts: list[list[int]]
    max_tokens: int = 16
    dtype: str = "float32"
    block_size: int = 32
    max_num_batched_tokens: int = 64
    prefix_caching: bool = False
    drafts: int = 0
    ops: str = ""
    fault: str = ""


@dataclass(frozen=True)
class Session:
    """Runs of one process, by name. architectures: vLLM's names of their models' classes."""

    runs: dict[str, Run]
    architectures: list[str]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunReport:
    """What an engine answered, and what really ran.

    tokens, logprobs: [prompt][step]. margins: by how much each token beat the next best, in
    logprob. cached: tokens of each prompt that prefix caching served. impls, backends: class of
    each attention layer's impl and backend. forwards: calls of the impls' forward. ops: calls of
    xfv1's ops, by "op phase max_query_len".
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    margins: list[list[float]]
    cached: list[int]
    impls: list[str]
    backends: list[str]
    forwards: int
    ops: dict[str, int]

    def query_lens(self, op: str, phase: str) -> set[int]:
        """The max_query_len of every call of an op in a phase."""
        calls = (call.split() for call in self.ops)
        return {int(longest) for name, of, longest in calls if (name, of) == (op, phase)}


@dataclass(frozen=True)
class Report:
    """installed: whether vLLM found xfv1 by its entry point, so that nobody else registered it."""

    vllm: str
    installed: bool
    runs: dict[str, RunReport]


class SessionError(RuntimeError):
    """A session's process failed; the message ends with what it printed last."""


class Process:
    """A session under way."""

    def __init__(self, session: Session, folder: Path) -> None:
        """Start it. folder: for its files; not shared with another session."""
        folder.mkdir(parents=True, exist_ok=True)
        self._log, self._report = folder / "log", folder / "report.json"
        path = folder / "session.json"
        path.write_text(json.dumps(dataclasses.asdict(session)))
        inherited = {name: value for name, value in os.environ.items() if name not in OWN}
        command = [sys.executable, "-m", __spec__.name]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, "--session", str(path), "--report", str(self._report)],
                cwd=ROOT,
                env={**inherited, **ENVIRONMENT, **session.environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def report(self, timeout: float = 300.0) -> Report:
        """Wait for what came of it.

        Raises:
            SessionError: if the process failed.
        """
        if self._process.wait(timeout):
            raise SessionError(self._log.read_text()[-4000:])
        content = json.loads(self._report.read_text())
        runs = {name: RunReport(**run) for name, run in content.pop("runs").items()}
        return Report(**content, runs=runs)

    def stop(self) -> None:
        """End it, whether or not it is through."""
        self._process.kill()
        self._process.wait()


# What follows runs in the session's process.


def serve(session: Session) -> Report:
    """Run a session's engines in this process."""
    from tests.harness import environment

    environment.prepare()
    import vllm

    group, value = ENTRY_POINT
    installed = any(e.value == value for e in importlib.metadata.entry_points(group=group))
    if not installed:
        import xfv1

        xfv1.register()
    environment.register_models(*session.architectures)
    # The n-gram speculator's numba breaks vLLM's start of any engine after it: it goes last.
    ordered = sorted(session.runs.items(), key=lambda item: item[1].drafts)
    runs = {}
    for name, run in ordered:
        # vLLM collects eight times an engine, over all that was ever imported.
        with mock.patch.object(gc, "collect"):
            runs[name] = _run(run)
        gc.collect()
    return Report(vllm.__version__, installed, runs)


def _run(run: Run) -> RunReport:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    os.environ["XFV1_OPS"] = run.ops
    speculation = {
        "method": "ngram",
        "num_speculative_tokens": run.drafts,
        "prompt_lookup_max": 2,
        "prompt_lookup_min": 1,
    }
    llm = LLM(
        model=run.model,
        dtype=run.dtype,
        block_size=run.block_size,
        max_model_len=512,
        max_num_seqs=8,
        num_gpu_blocks_override=CACHED_TOKENS // run.block_size,
        max_num_batched_tokens=run.max_num_batched_tokens,
        enable_chunked_prefill=True,
        enable_prefix_caching=run.prefix_caching,
        speculative_config=speculation if run.drafts else None,
        enforce_eager=True,
        skip_tokenizer_init=True,
        seed=0,
    )
    layers = _attention_layers(llm)
    sampling = SamplingParams(
        temperature=0.0, max_tokens=run.max_tokens, ignore_eos=True, logprobs=2, detokenize=False
    )
    with _counted(layers) as (forwards, ops), _planted(run.fault):
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in run.prompts], sampling, use_tqdm=False
        )
    answers = [output.outputs[0] for output in outputs]
    report = RunReport(
        tokens=[list(answer.token_ids) for answer in answers],
        logprobs=[
            [step[token].logprob for token, step in zip(a.token_ids, a.logprobs, strict=True)]
            for a in answers
        ],
        margins=[[_margin(step) for step in answer.logprobs] for answer in answers],
        cached=[output.num_cached_tokens or 0 for output in outputs],
        impls=[_name(type(layer.impl)) for layer in layers],
        backends=[_name(layer.get_attn_backend()) for layer in layers],
        forwards=forwards.total(),
        ops=dict(ops),
    )
    del llm, layers
    cleanup_dist_env_and_memory()
    return report


def _attention_layers(llm: Any) -> list[Any]:
    """The engine's attention layers, those its model runner calls."""
    from vllm.model_executor.layers.attention import Attention

    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return [layer for layer in context.values() if isinstance(layer, Attention)]


def _name(kind: type[Any]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _margin(step: dict[int, Any]) -> float:
    best, second = sorted((entry.logprob for entry in step.values()), reverse=True)[:2]
    return float(best - second)


@contextlib.contextmanager
def _counted(layers: list[Any]) -> Iterator[tuple[Counter[str], Counter[str]]]:
    """Counts of the impls' forward calls, and of the calls of xfv1's ops."""
    from xfv1.dispatch import OPS

    forwards: Counter[str] = Counter()
    calls: Counter[str] = Counter()

    def counting(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            forwards["forward"] += 1
            return forward(*args, **kwargs)

        return call

    def counting_op(name: str, run: Callable[[Any], None]) -> Callable[[Any], None]:
        def call(call: Any) -> None:
            run(call)
            calls[f"{name} {call.batch.phase} {call.batch.max_query_len}"] += 1

        return call

    with contextlib.ExitStack() as stack:
        for layer in layers:
            patch = mock.patch.object(layer.impl, "forward", counting(layer.impl.forward))
            stack.enter_context(patch)
        for name, op in OPS.items():
            stack.enter_context(mock.patch.object(op, "run", counting_op(name, op.run)))
        yield forwards, calls


@contextlib.contextmanager
def _planted(fault: str) -> Iterator[None]:
    """xfv1's torch op with a fault in it, one of `FAULTS`; as it is for ""."""
    from xfv1.ops.torch_cpu import TorchCpu

    if not fault:
        yield
        return
    attend, shift = TorchCpu._attend, FAULTS[fault]

    def faulty(
        self: TorchCpu, call: Any, rows: slice, positions: Any, key: Any, value: Any
    ) -> None:
        attend(self, call, rows, positions + shift, key, value)

    with mock.patch.object(TorchCpu, "_attend", faulty):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--session", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    args = parser.parse_args()
    content = json.loads(args.session.read_text())
    runs = {name: Run(**run) for name, run in content.pop("runs").items()}
    session = Session(runs, **content)
    os.environ.update(ENVIRONMENT | session.environment)
    report = serve(session)
    args.report.write_text(json.dumps(dataclasses.asdict(report), indent=1))


if __name__ == "__main__":
    main()
