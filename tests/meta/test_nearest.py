"""A mismatch names the planted fault whose answer the candidate gave, and no other."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.cases import AttnCase
from fixtures.inputs import AttnInputs, build_inputs
from tests.harness.compare import check_output
from tests.harness.driver import drive
from tests.harness.truth import Expected, expected
from tests.harness.verdicts import Mismatch, Outcome
from tests.meta.runs import run_once
from tests.museum import nearest
from tests.museum.nearest import named_fault, nearest_fault
from tests.museum.plain import Call, Plain, PlainImpl, pieces
from tests.museum.reference_faults import (
    REFERENCE_FAULTS,
    Question,
    ReferenceFault,
    answer,
    honest,
)

CPU = torch.device("cpu")
SAYS = "the answer is that of: "
# A decode, a chunk and a prompt over blocks of 16, of which no window frees any.
SMALL = AttnCase(
    query_lens=(1, 5, 12),
    seq_lens=(21, 30, 12),
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    dtype="bf16",
)
SCALES = {"kv_dtype": "fp8_e4m3"}
# By fault: what a case needs to have it.
NEEDS: dict[str, dict[str, Any]] = {
    "window_ignored": {"sliding_window": 9},
    "window_plus_one": {"sliding_window": 9},
    "window_minus_one": {"sliding_window": 9},
    "softcap_dropped": {"softcap": 30.0},
    "alibi_shifted": {"alibi": True},
    "alibi_linear": {"alibi": True, "alibi_sqrt": True},
    "sinks_dropped": {"sinks": True},
    "scale_one_percent": {},
    "kv_heads_swapped": {},
    "newest_lost": {},
    "look_ahead": {},
    "made_causal": {"attention": "noncausal"},
    "k_scale_dropped": SCALES,
    "v_scale_dropped": SCALES,
    "kv_scales_swapped": SCALES,
}


def _planted(fault: ReferenceFault, base: type[PlainImpl] = PlainImpl) -> type[Plain]:
    """The plain backend with a fault: it answers the question that the fault makes of the right
    one, by its own arithmetic."""

    class Wrong(base):  # type: ignore[valid-type,misc]
        def run(self, call: Call) -> None:
            facts = vars(call.layer)
            scales = float(facts["k_scale"]), float(facts["v_scale"])
            arguments = {name: facts[name] for name in ARGUMENTS}
            for piece in pieces(call):
                key, value = self.read(piece, piece.length)
                query = call.query[piece.rows]
                asked = fault.change(Question(query, key, value, *scales, arguments))
                layer = dataclasses.replace(call.layer, **asked.arguments)
                other = dataclasses.replace(piece, call=dataclasses.replace(call, layer=layer))
                seen = self.seen(other, len(key)) if asked.seen is None else asked.seen
                output = self.answer(other, asked.key, asked.value, seen)
                call.out[piece.rows] = output.to(call.out.dtype)

    return type("Planted", (Plain,), {"impl": Wrong})


# Arguments of `reference.attend`; the plain backend's layer has attributes of the same names.
ARGUMENTS = (
    "scale",
    "causal",
    "sliding_window",
    "alibi_slopes",
    "alibi_sqrt",
    "softcap",
    "sinks",
)


def _said(candidate: type[Any], case: AttnCase) -> str:
    """The line about the mismatch that a candidate's answer to a case is."""
    inputs = build_inputs(case)
    done = drive(candidate, case, CPU).run(inputs)
    return _line(inputs, done, expected(inputs, done.query))


def _line(inputs: AttnInputs, done: Outcome, truth: Expected) -> str:
    with pytest.raises(Mismatch) as caught:
        check_output(inputs, done, truth)
    assert caught.value.evidence == (inputs, done, truth)
    return named_fault(*caught.value.evidence)


def _small(case: AttnCase = SMALL) -> tuple[AttnInputs, Expected]:
    inputs = build_inputs(case)
    return inputs, expected(inputs)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", NEEDS)
def test_a_candidate_that_has_a_fault_is_named_by_it(name: str, dtype: str) -> None:
    fault = REFERENCE_FAULTS[name]
    said = _said(_planted(fault), SMALL.replace(dtype=dtype, **NEEDS[name]))
    assert said == f"{SAYS}{fault.what}"


@pytest.mark.parametrize("name", NEEDS)
def test_a_fault_is_named_among_others_features(name: str) -> None:
    """A window, a softcap, sinks and a quantized cache, where they go together with the fault."""
    most = {"sliding_window": 7, "softcap": 30.0, "kv_dtype": "fp8_e4m3"}
    most |= {} if "alibi" in NEEDS[name] else {"sinks": True}
    fault = REFERENCE_FAULTS[name]
    case = SMALL.replace(**{**most, **NEEDS[name]})
    assert _said(_planted(fault), case) == f"{SAYS}{fault.what}"


