"""Is what nobody may read really not read, beyond what vLLM's contract allows?"""

from operator import attrgetter

from fixtures.cases import AttnCase
from fixtures.cases.tables import depth_tier
from fixtures.inputs import Poison, build_inputs
from tests.harness.candidate import Driver
from tests.harness.compare import check_against_reference
from tests.harness.oracle import reference_device
from tests.harness.report import Recorder


def _check_poisoned(driver: Driver, case: AttnCase, poison: Poison, record: Recorder) -> None:
    inputs = build_inputs(case, reference_device(case, driver.device), poison)
    check_against_reference(inputs, driver.run(inputs), record)


def test_nan_in_the_last_blocks_tail_does_not_leak(
    driver: Driver, case: AttnCase, record: Recorder
) -> None:
    """NaN after the last key, where an earlier request's values lie in service."""
    _check_poisoned(driver, case, Poison.STRICT, record)


def test_table_entries_past_the_last_block_are_not_followed(
    driver: Driver, case: AttnCase, record: Recorder
) -> None:
    """Ids past the cache's end in the table's padding, and in the rows and columns around it;
    there lies NaN, inside the storage."""
    _check_poisoned(driver, case, Poison.OUT_OF_RANGE, record)


test_nan_in_the_last_blocks_tail_does_not_leak.cases = attrgetter("tailed")  # type: ignore[attr-defined]
test_table_entries_past_the_last_block_are_not_followed.cases = attrgetter("paged")  # type: ignore[attr-defined]
test_nan_in_the_last_blocks_tail_does_not_leak.least_tier = depth_tier  # type: ignore[attr-defined]
test_table_entries_past_the_last_block_are_not_followed.least_tier = depth_tier  # type: ignore[attr-defined]
