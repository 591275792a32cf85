"""Does the cache hold the new keys and values, and is everything else as it was?"""

from fixtures.inputs import AttnInputs
from tests.harness.candidate import Outcome
from tests.harness.compare import check_cache, check_inputs_unchanged
from tests.harness.oracle import written_cache
from tests.harness.report import Recorder


def test_cache_holds_new_tokens_and_nothing_else_changes(
    outcome: Outcome, inputs: AttnInputs, record: Recorder
) -> None:
    """Written slots bit for bit, every other byte of the storage unchanged, inputs unchanged."""
    assert outcome.given is not None
    check_inputs_unchanged(inputs, outcome.given)
    check_cache(inputs, outcome, written_cache(inputs)[1])
    record(elements=outcome.storage.numel())
