"""A case's id says all of it, is safe to paste, and an impossible case says why it is one."""

import dataclasses
import re
import shlex
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures.cases import (
    ATTENTION,
    DTYPES,
    KV_DTYPES,
    KV_LAYOUTS,
    LOGITS,
    AttnCase,
    CaseError,
)
from fixtures.cases.scenarios import SCENARIOS
from fixtures.cases.tables import rows


@st.composite
def _cases(draw: st.DrawFn) -> AttnCase:
    """Any case that can be: every field drawn, lengths by name or one by one."""
    attention = draw(st.sampled_from(ATTENTION))
    fields: dict[str, Any] = {"attention": attention}
    names = [name for name in SCENARIOS if attention != "encoder" or _is_encoder(name)]
    if draw(st.booleans()):
        names = [name for name in names if attention == "cross" or not name.startswith("cross")]
        fields["scenario"] = draw(st.sampled_from(names))
    else:
        keys = draw(st.lists(st.integers(1, 300), min_size=1, max_size=5))
        queries = [draw(st.integers(0, k if attention != "cross" else 300)) for k in keys]
        if sum(queries) == 0:
            queries[0] = 1
        fields["query_lens"] = tuple(keys if attention == "encoder" else queries)
        fields["seq_lens"] = tuple(keys)
    fields["num_kv_heads"] = draw(st.integers(1, 8))
    fields["num_heads"] = fields["num_kv_heads"] * draw(st.integers(1, 16))
    fields["head_size"] = draw(st.integers(1, 512))
    fields["block_size"] = draw(st.integers(1, 512))
    fields["alibi"] = attention != "cross" and draw(st.booleans())
    fields["alibi_sqrt"] = fields["alibi"] and draw(st.booleans())
    if attention != "cross":
        fields["sliding_window"] = draw(st.none() | st.integers(1, 2**31))
    fields["softcap"] = draw(
        st.none() | st.floats(0, exclude_min=True, allow_nan=False, allow_infinity=False)
    )
    flags = ["sinks", "fused_qkv"]
    if attention in ("decoder", "noncausal"):
        flags += ["kv_sharing", "shared_prefix"]
    for name in flags:
        fields[name] = draw(st.booleans())
    for name in ("pad_reqs", "pad_tokens", "variant"):
        fields[name] = draw(st.integers(0, 99))
    for name, values in _WORDS.items():
        fields[name] = draw(st.sampled_from(values))
    if fields["logits"] == "extreme":
        fields["kv_dtype"] = "auto"
    return AttnCase(**fields)


_WORDS = {"dtype": DTYPES, "kv_dtype": KV_DTYPES, "kv_layout": KV_LAYOUTS, "logits": LOGITS}


def _is_encoder(scenario: str) -> bool:
    """Whether an encoder's: queries and keys are the same tokens."""
    lengths = SCENARIOS[scenario]
    return lengths.query_lens == lengths.seq_lens


@given(_cases())
def test_an_id_reads_back_as_its_case(case: AttnCase) -> None:
    assert AttnCase.from_id(case.id) == case


@given(_cases())
def test_an_id_is_one_word_of_a_shell_and_of_pytest(case: AttnCase) -> None:
    """Nothing to quote, to glob or to take for an option."""
    assert shlex.quote(case.id) == case.id
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", case.id)


@given(_cases(), _cases())
def test_ids_and_seeds_are_equal_only_for_equal_cases(one: AttnCase, other: AttnCase) -> None:
    assert (one.id == other.id) == (one == other)
    assert (one.seed == other.seed) == (one == other)


@given(_cases())
def test_a_row_evaluates_to_its_case(case: AttnCase) -> None:
    (again,) = eval(case.row(), {"AttnCase": AttnCase})
    assert again == case


@given(_cases())
def test_a_seed_is_one_for_torch(case: AttnCase) -> None:
    """`torch.Generator.manual_seed` takes 64 bits, but some of its users only positive ones."""
    assert 0 <= case.seed < 2**63


@given(_cases())
def test_what_follows_from_the_fields(case: AttnCase) -> None:
    assert case.num_tokens == sum(case.query_lens) > 0
    assert case.group * case.num_kv_heads == case.num_heads
    assert case.causal == (case.attention == "decoder")
    assert case.kind in ("decode", "prefill", "chunked", "mixed")
    assert case.kind in case.id
    assert case.heads_word in case.id.split("-")


