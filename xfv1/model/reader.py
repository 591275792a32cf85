"""Ask vLLM how it will make a model's attention layers; without vLLM, the config's fields."""

import contextlib
import errno
import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xfv1.model.facts import Model, ModelError
from xfv1.wording import one_line, shown

# How long vLLM may take to build one model on the meta device; most take less than 5 s.
SECONDS = 60.0
DTYPES = ("auto", "float16", "bfloat16", "float32")
# No server has more ranks.
MAX_RANKS = 9999


def read(
    path: str | os.PathLike[str], *, tensor_parallel_size: int = 1, dtype: str = "auto"
) -> Model:
    """The attention layers of the model that a config.json describes.

    Args:
        path: the config.json, or the folder that holds it.
        tensor_parallel_size: the number of ranks that share each layer's heads.
        dtype: as vLLM's --dtype.

    Raises:
        ModelError: the config cannot be read, or vLLM refuses it. The message is one line.
    """
    with Reader() as reader:
        return reader.read(path, tensor_parallel_size=tensor_parallel_size, dtype=dtype)


class Reader:
    """Reads models, one after another, by one process that has imported vLLM.

    A context manager: the process starts with the first model, and ends with the context.
    seconds: how long each model may take.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._open = contextlib.ExitStack()
        self._process: subprocess.Popen[str] | None = None
        self._log: Path | None = None
        self._hello: dict[str, Any] = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error: object) -> None:
        # The process ends where its input does.
        with contextlib.suppress(BrokenPipeError):
            self._open.close()
        self._process = None

    def read(
        self, path: str | os.PathLike[str], *, tensor_parallel_size: int = 1, dtype: str = "auto"
    ) -> Model:
        """As the function `read`.

        Raises:
            ModelError: as there.
        """
        try:
            expanded = Path(os.path.expanduser(path))
            return self._read(expanded, tensor_parallel_size, dtype)
        except ValueError as error:
            raise ModelError(one_line(f"{os.fspath(path)}: {error}")) from error

    def _read(self, path: Path, ranks: int, dtype: str) -> Model:
        if not 1 <= ranks <= MAX_RANKS:
            raise ValueError(f"tensor_parallel_size={ranks}: expected 1 to {MAX_RANKS}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={shown(dtype)}: expected {', '.join(DTYPES)}")
        config = load(path)
        hello = self._start()
        if "missing" in hello:
            from xfv1.model import fields

            return fields.read(config, ranks, dtype, hello["missing"])
        with _folder(path, config) as folder:
            answer = self._ask(folder, ranks, dtype)
        refused = [answer["refused"]] if "refused" in answer else answer["model"]["refused"]
        # vLLM names the folder that it was given.
        refused = [reason.replace(folder, str(path)) for reason in refused]
        if "refused" in answer:
            raise ValueError(f"vLLM {hello['vllm']} refuses it: {refused[0]}")
        return Model.from_json({**answer["model"], "refused": refused})

    def _start(self) -> dict[str, Any]:
        """Start the process, and return the line that it begins with."""
        if self._process is None:
            folder = self._open.enter_context(tempfile.TemporaryDirectory())
            self._log = Path(folder, "log")
            with self._log.open("w") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "xfv1.model.serve"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=_environment(),
                )
            self._process = self._open.enter_context(process)
            self._hello = self._line()
        return self._hello

    def _ask(self, folder: str, ranks: int, dtype: str) -> dict[str, Any]:
        assert self._process is not None and self._process.stdin is not None
        request = {
            "folder": folder,
            "tensor_parallel_size": ranks,
            "dtype": dtype,
            "seconds": self.seconds,
        }
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._line()

    def _line(self) -> dict[str, Any]:
        """The process's next answer.

        Raises:
            ValueError: it has ended.
        """
        assert self._process is not None and self._log is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            lines = self._log.read_text(errors="replace").splitlines()
            last = lines[-1] if lines else "no message"
            raise ValueError(f"the process that reads it ended with status {status}: {last}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def load(path: Path) -> dict[str, Any]:
    """The object in a config.json, or in the one of a folder.

    Raises:
        ValueError: there is none.
    """
    try:
        file = path / "config.json" if path.is_dir() else path
        if not stat.S_ISREG(file.stat().st_mode):
            # Reading a device may never end, and a pipe may never begin.
            raise OSError(errno.EINVAL, "Not a regular file")
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{error.strerror}: expected a config.json") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{error}: expected JSON") from error
    if not isinstance(config, dict):
        raise ValueError(f"{shown(config)}: expected an object")
    return config


@contextlib.contextmanager
def _folder(path: Path, config: dict[str, Any]) -> Iterator[str]:
    """A folder with the config under the name config.json, which vLLM looks for.

    That is the model's own folder where it can be. Some models need more files of it, such as an
    image processor's settings.
    """
    path = path.absolute()
    if path.is_dir() or path.name == "config.json":
        yield str(path if path.is_dir() else path.parent)
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        yield folder


def _environment() -> dict[str, str]:
    """The process imports the same xfv1 as this one, and looks for nothing on a network."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
    return {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        # One process talks to itself; without a network, looking up its host's name takes minutes.
        "VLLM_HOST_IP": "127.0.0.1",
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": path,
    }
