"""Is a wrong setting named in one line, with what is accepted, before torch or vLLM is imported?"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import xfv1
from xfv1 import settings, wording
from xfv1.dispatch import OPS

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("XFV1_OPS", "XFV1_DEBUG", "XFV1_CPU")


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_the_names_are_those_of_the_ops() -> None:
    assert tuple(OPS) == settings.OPS


def test_checking_imports_neither_torch_nor_vllm() -> None:
    code = "import sys; from xfv1 import settings; settings.check(); print(*sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert {"torch", "vllm", "xformers", "triton"} & set(done.stdout.split()) == set()


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ("", None),
        (" ", None),
        ("triton", ("triton",)),
        (" torch , triton,", ("torch", "triton")),
        ("triton,triton", ("triton", "triton")),
    ],
)
def test_ops_are_read_in_their_order(
    setting: str, names: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XFV1_OPS", setting)
    assert settings.ops() == names


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("tritn", "XFV1_OPS='tritn': no op 'tritn' (did you mean triton?), expected names among"),
        ("torch,FA3", "XFV1_OPS='torch,FA3': no op 'FA3'"),
        ("Xformers_CK", "no op 'Xformers_CK' (did you mean xformers_ck?)"),
        ("nothing", "no op 'nothing', expected names among"),
        (",", "XFV1_OPS=',': expected names among"),
        ("a\nb", r"XFV1_OPS='a\nb': no op 'a\nb', expected"),
        ("\udcff", r"XFV1_OPS='\udcff': no op '\udcff', expected"),
        ("x" * 5000, f"XFV1_OPS='{'x' * 47}...{'x' * 47}x': no op"),
    ],
)
def test_wrong_ops_are_answered_in_one_line_with_the_names(
    setting: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XFV1_OPS", setting)
    with pytest.raises(ValueError, match=r"^XFV1_OPS=") as raised:
        settings.check()
    line = str(raised.value)
    assert said in line
    assert all(name in line for name in settings.OPS)
    assert line == wording.one_line(line)


@pytest.mark.parametrize(
    ("name", "read"), [("XFV1_DEBUG", settings.debug), ("XFV1_CPU", settings.cpu)]
)
def test_a_switch_is_0_or_1(
    name: str, read: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not read()
    for setting, on in {"": False, "0": False, "1": True}.items():
        monkeypatch.setenv(name, setting)
        assert read() == on
        settings.check()
    for setting in ("yes", "2", " 1", "TRUE"):
        monkeypatch.setenv(name, setting)
        for call in (read, settings.check):
            with pytest.raises(ValueError, match=f"^{name}='{setting}': expected 0 or 1$"):
                call()


def test_a_wrong_switch_registers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends import registry

    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", {})
    monkeypatch.setenv("XFV1_CPU", "yes")
    with pytest.raises(ValueError, match=r"^XFV1_CPU='yes': expected 0 or 1$"):
        xfv1.register()
    assert registry._ATTN_OVERRIDES == {}


def test_a_long_or_broken_text_becomes_one_short_line() -> None:
    assert wording.one_line("caf\u00e9: no op") == "caf\u00e9: no op"
    assert wording.one_line("a\nb\x00\udcff") == r"a\nb\x00\udcff"
    line = wording.one_line("first " + "x" * 5000 + " last")
    assert line.startswith("first x")
    assert line.endswith("x last")
    assert len(line) < 1100
