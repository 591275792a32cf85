"""Imports go one way: each module imports only modules that are drawn below it.

The drawing is `DRAWN`. `tests/oracle/test_purity.py` asks what the packages import of others.
"""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# By package: its parts from the top down. A part is a module, or a folder with all that is in it.
# A part imports parts of lower lines; parts of the same line do not know each other.
Drawing = tuple[tuple[str, ...], ...]
DRAWN: dict[str, Drawing] = {
    "xfv1": (
        ("backend", "__main__"),
        ("impl", "model"),
        ("support", "builder"),
        ("debug", "dispatch"),
        ("step", "rules"),
        ("ops",),
        ("phase", "cache", "kernels", "__init__"),
        ("cpu",),
        ("compat", "device", "settings", "packages"),
        ("wording",),
    ),
    "xfv1.ops": (
        ("xformers", "vllm_fa", "triton_paged", "torch_cpu"),
        ("base",),
        ("__init__",),
    ),
    "xfv1.ops.xformers": (
        ("fa3", "splitk", "varlen"),
        ("gather",),
        ("base",),
        ("__init__",),
    ),
    "xfv1.model": (
        ("__init__", "serve"),
        ("reader", "build"),
        ("fields",),
        ("facts",),
    ),
    "xfv1.kernels": (("paged",), ("__init__",)),
    "xfv1.kernels.paged": (("launch",), ("device", "tiling"), ("__init__",)),
    "fixtures": (("inputs",), ("cases",), ("__init__",)),
}


def modules_of(package: str) -> dict[str, Path]:
    """The package's files by the names of their modules; a folder is called `__init__`."""
    files = sorted((ROOT / package.replace(".", "/")).rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}


def imported(text: str, modules: set[str]) -> set[str]:
    """Which of the modules a source imports, at its top, within a function or for types alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, ast.unparse(node)
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            # A name of the package itself, or a module in it.
            known = {name for name in inner if {name, f"{name}.__init__"} & modules}
            found |= known | ({node.module} if inner - known else set())
    return {
        name if name in modules else f"{name}.__init__"
        for name in found
        if {name, f"{name}.__init__"} & modules
    }


def arrows(package: str) -> dict[str, set[str]]:
    """By each module of a package, the package's modules that it imports."""
    modules = modules_of(package)
    return {name: imported(file.read_text(), {*modules}) for name, file in modules.items()}


def part_of(package: str, module: str) -> str:
    """The part of a package in which a module is."""
    return module.removeprefix(f"{package}.").partition(".")[0]


def against(package: str, drawing: Drawing, found: dict[str, set[str]]) -> Iterator[str]:
    """The imports that are not drawn."""
    line = {part: number for number, parts in enumerate(drawing) for part in parts}
    for module, others in found.items():
        above = part_of(package, module)
        for other in sorted(others):
            below = part_of(package, other)
            if above != below and line[above] >= line[below]:
                yield f"{module} imports {other}"


@pytest.mark.parametrize("package", DRAWN)
def test_every_module_is_drawn_once(package: str) -> None:
    drawn = [part for parts in DRAWN[package] for part in parts]
    assert len(drawn) == len(set(drawn))
    assert set(drawn) == {part_of(package, module) for module in modules_of(package)}


@pytest.mark.parametrize("package", DRAWN)
def test_imports_go_down_the_drawing(package: str) -> None:
    assert list(against(package, DRAWN[package], arrows(package))) == []


@pytest.mark.parametrize("package", ["xfv1", "fixtures", "reference"])
def test_no_module_imports_itself_by_way_of_others(package: str) -> None:
    """graphlib.CycleError names the circle."""
    found = arrows(package)
    assert len(found) > 1
    assert len([*graphlib.TopologicalSorter(found).static_order()]) == len(found)


# The test can fail.


@pytest.mark.parametrize(
    "line",
    [
        "import xfv1.impl",
        "from xfv1 import impl",
        "from xfv1.impl import XFormersImpl",
        "def late():\n    from xfv1.impl import XFormersImpl",
        "if TYPE_CHECKING:\n    from xfv1.impl import XFormersImpl",
    ],
)
def test_an_arrow_up_is_seen(line: str) -> None:
    found = {"xfv1.debug": imported(line, {*modules_of("xfv1")})}
    assert [*against("xfv1", DRAWN["xfv1"], found)] == ["xfv1.debug imports xfv1.impl"]


def test_an_arrow_within_a_line_is_seen() -> None:
    text = "from xfv1.builder import XFormersMetadataBuilder"
    found = {"xfv1.support": imported(text, {*modules_of("xfv1")})}
    assert [*against("xfv1", DRAWN["xfv1"], found)] == ["xfv1.support imports xfv1.builder"]


def test_a_packages_own_names_are_its_inits() -> None:
    text = "from xfv1 import __version__, compat\nimport xfv1\nimport torch"
    assert imported(text, {*modules_of("xfv1")}) == {"xfv1.__init__", "xfv1.compat"}
