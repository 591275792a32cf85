"""Does the cache hold the new keys and values, and is everything else as it was?"""

from fixtures.inputs import AttnInputs
from tests.conformance.conftest import Ran
from tests.harness.compare import check_cache, check_inputs_unchanged
from tests.harness.oracle import written_cache
from tests.harness.report import Recorder


def test_cache_holds_new_tokens_and_nothing_else_changes(
    ran: Ran, inputs: AttnInputs, record: Recorder
) -> None:
    """Written slots bit for bit, every other byte of the storage unchanged, inputs unchanged."""
    check_inputs_unchanged(inputs, ran.before)
    check_cache(inputs, ran.outcome, written_cache(inputs)[1])
    record(elements=ran.outcome.storage.numel())
