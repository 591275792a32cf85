"""`xfv1.model`: are a model's attention layers what vLLM's own class of the model makes?

All models are read by one process, which imports vLLM once.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.meta import test_model_fields as by_fields
from tests.programs import read_models
from xfv1.model import LayerKind, Model, ModelError, Reader

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.cpu, pytest.mark.xdist_group("models")]

LLAMA = by_fields.LLAMA | {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "intermediate_size": 64,
    "max_position_embeddings": 4096,
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    with Reader(seconds=300.0) as reader:
        yield reader


def _read(reader: Reader, folder: Path, config: dict[str, Any], ranks: int = 1) -> Model:
    name = ARCHITECTURES.get(config.get("model_type", ""))
    named = {"architectures": [name]} if name and config is not LLAMA else {}
    (folder / "config.json").write_text(json.dumps({**LLAMA, **config, **named}))
    return reader.read(folder, tensor_parallel_size=ranks)


def _windows(model: Model) -> dict[int | None, int]:
    return {kind.sliding_window: len(kind.layers) for kind in model.kinds}


SERVED = [path for path in by_fields.FILES if path.stem not in ("mpt-7b", "whisper-small")]


@pytest.mark.parametrize("path", SERVED, ids=lambda path: path.stem)
def test_shipped_file_gives_its_models_layer_kinds(reader: Reader, path: Path) -> None:
    model = reader.read(path)
    assert (model.dtype, list(model.kinds)) == by_fields.EXPECTED[path.stem]
    assert model.reader.startswith("vLLM ")


def test_whispers_encoder_is_not_asked(reader: Reader) -> None:
    model = reader.read(by_fields.MODELS / "whisper-small.json")
    assert list(model.kinds) == by_fields.EXPECTED["whisper-small"][1]
    (encoder,) = model.not_asked
    assert len(encoder.layers) == 12
    assert "encoder" in encoder.reason


def test_a_model_that_vllm_dropped_is_refused_in_vllms_words(reader: Reader) -> None:
    with pytest.raises(ModelError, match="was supported in vLLM until v0") as at:
        reader.read(by_fields.MODELS / "mpt-7b.json")
    assert len(str(at.value).splitlines()) == 1


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gemma2", "head_dim": 64, "sliding_window": 32},
        {"model_type": "gemma2", "head_dim": 64, "query_pre_attn_scalar": 144},
        {"model_type": "gemma3_text", "head_dim": 64, "num_hidden_layers": 13},
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "qwen3", "head_dim": 64, "use_sliding_window": False, "sliding_window": 32},
    ],
    ids=lambda config: "-".join(map(str, config.values())),
)
def test_the_reader_without_vllm_agrees(
    reader: Reader, tmp_path: Path, config: dict[str, Any]
) -> None:
    model = _read(reader, tmp_path, config)
    fields = by_fields._read({**by_fields.LLAMA, **config})
    assert model.kinds == fields.kinds


def test_gemma_2s_scale_is_the_configs(reader: Reader, tmp_path: Path) -> None:
    config = {"model_type": "gemma2", "head_dim": 64, "query_pre_attn_scalar": 144}
    assert {kind.scale for kind in _read(reader, tmp_path, config).kinds} == {144**-0.5}


def test_granites_scale_is_its_multiplier(reader: Reader, tmp_path: Path) -> None:
    config = {"model_type": "granite", "attention_multiplier": 0.31}
    (kind,) = _read(reader, tmp_path, config).kinds
    assert kind.scale == pytest.approx(0.31)


def test_qwen2s_window_is_off_unless_it_is_used(reader: Reader, tmp_path: Path) -> None:
    config = {"model_type": "qwen2", "sliding_window": 32, "max_window_layers": 0}
    assert _windows(_read(reader, tmp_path, config)) == {None: 4}
    used = config | {"use_sliding_window": True}
    assert _windows(_read(reader, tmp_path, used)) == {32: 4}


def test_llama_4s_chunks_are_not_asked(reader: Reader, tmp_path: Path) -> None:
    text = LLAMA | {
        "model_type": "llama4_text",
        "head_dim": 64,
        "attention_chunk_size": 128,
        "num_local_experts": 4,
        "intermediate_size_mlp": 64,
        "interleave_moe_layer_step": 1,
    }
    model = _read(reader, tmp_path, {**text, "architectures": ["Llama4ForCausalLM"]})
    (chunked,) = model.not_asked
    assert chunked.layers == (0, 1, 2)
    assert "chunks of 128 tokens" in chunked.reason
    assert [kind.layers for kind in model.kinds] == [(3,)]


@pytest.mark.parametrize(
    ("model_type", "architecture", "layer", "reason"),
    [
        ("deepseek_v3", "DeepseekV3ForCausalLM", "MLAAttention", "latent attention (MLA)"),
        ("mamba", "MambaForCausalLM", "MambaMixer", "state space or linear attention (mamba1)"),
    ],
)
def test_layers_of_other_kinds_are_named_as_not_asked(
    reader: Reader,
    tmp_path: Path,
    model_type: str,
    architecture: str,
    layer: str,
    reason: str,
) -> None:
    config = {"model_type": model_type, "architectures": [architecture]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = reader.read(tmp_path)
    assert model.kinds == ()
    (layers,) = model.not_asked
    assert layers.layer == layer
    assert reason in layers.reason
    assert layers.layers == tuple(range(len(layers.layers)))


@pytest.mark.parametrize(("ranks", "heads"), [(2, (4, 1)), (4, (2, 1)), (8, (1, 1))])
def test_ranks_share_the_heads_and_copy_kv_heads(
    reader: Reader, tmp_path: Path, ranks: int, heads: tuple[int, int]
) -> None:
    (kind,) = _read(reader, tmp_path, LLAMA, ranks).kinds
    assert (kind.num_heads, kind.num_kv_heads) == heads


# One of two ranks that communicate, as vLLM's CPU worker sets them up.
REAL_RANK = """
import json, sys
from xfv1.packages import hide_broken
hide_broken()
from vllm.distributed import parallel_state
from xfv1.model import build

