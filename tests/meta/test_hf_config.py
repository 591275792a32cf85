"""The shipped configs: their layers, windows that really hide keys, errors that name the field."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fixtures.cases import AttnCase
from fixtures.cases.models import (
    MAX_KEY_ELEMENTS,
    MAX_LOGITS,
    MAX_WINDOW,
    ConfigError,
    LayerKind,
    cases_from_config,
    layer_kinds,
)

MODELS = Path(__file__).resolve().parents[2] / "fixtures" / "cases" / "models"
FILES = sorted(MODELS.glob("*.json"))


def _kind(
    model_type: str, layers: int, num_heads: int, num_kv_heads: int, head_size: int, **features: Any
) -> LayerKind:
    return LayerKind(
        model_type=model_type,
        layers=layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        **features,
    )


# Written out by hand from the models' publications: each file's dtype and kinds.
EXPECTED: dict[str, tuple[str, list[LayerKind]]] = {
    "llama-3.1-8b": ("bf16", [_kind("llama", 32, 32, 8, 128)]),
    "gemma-2-9b-it": (
        "bf16",
        [
            _kind("gemma2", 21, 16, 8, 256, sliding_window=4096, softcap=50.0),
            _kind("gemma2", 21, 16, 8, 256, softcap=50.0),
        ],
    ),
    "gemma-3-4b-it": (
        "bf16",
        [
            _kind("gemma3_text", 29, 8, 4, 256, sliding_window=1024),
            _kind("gemma3_text", 5, 8, 4, 256),
        ],
    ),
    "mistral-7b-v0.1": ("bf16", [_kind("mistral", 32, 32, 8, 128, sliding_window=4096)]),
    "phi-3-mini-4k-instruct": ("bf16", [_kind("phi3", 32, 32, 32, 96, sliding_window=2047)]),
    "stablelm-3b-4e1t": ("bf16", [_kind("stablelm", 32, 32, 32, 80)]),
    "phi-2": ("fp16", [_kind("phi", 32, 32, 32, 80)]),
    "mpt-7b": ("bf16", [_kind("mpt", 32, 32, 32, 128, alibi=True)]),
    "bloom-560m": ("bf16", [_kind("bloom", 24, 16, 16, 64, alibi=True)]),
    "gpt-oss-20b": (
        "bf16",
        [
            _kind("gpt_oss", 12, 64, 8, 64, sliding_window=128, sinks=True),
            _kind("gpt_oss", 12, 64, 8, 64, sinks=True),
        ],
    ),
    "qwen2.5-7b": ("bf16", [_kind("qwen2", 28, 28, 4, 128)]),
    "qwen3-8b": ("bf16", [_kind("qwen3", 36, 32, 8, 128)]),
    "whisper-small": (
        "fp32",
        [
            _kind("whisper", 12, 12, 12, 64, attention="encoder"),
            _kind("whisper", 12, 12, 12, 64),
            _kind("whisper", 12, 12, 12, 64, attention="cross"),
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


def _write(folder: Path, config: Any) -> Path:
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    return path


def _without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


def _of_kind(case: AttnCase, kind: LayerKind) -> bool:
    shape = ("num_heads", "num_kv_heads", "head_size", "sliding_window", "attention")
    features = ("softcap", "alibi", "sinks")
    return all(getattr(case, name) == getattr(kind, name) for name in shape + features)


def test_every_shipped_file_is_expected() -> None:
    assert [path.stem for path in FILES] == sorted(EXPECTED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_file_gives_its_models_layer_kinds(path: Path) -> None:
    assert layer_kinds(path) == EXPECTED[path.stem][1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_cases_are_of_the_models_dtype_and_block_16(path: Path) -> None:
    found = {(case.dtype, case.block_size) for case in cases_from_config(path)}
    assert found == {(EXPECTED[path.stem][0], 16)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_case_is_of_a_layer_kind_and_every_kind_has_cases(path: Path) -> None:
    kinds, cases = layer_kinds(path), cases_from_config(path)
    assert all(sum(_of_kind(case, kind) for kind in kinds) == 1 for case in cases)
    for kind in kinds:
        served = {case.kind for case in cases if _of_kind(case, kind)}
        if kind.attention == "decoder":
            assert served == {"decode", "chunked", "mixed", "prefill"}
        assert served


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ids_are_unique_and_round_trip(path: Path) -> None:
    cases = cases_from_config(path)
    assert len({case.id for case in cases}) == len(cases)
    assert [AttnCase.from_id(case.id) for case in cases] == cases


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_cases_are_within_the_oracles_means(path: Path) -> None:
    for case in cases_from_config(path):
        pairs = sum(q * k for q, k in case.requests)
        assert case.num_heads * pairs <= MAX_LOGITS
        assert case.num_heads * case.head_size * sum(case.seq_lens) <= MAX_KEY_ELEMENTS


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_windowed_kind_has_requests_that_leave_the_window(path: Path) -> None:
    cases = cases_from_config(path)
    for kind in layer_kinds(path):
        window = kind.sliding_window
        if window is None:
            continue
        assert window <= MAX_WINDOW
        left = {c.kind for c in cases if _of_kind(c, kind) and max(c.seq_lens) > window}
        assert left >= {"decode", "chunked", "mixed"}


@pytest.mark.parametrize("window", [1, 2, 16, 129, 1024, 2047, MAX_WINDOW])
@pytest.mark.parametrize(("num_heads", "head_size"), [(8, 64), (128, 512), (1024, 512)])
def test_window_is_left_whatever_the_shape(
    tmp_path: Path, window: int, num_heads: int, head_size: int
) -> None:
    shape = {"num_attention_heads": num_heads, "head_dim": head_size, "sliding_window": window}
    cases = cases_from_config(_write(tmp_path, LLAMA | {"model_type": "mistral"} | shape))
    left = {case.kind for case in cases if max(case.seq_lens) > window}
    assert left >= {"decode", "chunked", "mixed"}
    assert len({case.id for case in cases}) == len(cases)


def test_window_beyond_the_oracle_is_kept_on_short_requests(tmp_path: Path) -> None:
    config = LLAMA | {"model_type": "mistral", "sliding_window": MAX_WINDOW + 1}
    cases = cases_from_config(_write(tmp_path, config))
    assert {case.sliding_window for case in cases} == {MAX_WINDOW + 1}
    assert max(max(case.seq_lens) for case in cases) < 1000


def test_folder_stands_for_its_config(tmp_path: Path) -> None:
    path = _write(tmp_path, LLAMA)
    assert layer_kinds(tmp_path) == layer_kinds(path) == layer_kinds(str(path))
    assert cases_from_config(tmp_path) == cases_from_config(path)


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({}, "bf16"),
        ({"torch_dtype": None}, "bf16"),
        ({"torch_dtype": "float16"}, "fp16"),
        ({"dtype": "float32"}, "fp32"),
        ({"dtype": "float16", "torch_dtype": "float32"}, "fp16"),
    ],
)
def test_dtype_is_the_configs_else_bf16(tmp_path: Path, fields: dict[str, Any], dtype: str) -> None:
    assert {c.dtype for c in cases_from_config(_write(tmp_path, LLAMA | fields))} == {dtype}


def test_dtype_may_be_the_text_models(tmp_path: Path) -> None:
    config = {"model_type": "some_vlm", "text_config": LLAMA | {"dtype": "float16"}}
    assert {case.dtype for case in cases_from_config(_write(tmp_path, config))} == {"fp16"}


def test_text_config_is_the_model(tmp_path: Path) -> None:
    plain = layer_kinds(_write(tmp_path, LLAMA))
    vision = {"num_attention_heads": 3, "hidden_size": 7}
    nested = {"model_type": "some_vlm", "text_config": LLAMA, "vision_config": vision}
    assert layer_kinds(_write(tmp_path, nested)) == plain


def test_text_config_without_model_type_has_the_outer_one(tmp_path: Path) -> None:
    nested = {"model_type": "llama", "text_config": _without(LLAMA, "model_type")}
    assert layer_kinds(_write(tmp_path, nested)) == layer_kinds(_write(tmp_path, LLAMA))


def test_head_dim_wins_over_the_hidden_sizes_share(tmp_path: Path) -> None:
    sizes = [
        layer_kinds(_write(tmp_path, LLAMA | given))[0].head_size
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
def test_each_layer_has_its_window(
    tmp_path: Path, config: dict[str, Any], windows: dict[int | None, int]
) -> None:
    kinds = layer_kinds(_write(tmp_path, config))
    assert {kind.sliding_window: kind.layers for kind in kinds} == windows


@pytest.mark.parametrize(
    ("fields", "softcap"), [({}, 50.0), ({"attn_logit_softcapping": 30}, 30.0)]
)
def test_softcap_is_the_configs(tmp_path: Path, fields: dict[str, Any], softcap: float) -> None:
    assert {k.softcap for k in layer_kinds(_write(tmp_path, GEMMA2 | fields))} == {softcap}
    off = GEMMA2 | {"attn_logit_softcapping": None}
    assert {k.softcap for k in layer_kinds(_write(tmp_path, off))} == {None}


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
    tmp_path: Path, attn_config: dict[str, Any] | None, num_kv_heads: int, alibi: bool
) -> None:
    kinds = layer_kinds(_write(tmp_path, MPT | {"attn_config": attn_config}))
    assert kinds == [_kind("mpt", 4, 8, num_kv_heads, 64, alibi=alibi)]


def test_bloom_is_read_under_either_name(tmp_path: Path) -> None:
    old = {"model_type": "bloom", "n_embed": 512, "num_attention_heads": 8, "n_layer": 4}
    new = {"model_type": "bloom", "hidden_size": 512, "n_head": 8, "num_hidden_layers": 4}
    expected = [_kind("bloom", 4, 8, 8, 64, alibi=True)]
    assert layer_kinds(_write(tmp_path, old)) == layer_kinds(_write(tmp_path, new)) == expected


def test_whisper_has_heads_of_its_own_on_either_side(tmp_path: Path) -> None:
    kinds = layer_kinds(_write(tmp_path, WHISPER))
    assert kinds == [
        _kind("whisper", 6, 8, 8, 64, attention="encoder"),
        _kind("whisper", 2, 4, 4, 128),
        _kind("whisper", 2, 4, 4, 128, attention="cross"),
    ]


@pytest.mark.parametrize("model_type", ["llama", "phi", "phi3"])
def test_kv_heads_left_out_are_as_many_as_query_heads(tmp_path: Path, model_type: str) -> None:
    config = _without(LLAMA, "num_key_value_heads") | {"model_type": model_type}
    assert [kind.num_kv_heads for kind in layer_kinds(_write(tmp_path, config))] == [8]


def test_layer_kind_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EXPECTED["phi-2"][1][0].layers = 1  # type: ignore[misc]


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
    (WHISPER | {"encoder_attention_heads": 7}, "d_model=512", "a multiple of the 7"),
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
def test_error_names_file_field_value_and_what_is_accepted(
    tmp_path: Path, config: dict[str, Any], found: str, accepted: str
) -> None:
    path = _write(tmp_path, config)
    for read in (layer_kinds, cases_from_config):
        with pytest.raises(ConfigError) as caught:
            read(path)
        where, _, rest = str(caught.value).partition(": ")
        said, _, expected = rest.partition(": expected ")
        assert where == str(path)
        assert said.startswith(found)
        assert accepted in expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected JSON"),
        ('{"model_type": "llama",', "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ("[]", "expected an object"),
        ("null", "expected an object"),
    ],
    ids=["empty", "cut", "deep", "list", "null"],
)
def test_error_on_broken_json_names_the_file(tmp_path: Path, text: str, said: str) -> None:
    path = _write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        layer_kinds(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)


def test_error_on_bytes_that_are_no_text_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="expected JSON"):
        layer_kinds(path)


@pytest.mark.parametrize("name", ["", "nonesuch.json"])
def test_error_on_no_file_names_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        layer_kinds(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / (name or "config.json")))
