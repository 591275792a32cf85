"""Real V1 engines in a process of their own, one after another: `Session` in, `Report` out.

    python -m tests.engine.engine --session session.json --report report.json

What vLLM and Triton read at import is the session's; the rest differs from run to run. vLLM is not
imported before the session's environment is set.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib
import importlib.metadata
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from tests.engine.call_faults import FAULTS
from tests.engine.models import SAMPLING_RATE, Model, Weights, loading, noise

ROOT = Path(__file__).resolve().parents[2]
ENTRY_POINT = ("vllm.general_plugins", "xfv1:register")
ENVIRONMENT = {
    # Several sessions share the machine's cores, and sums keep one order.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Eager all through: compiling one small function for the logprobs takes seconds.
    "TORCHDYNAMO_DISABLE": "1",
    # The same of the n-gram speculator; and its threads would be torch's too, and slow it down.
    "NUMBA_DISABLE_JIT": "1",
    "NUMBA_NUM_THREADS": "1",
}
# What vLLM may spend on the cache; it spends what `Run.cached_tokens` needs.
CACHE_BYTES = 2 << 30
# What a session does not take over from the process that starts it.
OWN = ("XFV1_CPU", "XFV1_DEBUG", "XFV1_OPS", "TRITON_INTERPRET", "XFORMERS_ENABLE_TRITON")


@dataclass(frozen=True)
class Run:
    """One engine and its prompts, decoded greedily, all given at once.

    max_tokens: of each, or of every one. until: a time (seconds since 1970) up to which prompts
    drawn at random arrive one after another instead; 0 for none. backend: vLLM's name of it,
    for a platform that offers several. graphs: decodes are CUDA graphs. drafts: tokens an
    n-gram speculator proposes at most, 0 for none. ops: XFV1_OPS. fault: a name among `FAULTS`.
    jitter: each attention's output is moved, at random, by up to so many units in its last
    place, as another right answer may be. context_parallel: ranks a request's keys are spread
    over, all of the session's or one. prompt_logprobs: the engine gives them too, and then reads
    no cached prefix. audio: samples of noise that the encoder of an encoder-decoder model hears
    with each prompt.
    """

    model: Model
    prompts: list[list[int]]
    max_tokens: int | list[int] = 16
    until: float = 0.0
    block_size: int = 32
    max_num_batched_tokens: int = 64
    max_num_seqs: int = 8
    max_model_len: int = 512
    cached_tokens: int = 8192
    backend: str = ""
    graphs: bool = False
    prefix_caching: bool = False
    drafts: int = 0
    ops: str = ""
    fault: str = ""
    jitter: float = 0.0
    context_parallel: int = 1
    prompt_logprobs: bool = False
    audio: list[int] = field(default_factory=list)

    @property
    def engine(self) -> "Run":
        """The run without what an engine is given after its start.

        Runs share an engine where this is equal. A CUDA graph keeps the fault that was planted
        while it was captured, so there the fault stays.
        """
        fault = self.fault if self.graphs else ""
        served: dict[str, Any] = {
            "prompts": [], "max_tokens": 0, "until": 0.0, "fault": fault, "jitter": 0.0,
            "prompt_logprobs": False,
            # An engine's start depends on whether it has an encoder.
            "audio": [1] if self.audio else [],
        }  # fmt: skip
        return dataclasses.replace(self, **served)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Run":
        model = content.pop("model")
        weights = Weights(**model.pop("weights"))
        return cls(**content, model=Model(**model, weights=weights))


@dataclass(frozen=True)
class Session:
    """Runs of one process, by name; or of several, with a GPU and a share of the heads to each.

    ranks: how many processes.
    """

    runs: dict[str, Run]
    environment: dict[str, str] = field(default_factory=dict)
    ranks: int = 1


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Greedy answers to prompts.

    prompts: which of the run's each answer is to. times: how often it was given; a prompt that
    is given again may be answered otherwise. tokens, logprobs: [answer][step]. margins: by how
    much each token beat the next best, in logprob. prompt_logprobs: of each answer's prompt, from
    its second token on; empty where nobody asked for them.
    """

    prompts: list[int]
    times: list[int]
    tokens: list[list[int]]
    logprobs: list[list[float]]
    margins: list[list[float]]
    prompt_logprobs: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class RunReport(Answers):
    """An engine's answers, and the ops that really ran.

    cached: tokens of each answer's prompt that prefix caching served. impls, backends: class of
    each attention layer's impl and backend. forwards: calls of each layer's forward. ops: calls
    of xfv1's ops, by "op phase max_query_len"; captured: those that a CUDA graph recorded.
    graphs: vLLM's mode of CUDA graphs in the end. replays: of a graph. context_ranks: what every
    layer believes to share its requests' keys with. counters: vLLM's own, by name. start_s,
    serve_s: seconds to start the engine (0 if it had served another run) and to serve the prompts.
    """

    cached: list[int]
    impls: list[str]
    backends: list[str]
    forwards: list[int]
    ops: dict[str, int]
    captured: dict[str, int]
    graphs: str
    replays: int
    context_ranks: int
    counters: dict[str, int]
    start_s: float
    serve_s: float

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
        self._names = session.runs.keys()
        path = folder / "session.json"
        path.write_text(json.dumps(dataclasses.asdict(session)))
        inherited = {name: value for name, value in os.environ.items() if name not in OWN}
        self._logs = [folder / f"log-{rank}" for rank in range(session.ranks)]
        self._reports = [folder / f"report-{rank}.json" for rank in range(session.ranks)]
        self._processes = []
        port = _free_port()
        for rank, (log, report) in enumerate(zip(self._logs, self._reports, strict=True)):
            command = [sys.executable, "-m", __spec__.name]
            with log.open("w") as output:
                process = subprocess.Popen(
                    [*command, "--session", str(path), "--report", str(report)],
                    cwd=ROOT,
                    env={
                        **inherited,
                        **ENVIRONMENT,
                        **session.environment,
                        **_rank_environment(rank, session.ranks, port),
                    },
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            self._processes.append(process)

    def report(self, timeout: float = 300.0) -> Report:
        """Wait for what came of it.

        Raises:
            SessionError: if a process failed, has not written all in so many seconds, or answered
                otherwise than the first rank's.
        """
        end = time.monotonic() + timeout
        codes = self._codes()
        # One that failed leaves the others waiting for it.
        while None in codes and not any(codes) and time.monotonic() < end:
            time.sleep(0.1)
            codes = self._codes()
        for rank, code in enumerate(codes):
            # Where none failed and time is up, it may be clearing up.
            through = code == 0 or any(codes) or self.so_far(rank).runs.keys() == self._names
            if code or not through:
                outcome = f"ended with {code}" if code else f"not through after {timeout} s"
                text = self._logs[rank].read_text(errors="replace")
                raise SessionError(f"rank {rank} {outcome}: {text[-4000:]}")
        first = self.so_far()
        for rank in range(1, len(self._processes)):
            for name, run in self.so_far(rank).runs.items():
                if run.tokens != first.runs[name].tokens:
                    raise SessionError(f"{name}: rank {rank} answered otherwise than the first")
        return first

    def _codes(self) -> list[int | None]:
        return [process.poll() for process in self._processes]

    def so_far(self, rank: int = 0) -> Report:
        """The runs that are through, as a rank has them."""
        return read_report(self._reports[rank])

    def stop(self) -> None:
        """End it, whether or not it is through."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()


def read_report(path: Path) -> Report:
    """The runs that a session's process has written so far."""
    if not path.exists():
        return Report("", False, {})
    content = json.loads(path.read_text())
    runs = {name: RunReport(**run) for name, run in content.pop("runs").items()}
    return Report(**content, runs=runs)


def _rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What a launcher of several processes tells each."""
    if ranks == 1:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NCCL_SOCKET_IFNAME": "lo",
        # NCCL does all of it, by whatever links there are.
        "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    }


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


# What follows runs in the session's process.


def serve(session: Session) -> Iterator[Report]:
    """Run a session's engines in this process: what is known after each."""
    from tests.harness import environment

    environment.prepare()
    import vllm

    group, value = ENTRY_POINT
    installed = any(e.value == value for e in importlib.metadata.entry_points(group=group))
    if not installed:
        import xfv1

        xfv1.register()
    for run in session.runs.values():
        _register_model(run.model)
    # On a CPU, numba breaks vLLM's start of any engine after it: the n-gram speculators go last.
    ordered = sorted(session.runs.items(), key=lambda item: item[1].drafts)
    runs = {}
    for _, shared in itertools.groupby(ordered, key=lambda item: item[1].engine):
        # vLLM collects eight times an engine, over all that was ever imported.
        with mock.patch.object(gc, "collect"):
            for name, report in _serve_all(dict(shared), session.ranks):
                runs[name] = report
                # Clearing up may take longer than whoever waits has time for.
                yield Report(vllm.__version__, installed, runs)
        _clear_up()
        if session.ranks > 1:
            # The next engine's ranks may meet before the last one's meeting place is gone.
            os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)


