"""Does the cache hold the new keys and values, and is everything else as it was?"""

from fixtures.inputs import AttnInputs
from tests.harness.candidate import Driver
from tests.harness.compare import check_cache, check_inputs_unchanged, snapshot
from tests.harness.oracle import written_cache
from tests.harness.report import Recorder


def test_cache_holds_new_tokens_and_nothing_else_changes(
    driver: Driver, inputs: AttnInputs, record: Recorder
) -> None:
    """Written slots bit for bit, every other byte of the storage unchanged, inputs unchanged."""
    before = snapshot(inputs)
    outcome = driver.run(inputs)
    check_inputs_unchanged(inputs, before)
    check_cache(inputs, outcome, written_cache(inputs)[1])
    record(elements=outcome.storage.numel())
