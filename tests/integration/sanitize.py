"""The own kernels over the rows of the cpu tier, small and without vLLM: for NVIDIA's sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \\
        python -m tests.integration.sanitize

Or racecheck, initcheck, synccheck. Each case is run as it is, with its keys cut over many programs,
and batch invariant, each answer compared with the reference. Without PyTorch's own caching every
tensor is an allocation, so that an access past its end is one outside of all memory.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from unittest import mock

import torch

from benchmarks import say
from fixtures.cases.covering import covering_cases
from fixtures.cases.tables import work
from fixtures.inputs import AttnInputs, build_inputs
from tests.harness.compare import check_lse, check_output
from tests.harness.truth import expected
from tests.harness.verdicts import Mismatch, Outcome
from tests.integration.calls import whole_call
from xfv1.device import device_of
from xfv1.dispatch import OPS
from xfv1.kernels.paged import launch

# Multiplications that the reference, and an instrumented kernel, do in about a second.
SMALL = 1e9
# A split for every few keys, where a GPU would otherwise split none so short.
KEYS_PER_SPLIT = 16
MODES = ("whole", "split", "invariant")


def answers(
    inputs: AttnInputs, device: torch.device
) -> Iterator[tuple[str, Outcome, torch.Tensor]]:
    """(mode, output, LSE) of the own kernel in each way that it can be asked, on the CPU."""
    given = inputs.copied(device)
    for mode in MODES:
        call = whole_call(given)
        call.layer = dataclasses.replace(call.layer, batch_invariant=mode == "invariant")
        keys = KEYS_PER_SPLIT if mode == "split" else launch.MIN_SPLIT_KEYS
        with mock.patch.object(launch, "MIN_SPLIT_KEYS", keys):
            OPS["triton"].run(call)
        assert call.lse is not None
        yield mode, Outcome(call.out.cpu(), inputs.storage), call.lse.cpu()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", default="1/1", help="i/n: every n-th case from the i-th")
    args = parser.parse_args(arguments)
    first, every = map(int, args.part.split("/"))
    # Several tools may be at work side by side.
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ran = wrong = 0
    for case in covering_cases("cpu")[first - 1 :: every]:
        if work(case) > SMALL:
            continue
        inputs = build_inputs(case, torch.device("cpu"))
        call = whole_call(inputs)
        if OPS["triton"].not_supported_reasons(call.layer, call.batch, device_of(device.type)):
            continue
        truth = expected(inputs)
        for mode, outcome, lse in answers(inputs, device):
            ran += 1
            try:
                check_output(inputs, outcome, truth)
                check_lse(lse, truth)
            except Mismatch as mismatch:
                wrong += 1
                say(f"{case.id}, {mode}: {mismatch}")
    say(f"{ran} runs, {wrong} wrong")
    return 1 if wrong or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
