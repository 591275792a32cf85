"""The ops that gather keys from the pages take what a request's queries see, and nothing else."""

import itertools
from dataclasses import replace

import pytest
import torch

from fixtures.cases import AttnCase
from fixtures.inputs import build_inputs
from reference import gather_kv
from tests.backend.calls import whole_call
from tests.harness.environment import has_xformers
from tests.harness.memory import bits
from tests.museum.twins import GatheredOp
from xfv1.ops.xformers import gather
from xfv1.ops.xformers.gather import contiguous_bias, contiguous_kv, picked, pieces

# An op of xFormers takes masks that xFormers makes.
needs_xformers = pytest.mark.skipif(not has_xformers(), reason="xformers is not installed")
CASES = (
    AttnCase(scenario="mixed_spec"),
    AttnCase(scenario="mixed_spec", block_size=32, sliding_window=37),
    AttnCase(scenario="chunked_prefill", sliding_window=1),
    AttnCase(scenario="mixed_small", kv_dtype="fp8_e4m3", sliding_window=19),
)


@pytest.mark.parametrize("of", CASES, ids=lambda case: case.id)
def test_gathered_keys_are_those_within_some_querys_window(of: AttnCase) -> None:
    """Blocks before a window hold NaN: they are another request's by then."""
    case = of
    inputs = build_inputs(case)
    call = whole_call(inputs)
    key, value = contiguous_kv(call)
    for made, pages, scale in (
        (key, call.key_cache, inputs.k_scale),
        (value, call.value_cache, inputs.v_scale),
    ):
        assert pages is not None
        seen = []
        for row, (query_len, length) in enumerate(case.requests):
            window = case.sliding_window or length
            first = max(length - query_len - window + 1, 0)
            seen.append(gather_kv(pages, inputs.block_table[row], length, scale)[first:])
        torch.testing.assert_close(made.double(), torch.cat(seen).double(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("head_size", [8, 20, 24, 37, 80])
@pytest.mark.parametrize("first", [0, 1, 4])
def test_picked_slots_are_the_caches_bit_for_bit(
    dtype: torch.dtype, head_size: int, first: int, device: torch.device
) -> None:
    """Whatever word its rows allow: NaN keeps its payload, rows may begin anywhere."""
    blocks, block_size, heads = 5, 16, 3
    shape = (blocks, block_size, heads, 2 * head_size)
    rng = torch.Generator().manual_seed(head_size)
    numel = blocks * block_size * heads * 2 * head_size
    raw = torch.randint(0, 256, ((first + numel) * dtype.itemsize,), generator=rng)
    memory = raw.to(device, torch.uint8).view(dtype)[first:].view(shape)
    ids = torch.tensor([4, 0, 0, 3], device=device)
    offsets = torch.tensor([0, 15, 7, 7], device=device)
    for cache in (memory[..., :head_size], memory[..., head_size:]):
        made = picked(cache, ids, offsets)
        assert made.dtype == dtype and made.is_contiguous()
        one_by_one = torch.stack([cache[int(b), int(o)] for b, o in zip(ids, offsets, strict=True)])
        assert torch.equal(bits(made), bits(one_by_one))


@needs_xformers
@pytest.mark.parametrize("most", [1, 24, 60, 1000])
@pytest.mark.parametrize("of", CASES, ids=lambda case: case.id)
def test_pieces_are_the_whole_within_what_may_be_gathered(
    of: AttnCase, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """most: keys at a time, unless one request has more."""
    inputs = build_inputs(of)
    call = whole_call(inputs)
    itemsize = 4 if of.kv_dtype == "fp8_e4m3" else call.query.itemsize
    size = 2 * of.num_kv_heads * of.head_size * itemsize
    key, value = contiguous_kv(call)
    expected = torch.empty_like(call.out)
    GatheredOp().run(replace(call, out=expected))

    monkeypatch.setattr(gather, "MAX_GATHERED", most * size)
    cut = list(pieces(call))
    gathered = [contiguous_kv(piece) for piece in cut]
    lens = [len(k) for k, _ in gathered]
    requests = [piece.batch.num_reqs for piece in cut]
    assert all(n <= most or alone == 1 for n, alone in zip(lens, requests, strict=True))
    assert sum(requests) == len(of.query_lens)
    # No two neighbours would have fitted.
    assert all(sum(pair) > most for pair in itertools.pairwise(lens))
    assert torch.equal(torch.cat([k for k, _ in gathered]), key)
    assert torch.equal(torch.cat([v for _, v in gathered]), value)
    for piece in cut:
        phase, starts = piece.phase, piece.phase.query_start_loc_cpu
        assert torch.equal(phase.query_start_loc.cpu(), starts)
        assert piece.query.shape[0] == piece.out.shape[0] == starts[-1]
        assert piece.batch.num_reqs == len(phase.seq_lens) == len(phase.block_table)
        assert piece.batch.max_query_len == starts.diff().max()
        assert phase.seq_lens_cpu is not None
        assert torch.equal(phase.seq_lens.cpu(), phase.seq_lens_cpu)
        assert piece.batch.max_seq_len == phase.seq_lens_cpu.max()
    assert call.lse is not None
    assert [piece.lse.data_ptr() for piece in cut if piece.lse is not None] == [
        call.lse[first:].data_ptr()
        for first in itertools.accumulate((len(p.query) for p in cut[:-1]), initial=0)
    ]
    GatheredOp().run(call)
    torch.testing.assert_close(call.out, expected)


def test_requests_that_just_fit_are_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    of = AttnCase(query_lens=(3, 1, 9, 2), seq_lens=(20, 10, 30, 12))
    call = whole_call(build_inputs(of))
    size = 2 * of.num_kv_heads * of.head_size * call.query.itemsize
    for most, requests, longest in ((42, [2, 2], [3, 9]), (41, [2, 1, 1], [3, 9, 2])):
        monkeypatch.setattr(gather, "MAX_GATHERED", most * size)
        cut = [piece.batch for piece in pieces(call)]
        assert [batch.num_reqs for batch in cut] == requests
        assert [batch.max_query_len for batch in cut] == longest


@needs_xformers
def test_an_op_is_given_keys_values_and_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[torch.Tensor] = []
    monkeypatch.setattr(gather, "attend", lambda call, op, *tensors: given.extend(tensors))
    call = whole_call(build_inputs(CASES[0]))
    gather.attend_contiguous(call, None)
    for made, expected in zip(given[:2], contiguous_kv(call), strict=True):
        assert torch.equal(made[0, :, :, 0], expected)
        assert made.shape[3] == call.layer.group
    assert given[2] is contiguous_bias(call)


def test_pieces_are_cut_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "MAX_GATHERED", 1)
    call = whole_call(build_inputs(CASES[0]))
    first, again = list(pieces(call)), list(pieces(call))
    assert len(first) > 1
    for one, other in zip(first, again, strict=True):
        assert one.phase is other.phase


@needs_xformers
def test_a_request_without_tokens_is_no_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    of = AttnCase(scenario="mixed_empty")
    call = whole_call(build_inputs(of))
    expected = torch.empty_like(call.out)
    GatheredOp().run(replace(call, out=expected))
    monkeypatch.setattr(gather, "MAX_GATHERED", 1)
    assert [len(p.query) for p in pieces(call)] == [n for n in of.query_lens if n]
    GatheredOp().run(call)
    torch.testing.assert_close(call.out, expected)


def test_a_prompts_own_keys_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "MAX_GATHERED", 1)
    call = whole_call(build_inputs(AttnCase(scenario="fresh_prefill")))
    fresh = replace(call, phase=call.phase.changed(batch=replace(call.batch, fresh=True)))
    assert list(pieces(fresh)) == [fresh]


def test_a_fresh_batch_has_the_keys_and_values_of_its_tokens_alone() -> None:
    """Rows of a graph's padding come after them."""
    case = AttnCase(scenario="fresh_prefill", pad_tokens=3)
    inputs = build_inputs(case)
    call = whole_call(inputs)
    padded = replace(call, phase=call.phase.changed(batch=replace(call.batch, fresh=True)))
    padded = replace(padded, key=inputs.key, value=inputs.value)
    assert len(inputs.key) == len(inputs.value) == case.num_tokens + 3
    key, value = contiguous_kv(padded)
    assert torch.equal(bits(key), bits(inputs.key[: case.num_tokens]))
    assert torch.equal(bits(value), bits(inputs.value[: case.num_tokens]))
