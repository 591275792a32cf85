"""Is what nobody may read really not read, beyond what vLLM's contract allows?"""

from operator import attrgetter

from fixtures.cases import AttnCase
from fixtures.cases.tables import depth_tier
from fixtures.inputs import Poison
from tests.harness.compare import check_output
from tests.harness.driver import Driver
from tests.harness.promises import promise
from tests.harness.record import Recorder
from tests.harness.trial import case_inputs
from tests.harness.truth import Truth
from tests.harness.verdicts import Verdict


@promise("poison", cases=attrgetter("tailed"), tier=depth_tier)
def test_nan_in_the_last_blocks_tail_does_not_leak(
    driver: Driver, case: AttnCase, truth: Truth, record: Recorder
) -> None:
    """NaN after the last key, where an earlier request's values lie in service."""
    record(_check_poisoned(driver, case, truth, Poison.STRICT))


@promise("out_of_range", cases=attrgetter("paged"), tier=depth_tier)
def test_table_entries_past_the_last_block_are_not_followed(
    driver: Driver, case: AttnCase, truth: Truth, record: Recorder
) -> None:
    """Ids past the cache's end in the table's padding, and in the rows and columns around it.

    NaN lies there, inside the storage.
    """
    record(_check_poisoned(driver, case, truth, Poison.OUT_OF_RANGE))


def _check_poisoned(driver: Driver, case: AttnCase, truth: Truth, poison: Poison) -> Verdict:
    inputs = case_inputs(case, driver.device, poison)
    outcome = driver.run(inputs)
    return check_output(inputs, outcome, truth(inputs, outcome.query))
