"""A real `vllm serve` in a process group of its own, and OpenAI's client to talk to it."""

import contextlib
import functools
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
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil
from openai import OpenAI

# Seconds that a server may take to start and to stop, on a loaded machine.
PATIENCE = 900.0
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
                raise ServerError(f"ended with {code}: {self.printed()[-4000:]}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health").is_success:
                    return
            time.sleep(0.5)
        raise ServerError(f"no answer after {PATIENCE} s: {self.printed()[-4000:]}")

    def printed(self) -> str:
        return self.log.read_text(errors="replace")

    @functools.cached_property
    def model(self) -> str:
        """The name of the one model that it serves."""
        (found,) = self.client().models.list().data
        name: str = found.id
        return name

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=PATIENCE, max_retries=0)

    def workers(self, method: str) -> Any:
        """What each worker process answers to a method of `tests/site/observed.py`."""
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
                raise ServerError(f"{left} requests are left: {self.printed()[-4000:]}")
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
                raise ServerError(f"it left processes behind: {left}: {self.printed()[-4000:]}")
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