def test_every_fault_of_the_reference_is_tried() -> None:
    assert set(NEEDS) == set(REFERENCE_FAULTS)
    words = [fault.what for fault in REFERENCE_FAULTS.values()]
    assert len(set(words)) == len(words)


def test_a_fault_is_named_where_the_layer_quantizes_the_query() -> None:
    """The faults' answers are then those to the quantized query."""

    class Quantized(PlainImpl):
        supports_quant_query_input = True

        def forward(self, layer: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            query = (query.float() * layer._q_scale).to(kwargs["output"].dtype)
            return super().forward(layer, query, *args, **kwargs)

    fault = REFERENCE_FAULTS["v_scale_dropped"]
    said = _said(_planted(fault, Quantized), SMALL.replace(**SCALES))
    assert said == f"{SAYS}{fault.what}"


def test_a_fault_that_reads_freed_blocks_is_named_by_its_numbers() -> None:
    """Two requests of which one's window begins with a block: the key before it is no number."""
    case = SMALL.replace(query_lens=(1, 1), seq_lens=(33, 40), sliding_window=17)
    fault = REFERENCE_FAULTS["window_plus_one"]
    done = drive(_planted(fault), case, CPU).run(build_inputs(case))
    assert done.output[0].isnan().all() and done.output[1].isfinite().all()
    assert _said(_planted(fault), case) == f"{SAYS}{fault.what}"


def test_an_answer_that_is_no_number_is_no_faults() -> None:
    inputs, truth = _small(SMALL.replace(sliding_window=9))
    nothing = torch.full_like(truth.output, float("nan"))
    assert nearest_fault(inputs, nothing, truth) is None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [2.0, 30.0])
@pytest.mark.parametrize("name", NEEDS)
def test_noise_is_no_faults(name: str, size: float, seed: int) -> None:
    """An honest kernel's answer, and noise of that many budgets on every element."""
    inputs, truth = _small(SMALL.replace(**NEEDS[name]))
    rng = torch.Generator().manual_seed(seed)
    noise = size * torch.randn(truth.output.shape, generator=rng, dtype=torch.float64)
    wrong = (honest(inputs) + noise * truth.budget).to(inputs.query.dtype)
    assert _line(inputs, Outcome(wrong, truth.storage), truth) == ""


@pytest.mark.parametrize("name", NEEDS)
def test_one_wrong_element_is_no_faults(name: str) -> None:
    inputs, truth = _small(SMALL.replace(**NEEDS[name]))
    wrong = honest(inputs).double()
    wrong[3, 1, 2] += 5 * truth.budget[3, 1, 2]
    assert nearest_fault(inputs, wrong, truth) is None


def test_the_nearer_of_two_faults_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale of 1.01 and one of 1.0102 are within one budget of each other."""
    right = REFERENCE_FAULTS["scale_one_percent"]
    near = dataclasses.replace(
        right, name="near", change=lambda asked: asked.told(scale=asked.arguments["scale"] * 1.0102)
    )
    inputs, truth = _small(SMALL.replace(query_lens=(120,), seq_lens=(120,)))
    for faults in ({"near": near}, {"near": near, "right": right}, {"right": right, "near": near}):
        monkeypatch.setattr(nearest, "REFERENCE_FAULTS", faults)
        found = nearest_fault(inputs, right.output(inputs), truth)
        assert found is faults.get("right", near)


def test_a_run_that_fails_names_the_fault(tmp_path: Path) -> None:
    case = SMALL.replace(query_lens=(1, 1), seq_lens=(33, 40), sliding_window=20)
    candidate = "tests.museum.faults:WindowIgnoredAtDecode"
    run = run_once(tmp_path, "tests/conformance", f"--case={case.id}", f"--candidate={candidate}")
    assert run.status == 1
    line = f"{SAYS}{REFERENCE_FAULTS['window_ignored'].what}"
    (error,) = (
        result["error"]
        for result in run.results["results"]
        if result["test"] == "test_output_matches_reference"
    )
    assert line in error
    assert line in run.output


# The cost.


def test_a_fault_is_dropped_at_the_first_request_that_it_does_not_explain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def counted(question: Question) -> Any:
        asked.append(len(question.query))
        return answer(question)

    monkeypatch.setattr(nearest, "answer", counted)
    inputs, truth = _small()
    faults = sum(fault.shows(SMALL) for fault in REFERENCE_FAULTS.values())
    assert nearest_fault(inputs, -truth.output, truth) is None
    assert asked == [1] * faults


def test_a_case_of_more_than_the_most_work_is_not_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs, truth = _small()
    wrong = REFERENCE_FAULTS["kv_heads_swapped"].output(inputs)
    assert nearest_fault(inputs, wrong, truth) is REFERENCE_FAULTS["kv_heads_swapped"]
    monkeypatch.setattr(nearest, "MOST_WORK", 0.0)
    assert nearest_fault(inputs, wrong, truth) is None
