"""The wheel alone, without torch or vLLM: does it say what to install?"""

import json
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest

import xfv1

ROOT = Path(__file__).resolve().parents[2]
# The first setuptools that reads pyproject.toml's license, as [build-system] says.
SETUPTOOLS = 77


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment that has the wheel and nothing else."""
    version = metadata.version("setuptools")
    if int(version.partition(".")[0]) < SETUPTOOLS:
        pytest.skip(f"setuptools {version} cannot build the wheel, and no index may be at hand")
    folder = tmp_path_factory.mktemp("wheel")
    # A build leaves folders behind.
    source = folder / "source"
    shutil.copytree(ROOT / "xfv1", source / "xfv1")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}", str(source)]
    subprocess.run([*pip, *build], check=True)
    environment = folder / "environment"
    venv.create(environment)
    programs = environment / "bin"
    (wheel,) = folder.glob("*.whl")
    install = ["install", "--no-index", "--no-deps", str(wheel)]
    subprocess.run([*pip, "--python", str(programs / "python"), *install], check=True)
    return programs


def _run(programs: Path, *command: str) -> subprocess.CompletedProcess[str]:
    program = str(programs / command[0])
    return subprocess.run(
        [program, *command[1:]],
        cwd=programs,
        env={},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def test_without_torch_it_says_what_to_install(installed: Path) -> None:
    for command in (("xfv1",), ("python", "-m", "xfv1")):
        done = _run(installed, *command)
        assert done.returncode == 1
        lines = done.stdout.splitlines()
        assert lines[0] == f"xfv1 {xfv1.__version__}"
        assert lines[-3:-1] == ["torch is not installed", "vllm is not installed"]
        assert 'pip install "xfv1[cuda]"' in lines[-1]
        assert 'pip install "xfv1[cpu]"' in lines[-1]
        assert "Traceback" not in done.stdout
    facts = json.loads(_run(installed, "xfv1", "--json").stdout)
    assert facts["missing"] == ["torch is not installed", "vllm is not installed"]
    assert facts["rows"] == []


def test_the_script_says_its_version(installed: Path) -> None:
    done = _run(installed, "xfv1", "--version")
    assert (done.returncode, done.stdout) == (0, f"xfv1 {xfv1.__version__}\n")
