"""The Python sources of a released vLLM, from its wheel; nothing is installed.

python -m tests.contract.fetch 0.26.0 .tox/vllm-sources/0.26.0
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PLATFORM = "manylinux_2_28_x86_64"


class FetchError(RuntimeError):
    """pip gave no wheel; the message names the version and ends with what pip said."""


def fetch(version: str, folder: Path) -> Path:
    """Put ``vllm/**/*.py`` of a release into a folder, unless it is there already.

    Beside it goes the metadata of a build for CPUs: vLLM's platforms ask for its version.

    Raises:
        FetchError: if pip finds no such wheel, or cannot load it.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Complete, or not there at all.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        sources = Path(scratch, "sources")
        with zipfile.ZipFile(_wheel(version, Path(scratch))) as wheel:
            for name in wheel.namelist():
                if name.startswith("vllm/") and name.endswith(".py"):
                    wheel.extract(name, sources)
        metadata = sources / f"vllm-{version}+cpu.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
        sources.rename(folder)
    return folder


def _wheel(version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-cache-dir", "--no-deps"]
    command += ["--only-binary=:all:", f"--platform={PLATFORM}", f"--dest={folder}"]
    done = subprocess.run([*command, f"vllm=={version}"], capture_output=True, text=True)
    wheels = list(folder.glob("vllm-*.whl"))
    if done.returncode or not wheels:
        said = "\n".join((done.stderr or done.stdout).splitlines()[-5:])
        raise FetchError(f"vllm=={version} for {PLATFORM}: pip download failed:\n{said}")
    return wheels[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version", help="a release, e.g. 0.33.0")
    parser.add_argument("folder", type=Path, help="where the sources go")
    options = parser.parse_args()
    try:
        fetch(options.version, options.folder)
    except FetchError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