def _register_model(model: Model) -> None:
    """Make vLLM take the model's class from this process: its own, or one of ours."""
    from vllm import ModelRegistry

    from tests.harness import environment

    if not model.implementation:
        environment.register_models(model.architecture)
        return
    module, _, name = model.implementation.partition(":")
    implementation = getattr(importlib.import_module(module), name)
    ModelRegistry.register_model(model.architecture, implementation)


def _serve_all(runs: dict[str, Run], ranks: int) -> Iterator[tuple[str, RunReport]]:
    """Serve the runs that share an engine, and give the report of each as soon as it is there."""
    first = next(iter(runs.values()))
    began = time.perf_counter()
    with _watched_ops(first.fault) as ops:
        llm = start(first, ranks)
        start_s = time.perf_counter() - began
        for name, run in runs.items():
            ops.fault = run.fault
            # The calls so far belong to the warm-up, or to another run.
            ops.calls.clear()
            llm.reset_prefix_cache()
            yield name, _serve(llm, run, ops, start_s)
            start_s = 0.0


def _serve(llm: Any, run: Run, ops: "Ops", start_s: float) -> RunReport:
    """Serve one run by an engine that took start_s seconds to start."""
    layers = _attention_layers(llm)
    before = Counter(counters(llm))
    started = time.perf_counter()
    with _counted_calls(layers, run.jitter) as calls:
        # The same tokens to the same prompt are one answer, by whichever request came first.
        answers: dict[tuple[int, ...], Any] = {}
        times: Counter[tuple[int, ...]] = Counter()
        for prompt, output in _outputs(llm, run):
            key = (prompt, *output.outputs[0].token_ids)
            answers.setdefault(key, output)
            times[key] += 1
    serve_s = time.perf_counter() - started
    steps = [
        [(token, step) for token, step in zip(a.token_ids, a.logprobs, strict=True)]
        for a in (output.outputs[0] for output in answers.values())
    ]
    return RunReport(
        prompts=[prompt for prompt, *_ in answers],
        times=[times[key] for key in answers],
        tokens=[tokens for _, *tokens in answers],
        logprobs=[[step[token].logprob for token, step in row] for row in steps],
        margins=[[_margin(step) for _, step in row] for row in steps],
        prompt_logprobs=[
            _prompt_logprobs(output) for output in answers.values() if run.prompt_logprobs
        ],
        cached=[output.num_cached_tokens or 0 for output in answers.values()],
        impls=[_name(_written_class(type(layer.impl))) for layer in layers],
        backends=[_name(layer.get_attn_backend()) for layer in layers],
        forwards=calls.forwards,
        ops=dict(ops.calls),
        captured=dict(ops.captured),
        graphs=llm.llm_engine.vllm_config.compilation_config.cudagraph_mode.name,
        replays=calls.replays,
        context_ranks=min(layer.impl.dcp_world_size for layer in layers),
        counters=dict(Counter(counters(llm)) - before),
        start_s=round(start_s, 1),
        serve_s=round(serve_s, 1),
    )


