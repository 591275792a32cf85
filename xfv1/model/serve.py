"""A program that reads models by building them (`xfv1.model.build`), for `xfv1.model.reader`.

    python -m xfv1.model.serve

It imports vLLM, and writes one line of JSON: `vllm`, its version, or `missing`, why it cannot be
imported. Then it reads a request a line, and answers each by a line:

- a request has the fields `folder` (where the config.json is), `tensor_parallel_size`, `dtype`
  ("auto", or the dtype to serve with) and `seconds` (how long the answer may take);
- an answer has the field `model` (see `facts.Model`), or `refused`, vLLM's reason.

Each model is built in a fork of the program, so that nothing of it stays behind.
"""

import functools
import json
import linecache
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from xfv1.packages import hide_broken, import_without_ops
from xfv1.wording import cause

# Exceptions whose text alone, such as a key, says too little.
PLACED = (KeyError, AttributeError, IndexError, TypeError, AssertionError)


def main() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    # Libraries print to standard output too; that goes to the log.
    os.dup2(2, 1)
    try:
        import_without_ops()
        hide_broken()
        from xfv1.model import build

        hello = {"vllm": build.prepare()}
    except Exception as error:
        hello = {"missing": _flat(cause(error))}
    _write(answers, hello)
    for line in sys.stdin:
        request = json.loads(line)
        seconds = request.pop("seconds")
        _write(answers, _in_a_fork(functools.partial(_answer, **request), seconds))


def _write(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _answer(folder: str, tensor_parallel_size: int, dtype: str) -> dict[str, Any]:
    from xfv1.model import build

    try:
        return {"model": build.read(folder, tensor_parallel_size, dtype).to_json()}
    except Exception as error:
        return {"refused": reason(error)}


def reason(error: Exception) -> str:
    """An exception's message in one line; if that says too little, with the place of the error."""
    # Pydantic adds the arguments and an address to what was said.
    messages = [row["msg"] for row in error.errors()] if hasattr(error, "errors") else []
    text = _flat("; ".join(messages) or str(error)).removeprefix("Value error, ")
    if text and not isinstance(error, PLACED):
        return text
    name, trace = type(error).__name__, error.__traceback__
    if trace is None:
        return f"{name}: {text}"
    while trace.tb_next is not None:
        trace = trace.tb_next
    file = trace.tb_frame.f_code.co_filename
    text = text or linecache.getline(file, trace.tb_lineno).strip()
    return f"{name} in {Path(file).name}, line {trace.tb_lineno}: {text}"


def _flat(text: str) -> str:
    return " ".join(text.split())


def _in_a_fork(answer: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Call `answer` in a fork of this process, which is killed after so many seconds."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            with os.fdopen(writer, "w") as pipe:
                pipe.write(json.dumps(answer()))
        finally:
            os._exit(0)
    os.close(writer)
    text = _received(reader, time.monotonic() + seconds)
    os.close(reader)
    if text is None:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if text is None:
        return {"refused": f"building the model took more than {seconds:g} s", "late": True}
    if not text:
        code = os.waitstatus_to_exitcode(status)
        return {"refused": f"the process that built the model ended with status {code}"}
    result: dict[str, Any] = json.loads(text)
    return result


def _received(pipe: int, end: float) -> bytes | None:
    """All that is written to a pipe; None if its writer has not finished in time."""
    text = b""
    while select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
        part = os.read(pipe, 2**16)
        if not part:
            return text
        text += part
    return None


if __name__ == "__main__":
    main()
