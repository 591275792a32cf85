"""Is every number of the output what the reference says, within what rounding explains?"""

from fixtures.inputs import AttnInputs
from tests.harness.compare import check_output, check_padding
from tests.harness.promises import every, promise
from tests.harness.record import Recorder
from tests.harness.truth import Truth
from tests.harness.verdicts import Outcome


@promise("output", cases=every, tier="smoke")
def test_output_matches_reference(
    outcome: Outcome, inputs: AttnInputs, truth: Truth, record: Recorder
) -> None:
    """Each (token, head, dim) within its budget; rows that are padding untouched."""
    record(check_output(inputs, outcome, truth(inputs, outcome.query)))
    check_padding(inputs, outcome)
