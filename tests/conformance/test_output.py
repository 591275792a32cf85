"""Is every number of the output what the reference says, within what rounding explains?"""

from fixtures.inputs import AttnInputs
from tests.conformance.conftest import Ran
from tests.harness.compare import check_output, check_padding
from tests.harness.oracle import expected
from tests.harness.report import Recorder


def test_output_matches_reference(ran: Ran, inputs: AttnInputs, record: Recorder) -> None:
    """Each (token, head, dim) within its budget; rows that are padding untouched."""
    verdict = check_output(inputs, ran.outcome, expected(inputs, ran.outcome.query))
    record(elements=verdict.elements, share=verdict.share)
    check_padding(inputs, ran.outcome)
