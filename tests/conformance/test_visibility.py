"""Does each query see exactly the keys it may: windows, causality, lengths, to the key?"""

from functools import partial
from typing import Any

import torch

from fixtures.cases import AttnCase
from fixtures.inputs import TORCH_DTYPES, AttnInputs
from fixtures.inputs.probes import build_probe, can_probe
from reference import visible
from tests.harness.driver import drive
from tests.harness.promises import promise
from tests.harness.record import Recorder
from tests.harness.verdicts import Mismatch, Verdict

# A count of n visible keys is off by one where the output is off by more than 1 / (n + 1); half
# of that is left to rounding, for as long as rounding is the smaller (bf16: up to 64 keys).
COUNTABLE = 64


@promise("visibility", cases=can_probe, tier="smoke")
def test_sees_exactly_the_keys_it_may(
    candidate: type[Any],
    case: AttnCase,
    device: torch.device,
    inputs: AttnInputs,
    record: Recorder,
) -> None:
    """Zero keys, one-hot values: the output is zero exactly where a key is hidden."""
    # A sink of logit 0 weighs as much as one key.
    sinks = torch.zeros(case.num_heads, dtype=TORCH_DTYPES[case.dtype])
    driver = drive(candidate, case, device, sinks if case.sinks else None)
    probe = build_probe(inputs)
    output = driver.run(probe.inputs).output.float().cpu()
    starts = probe.inputs.query_start_loc.tolist()
    asked = 0
    for request, positions in enumerate(probe.positions):
        query_len, length = case.query_lens[request], case.seq_lens[request]
        rows = output[starts[request] : starts[request + 1]]
        if not rows.isfinite().all():
            raise Mismatch(f"request {request}: the output is no number")
        dims = (positions >= 0).nonzero().flatten()
        queries = torch.arange(length - query_len, length)
        mask = partial(visible, queries, causal=case.causal, sliding_window=case.sliding_window)
        may = mask(positions[dims])
        seen = rows[..., dims] != 0
        wrong = seen != may[:, None, :]
        if wrong.any():
            token, head, at = (int(i) for i in wrong.nonzero()[0])
            verb = "sees" if bool(seen[token, head, at]) else "does not see"
            raise Mismatch(
                f"request {request} (query {query_len}, keys {length}), head {head}: the query at"
                f" position {int(queries[token])} {verb} the key at {int(positions[dims[at]])}"
            )
        counts = mask(torch.arange(length)).sum(dim=1)
        _check_counts(rows[..., dims], may, counts + case.sinks, probe.value, request)
        asked += wrong.numel()
    record(Verdict(asked))


def _check_counts(
    seen: torch.Tensor, may: torch.Tensor, counts: torch.Tensor, value: float, request: int
) -> None:
    """Where few keys are seen, the output also says how many."""
    few = may & (counts <= COUNTABLE)[:, None]
    share = seen / value * counts[:, None, None]
    off = ((share - 1.0).abs() > 0.5 / (counts[:, None, None] + 1)) & few[:, None, :]
    if off.any():
        token, head, at = (int(i) for i in off.nonzero()[0])
        found = value / float(seen[token, head, at])
        raise Mismatch(
            f"request {request}, token {token}, head {head}: {found:.2f} keys are seen,"
            f" expected {int(counts[token])}"
        )
