"""Real engines as users start them: `vllm serve` in a process group of its own, and a script."""

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil
from openai import OpenAI

from tests.engine.engine import Answers

# Seconds that a server may take to start and to stop, on a loaded machine.
PATIENCE = 900.0
# Characters of its log that an error ends with: vLLM's own errors name their cause far above.
TOLD = 20_000
# A server binds its port long after that was found free. Meanwhile another process may be given
# it: vLLM's engines and torch ask for any port, which the kernel takes from 32768 on.
PORTS = range(20000, 32000)


class ServerError(RuntimeError):
    """A server ended or did not start in time; the message ends with what it printed last."""


class Server:
    """`vllm serve` under way. Use it as a context: its whole process group ends with that."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str], folder: Path) -> None:
        """Start it.

        Args:
            arguments: what follows the command `vllm`, "serve" first.
            environment: the process's.
            folder: its current directory, where its log goes.
        """
        folder.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "log"
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [*command(), *arguments, "--host", "127.0.0.1", "--port", str(port)],
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait(self) -> None:
        """Wait until it answers.

        Raises:
            ServerError: if it ends before, or takes longer than PATIENCE.
        """
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if (code := self.process.poll()) is not None:
                raise ServerError(f"ended with {code}: {self.printed()[-TOLD:]}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health").is_success:
                    return
            time.sleep(0.5)
        raise ServerError(f"no answer after {PATIENCE} s: {self.printed()[-TOLD:]}")

    def printed(self) -> str:
        return self.log.read_text(errors="replace")

    @functools.cached_property
    def model(self) -> str:
        """The name of the one model that it serves."""
        (found,) = self.client().models.list().data
        name: str = found.id
        return name

    def complete(self, ids: list[int], max_tokens: int) -> dict[str, Any]:
        """A greedy completion of a prompt: its "tokens", "logprobs" and "margins"."""
        (choice,) = (
            self.client()
            .completions.create(
                model=self.model, prompt=ids, max_tokens=max_tokens, temperature=0.0, logprobs=2,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            .choices
        )  # fmt: skip
        ranked = [sorted(step.values(), reverse=True) for step in choice.logprobs.top_logprobs]
        return {
            "tokens": choice.token_ids,
            "logprobs": choice.logprobs.token_logprobs,
            "margins": [step[0] - step[1] for step in ranked],
        }

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=PATIENCE, max_retries=0)

    def workers(self, method: str) -> Any:
        """Each worker process's answer to a method of `tests/site/observed.py`."""
        answer = httpx.post(f"{self.url}/collective_rpc", json={"method": method}, timeout=PATIENCE)
        answer.raise_for_status()
        return answer.json()["results"]

    def running(self) -> float:
        """Requests that the engine is at work on or has in its queue, by its own metrics."""
        total, found = 0.0, 0
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if line.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{")):
                total, found = total + float(line.split()[-1]), found + 1
        if not found:
            raise ServerError("its metrics do not say how many requests run")
        return total

    def wait_until_idle(self) -> None:
        """Wait until the engine has no request left.

        Raises:
            ServerError: if it still has one after PATIENCE.
        """
        end = time.monotonic() + PATIENCE
        while left := self.running():
            if time.monotonic() > end:
                raise ServerError(f"{left} requests are left: {self.printed()[-TOLD:]}")
            time.sleep(0.2)

    def stop(self) -> int:
        """End it as a service manager does, by SIGTERM, and wait. Returns its exit status.

        Raises:
            ServerError: if a process of its group is left after PATIENCE.
        """
        self.process.terminate()
        code = self.process.wait(PATIENCE)
        end = time.monotonic() + PATIENCE
        while left := self.group():
            if time.monotonic() > end:
                raise ServerError(f"it left processes behind: {left}: {self.printed()[-TOLD:]}")
            time.sleep(0.2)
        return code

    def group(self) -> list[int]:
        """The processes of its group that still run."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.Error):
                if (
                    os.getpgid(process.pid) == self.process.pid
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(process.pid)
        return found


@dataclass(frozen=True)
class Offline:
    """The answers of a script's engine, the script's process, and its workers' reports."""

    pid: int
    workers: list[dict[str, Any]]
    answers: Answers


def run_script(
    folder: Path,
    environment: dict[str, str],
    engine: dict[str, Any],
    prompts: list[list[int]],
    max_tokens: int,
    before: dict[str, list[Any]] | None = None,
) -> Offline:
    """Have a script's engine answer prompts (`tests/site/offline.py`), in processes of its own.

    Raises:
        ServerError: if it fails.
    """
    folder.mkdir(parents=True)
    request = {
        "engine": engine,
        "prompts": prompts,
        "max_tokens": max_tokens,
        "before": before or {},
    }
    (folder / "request.json").write_text(json.dumps(request))
    done = subprocess.run(
        [sys.executable, "-m", "offline", "request.json", "answer.json"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    if done.returncode:
        raise ServerError(f"the script ended with {done.returncode}: {done.stdout[-TOLD:]}")
    found = json.loads((folder / "answer.json").read_text())
    return Offline(found["pid"], found["workers"], answers_of(found["answers"]))


def answers_of(found: list[dict[str, Any]]) -> Answers:
    """Answers to prompts in their order."""
    rows = {name: [answer[name] for answer in found] for name in ("tokens", "logprobs", "margins")}
    return Answers(prompts=list(range(len(found))), times=[1] * len(found), **rows)


def _free_port() -> int:
    """A port that nobody listens at, and that no process is given that asks for any."""
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port
    raise ServerError(f"no free port from {PORTS.start} to {PORTS.stop - 1}")


def command() -> list[str]:
    """How to call vLLM's command: its script, or its module where there is no script."""
    script = shutil.which("vllm", path=sysconfig.get_path("scripts"))
    return [script] if script else [sys.executable, "-m", "vllm.entrypoints.cli.main"]
