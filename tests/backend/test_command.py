"""`python -m xfv1`: does bad input end in one line, and what does it say where vLLM is missing?"""

import json
from pathlib import Path
from typing import Any

import pytest

import xfv1
from xfv1 import __main__ as command

pytestmark = pytest.mark.cpu

LLAMA: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
WHOLE = "expected a whole number from 1 to 2147483647"
# By what a config.json holds: what is said of it.
CONFIGS: dict[str, tuple[object, str]] = {
    "list": ([1], "[1]: expected an object"),
    "no heads": ({}, "num_attention_heads or n_head or n_heads is missing"),
    "heads": ({"num_attention_heads": True}, f"num_attention_heads=True: {WHOLE}"),
    "text": (LLAMA | {"text_config": 3}, "text_config=3: expected an object"),
    "MPT": (LLAMA | {"attn_config": [1]}, "attn_config=[1]: expected an object"),
    "KV heads": (LLAMA | {"num_key_value_heads": "2"}, f"num_key_value_heads='2': {WHOLE}"),
    "divisor": (LLAMA | {"num_key_value_heads": 3}, "=3: expected a divisor of 8 heads"),
    "size": (LLAMA | {"head_dim": "64"}, f"head_dim='64': {WHOLE}"),
    "negative": (LLAMA | {"head_dim": -3}, f"head_dim=-3: {WHOLE}"),
    "infinite": (LLAMA | {"head_dim": float("inf")}, f"head_dim=inf: {WHOLE}"),
    "NaN": (LLAMA | {"head_dim": None, "hidden_size": float("nan")}, f"hidden_size=nan: {WHOLE}"),
    "hidden": (LLAMA | {"head_dim": None, "hidden_size": 9}, "=9: expected a multiple of 8 heads"),
    "cap": (LLAMA | {"attn_logit_softcapping": [1]}, "=[1]: expected a number above 0"),
    "huge cap": (LLAMA | {"attn_logit_softcapping": 10**400}, ": expected a number above 0"),
    "window": (LLAMA | {"sliding_window": [4]}, f"sliding_window=[4]: {WHOLE}"),
    "wide": (LLAMA | {"sliding_window": 10**40}, f": {WHOLE}"),
}
# By what else is at the path.
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "Expecting value: line 1 column 1 (char 0): expected JSON"),
    "binary": (bytes(range(256)), "'utf-8' codec can't decode byte"),
    "deep": (b"[" * 100_000, "maximum recursion depth exceeded"),
    "digits": (b"[" + b"9" * 5000 + b"]", "Exceeds the limit"),
}


def _said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a wrong command ends in."""
    with pytest.raises(SystemExit) as left:
        command.main([*arguments])
    assert left.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("python -m xfv1: error: ")
    assert len(line) < 1100
    return line


@pytest.mark.parametrize(("content", "said"), CONFIGS.values(), ids=CONFIGS)
def test_a_wrong_config_is_one_line(
    content: object, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    line = _said(capsys, f"--hf-config={tmp_path}")
    assert f"--hf-config={tmp_path}: " in line
    assert said in line


@pytest.mark.parametrize(("content", "said"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_config_is_one_line(
    content: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a config"
    path.write_bytes(content)
    assert said in _said(capsys, "--hf-config", str(path))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("", "--hf-config=: No such file or directory: expected a config.json"),
        ("/dev/zero", "--hf-config=/dev/zero: Not a regular file: expected a config.json"),
        ("a\nb", r"--hf-config=a\nb: No such file or directory"),
        ("x" * 5000, "x: File name too long: expected a config.json"),
        ("~nobody-of-that-name/x", "No such file or directory"),
    ],
)
def test_a_path_that_is_no_file_is_one_line(
    path: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in _said(capsys, f"--hf-config={path}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("XFV1_OPS", "no op 'x', expected names among"),
        ("XFV1_DEBUG", "XFV1_DEBUG='x': expected 0 or 1"),
        ("XFV1_CPU", "XFV1_CPU='x': expected 0 or 1"),
    ],
)
def test_a_wrong_setting_is_one_line(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "x")
    assert said in _said(capsys)


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"xfv1 {xfv1.__version__}\n"


def test_a_models_layers_are_read_from_its_folder(tmp_path: Path) -> None:
    config = {"text_config": LLAMA | {"sliding_window": 4096, "attn_logit_softcapping": 50}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    layer = {"num_heads": 8, "num_kv_heads": 2, "head_size": 64, "softcap": 50.0}
    assert command.layers_of(str(tmp_path)) == {
        "full attention": layer,
        "sliding window 4096": layer | {"sliding_window": 4096},
    }


def test_without_vllm_the_ops_are_still_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "NEEDED", ("torch", "no_such_package"))
    assert command.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "no_such_package is not installed" in lines
    assert any(line.startswith("to install what xfv1 needs: pip install ") for line in lines)
    assert any(line.startswith("sliding window ") for line in lines)

    assert command.main(["--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["missing"] == ["no_such_package is not installed"]
    assert facts["rows"]


def test_a_package_that_does_not_load_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_installed.py").write_text("raise OSError('no library\\nof that name')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(command, "NEEDED", ("torch", "half_installed"))
    (line,) = command.survey({}, "float32")["missing"]
    assert line == r"half_installed cannot be imported: OSError: no library\nof that name"
