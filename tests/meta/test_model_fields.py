"""The reader of a config's fields, which serves where vLLM is not installed."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from xfv1.model import LayerKind, Model, fields
from xfv1.model.reader import load

MODELS = Path(__file__).resolve().parents[2] / "fixtures" / "cases" / "models"
FILES = sorted(MODELS.glob("*.json"))
ABSENT = "vllm is not installed"


def _read(config: dict[str, Any], ranks: int = 1) -> Model:
    return fields.read(config, ranks, "auto", ABSENT)


def _kinds(config: dict[str, Any], ranks: int = 1) -> tuple[LayerKind, ...]:
    return _read(config, ranks).kinds


def _kind(
    layers: int | Iterable[int], num_heads: int, num_kv_heads: int, head_size: int, **features: Any
) -> LayerKind:
    indices = range(layers) if isinstance(layers, int) else layers
    return LayerKind(
        layers=tuple(indices),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        **{"scale": head_size**-0.5, **features},
    )


# Written out by hand from the models' publications: each file's dtype and kinds.
GEMMA_3_GLOBAL = range(5, 34, 6)
GEMMA_3_LOCAL = [layer for layer in range(34) if layer not in GEMMA_3_GLOBAL]
EXPECTED: dict[str, tuple[str, list[LayerKind]]] = {
    "llama-3.1-8b": ("bfloat16", [_kind(32, 32, 8, 128)]),
    "gemma-2-9b-it": (
        "bfloat16",
        [
            _kind(range(0, 42, 2), 16, 8, 256, sliding_window=4096, softcap=50.0),
            _kind(range(1, 42, 2), 16, 8, 256, softcap=50.0),
        ],
    ),
    "gemma-3-4b-it": (
        "bfloat16",
        [
            _kind(GEMMA_3_LOCAL, 8, 4, 256, sliding_window=1024),
            _kind(GEMMA_3_GLOBAL, 8, 4, 256),
        ],
    ),
    "mistral-7b-v0.1": ("bfloat16", [_kind(32, 32, 8, 128, sliding_window=4096)]),
    "phi-3-mini-4k-instruct": ("bfloat16", [_kind(32, 32, 32, 96, sliding_window=2047)]),
    "stablelm-3b-4e1t": ("bfloat16", [_kind(32, 32, 32, 80)]),
    "phi-2": ("float16", [_kind(32, 32, 32, 80)]),
    "mpt-7b": ("bfloat16", [_kind(32, 32, 32, 128, alibi=True)]),
    "bloom-560m": ("bfloat16", [_kind(24, 16, 16, 64, alibi=True)]),
    "gpt-oss-20b": (
        "bfloat16",
        [
            _kind(range(0, 24, 2), 64, 8, 64, sliding_window=128, sinks=True),
            _kind(range(1, 24, 2), 64, 8, 64, sinks=True),
        ],
    ),
    "qwen2.5-7b": ("bfloat16", [_kind(28, 28, 4, 128)]),
    "qwen3-8b": ("bfloat16", [_kind(36, 32, 8, 128)]),
    "whisper-small": (
        "float32",
        [
            _kind(12, 12, 12, 64),
            _kind(12, 12, 12, 64, attention="cross"),
        ],
    ),
}

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
}
GEMMA2 = LLAMA | {"model_type": "gemma2", "head_dim": 64, "sliding_window": 32}
GEMMA3 = GEMMA2 | {"model_type": "gemma3_text", "num_hidden_layers": 13}
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 64, "sliding_window": 32}
MPT: dict[str, Any] = {"model_type": "mpt", "d_model": 512, "n_heads": 8, "n_layers": 4}
WHISPER: dict[str, Any] = {
    "model_type": "whisper",
    "d_model": 512,
    "encoder_attention_heads": 8,
    "encoder_layers": 6,
    "decoder_attention_heads": 4,
    "decoder_layers": 2,
}


def _without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


def test_every_shipped_file_is_expected() -> None:
    assert [path.stem for path in FILES] == sorted(EXPECTED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_file_gives_its_models_layer_kinds(path: Path) -> None:
    model = _read(load(path))
    assert (model.dtype, list(model.kinds)) == EXPECTED[path.stem]
    assert ABSENT in model.reader


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ({}, "bfloat16"),
        ({"torch_dtype": None}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "float32"}, "float32"),
        ({"dtype": "float16", "torch_dtype": "float32"}, "float16"),
    ],
)
def test_dtype_is_the_configs_else_bfloat16(given: dict[str, Any], dtype: str) -> None:
    assert _read(LLAMA | given).dtype == dtype


def test_dtype_may_be_the_text_models() -> None:
    config = {"model_type": "some_vlm", "text_config": LLAMA | {"dtype": "float16"}}
    assert _read(config).dtype == "float16"


def test_text_config_is_the_model() -> None:
    plain = _kinds(LLAMA)
    vision = {"num_attention_heads": 3, "hidden_size": 7}
    nested = {"model_type": "some_vlm", "text_config": LLAMA, "vision_config": vision}
    assert _kinds(nested) == plain


def test_text_config_without_model_type_has_the_outer_one() -> None:
    nested = {"model_type": "llama", "text_config": _without(LLAMA, "model_type")}
    assert _kinds(nested) == _kinds(LLAMA)


def test_head_dim_wins_over_the_hidden_sizes_share() -> None:
    sizes = [
        _kinds(LLAMA | given)[0].head_size
        for given in ({}, {"head_dim": None}, {"head_dim": 96}, {"head_dim": 96, "hidden_size": 7})
    ]
    assert sizes == [64, 64, 96, 96]


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (LLAMA, {None: 4}),
        (LLAMA | {"sliding_window": 32}, {32: 4}),
        (LLAMA | {"model_type": "mistral", "sliding_window": None}, {None: 4}),
        (LLAMA | {"model_type": "mistral", "sliding_window": 0}, {None: 4}),
        (LLAMA | {"model_type": "mistral"}, {4096: 4}),
        (LLAMA | {"model_type": "phi3"}, {None: 4}),
        (GEMMA2, {32: 2, None: 2}),
        (GEMMA2 | {"layer_types": None}, {32: 2, None: 2}),
        (
            GEMMA2 | {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
            {32: 3, None: 1},
        ),
        (GEMMA2 | {"layer_types": ["full_attention"] * 4}, {None: 4}),
        (GEMMA2 | {"num_hidden_layers": 1}, {32: 1}),
        (GEMMA3, {32: 11, None: 2}),
        (GEMMA3 | {"sliding_window_pattern": 3}, {32: 9, None: 4}),
        (GEMMA3 | {"sliding_window_pattern": 1}, {None: 13}),
        (QWEN3, {None: 4}),
        (QWEN3 | {"use_sliding_window": False, "max_window_layers": 1}, {None: 4}),
        (QWEN3 | {"use_sliding_window": True}, {None: 4}),
        (QWEN3 | {"use_sliding_window": True, "max_window_layers": 1}, {None: 1, 32: 3}),
        (QWEN3 | {"use_sliding_window": True, "max_window_layers": 0}, {32: 4}),
    ],
)
def test_each_layer_has_its_window(config: dict[str, Any], windows: dict[int | None, int]) -> None:
    kinds = _kinds(config)
    assert {kind.sliding_window: len(kind.layers) for kind in kinds} == windows


@pytest.mark.parametrize(("given", "softcap"), [({}, 50.0), ({"attn_logit_softcapping": 30}, 30.0)])
def test_softcap_is_the_configs(given: dict[str, Any], softcap: float) -> None:
    assert {k.softcap for k in _kinds(GEMMA2 | given)} == {softcap}
    off = GEMMA2 | {"attn_logit_softcapping": None}
    assert {k.softcap for k in _kinds(off)} == {None}


@pytest.mark.parametrize(
    ("attn_config", "num_kv_heads", "alibi"),
    [
        (None, 8, True),
        ({}, 8, True),
        ({"alibi": False}, 8, False),
        ({"attn_type": "multihead_attention", "alibi": True}, 8, True),
        ({"attn_type": "multiquery_attention"}, 1, True),
        ({"attn_type": "grouped_query_attention", "kv_n_heads": 2}, 2, True),
    ],
)
def test_mpt_says_its_attention_in_attn_config(
    attn_config: dict[str, Any] | None, num_kv_heads: int, alibi: bool
) -> None:
    kinds = _kinds(MPT | {"attn_config": attn_config})
    assert kinds == (_kind(4, 8, num_kv_heads, 64, alibi=alibi),)


def test_bloom_is_read_under_either_name() -> None:
    old = {"model_type": "bloom", "n_embed": 512, "num_attention_heads": 8, "n_layer": 4}
    new = {"model_type": "bloom", "hidden_size": 512, "n_head": 8, "num_hidden_layers": 4}
    expected = (_kind(4, 8, 8, 64, alibi=True),)
    assert _kinds(old) == _kinds(new) == expected


def test_whisper_has_self_and_cross_attention_and_an_encoder_that_is_not_asked() -> None:
    model = _read(WHISPER)
    assert model.kinds == (_kind(2, 4, 4, 128), _kind(2, 4, 4, 128, attention="cross"))
    (encoder,) = model.not_asked
    assert encoder.layers == tuple(range(6))
    assert "encoder" in encoder.reason


@pytest.mark.parametrize(("ranks", "heads"), [(1, (8, 2)), (2, (4, 1)), (4, (2, 1)), (8, (1, 1))])
def test_ranks_share_the_heads_and_copy_kv_heads(ranks: int, heads: tuple[int, int]) -> None:
    assert {(k.num_heads, k.num_kv_heads) for k in _kinds(LLAMA, ranks)} == {heads}


@pytest.mark.parametrize("ranks", [3, 16])
def test_ranks_that_cannot_share_the_heads_are_refused(ranks: int) -> None:
    with pytest.raises(ValueError, match=f"tensor_parallel_size={ranks}: expected a divisor"):
        _read(LLAMA, ranks)


def test_scale_is_the_configs() -> None:
    assert {k.scale for k in _kinds(GEMMA2 | {"query_pre_attn_scalar": 144})} == {1 / 12}
    scaled = MPT | {"attn_config": {"softmax_scale": 0.5}}
    assert {k.scale for k in _kinds(scaled)} == {0.5}


@pytest.mark.parametrize("model_type", ["llama", "phi", "phi3"])
def test_kv_heads_left_out_are_as_many_as_query_heads(model_type: str) -> None:
    config = _without(LLAMA, "num_key_value_heads") | {"model_type": model_type}
    assert [kind.num_kv_heads for kind in _kinds(config)] == [8]


GROUPED = {"attn_type": "grouped_query_attention"}

# A config that cannot be, and what the message says: the field, and what was found there.
WRONG: list[tuple[dict[str, Any], str, str]] = [
    (_without(LLAMA, "model_type"), "model_type is missing", "llama"),
    (LLAMA | {"model_type": "nonesuch"}, "model_type='nonesuch'", "whisper"),
    (LLAMA | {"model_type": 7}, "model_type=7", "llama"),
    (_without(LLAMA, "num_attention_heads"), "num_attention_heads is missing", "an integer"),
    (LLAMA | {"num_attention_heads": None}, "num_attention_heads=None", "an integer"),
    (LLAMA | {"num_attention_heads": "8"}, "num_attention_heads='8'", "an integer"),
    (LLAMA | {"num_attention_heads": 8.0}, "num_attention_heads=8.0", "an integer"),
    (LLAMA | {"num_attention_heads": True}, "num_attention_heads=True", "an integer"),
    (LLAMA | {"num_attention_heads": 0}, "num_attention_heads=0", "from 1 to"),
    (LLAMA | {"num_attention_heads": -8}, "num_attention_heads=-8", "from 1 to"),
    (LLAMA | {"num_attention_heads": 10**9}, "num_attention_heads=1000000000", "from 1 to"),
    (LLAMA | {"num_key_value_heads": 3}, "num_key_value_heads=3", "a divisor of the 8"),
    (LLAMA | {"num_key_value_heads": 16}, "num_key_value_heads=16", "a divisor of the 8"),
    (LLAMA | {"num_key_value_heads": 0}, "num_key_value_heads=0", "from 1 to"),
    (LLAMA | {"num_key_value_heads": "2"}, "num_key_value_heads='2'", "an integer"),
    (
        _without(LLAMA, "num_key_value_heads") | {"model_type": "stablelm"},
        "num_key_value_heads is missing",
        "an integer",
    ),
    (_without(LLAMA, "hidden_size"), "hidden_size is missing", "an integer"),
    (LLAMA | {"hidden_size": 513}, "hidden_size=513", "head_dim, or a multiple of the 8"),
    (LLAMA | {"hidden_size": 8192}, "hidden_size=8192", "at most 512"),
    (LLAMA | {"hidden_size": -512}, "hidden_size=-512", "at least 1"),
    (LLAMA | {"head_dim": 0}, "head_dim=0", "from 1 to 512"),
    (LLAMA | {"head_dim": 1024}, "head_dim=1024", "from 1 to 512"),
    (LLAMA | {"head_dim": "64"}, "head_dim='64'", "an integer"),
    (_without(LLAMA, "num_hidden_layers"), "num_hidden_layers is missing", "an integer"),
    (LLAMA | {"num_hidden_layers": 0}, "num_hidden_layers=0", "from 1 to"),
    (LLAMA | {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000", "from 1 to"),
    (LLAMA | {"torch_dtype": "float8"}, "torch_dtype='float8'", "float16, bfloat16, float32"),
    (LLAMA | {"dtype": 16}, "dtype=16", "float16, bfloat16, float32"),
    (LLAMA | {"sliding_window": "4096"}, "sliding_window='4096'", "an integer"),
    (LLAMA | {"sliding_window": -1}, "sliding_window=-1", "from 0 to"),
    (LLAMA | {"sliding_window": False}, "sliding_window=False", "an integer"),
    (
        LLAMA | {"layer_types": ["sliding_attention"] * 4},
        "sliding_window is missing",
        "an integer",
    ),
    (GEMMA2 | {"layer_types": ["full_attention"] * 3}, "layer_types=[", "a list of 4"),
    (GEMMA2 | {"layer_types": "full_attention"}, "layer_types='full", "a list of 4"),
    (GEMMA2 | {"layer_types": ["full_attention", "conv"] * 2}, "layer_types=[", "not 'conv'"),
    (GEMMA2 | {"layer_types": [{}] * 4}, "layer_types=[", "not {}"),
    (GEMMA2 | {"attn_logit_softcapping": 0}, "attn_logit_softcapping=0", "above 0"),
    (GEMMA2 | {"attn_logit_softcapping": "50"}, "attn_logit_softcapping='50'", "above 0"),
    (GEMMA2 | {"attn_logit_softcapping": float("nan")}, "attn_logit_softcapping=nan", "above 0"),
    (GEMMA2 | {"use_bidirectional_attention": True}, "use_bidirectional_attention=True", "false"),
    (GEMMA3 | {"sliding_window_pattern": 0}, "sliding_window_pattern=0", "at least 1"),
    (LLAMA | {"is_causal": False}, "is_causal=False", "true"),
    (QWEN3 | {"use_sliding_window": "yes"}, "use_sliding_window='yes'", "true or false"),
    (
        QWEN3 | {"use_sliding_window": True, "max_window_layers": -1},
        "max_window_layers=-1",
        "at least 0",
    ),
    (QWEN3 | {"dual_chunk_attention_config": {}}, "dual_chunk_attention_config={}", "null"),
    (_without(MPT, "n_heads"), "n_heads or num_attention_heads is missing", "an integer"),
    (MPT | {"attn_config": 3}, "attn_config=3", "an object"),
    (MPT | {"attn_config": {"alibi": 1}}, "attn_config.alibi=1", "true or false"),
    (MPT | {"attn_config": {"alibi_bias_max": 16}}, "attn_config.alibi_bias_max=16", "8"),
    (MPT | {"attn_config": {"prefix_lm": True}}, "attn_config.prefix_lm=True", "false"),
    (MPT | {"attn_config": {"attn_type": "new"}}, "attn_config.attn_type='new'", "multihead"),
    (MPT | {"attn_config": GROUPED}, "attn_config.kv_n_heads is missing", "an integer"),
    (
        MPT | {"attn_config": GROUPED | {"kv_n_heads": 3}},
        "attn_config.kv_n_heads=3",
        "a divisor of the 8",
    ),
    (_without(WHISPER, "decoder_layers"), "decoder_layers is missing", "an integer"),
    (WHISPER | {"decoder_attention_heads": 7}, "d_model=512", "a multiple of the 7"),
    ({"model_type": "some_vlm", "text_config": []}, "text_config=[]", "an object"),
    (
        {"model_type": "some_vlm", "text_config": LLAMA | {"model_type": "nonesuch"}},
        "text_config.model_type='nonesuch'",
        "llama",
    ),
    (
        {"model_type": "some_vlm", "text_config": _without(LLAMA, "hidden_size")},
        "text_config.hidden_size is missing",
        "an integer",
    ),
]


@pytest.mark.parametrize(("config", "found", "accepted"), WRONG, ids=[row[1] for row in WRONG])
def test_error_names_field_value_and_what_is_accepted(
    config: dict[str, Any], found: str, accepted: str
) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        _read(config)
    said, _, expected = str(caught.value).partition(": expected ")
    assert said.startswith(found)
    assert accepted in expected


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (LLAMA, "attention_multiplier"),
        (LLAMA, "query_pre_attn_scalar"),
        (LLAMA, "attention_chunk_size"),
        (LLAMA, "kv_lora_rank"),
        (LLAMA, "alibi"),
        (LLAMA, "quantization_config"),
        (QWEN3, "sliding_window_pattern"),
        (MPT, "sinks"),
    ],
)
def test_a_field_that_the_reader_does_not_know_is_refused(
    config: dict[str, Any], field: str
) -> None:
    with pytest.raises(ValueError, match=f"{field}=64: expected "):
        _read(config | {field: 64})
    with pytest.raises(ValueError, match=r"attn_config\.new=1: expected no field"):
        _read(MPT | {"attn_config": {"new": 1}})