def _clear_up() -> None:
    """After an engine, so that another can start."""
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    gc.collect()
    with mock.patch.object(gc, "collect"):
        cleanup_dist_env_and_memory()
    # The pool of the graphs that went with the engine is gone, which vLLM does not know.
    type(current_platform)._global_graph_pool = None


def _outputs(llm: Any, run: Run) -> Iterator[tuple[int, Any]]:
    """Which prompt, and vLLM's output to it, for every request that is through."""
    from vllm import SamplingParams

    most = run.max_tokens
    lengths = most if isinstance(most, list) else [most] * len(run.prompts)
    prompts = _given(run)
    sampling = [
        SamplingParams(
            temperature=0.0,
            max_tokens=length,
            ignore_eos=True,
            logprobs=2,
            detokenize=False,
            prompt_logprobs=0 if run.prompt_logprobs else None,
        )
        for length in lengths
    ]
    if not run.until:
        yield from enumerate(llm.generate(prompts, sampling, use_tqdm=False))
        return
    rng = random.Random(0)
    engine, given = llm.llm_engine, itertools.count()
    while time.time() < run.until:
        # At times more than can run at once, at times none.
        room = 2 * run.max_num_seqs - engine.get_num_unfinished_requests()
        for _ in range(min(room, rng.choice((0, 0, 0, 1, 4)))):
            drawn = rng.randrange(len(prompts))
            engine.add_request(f"{next(given)}-{drawn}", prompts[drawn], sampling[drawn])
        if engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    yield int(output.request_id.split("-")[1]), output


