"""The museum against the method of vLLM's own backend test, to compare what each notices.

vLLM's tests/v1/attention/test_attention_backends.py, as its source describes it: unit-normal
queries, keys and values; a cache of zeros beside them, in which the batch's new tokens already
lie (backends take turns on one cache, and the first writes); output compared to one flat
tolerance in bf16. Its scenarios, and those of its windowed variant. Written here from that
description; heads and head size are smaller, which changes no element's distribution.

    python -m tests.museum.vllm_method --json docs/results/museum-vllm-method.json
"""

import argparse
import dataclasses
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.harness.environment import prepare

prepare()

import torch  # noqa: E402

import xfv1  # noqa: E402
from fixtures.cases import AttnCase  # noqa: E402
from fixtures.cases.tables import VLLM_SCENARIOS  # noqa: E402
from fixtures.inputs import AttnInputs, build_inputs  # noqa: E402
from reference.paged import store  # noqa: E402
from tests.harness.driver import drive  # noqa: E402
from tests.harness.loading import load_candidate  # noqa: E402
from tests.harness.provenance import environment  # noqa: E402
from tests.harness.truth import expected, written_cache  # noqa: E402
from tests.harness.verdicts import Mismatch, Refused  # noqa: E402
from tests.museum.faults import FAULTS, Fault  # noqa: E402

CPU = torch.device("cpu")
# That test's own: rtol and atol of torch.allclose.
TOLERANCE = 1e-2
# Of its windowed model, microsoft/Phi-tiny-MoE-instruct, as far as we know it.
WINDOW = 2047
WINDOWED = (
    "small_decode",
    "small_prefill",
    "mixed_medium",
    "large_decode",
    "large_prefill",
    "mixed_large",
)
CASES = (
    *(AttnCase(scenario=name, dtype="bf16") for name in VLLM_SCENARIOS),
    *(AttnCase(scenario=name, dtype="bf16", sliding_window=WINDOW) for name in WINDOWED),
)


@dataclass(frozen=True)
class Seen:
    """Whether the method notices a fault, and in which case first."""

    name: str
    source: str
    control: bool
    noticed: bool
    case: str = ""


def plain_inputs(case: AttnCase) -> AttnInputs:
    """Unit-normal numbers, no poison, and the new tokens already in the cache."""
    inputs = build_inputs(case)
    rng = torch.Generator().manual_seed(42)
    names = ("query", "key", "value")
    drawn: dict[str, Any] = {
        name: torch.randn(getattr(inputs, name).shape, generator=rng).to(inputs.query.dtype)
        for name in names
    }
    cache, storage = inputs.new_cache()
    storage.zero_()
    content = torch.randn(cache.shape, generator=rng)
    cache.copy_(store(content, cache.dtype, 1.0))
    plain = dataclasses.replace(inputs, cache=cache, storage=storage, **drawn)
    shared, shared_storage = written_cache(plain)
    return dataclasses.replace(plain, cache=shared, storage=shared_storage)


def notices(fault: Fault, batches: list[AttnInputs], truths: list[torch.Tensor]) -> Seen:
    """Run a fault through every case until one differs by more than the tolerance."""
    candidate = load_candidate(fault.candidate)
    for inputs, truth in zip(batches, truths, strict=True):
        case = inputs.case
        try:
            output = drive(candidate, case, CPU).run(inputs).output[: case.num_tokens].double()
        except (Refused, Mismatch):
            # That test runs only what a backend says it supports.
            continue
        except Exception:
            # A crash is noticed by any method.
            return Seen(fault.name, fault.source, fault.control, True, case.id)
        if not torch.allclose(output, truth, rtol=TOLERANCE, atol=TOLERANCE):
            return Seen(fault.name, fault.source, fault.control, True, case.id)
    return Seen(fault.name, fault.source, fault.control, False)


def main(argv: list[str] | None = None) -> int:
    """Print what is noticed; write JSON where asked. Returns 0."""
    parser = argparse.ArgumentParser(description="the museum by the method of vLLM's own test")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    xfv1.register()
    torch.set_num_threads(1)
    batches = [plain_inputs(case) for case in CASES]
    truths = [expected(inputs).output for inputs in batches]
    found = [notices(fault, batches, truths) for fault in FAULTS.values()]
    faults = [seen for seen in found if not seen.control]
    caught = sum(seen.noticed for seen in faults)
    for seen in found:
        print(f"{seen.name:32}{'noticed' if seen.noticed else '-':10}{seen.case}")
    print(f"{caught} of {len(faults)} faults noticed")
    if args.json:
        content = {
            "method": __doc__,
            "tolerance": TOLERANCE,
            "cases": [case.id for case in CASES],
            "faults": len(faults),
            "noticed": caught,
            **environment(),
            "results": [asdict(seen) for seen in found],
        }
        args.json.write_text(json.dumps(content, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
