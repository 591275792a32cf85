"""Wrong answers leave the budget: every scenario with every single feature can tell its faults.

The other side, that honest kernels stay inside, is tests/oracle/test_lowprec.py.
"""

import functools
import re
from typing import Any

import pytest
import torch

from fixtures.cases import DTYPES, AttnCase, CaseError
from fixtures.cases.scenarios import SCENARIOS
from fixtures.inputs import AttnInputs, build_inputs
from tests.harness.compare import check_output
from tests.harness.perturb import (
    PERTURBATIONS,
    SEVERAL,
    Perturbation,
    attend_request,
    distinguishes,
    honest,
    output_share,
    worst_share,
)
from tests.harness.truth import Expected, expected
from tests.harness.verdicts import Mismatch, Outcome

# bf16 has the widest budget, few elements are few chances; 8 heads plant every target.
SHAPE: dict[str, Any] = {"num_heads": 8, "num_kv_heads": 2, "head_size": 16, "dtype": "bf16"}
# Where the reference has 2e6 pairs of a query and a key to a head: the fewest heads with two KV.
LARGE: dict[str, dict[str, Any]] = {"long32k_chunked": {"num_heads": 2}}

WINDOW = ("window_ignored", "window_plus_one", "window_minus_one")
SCALES = ("k_scale_dropped", "v_scale_dropped", "kv_scales_swapped")
# By feature: the case's fields, and the faults that it is there to catch.
FEATURES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": (
        {},
        ("kv_heads_swapped", "newest_lost", "look_ahead", "made_causal", "scale_one_percent"),
    ),
    "sliding_window1": ({"sliding_window": 1}, WINDOW),
    "sliding_window17": ({"sliding_window": 17}, WINDOW),
    "sliding_window61": ({"sliding_window": 61}, WINDOW),
    "softcap": ({"softcap": 30.0}, ("softcap_dropped",)),
    "alibi": ({"alibi": True}, ("alibi_shifted",)),
    "alibi_sqrt": ({"alibi": True, "alibi_sqrt": True}, ("alibi_shifted", "alibi_linear")),
    "sinks": ({"sinks": True}, ("sinks_dropped",)),
    "fp8_e4m3": ({"kv_dtype": "fp8_e4m3"}, SCALES),
    "extreme": ({"logits": "extreme"}, ("kv_heads_swapped",)),
    "extreme_softcap": ({"logits": "extreme", "softcap": 30.0}, ("softcap_dropped",)),
}


def _case(scenario: str, **fields: Any) -> AttnCase:
    """A scenario's case; the kind of attention of those for encoders is in their names."""
    kind = scenario.partition("_")[0]
    attention = kind if kind in ("encoder", "cross") else "decoder"
    shape = SHAPE | fields | LARGE.get(scenario, {})
    return AttnCase(scenario=scenario, attention=attention, **shape)


def _possible(scenario: str, feature: str) -> bool:
    """Cross attention has no windows and no ALiBi; any other case exists."""
    try:
        _case(scenario, **FEATURES[feature][0])
    except CaseError:
        assert scenario.startswith("cross")
        assert set(FEATURES[feature][0]) & {"sliding_window", "alibi"}
        return False
    return True


PAIRS = [(s, f) for s in SCENARIOS for f in FEATURES if _possible(s, f)]


@functools.lru_cache(maxsize=4)
def _truth(case: AttnCase) -> tuple[AttnInputs, Expected]:
    inputs = build_inputs(case)
    return inputs, expected(inputs)


@pytest.mark.parametrize(("scenario", "feature"), PAIRS)
def test_a_features_faults_leave_the_budget(scenario: str, feature: str) -> None:
    """Largest |wrong - truth| / budget is at least SEVERAL, for each fault that can show at all."""
    fields, faults = FEATURES[feature]
    case = _case(scenario, **fields)
    able = [name for name in faults if PERTURBATIONS[name].applies(case)]
    for name in set(faults) - set(able):
        assert PERTURBATIONS[name].hidden(case), f"{name} has no reason not to apply to {case.id}"
    if able:
        shares = distinguishes(*_truth(case), able)
        weak = {name: share for name, share in shares.items() if not share >= SEVERAL}
        assert not weak, f"{case.id} cannot tell {weak}"


# By feature; fp8 is where a kernel's own rounding is most like another scale.
SCALED = ("plain", "sliding_window17", "softcap", "alibi", "alibi_sqrt", "sinks", "fp8_e4m3")


