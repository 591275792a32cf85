"""Memory bit by bit: what a candidate may write, what lies around it, and whether both agree."""

import torch

from fixtures.inputs import AttnInputs
from fixtures.inputs.build import GUARD_ROWS
from tests.harness.verdicts import Mismatch

# A NaN with a payload of its own, by element size. Output rows that nobody may write keep these
# very bits.
UNTOUCHED = {1: 0x7D, 2: 0x7FDB, 4: 0x7FDBDBDB}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes as integers of its element size, so that NaN compares equal to itself."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.itemsize])


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor of integers, so that NaN compares equal to itself."""
    dense = tensor.contiguous()
    return bits(dense) if dense.is_floating_point() else dense


def new_output(inputs: AttnInputs) -> torch.Tensor:
    """An output as vLLM allocates it, between guard rows; every element has the UNTOUCHED bits."""
    rows, *row = inputs.query.shape
    whole = inputs.query.new_empty(rows + 2 * GUARD_ROWS, *row)
    bits(whole).fill_(UNTOUCHED[whole.itemsize])
    return whole[GUARD_ROWS : GUARD_ROWS + rows]


def check_guards(output: torch.Tensor) -> None:
    """The rows before and after an output are as `new_output` left them.

    Raises:
        Mismatch: if any was written.
    """
    memory = torch.empty(0, dtype=output.dtype, device=output.device)
    whole = bits(memory.set_(output.untyped_storage()))
    first, last = output.storage_offset(), output.storage_offset() + output.numel()
    for where, guard in (("before its first", whole[:first]), ("after its last", whole[last:])):
        if (guard != UNTOUCHED[output.itemsize]).any():
            raise Mismatch(f"the output was written {where} row")
