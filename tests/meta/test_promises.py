"""Every conformance test says above its head which cases it takes, and everybody reads that."""

import ast
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.cases import AttnCase
from fixtures.cases.tables import TIERS
from tests.conformance import (
    conftest,
    test_addressing,
    test_cache,
    test_invariance,
    test_output,
    test_poison,
    test_visibility,
)
from tests.harness.promises import Promise, every, promise_of, promises_in
from tests.harness.trial import Trial
from tests.museum.kill import KINDS, PROMISES, RESULTS

MODULES = (
    test_output,
    test_visibility,
    test_poison,
    test_cache,
    test_invariance,
    test_addressing,
)
ALL = promises_in(*MODULES)
CASE = AttnCase(scenario="small_decode")


def test_every_test_that_has_a_case_says_which() -> None:
    """In every file; the properties draw their cases themselves."""
    folder = Path(test_output.__file__).parent
    found = {
        node.name
        for path in folder.glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert found - {each.test.__name__ for each in ALL} == {"test_any_case_matches_the_reference"}


def test_names_are_the_museums_kinds() -> None:
    """Its report may name no other, and a name belongs to one test."""
    names = [each.name for each in ALL]
    assert len(set(names)) == len(names)
    assert PROMISES == ALL
    assert set(names) - set(KINDS) == {"thousand"}
    exhibits = json.loads(RESULTS.read_text())["exhibits"]
    assert {kind for exhibit in exhibits for kind in exhibit["kinds"]} == set(KINDS)


@pytest.mark.parametrize("each", ALL, ids=lambda each: each.name)
def test_a_trial_has_all_that_a_test_asks_for(each: Promise) -> None:
    """Under the names of pytest's fixtures: it can run the test without pytest."""
    names = set(inspect.signature(each.test).parameters) - {"record"}
    assert names <= set(dir(Trial)) | set(Trial.__dataclass_fields__)
    given_by_the_suite = {"candidate", "case", "device"}
    assert all(hasattr(conftest, name) for name in names - given_by_the_suite)


def test_a_test_without_a_promise_is_named() -> None:
    with pytest.raises(LookupError, match=r"\.test_a_test_\w+ has a case: expected @promise"):
        promise_of(test_a_test_without_a_promise_is_named)


@pytest.mark.parametrize("least", TIERS)
@pytest.mark.parametrize("own", TIERS)
def test_a_case_comes_no_earlier_than_its_own_tier_and_the_tests(own: str, least: str) -> None:
    made = Promise("any", test_a_test_without_a_promise_is_named, every, lambda case: least)
    assert TIERS.index(made.tier_of(CASE, own)) == max(TIERS.index(own), TIERS.index(least))


def test_a_trial_makes_inputs_and_answer_once_and_a_driver_each_time(
    candidate: type[Any], device: torch.device
) -> None:
    trial = Trial(candidate, CASE, device)
    assert trial.inputs is trial.inputs
    assert trial.outcome is trial.outcome
    assert trial.driver is not trial.driver
    assert trial.written.shape == trial.inputs.storage.shape
