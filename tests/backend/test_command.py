"""`python -m xfv1`: does bad input end in one line, and what does it say where vLLM is missing?"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import xfv1
from xfv1 import __main__ as command
from xfv1.model import LayerKind, Model, NotAsked

pytestmark = pytest.mark.cpu

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "torch_dtype": "float16",
}
# By what a config.json holds: what is said of it. vLLM reads the last one.
CONFIGS: dict[str, tuple[object, str]] = {
    "list": ([1], "[1]: expected an object"),
    "number": (7, "7: expected an object"),
    "heads": (LLAMA | {"num_attention_heads": "many"}, "num_attention_heads"),
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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tensor-parallel-size", "0"), "--tensor-parallel-size='0': expected a whole number"),
        (("--tensor-parallel-size=two",), "--tensor-parallel-size='two': expected a whole number"),
        (("--tensor-parallel-size=2",), "--tensor-parallel-size: expected --hf-config too"),
    ],
)
def test_wrong_ranks_are_one_line(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in _said(capsys, *arguments)


def test_a_models_layers_are_one_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    command.main(["--json", f"--hf-config={tmp_path}", "--tensor-parallel-size=2"])
    facts = json.loads(capsys.readouterr().out)
    (kind,) = facts["model"]["kinds"]
    assert (kind["num_heads"], kind["num_kv_heads"], kind["layers"]) == (4, 1, [0, 1])
    assert facts["model"]["dtype"] == "float16"
    phases = ["decode", "prefill", "chunked prefill"]
    feature = "full attention, 4/1 heads of 64 (2 layers)"
    found = [(row["feature"], row["phase"]) for row in facts["rows"]]
    assert found == [(feature, phase) for phase in phases]


def _model(*kinds: LayerKind, **facts: Any) -> Model:
    return Model(reader="a test", architecture="A", dtype="float32", kinds=kinds, **facts)


PLAIN = LayerKind(layers=(0,), num_heads=8, num_kv_heads=2, head_size=64, scale=0.125)
MLA = NotAsked(layer="MLAAttention", reason="multi-head latent attention", layers=(0, 1))


@pytest.mark.parametrize(
    ("model", "said", "status"),
    [
        (_model(PLAIN), "layers: full attention, 8/2 heads of 64 (1 layer): 0", 0),
        (
            _model(PLAIN, not_asked=(MLA,)),
            "not asked: MLAAttention (2 layers): multi-head latent attention",
            0,
        ),
        (_model(not_asked=(MLA,)), "not asked: MLAAttention (2 layers)", 1),
        (_model(PLAIN, refused=("its image tokens",)), "xfv1 refuses it: its image tokens", 1),
        (_model(replace(PLAIN, kv_cache_dtype="nvfp4")), "every op: kv_cache_dtype='nvfp4'", 1),
        (_model(replace(PLAIN, attention="encoder")), "  encoder  torch", 0),
    ],
    ids=["served", "some not asked", "none asked", "refused", "KV cache", "encoder"],
)
def test_the_table_says_what_is_not_asked_or_refused(
    model: Model,
    said: str,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "read", lambda path, **options: model)
    monkeypatch.setattr(command, "plugin", lambda: (True, "registered"))
    assert command.main(["--hf-config=model"]) == status
    assert said in capsys.readouterr().out


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