def _given(run: Run) -> list[dict[str, Any]]:
    """The run's prompts as vLLM takes them."""
    prompts: list[dict[str, Any]] = [{"prompt_token_ids": ids} for ids in run.prompts]
    if not run.audio:
        return prompts
    heard = [{"audio": (noise(samples).numpy(), SAMPLING_RATE)} for samples in run.audio]
    return [
        {"encoder_prompt": {"prompt": "", "multi_modal_data": audio}, "decoder_prompt": prompt}
        for audio, prompt in zip(heard, prompts, strict=True)
    ]


def start(run: Run, ranks: int = 1) -> Any:
    """vLLM's LLM for a run, in this process: one rank's of several."""
    from vllm import LLM

    os.environ["XFV1_OPS"] = run.ops
    options: dict[str, Any] = {"enforce_eager": not run.graphs}
    if run.backend:
        options["attention_config"] = {"backend": run.backend}
    if run.graphs:
        # Batches of every size up to the largest, each request with all its drafts.
        sizes = [1 << bit for bit in range(run.max_num_seqs.bit_length())]
        options["compilation_config"] = {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [size * (1 + run.drafts) for size in sizes],
        }
    if run.drafts:
        options["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": run.drafts,
            "prompt_lookup_max": 2,
            "prompt_lookup_min": 1,
        }
    if ranks > 1:
        options |= {
            "distributed_executor_backend": "external_launcher",
            "tensor_parallel_size": ranks,
            "decode_context_parallel_size": run.context_parallel,
            "disable_custom_all_reduce": True,
        }
    with tempfile.TemporaryDirectory() as folder:
        return LLM(
            model=run.model.save(Path(folder)),
            dtype=run.model.dtype,
            generation_config="vllm",
            block_size=run.block_size,
            max_model_len=run.max_model_len,
            max_num_seqs=run.max_num_seqs,
            max_num_batched_tokens=run.max_num_batched_tokens,
            num_gpu_blocks_override=run.cached_tokens // run.block_size,
            # Given outright, so that memory is not profiled, and others' use of it is no error.
            kv_cache_memory_bytes=CACHE_BYTES,
            gpu_memory_utilization=0.05,
            enable_flashinfer_autotune=False,
            enable_chunked_prefill=True,
            enable_prefix_caching=run.prefix_caching,
            # vLLM's audio processor asks for a tokenizer.
            skip_tokenizer_init=not run.audio,
            disable_log_stats=False,
            seed=0,
            **loading(run.model),
            **options,
        )