folder, rank, store = sys.argv[1:]

def real_groups(size):
    parallel_state.init_distributed_environment(size, int(rank), store, int(rank), "gloo")
    parallel_state.initialize_model_parallel(size, backend="gloo")

build.prepare()
build._make_groups = real_groups
print(json.dumps(build.read(folder, 2, "auto").to_json()))
"""


def test_real_ranks_have_the_same_layers(reader: Reader, tmp_path: Path) -> None:
    alone = _read(reader, tmp_path, LLAMA, ranks=2)
    environment = {**os.environ, "VLLM_DIST_IDENT": tmp_path.name, "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", REAL_RANK, str(tmp_path), rank, f"file://{tmp_path}/store"],
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for rank in "01"
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    for output in outputs:
        assert Model.from_json(json.loads(output.splitlines()[-1])) == alone


def test_ranks_that_cannot_share_the_heads_are_refused(reader: Reader, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="must be divisible by tensor parallel size"):
        _read(reader, tmp_path, LLAMA, ranks=3)


def test_an_fp8_checkpoints_scheme_gives_an_fp8_cache(reader: Reader, tmp_path: Path) -> None:
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    config = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme | {"dynamic": False}}
    model = _read(reader, tmp_path, {**LLAMA, "quantization_config": config})
    assert {kind.kv_cache_dtype for kind in model.kinds} == {"fp8"}


def test_a_model_whose_image_tokens_see_each_other_is_refused_by_xfv1(reader: Reader) -> None:
    path = by_fields.MODELS / "gemma-3-4b-it.json"
    model = reader.read(path)
    (reason,) = model.refused
    assert f"model {path}: its image tokens see each other" in reason


def test_a_model_leaves_nothing_behind_for_the_next(reader: Reader, tmp_path: Path) -> None:
    first = _read(reader, tmp_path, LLAMA, ranks=2)
    _read(reader, tmp_path, {"model_type": "gpt_oss", "head_dim": 64, "sliding_window": 32})
    assert _read(reader, tmp_path, LLAMA, ranks=2) == first


def test_the_dtype_may_be_chosen(reader: Reader, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert reader.read(tmp_path, dtype="float32").dtype == "float32"
    with pytest.raises(ModelError, match="dtype='float8': expected auto, float16"):
        reader.read(tmp_path, dtype="float8")


def test_a_wrong_field_is_one_line_that_names_it(reader: Reader, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="num_attention_heads") as caught:
        _read(reader, tmp_path, {**LLAMA, "num_attention_heads": "many"})
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{tmp_path}: vLLM ")
    assert "many" in line


def test_a_model_that_takes_too_long_is_refused(tmp_path: Path) -> None:
    with Reader(seconds=0.0) as hasty, pytest.raises(ModelError, match="took more than 0 s"):
        _read(hasty, tmp_path, LLAMA)


def test_without_vllm_the_fields_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    absent = tmp_path / "packages" / "vllm"
    absent.mkdir(parents=True)
    (absent / "__init__.py").write_text("raise ImportError('no such vllm')\n")
    # The process that reads models looks in PYTHONPATH before it looks where vLLM is installed.
    path = os.pathsep.join(filter(None, (str(absent.parent), os.environ.get("PYTHONPATH", ""))))
    monkeypatch.setenv("PYTHONPATH", path)
    with Reader() as reader:
        model = reader.read(tmp_path)
    assert model.reader == "the config's fields (ImportError: no such vllm)"
    assert model.kinds == by_fields._kinds(by_fields.LLAMA)


# The program that tries every config of Transformers.


@pytest.mark.parametrize(
    ("kinds", "wrong"),
    [
        ({}, set()),
        ({"num_heads": 4}, {"num_heads"}),
        ({"num_kv_heads": 4}, {"num_kv_heads"}),
        ({"head_size": 32}, {"head_size"}),
        ({"softcap": None}, {"softcap"}),
        ({"scale": 0.125}, {"scale"}),
        ({"sliding_window": 33}, {"windows"}),
        ({"layers": (0,)}, {"windows"}),
    ],
    ids=str,
)
def test_the_program_notices_what_is_read_wrongly(kinds: dict[str, Any], wrong: set[str]) -> None:
    facts: dict[str, Any] = {
        "layers": (0, 1),
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_size": 64,
        "softcap": 50.0,
        "scale": 0.5,
        "sliding_window": 32,
    }
    model = Model(
        reader="a test",
        architecture="A",
        dtype="bfloat16",
        kinds=(LayerKind(**{**facts, **kinds}),),
    )
    want = read_models.Expected(8, 2, 64, {32: 2}, 50.0, 0.5)
    compared, differ = read_models.compare(model, want)
    assert set(differ) == wrong
    assert len(compared) == 6


def test_the_recorded_run_read_nothing_wrongly_and_gives_reasons() -> None:
    result = json.loads((ROOT / "docs" / "results" / "models.json").read_text())
    rows = result["rows"]
    counted = dict.fromkeys(read_models.OUTCOMES, 0)
    for row in rows:
        counted[row["outcome"]] += 1
        assert row["kinds"] or row["not_asked"] or row["reason"], row
        assert row["wrong"] == [], row
    assert result["counts"] == counted
    assert result["wrong"] == 0
    assert counted["read"] > len(rows) // 2
