"""A model's kinds of layers as cases: windows that hide keys, within the reference's means."""

import dataclasses
from typing import Any

import pytest

from fixtures.cases import AttnCase
from fixtures.cases.models import MAX_KEY_ELEMENTS, MAX_LOGITS, MAX_WINDOW, cases_of
from tests.harness.models import case_fields, model_cases, read_cases
from xfv1.model import LayerKind, Model, ModelError, NotAsked, Reader, spans

PLAIN = LayerKind(layers=(0, 1), num_heads=32, num_kv_heads=8, head_size=128, scale=128**-0.5)
# Kinds of layers of served models.
KINDS = {
    "llama": PLAIN,
    "gemma 2": dataclasses.replace(PLAIN, head_size=256, sliding_window=4096, softcap=50.0),
    "gemma 3": dataclasses.replace(PLAIN, num_heads=8, num_kv_heads=4, sliding_window=1024),
    "gpt-oss": dataclasses.replace(PLAIN, num_heads=64, sliding_window=128, sinks=True),
    "bloom": dataclasses.replace(PLAIN, num_kv_heads=32, alibi=True),
    "encoder": dataclasses.replace(PLAIN, attention="encoder"),
    "cross": dataclasses.replace(PLAIN, attention="cross"),
    "gemma 3n": dataclasses.replace(PLAIN, kv_sharing=True),
    "fp8": dataclasses.replace(PLAIN, kv_cache_dtype="fp8"),
}


def _cases(kind: LayerKind) -> list[AttnCase]:
    return cases_of(case_fields(kind, "bfloat16"))


def _model(*kinds: LayerKind, **facts: Any) -> Model:
    return Model(
        reader="a test", architecture="A", **{"dtype": "bfloat16", "kinds": kinds, **facts}
    )


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_cases_have_all_that_distinguishes_the_layer(kind: LayerKind) -> None:
    names = ["num_heads", "num_kv_heads", "head_size", "sliding_window", "softcap", "alibi"]
    names += ["sinks", "attention", "kv_sharing"]
    for case in _cases(kind):
        assert [getattr(case, name) for name in names] == [getattr(kind, name) for name in names]
        assert (case.dtype, case.block_size) == ("bf16", 16)
        assert case.quantized == (kind.kv_cache_dtype == "fp8")


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_decoders_layer_gets_every_phase(kind: LayerKind) -> None:
    phases = {case.kind for case in _cases(kind)}
    assert phases
    if kind.attention == "decoder":
        assert phases == {"decode", "chunked", "mixed", "prefill"}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_ids_are_unique_and_round_trip(kind: LayerKind) -> None:
    cases = _cases(kind)
    assert len({case.id for case in cases}) == len(cases)
    assert [AttnCase.from_id(case.id) for case in cases] == cases


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_cases_are_within_the_references_means(kind: LayerKind) -> None:
    for case in _cases(kind):
        assert case.num_heads * sum(q * k for q, k in case.requests) <= MAX_LOGITS
        assert case.num_heads * case.head_size * sum(case.seq_lens) <= MAX_KEY_ELEMENTS


@pytest.mark.parametrize("window", [1, 2, 16, 129, 1024, 2047, MAX_WINDOW])
@pytest.mark.parametrize(("num_heads", "head_size"), [(8, 64), (128, 512), (1024, 512)])
def test_window_is_left_whatever_the_shape(window: int, num_heads: int, head_size: int) -> None:
    kind = dataclasses.replace(
        PLAIN, num_heads=num_heads, head_size=head_size, sliding_window=window
    )
    cases = _cases(kind)
    assert {case.kind for case in cases if case.windowed} >= {"decode", "chunked", "mixed"}
    assert len({case.id for case in cases}) == len(cases)


def test_window_beyond_the_reference_is_kept_on_short_requests() -> None:
    cases = _cases(dataclasses.replace(PLAIN, sliding_window=MAX_WINDOW + 1))
    assert {case.sliding_window for case in cases} == {MAX_WINDOW + 1}
    assert max(max(case.seq_lens) for case in cases) < 1000


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (dataclasses.replace(PLAIN, head_size=576), "head_size=576: expected 1 to 512"),
        (dataclasses.replace(PLAIN, kv_cache_dtype="nvfp4"), "kv_cache_dtype='nvfp4'"),
        (dataclasses.replace(PLAIN, kv_cache_dtype="float16"), "kv_cache_dtype='float16'"),
        (dataclasses.replace(PLAIN, attention="cross", alibi=True), "alibi=True: expected False"),
    ],
)
def test_layers_that_no_case_describes_are_named(kind: LayerKind, reason: str) -> None:
    found, not_asked = model_cases(_model(PLAIN, kind))
    assert list(found) == [PLAIN]
    (layers,) = not_asked
    assert reason in layers.reason
    assert layers.layers == kind.layers


def test_what_is_read_and_what_is_not_asked_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    mla = NotAsked(layer="MLAAttention", reason="latent", layers=(2,))
    model = _model(PLAIN, KINDS["gpt-oss"], not_asked=(mla,))
    monkeypatch.setattr(Reader, "read", lambda self, path, **options: model)
    cases, lines = read_cases(["one", "two"], 1)
    assert cases == [*_cases(PLAIN), *_cases(KINDS["gpt-oss"])]
    assert lines == [
        line
        for path in ("one", "two")
        for line in (
            f"{path}: A, bfloat16, read by a test",
            f"  {PLAIN}",
            f"  {KINDS['gpt-oss']}",
            "  not asked: MLAAttention (1 layer): latent",
        )
    ]


def test_a_model_without_a_layer_to_test_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    mla = NotAsked(layer="MLAAttention", reason="latent", layers=(0, 1))
    monkeypatch.setattr(Reader, "read", lambda self, path, **options: _model(not_asked=(mla,)))
    with pytest.raises(ModelError, match=r"^one: no layer to test: MLAAttention \(2 layers\)"):
        read_cases(["one"], 1)


def test_a_cache_of_the_models_own_dtype_is_plain() -> None:
    own = dataclasses.replace(PLAIN, kv_cache_dtype="bfloat16")
    assert _cases(own) == _cases(PLAIN)


def test_a_model_is_the_same_after_json() -> None:
    mla = NotAsked(layer="MLAAttention", reason="MLA", layers=(3,))
    model = _model(PLAIN, KINDS["gemma 2"], not_asked=(mla,), refused=("why",))
    assert Model.from_json(model.to_json()) == model


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ((), ""),
        ((4,), "4"),
        ((0, 1, 2, 3), "0-3"),
        ((0, 2, 4), "0, 2, 4"),
        ((0, 2, 4, 6), "0, 2, ... 6"),
        ((0, 1, 3, 4, 9), "0-1, 3-4, 9"),
        ((5, 5, 5, 5), "5, 5, 5, 5"),
    ],
)
def test_indices_are_written_as_spans(indices: tuple[int, ...], text: str) -> None:
    assert spans(indices) == text


def test_a_kinds_name_says_how_it_differs() -> None:
    assert PLAIN.name == "full attention, 32/8 heads of 128 (2 layers)"
    odd = dataclasses.replace(
        PLAIN, sliding_window=9, softcap=30.0, alibi=True, sinks=True, scale=0.5, layers=(7,)
    )
    assert odd.name == (
        "sliding window 9, softcap 30, ALiBi, sinks, scale 0.5, 32/8 heads of 128 (1 layer)"
    )
    assert str(odd) == f"{odd.name}: 7"