@pytest.mark.parametrize("factor", [0.99, 1.01])
@pytest.mark.parametrize("feature", SCALED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_off_by_a_percent_fails_in_every_dtype(
    dtype: str, feature: str, factor: float
) -> None:
    """As rounded as an honest kernel's; where it is right, all is far within budget."""
    case = _case("mixed_spec", **{**FEATURES[feature][0], "dtype": dtype, "head_size": 64})
    inputs, truth = _truth(case)
    assert truth.tells_scale
    assert truth.scale_share(honest(inputs)) < 0.6
    wrong = honest(inputs, scale=inputs.scale * factor)
    with pytest.raises(Mismatch) as caught:
        check_output(inputs, Outcome(wrong, truth.storage), truth)
    # float32 shows it in single elements already.
    if found := re.search(r"softmax scale about ([\d.]+) times the right one", str(caught.value)):
        assert float(found[1]) == pytest.approx(factor, abs=0.003)
        assert f"budget    {truth.scale_budget!r}" in str(caught.value)
    assert bool(found) == (worst_share(wrong, truth.output, truth.budget) <= 1)


@pytest.mark.parametrize("scenario", ["mixed_spec", "deep_decode", "large_prefill"])
def test_a_scale_as_exact_as_float32_is_within_budget(scenario: str) -> None:
    """A factor of log2(e) that is off in its last bit is so in all elements alike."""
    case = _case(scenario, dtype="fp32")
    inputs, truth = _truth(case)
    wrong = honest(inputs, scale=inputs.scale * (1 + 2.0**-22))
    assert output_share(wrong, truth) < 0.9


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_case_that_tells_the_scale_catches_it(scenario: str) -> None:
    """And a case that does not is one in which the scale hardly matters."""
    case = _case(scenario)
    inputs, truth = _truth(case)
    assert truth.tells_scale == PERTURBATIONS["scale_one_percent"].applies(case)
    assert output_share(honest(inputs), truth) < 0.9
    for factor in (0.99, 1.01):
        wrong = honest(inputs, scale=inputs.scale * factor)
        assert not truth.tells_scale or truth.scale_share(wrong) > 1


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [("fp16", "auto"), ("fp16", "fp8_e5m2"), ("bf16", "fp8_e4m3"), ("fp32", "auto")],
)
def test_faults_leave_the_budget_of_every_dtype(feature: str, dtype: str, kv_dtype: str) -> None:
    """All faults that apply, each alone, on one mixed batch."""
    shape = {"num_heads": 8, "head_size": 64, "dtype": dtype, "kv_dtype": kv_dtype}
    if feature.startswith("extreme"):
        # What dequantizing rounds would decide the output: no such case.
        shape["kv_dtype"] = "auto"
    case = _case("mixed_spec", **{**shape, **FEATURES[feature][0]})
    shares = distinguishes(*_truth(case))
    assert shares
    assert all(share >= SEVERAL for share in shares.values()), f"{case.id} cannot tell {shares}"


# (fault, fields): what would have to be told apart is the same.
HIDDEN: list[tuple[str, dict[str, Any]]] = [
    ("window_ignored", {"scenario": "small_decode", "sliding_window": 40}),
    ("window_plus_one", {"scenario": "small_decode", "sliding_window": 40}),
    ("window_minus_one", {"scenario": "small_decode", "sliding_window": 41}),
    ("softcap_dropped", {"scenario": "single_token", "softcap": 30.0}),
    ("softcap_dropped", {"scenario": "small_decode", "softcap": 30.0, "sliding_window": 1}),
    ("alibi_shifted", {"scenario": "small_decode", "alibi": True, "num_heads": 1}),
    ("alibi_shifted", {"scenario": "single_token", "alibi": True, "sinks": True}),
    (
        "alibi_linear",
        {"scenario": "small_prefill", "alibi": True, "alibi_sqrt": True, "sliding_window": 2},
    ),
    ("scale_one_percent", {"scenario": "single_token"}),
    ("scale_one_percent", {"scenario": "small_prefill", "logits": "extreme"}),
    ("kv_heads_swapped", {"scenario": "small_decode", "num_kv_heads": 1}),
    ("look_ahead", {"scenario": "small_decode"}),
    ("made_causal", {"scenario": "small_decode", "attention": "noncausal"}),
    ("made_causal", {"scenario": "odd_prefill", "attention": "noncausal", "sliding_window": 1}),
    ("k_scale_dropped", {"scenario": "single_token", "kv_dtype": "fp8_e4m3"}),
]


@pytest.mark.parametrize(("name", "fields"), HIDDEN)
def test_a_fault_said_not_to_show_is_inside_the_budget(name: str, fields: dict[str, Any]) -> None:
    if "num_heads" in fields:
        fields = fields | {"num_kv_heads": fields["num_heads"]}
    case = AttnCase(**{**SHAPE, **fields})
    fault = PERTURBATIONS[name]
    assert fault.hidden(case)
    inputs, truth = _truth(case)
    assert worst_share(fault.output(inputs), truth.output, truth.budget) < 1


def test_every_fault_is_some_features() -> None:
    listed = {name for _, faults in FEATURES.values() for name in faults}
    assert listed == set(PERTURBATIONS)


def test_no_fault_applies_without_its_feature() -> None:
    """A plain decode of one head of one key: nothing but losing that key can go wrong."""
    case = AttnCase(scenario="single_token", num_heads=1, num_kv_heads=1)
    assert [name for name, fault in PERTURBATIONS.items() if fault.applies(case)] == ["newest_lost"]


@pytest.mark.parametrize("feature", FEATURES)
def test_no_fault_is_the_truth(feature: str) -> None:
    """The table's machinery with nothing wrong gives the reference's very numbers."""
    none = Perturbation("none", lambda _, one, how: attend_request(one, how), lambda _: None)
    inputs, truth = _truth(_case("mixed_spec", **FEATURES[feature][0]))
    for poison in (False, True):
        assert torch.equal(none.output(inputs, poison=poison), truth.output)


def test_a_number_is_infinitely_far_from_nan() -> None:
    """(NaN - 0) / 1 and (inf - 0) / 1 are over every budget; 0 / 0 is inside."""
    zero, one = torch.zeros(1), torch.ones(1)
    assert worst_share(torch.tensor([float("nan")]), zero, one) == float("inf")
    assert worst_share(torch.tensor([float("inf")]), zero, one) == float("inf")
    assert worst_share(one, zero, zero) == float("inf")
    assert worst_share(zero, zero, zero) == 0
