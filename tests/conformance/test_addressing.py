"""Do offsets into the cache hold more than 32 bits?"""

import dataclasses

from fixtures.cases import AttnCase
from fixtures.inputs import AttnInputs
from fixtures.inputs.transforms import permute_blocks, spread_blocks
from tests.harness.compare import check_output
from tests.harness.driver import Driver
from tests.harness.promises import promise
from tests.harness.record import Recorder
from tests.harness.truth import Truth

# The last block in use begins past what an int32 counts: 4 GiB of 16-bit elements.
BEYOND_INT32 = 2**31


def _some(case: AttnCase) -> bool:
    """A decode and a mixed batch: nothing else about the batch changes an offset."""
    return case in (AttnCase(scenario="small_decode"), AttnCase(scenario="mixed_small"))


@promise("addressing", cases=_some, tier="smoke")
def test_blocks_past_two_to_the_31_elements_are_read_and_written(
    driver: Driver, inputs: AttnInputs, truth: Truth, record: Recorder
) -> None:
    """The same answer from blocks so far apart that an int32 offset overflows (vLLM #50427)."""
    moved = permute_blocks(inputs, seed=inputs.case.seed)
    last = int(moved.slot_mapping.max()) // inputs.case.block_size
    # A multiple of 64 elements keeps every row aligned for any kernel.
    stride = -(-BEYOND_INT32 // (last * 64)) * 64
    # In place: a copy would touch all that lies between the blocks.
    far = spread_blocks(moved.copied(driver.device), stride)
    done = driver.step(far)
    done = dataclasses.replace(done, output=done.output.to(moved.device))
    record(check_output(moved, done, truth(moved, done.query)))