def test_the_seed_is_that_of_always() -> None:
    """Recorded results name cases by id: its hash must not change.

    63 bits of sha256("custom-q2-k5-chunked-h8kv2-gqa-head64-block16-fp16").
    """
    case = AttnCase(query_lens=(2,), seq_lens=(5,))
    assert case.id == "custom-q2-k5-chunked-h8kv2-gqa-head64-block16-fp16"
    assert case.seed == 2987628199828992993


def test_every_row_of_the_tables_has_an_id_and_seed_of_its_own() -> None:
    cases = [row.case for row in rows()]
    assert len({case.id for case in cases}) == len({case.seed for case in cases}) == len(cases)
    assert all(AttnCase.from_id(case.id) == case for case in cases)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_scenarios_name_is_its_lengths(scenario: str) -> None:
    attention = "cross" if scenario.startswith("cross") else "decoder"
    case = AttnCase(scenario=scenario, attention=attention)
    assert case.id.split("-")[0] == scenario
    assert (case.query_lens, case.seq_lens, case.drafts) == SCENARIOS[scenario]
    assert case.replace(query_lens=case.query_lens).drafts == 0
    assert re.fullmatch(r"[a-z][a-z0-9_]*", scenario)
    assert AttnCase.from_id(case.id) == case


@pytest.mark.parametrize(
    ("scenario", "kind"),
    [
        ("small_decode", "decode"),
        ("small_prefill", "chunked"),
        ("fresh_prefill", "prefill"),
        ("mixed_small", "mixed"),
        ("spec_uniform5", "chunked"),
        ("mixed_empty", "mixed"),
        ("single_token", "decode"),
    ],
)
def test_a_kind_is_by_the_lengths(scenario: str, kind: str) -> None:
    assert AttnCase(scenario=scenario).kind == kind


SMALL: dict[str, Any] = {"query_lens": (1, 5), "seq_lens": (7, 9)}
# Fields, and the word they put into the id.
WORDS: list[tuple[dict[str, Any], str]] = [
    ({}, "custom"),
    ({}, "q1_5"),
    ({}, "k7_9"),
    ({}, "mixed"),
    ({"query_lens": (1, 1, 1), "seq_lens": (7, 9, 9)}, "q1x3"),
    ({"query_lens": (1, 1, 1), "seq_lens": (7, 9, 9)}, "k7_9x2"),
    ({"query_lens": (1, 1, 1), "seq_lens": (7, 9, 9)}, "decode"),
    ({"query_lens": (7, 9)}, "prefill"),
    ({"query_lens": (7, 8)}, "chunked"),
    ({"num_heads": 8, "num_kv_heads": 2}, "gqa"),
    ({"num_heads": 8, "num_kv_heads": 1}, "mqa"),
    ({"num_heads": 8, "num_kv_heads": 8}, "mha"),
    ({"num_heads": 1, "num_kv_heads": 1}, "h1kv1"),
    ({"head_size": 80}, "head80"),
    ({"block_size": 64}, "block64"),
    *(({"dtype": dtype}, dtype) for dtype in DTYPES),
    *(({"kv_dtype": dtype}, dtype) for dtype in KV_DTYPES[1:]),
    ({"sliding_window": 17}, "sliding_window17"),
    ({"softcap": 30.0}, "softcap30"),
    ({"softcap": 0.5}, "softcap0.5"),
    ({"softcap": 1e-7}, "softcap0.0000001"),
    ({"alibi": True}, "alibi"),
    ({"alibi": True, "alibi_sqrt": True}, "alibi_sqrt"),
    ({"sinks": True}, "sinks"),
    *(({"attention": kind}, kind) for kind in ("noncausal", "cross")),
    ({"attention": "encoder", "query_lens": (7, 9)}, "encoder"),
    *(({"kv_layout": layout}, layout) for layout in KV_LAYOUTS[1:]),
    ({"fused_qkv": True}, "fused_qkv"),
    ({"kv_sharing": True}, "kv_sharing"),
    ({"pad_reqs": 2, "pad_tokens": 3}, "pad2x3"),
    ({"pad_tokens": 3}, "pad0x3"),
    ({"shared_prefix": True}, "shared_prefix"),
    ({"logits": "extreme"}, "extreme"),
    ({"variant": 4}, "variant4"),
]


@pytest.mark.parametrize(("fields", "word"), WORDS)
def test_a_feature_has_a_word(fields: dict[str, Any], word: str) -> None:
    assert word in AttnCase(**{**SMALL, **fields}).id.split("-")


def test_a_feature_that_is_off_has_no_word() -> None:
    """Words are what `-k` looks for: nothing of a plain case may look like a feature."""
    plain = AttnCase(**SMALL).id
    assert not re.search("window|softcap|alibi|sink|fp8|pad|shar|extreme|fused|causal|cross", plain)


