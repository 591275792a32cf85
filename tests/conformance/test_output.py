"""Is every number of the output what the reference says, within what rounding explains?"""

from fixtures.inputs import AttnInputs
from tests.harness.candidate import Outcome
from tests.harness.compare import check_against_reference, check_padding
from tests.harness.report import Recorder


def test_output_matches_reference(outcome: Outcome, inputs: AttnInputs, record: Recorder) -> None:
    """Each (token, head, dim) within its budget; rows that are padding untouched."""
    check_against_reference(inputs, outcome, record)
    check_padding(inputs, outcome)