def counters(llm: Any) -> dict[str, int]:
    """vLLM's counters of one engine that are not zero."""
    from vllm.v1.metrics.reader import Counter as Metric

    found = (metric for metric in llm.get_metrics() if isinstance(metric, Metric))
    return {metric.name: metric.value for metric in found if metric.value}


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


def _written_class(kind: type[Any]) -> type[Any]:
    """The class, or its base where vLLM derived the class in a function (cross attention)."""
    return next(base for base in kind.__mro__ if "<locals>" not in base.__qualname__)


def _prompt_logprobs(output: Any) -> list[float]:
    """Logprobs of the prompt's tokens but the first, which nothing comes before."""
    steps = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return [step[token].logprob for token, step in steps]


@dataclass
class Calls:
    """forwards: calls of each layer's forward. replays: how often a CUDA graph was replayed."""

    forwards: list[int]
    replays: int = 0


@contextlib.contextmanager
def _counted_calls(layers: list[Any], jitter: float) -> Iterator[Calls]:
    """The layers count their calls, and move their outputs by a jitter, while this lasts."""
    import torch

    calls = Calls([0] * len(layers))

    def counting(index: int, forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            calls.forwards[index] += 1
            output = forward(*args, **kwargs)
            if jitter:
                moved = 2 * torch.rand(output.shape, device=output.device) - 1
                output.mul_(1 + jitter * torch.finfo(output.dtype).eps * moved)
            return output

        return call

    def counted_replay(graph: Any) -> None:
        calls.replays += 1
        replay(graph)

    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(layers):
            forward = counting(index, layer.impl.forward)
            stack.enter_context(mock.patch.object(layer.impl, "forward", forward))
        if torch.cuda.is_available():
            replay = torch.cuda.CUDAGraph.replay
            stack.enter_context(mock.patch.object(torch.cuda.CUDAGraph, "replay", counted_replay))
        yield calls


@dataclass
class Ops:
    """xfv1's ops under watch.

    fault: the name among `FAULTS` of the fault that every call has from now on; "" for none.
    calls: how often each "op phase max_query_len" was called.
    captured: the same of the calls that a CUDA graph recorded.
    """

    fault: str
    calls: Counter[str] = field(default_factory=Counter)
    captured: Counter[str] = field(default_factory=Counter)


@contextlib.contextmanager
def _watched_ops(fault: str) -> Iterator[Ops]:
    """xfv1's ops count their calls, and have a fault, while this lasts."""
    import torch

    from xfv1.dispatch import OPS

    ops = Ops(fault)
    cuda = torch.cuda.is_available()

    def watched(name: str, run: Callable[[Any], None]) -> Callable[[Any], None]:
        def call(call: Any) -> None:
            run(FAULTS[ops.fault](call) if ops.fault else call)
            captured = cuda and torch.cuda.is_current_stream_capturing()
            counts = ops.captured if captured else ops.calls
            counts[f"{name} {call.batch.kind} {call.batch.max_query_len}"] += 1

        return call

    with contextlib.ExitStack() as stack:
        for name, op in OPS.items():
            stack.enter_context(mock.patch.object(op, "run", watched(name, op.run)))
        yield ops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--session", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    args = parser.parse_args()
    content = json.loads(args.session.read_text())
    runs = {name: Run.from_json(run) for name, run in content.pop("runs").items()}
    session = Session(runs, **content)
    os.environ.update(ENVIRONMENT | session.environment)
    for report in serve(session):
        written = args.report.with_suffix(".tmp")
        written.write_text(json.dumps(dataclasses.asdict(report), indent=1))
        written.replace(args.report)


if __name__ == "__main__":
    main()
