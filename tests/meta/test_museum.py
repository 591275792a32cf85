"""The suite notices every fault of the museum, and lets pass what is none.

Which test of which case kills a fault is looked up in the museum's report, and is run here again.
After a new fault, or a change of cases: python -m tests.museum.kill --json tests/museum/museum.json
"""

import json
from typing import Any

import pytest

from fixtures.cases import AttnCase
from fixtures.cases.tables import Row, rows
from tests.harness.loading import load_candidate
from tests.museum.faults import BACKEND_FAULTS, BackendFault
from tests.museum.kill import (
    KILLED,
    KINDS,
    PASSED,
    RESULTS,
    applies,
    asked_in,
    attempt,
    telling_rows,
)
from tests.museum.plain import Plain
from tests.museum.reference_faults import REFERENCE_FAULTS
from tests.museum.registry import FAULTS, enter

EXHIBITS: dict[str, dict[str, Any]] = {
    exhibit["name"]: exhibit for exhibit in json.loads(RESULTS.read_text())["exhibits"]
}
KILLS = [exhibit for exhibit in EXHIBITS.values() if exhibit["verdict"] == KILLED]
CONTROLS = [fault for fault in BACKEND_FAULTS.values() if fault.control]
# Rows of a control that are run here; `tests.museum.kill` runs more.
CONTROL_ROWS = 2


def _row(case: str) -> Row:
    return next(row for row in rows() if row.case.id == case)


def test_report_is_of_these_faults() -> None:
    assert list(EXHIBITS) == list(BACKEND_FAULTS)


def test_a_fault_is_in_the_registry_once() -> None:
    assert {**BACKEND_FAULTS, **REFERENCE_FAULTS} == FAULTS
    assert len(FAULTS) == len(BACKEND_FAULTS) + len(REFERENCE_FAULTS)
    fault = FAULTS["newest_lost"]
    with pytest.raises(ValueError, match="fault newest_lost: expected a name that no other"):
        enter(fault)
    assert FAULTS["newest_lost"] is fault


def test_report_has_no_surprise() -> None:
    for name, exhibit in EXHIBITS.items():
        noticed = exhibit["verdict"] == KILLED
        assert noticed != BACKEND_FAULTS[name].control, name


def test_every_kind_of_test_is_the_only_one_to_notice_some_fault() -> None:
    """On the case that kills it, of which all kinds are asked."""
    alone = {exhibit["kinds"][0] for exhibit in KILLS if len(exhibit["kinds"]) == 1}
    assert alone == set(KINDS)


@pytest.mark.parametrize("fault", BACKEND_FAULTS.values(), ids=BACKEND_FAULTS)
def test_fault_is_a_candidate_with_a_source(fault: BackendFault) -> None:
    assert load_candidate(fault.candidate) is fault.backend
    assert issubclass(fault.backend, Plain)
    assert fault.source and fault.what and fault.model


@pytest.mark.parametrize("exhibit", KILLS, ids=lambda exhibit: exhibit["name"])
def test_fault_is_noticed(exhibit: dict[str, Any]) -> None:
    fault = BACKEND_FAULTS[exhibit["name"]]
    case = AttnCase.from_id(exhibit["case"])
    assert asked_in(exhibit["kind"], _row(case.id)) == exhibit["tier"]
    assert attempt(fault.backend, exhibit["kind"], case, fault.steps).outcome == KILLED


@pytest.mark.parametrize(
    ("kind", "of"), sorted({(exhibit["kind"], exhibit["case"]) for exhibit in KILLS})
)
def test_correct_candidate_passes_what_kills(kind: str, of: str) -> None:
    made = attempt(Plain, kind, AttnCase.from_id(of))
    assert made.outcome == PASSED, made.message


@pytest.mark.parametrize("fault", CONTROLS, ids=lambda fault: fault.name)
def test_control_passes(fault: BackendFault) -> None:
    for row in telling_rows(fault)[:CONTROL_ROWS]:
        for kind in KINDS:
            if applies(kind, row.case):
                made = attempt(fault.backend, kind, row.case)
                assert made.outcome != KILLED, made.message