# Fields that cannot be, and what the message must say: field=value: expected what is accepted.
INVALID: list[tuple[dict[str, Any], str]] = [
    ({"query_lens": ()}, "query_lens=(): expected at least one request"),
    ({"query_lens": (-1, 5)}, "query_lens=(-1, 5): expected none below 0"),
    ({"query_lens": (0, 0)}, "query_lens=(0, 0): expected at least one token"),
    ({"seq_lens": (7,)}, "seq_lens=(7,): expected 2 lengths"),
    ({"query_lens": (1, 0), "seq_lens": (7, 0)}, "seq_lens=(7, 0): expected none below 1"),
    ({"query_lens": (8, 5)}, "query_lens=(8, 5): expected none above seq_lens=(7, 9)"),
    ({"num_kv_heads": 0}, "num_kv_heads=0: expected at least 1"),
    ({"num_heads": 0}, "num_heads=0: expected a multiple of num_kv_heads=2"),
    ({"num_heads": 7}, "num_heads=7: expected a multiple of num_kv_heads=2"),
    ({"head_size": 0}, "head_size=0: expected 1 to 512"),
    ({"head_size": 513}, "head_size=513: expected 1 to 512"),
    ({"block_size": 0}, "block_size=0: expected at least 1"),
    ({"dtype": "fp64"}, "dtype='fp64': expected fp16 or bf16 or fp32"),
    ({"kv_dtype": "int8"}, "kv_dtype='int8': expected auto or fp8_e4m3 or fp8_e5m2"),
    ({"sliding_window": 0}, "sliding_window=0: expected None or at least 1"),
    ({"softcap": 0.0}, "softcap=0.0: expected None, or finite and above 0"),
    ({"softcap": -1.0}, "softcap=-1.0: expected None, or finite and above 0"),
    ({"alibi_sqrt": True}, "alibi_sqrt=True: expected False without alibi"),
    ({"attention": "both"}, "attention='both': expected decoder or noncausal or encoder or cross"),
    ({"attention": "encoder"}, "seq_lens=(7, 9): expected query_lens"),
    ({"kv_layout": "NHD"}, "kv_layout='NHD': expected LBNHC or"),
    ({"logits": "large"}, "logits='large': expected planted or extreme"),
    ({"pad_reqs": -1}, "pad_reqs=-1: expected at least 0"),
    ({"pad_tokens": -1}, "pad_tokens=-1: expected at least 0"),
    ({"variant": -1}, "variant=-1: expected at least 0"),
    ({"scenario": "smal_decode"}, "scenario='smal_decode': expected one of small_decode,"),
    ({"scenario": "small_decode"}, "query_lens=(1, 5): scenario 'small_decode' has (1, 1)"),
]


@pytest.mark.parametrize(("fields", "message"), INVALID)
def test_an_impossible_case_names_field_value_and_what_is_accepted(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(CaseError, match=re.escape(message)):
        AttnCase(**{**SMALL, **fields})


def test_every_field_is_checked_or_cannot_be_wrong() -> None:
    """A flag has no wrong value; every other field has one among INVALID."""
    flags = {f.name for f in dataclasses.fields(AttnCase) if isinstance(f.default, bool)}
    named = {message.partition("=")[0] for _, message in INVALID}
    assert {f.name for f in dataclasses.fields(AttnCase)} - flags <= named


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("small_decode-h8kv2-gqa-head64-block16-fp16-softcp30", "softcp30"),
        ("small_decode-h8kv2-gqa-head64-block16-fp16-", ""),
        ("small_decode-h8kv2-gqa-head64-block16-fp16-softcap", "softcap"),
        ("small_decode-h8-head64", "h8"),
    ],
)
def test_a_word_that_is_none_is_named(text: str, word: str) -> None:
    with pytest.raises(CaseError, match=re.escape(f"{word!r} is no word")):
        AttnCase.from_id(text)


def test_an_unknown_scenario_lists_the_known() -> None:
    with pytest.raises(
        CaseError, match=r"scenario='tiny': expected one of small_decode, .* custom"
    ):
        AttnCase.from_id("tiny-h8kv2-gqa-head64-block16-fp16")


def test_other_lengths_make_a_custom_case() -> None:
    case = AttnCase(scenario="small_decode", sliding_window=17)
    assert case.replace(head_size=80).scenario == "small_decode"
    longer = case.replace(seq_lens=(33, 41))
    assert (longer.scenario, longer.query_lens, longer.seq_lens) == ("custom", (1, 1), (33, 41))
    assert longer.sliding_window == 17
