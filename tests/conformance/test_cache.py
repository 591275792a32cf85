"""Does the cache hold the new keys and values, and is everything else as it was?"""

import torch

from fixtures.inputs import AttnInputs
from tests.harness.compare import check_cache, check_inputs_unchanged
from tests.harness.promises import every, promise
from tests.harness.record import Recorder
from tests.harness.verdicts import Outcome, Verdict


@promise("cache", cases=every, tier="smoke")
def test_cache_holds_new_tokens_and_nothing_else_changes(
    outcome: Outcome, inputs: AttnInputs, written: torch.Tensor, record: Recorder
) -> None:
    """Written slots bit for bit, every other byte of the storage unchanged, inputs unchanged."""
    assert outcome.given is not None
    check_inputs_unchanged(inputs, outcome.given)
    check_cache(inputs, outcome, written)
    record(Verdict(outcome.storage.numel()))
