"""Does it all hold for cases that nobody thought of? Hypothesis draws them and shrinks a failure.

HYPOTHESIS_PROFILE=nightly, weekly or soak draws more, see `fixtures.cases.strategies`. If a drawn
case fails and an entry of the ledger matches it, the failure is known. A drawn case that passes
although an entry matches it is no problem: the entry may describe other cases.
"""

from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from fixtures.cases import AttnCase
from fixtures.cases.strategies import cases_of, parts, profile, seeded
from fixtures.cases.tables import TIERS
from tests.conformance import test_cache, test_output
from tests.harness.compare import check_cache, check_output, check_padding
from tests.harness.ledger import Known
from tests.harness.record import record_drawn
from tests.harness.trial import Trial
from tests.harness.truth import Truth
from tests.harness.verdicts import Refused

pytestmark = [getattr(pytest.mark, tier) for tier in TIERS]


@pytest.mark.parametrize("part", parts())
@seeded
@profile()
@given(data=st.data())
def test_any_case_matches_the_reference(
    data: st.DataObject,
    part: int,
    candidate: type[Any],
    device: torch.device,
    truth: Truth,
    known_failures: list[Known],
    request: pytest.FixtureRequest,
) -> None:
    """Output within its budget, padding and all of the cache but the new tokens untouched."""
    drawn: AttnCase = data.draw(cases_of(part))
    trial = Trial(candidate, drawn, device)
    inputs = trial.inputs
    # Entries of the ledger name the tests that check the same for the cases of the tables.
    asked = test_output.test_output_matches_reference.__name__
    try:
        outcome = trial.outcome
        right = truth(inputs, outcome.query)
        verdict = check_output(inputs, outcome, right)
        check_padding(inputs, outcome)
        asked = test_cache.test_cache_holds_new_tokens_and_nothing_else_changes.__name__
        check_cache(inputs, outcome, right.storage)
    except Refused as refusal:
        event(f"refused: {refusal}")
        record_drawn(request.node, refused=1)
    except Exception as error:
        if known := next((k for k in known_failures if k.matches(asked, drawn.id)), None):
            event(f"known: {known.reason}")
            record_drawn(request.node, known=known.reason)
            return
        error.add_note(f"as a row: {drawn.row()}\nrerun with: --case={drawn.id}")
        record_drawn(request.node, failed=drawn.id)
        raise
    else:
        record_drawn(request.node, verdict)
