"""Inputs are the same everywhere, poisoned where nobody may look, and laid out as asked."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from fixtures.cases import DTYPES, KV_LAYOUTS, AttnCase
from fixtures.cases.scenarios import SCENARIOS
from fixtures.inputs.build import GUARD_ROWS, K_SCALE, V_SCALE, AttnInputs, build_inputs
from fixtures.inputs.draw import TORCH_DTYPES
from fixtures.inputs.pages import (
    GUARD_BLOCKS,
    HUGE,
    LAYER,
    LAYERS,
    NULL_BLOCK,
    SPARE_BLOCKS,
    TABLE_GUARD,
    Poison,
    physical_shape,
)
from tests.harness.samples import SAMPLES, mixed
from tests.harness.truth import expected, written_cache

# Each is a batch of several requests.
CASES: dict[str, AttnCase] = {
    **SAMPLES,
    "edges": AttnCase(scenario="edge_chunked"),
    "prefill": AttnCase(scenario="fresh_prefill"),
    "block32": mixed(block_size=32),
    "block1": AttnCase(scenario="mixed_small", block_size=1),
    "window_decode": AttnCase(scenario="edge_decode", sliding_window=33),
    "window_past_context": mixed(sliding_window=4096),
    "fp8_e5m2_window": mixed(kv_dtype="fp8_e5m2", sliding_window=17),
    "bf16": mixed(dtype="bf16"),
    "fp32": mixed(dtype="fp32"),
    "fused_qkv": mixed(fused_qkv=True),
    "fused_qkv_padded": mixed(fused_qkv=True, pad_tokens=5),
    "kv_sharing": mixed(kv_sharing=True),
    "kv_sharing_window": mixed(kv_sharing=True, sliding_window=17),
    "padded": AttnCase(scenario="edge_decode", pad_reqs=3, pad_tokens=4),
    "shared_prefix": AttnCase(scenario="mixed_deep", shared_prefix=True),
    "shared_prefix_window": AttnCase(scenario="mixed_deep", shared_prefix=True, sliding_window=17),
    **{f"layout_{name}": mixed(kv_layout=name) for name in KV_LAYOUTS},
}
# Those whose context lies in a cache of their own.
OWN_BLOCKS = [name for name, case in CASES.items() if not case.shared_prefix]
CACHED = [name for name in CASES if name not in ("encoder", "cross")]


def _case(name: str, **changes: Any) -> AttnCase:
    return CASES[name].replace(**changes)


def _tensors(inputs: AttnInputs) -> dict[str, torch.Tensor]:
    """The fields that are tensors, by name."""
    values = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """A copy as bytes, so that NaN compares equal to itself."""
    return tensor.contiguous().cpu().view(torch.uint8)


def _same(one: AttnInputs, other: AttnInputs) -> None:
    ours, theirs = _tensors(one), _tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(_raw(tensor), _raw(theirs[name])), name
        assert tensor.stride() == theirs[name].stride(), name
        assert tensor.storage_offset() == theirs[name].storage_offset(), name


def _blocks(case: AttnCase, row: int) -> int:
    """Blocks of a request's keys."""
    return -(-case.seq_lens[row] // case.block_size)


def _freed(case: AttnCase, row: int) -> int:
    """Blocks all of whose keys lie before the window of the request's first query.

    That query is at position seq_len - query_len and sees W keys, so the first key seen is at
    seq_len - query_len - W + 1, and whole blocks before it are free.
    """
    if case.sliding_window is None or not case.query_lens[row] or case.shared_prefix:
        return 0
    first = case.seq_lens[row] - case.query_lens[row] - case.sliding_window + 1
    return max(first, 0) // case.block_size


# The same numbers, always and everywhere.


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("poison", Poison)
def test_building_twice_gives_the_same(name: str, poison: Poison) -> None:
    """Whatever else has drawn from torch's global generator, and without drawing from it."""
    torch.manual_seed(1)
    first = build_inputs(_case(name), poison=poison)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    _same(first, build_inputs(_case(name), poison=poison))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", CASES)
def test_a_variant_draws_other_numbers_of_the_same_shape(name: str) -> None:
    one, other = build_inputs(_case(name)), build_inputs(_case(name, variant=1))
    for field in ("query", "key", "value", "block_table"):
        ours, theirs = getattr(one, field), getattr(other, field)
        assert ours.shape == theirs.shape
        assert not torch.equal(ours, theirs), field


@pytest.mark.parametrize("name", CASES)
def test_another_device_has_the_same_inputs(name: str) -> None:
    """Bit for bit, and with the same strides and offsets."""
    here = build_inputs(_case(name))
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        there = build_inputs(_case(name), torch.device(device))
        assert {tensor.device.type for tensor in _tensors(there).values()} == {device}
        _same(here, there)


@pytest.mark.parametrize("name", CASES)
def test_a_poison_moves_no_number_that_is_read(name: str) -> None:
    """Only the tails and the table's padding differ; what the reference reads does not."""
    contract, strict, out = (build_inputs(_case(name), poison=poison) for poison in Poison)
    for field, tensor in _tensors(contract).items():
        if field not in ("cache", "storage"):
            assert torch.equal(_raw(tensor), _raw(getattr(strict, field))), field
        if field not in ("block_table",):
            assert torch.equal(_raw(tensor), _raw(getattr(out, field))), field
    wanted = expected(contract)
    for other in (strict, out):
        assert torch.equal(expected(other).output, wanted.output)


# Shapes.


@pytest.mark.parametrize("name", CASES)
def test_shapes_and_dtypes_are_vllms(name: str) -> None:
    case = _case(name)
    inputs = build_inputs(case)
    rows, requests = case.num_tokens + case.pad_tokens, len(case.seq_lens) + case.pad_reqs
    dtype = TORCH_DTYPES[case.dtype]
    new = sum(case.seq_lens) if case.attention == "cross" else rows
    assert inputs.query.shape == (rows, case.num_heads, case.head_size)
    for tensor in (inputs.key, inputs.value):
        assert tensor.shape == (new, case.num_kv_heads, case.head_size)
    assert {inputs.query.dtype, inputs.key.dtype, inputs.value.dtype} == {dtype}
    stored = dtype if case.kv_dtype == "auto" else TORCH_DTYPES[case.kv_dtype]
    assert inputs.cache.dtype == inputs.storage.dtype == stored
    assert inputs.cache.shape[1:] == (case.num_kv_heads, case.block_size, 2 * case.head_size)
    assert inputs.block_table.shape[0] == inputs.num_reqs == requests
    assert inputs.block_table.dtype == torch.int32
    assert inputs.slot_mapping.shape == (new if case.attention == "cross" else rows,)
    assert inputs.slot_mapping.dtype == torch.int64
    assert inputs.seq_lens.tolist() == [*case.seq_lens, *[0] * case.pad_reqs]
    starts = [sum(case.query_lens[:row]) for row in range(len(case.query_lens) + 1)]
    assert inputs.query_start_loc.tolist() == [*starts, *[case.num_tokens] * case.pad_reqs]
    assert inputs.seq_lens.dtype == inputs.query_start_loc.dtype == torch.int32
    assert (inputs.k_scale, inputs.v_scale) == (
        (1.0, 1.0) if case.kv_dtype == "auto" else (K_SCALE, V_SCALE)
    )
    assert (inputs.alibi_slopes is not None) == case.alibi
    assert (inputs.sinks is not None) == case.sinks


@pytest.mark.parametrize("name", CASES)
def test_all_that_a_model_computes_is_finite(name: str) -> None:
    inputs = build_inputs(_case(name))
    for tensor in (inputs.query, inputs.key, inputs.value):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("layout", KV_LAYOUTS)
def test_a_layout_orders_the_storages_axes(layout: str) -> None:
    """Outermost first; the innermost axis has stride 1, each other that of what lies inside it."""
    case = _case(f"layout_{layout}")
    inputs = build_inputs(case)
    blocks = inputs.cache.shape[0] + GUARD_BLOCKS
    size = {
        "L": LAYERS,
        "B": blocks,
        "H": case.num_kv_heads,
        "N": case.block_size,
        "C": 2 * case.head_size,
    }
    sizes = tuple(size[axis] for axis in layout)
    stride = {axis: math.prod(sizes[at + 1 :]) for at, axis in enumerate(layout)}
    assert inputs.cache.stride() == tuple(stride[axis] for axis in "BHNC")
    assert inputs.cache.storage_offset() == LAYER * stride["L"]
    assert inputs.storage.numel() == math.prod(size.values())
    assert physical_shape(case, inputs.storage.numel()) == (layout, sizes)


@pytest.mark.parametrize("name", CASES)
def test_a_cache_is_a_view_of_its_storage(name: str) -> None:
    """And so is a copy of its own storage, which nothing else shares."""
    inputs = build_inputs(_case(name))
    assert inputs.cache.untyped_storage().data_ptr() == inputs.storage.untyped_storage().data_ptr()
    cache, storage = inputs.new_cache()
    assert cache.untyped_storage().data_ptr() == storage.untyped_storage().data_ptr()
    assert storage.data_ptr() != inputs.storage.data_ptr()
    assert (cache.stride(), cache.storage_offset()) == (
        inputs.cache.stride(),
        inputs.cache.storage_offset(),
    )
    assert torch.equal(_raw(cache), _raw(inputs.cache))
    key_cache, value_cache = inputs.split_cache(cache)
    half = inputs.case.head_size
    assert torch.equal(_raw(key_cache), _raw(cache[..., :half].transpose(1, 2)))
    assert torch.equal(_raw(value_cache), _raw(cache[..., half:].transpose(1, 2)))


@pytest.mark.parametrize("name", ["fused_qkv", "fused_qkv_padded"])
def test_a_fused_projections_slices_share_its_rows(name: str) -> None:
    """A row is num_heads + 2 num_kv_heads heads long; query, key, value lie one after another."""
    case = _case(name)
    inputs = build_inputs(case)
    row = (case.num_heads + 2 * case.num_kv_heads) * case.head_size
    tensors = (inputs.query, inputs.key, inputs.value)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert {tensor.stride() for tensor in tensors} == {(row, case.head_size, 1)}
    at = [0, case.num_heads * case.head_size, (case.num_heads + case.num_kv_heads) * case.head_size]
    first = GUARD_ROWS * row
    assert [tensor.storage_offset() - first for tensor in tensors] == at


def test_without_a_fused_projection_rows_are_contiguous() -> None:
    inputs = build_inputs(_case("padded"))
    assert all(tensor.is_contiguous() for tensor in (inputs.query, inputs.key, inputs.value))


# Blocks, slots and tables.


@pytest.mark.parametrize("name", OWN_BLOCKS)
def test_requests_own_their_blocks(name: str) -> None:
    """No block twice, none of them the null block, none past the cache; and not in order."""
    case = _case(name)
    inputs = build_inputs(case)
    owned = [
        block
        for row in range(len(case.seq_lens))
        for block in inputs.block_table[row, _freed(case, row) : _blocks(case, row)].tolist()
    ]
    assert len(set(owned)) == len(owned)
    assert all(NULL_BLOCK < block < inputs.cache.shape[0] - SPARE_BLOCKS for block in owned)
    assert owned != sorted(owned)


def test_a_shared_prefix_is_the_same_blocks_one_of_them_twice() -> None:
    """Shared: the whole blocks of the shortest context. What comes after is a request's own."""
    case = _case("shared_prefix")
    table = build_inputs(case).block_table.tolist()
    pairs = case.requests
    shared = min(k - q for q, k in pairs) // case.block_size
    assert shared > 1
    assert len({tuple(row[:shared]) for row in table}) == 1
    assert table[0][0] == table[0][1]
    rest = [block for row, ids in enumerate(table) for block in ids[shared : _blocks(case, row)]]
    assert len(set(rest)) == len(rest)
    assert not set(rest) & set(table[0][:shared])


@pytest.mark.parametrize("name", [name for name in CACHED if CASES[name].sliding_window])
def test_blocks_before_the_window_are_freed(name: str) -> None:
    """Their entries are the null block, and all other entries are not."""
    case = _case(name)
    table = build_inputs(case).block_table
    for row in range(len(case.seq_lens)):
        used = table[row, : _blocks(case, row)]
        assert (used == NULL_BLOCK).tolist() == [at < _freed(case, row) for at in range(len(used))]


def test_some_case_has_freed_blocks() -> None:
    for name in ("window1", "window17", "window_decode", "noncausal_window"):
        case = _case(name)
        assert sum(_freed(case, row) for row in range(len(case.seq_lens))) > 0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("poison", Poison)
def test_entries_past_a_requests_last_block_are_stale(name: str, poison: Poison) -> None:
    """They name spare blocks, all NaN, or blocks past the cache; at least two to a row."""
    case = _case(name)
    inputs = build_inputs(case, poison=poison)
    blocks = inputs.cache.shape[0]
    for row in range(len(case.seq_lens)):
        stale = inputs.block_table[row, _blocks(case, row) :]
        assert len(stale) >= 2
        if poison is Poison.OUT_OF_RANGE:
            assert ((stale >= blocks) & (stale < blocks + GUARD_BLOCKS)).all()
        else:
            assert ((stale >= blocks - SPARE_BLOCKS) & (stale < blocks)).all()
    assert (inputs.block_table[len(case.seq_lens) :] == NULL_BLOCK).all()


@pytest.mark.parametrize("name", CASES)
def test_an_out_of_range_table_lies_amid_ids_past_the_cache(name: str) -> None:
    """Rows and columns before and after its own; any other table is all of its memory."""
    inputs = build_inputs(_case(name), poison=Poison.OUT_OF_RANGE)
    table, blocks = inputs.block_table, inputs.cache.shape[0]
    rows, width = (size + 2 * TABLE_GUARD for size in table.shape)
    assert table.untyped_storage().nbytes() == 4 * rows * width
    around = table.as_strided((rows, width), (width, 1), 0).clone()
    own = around[TABLE_GUARD:-TABLE_GUARD, TABLE_GUARD:-TABLE_GUARD]
    assert torch.equal(own, table)
    own.fill_(blocks)
    assert ((around >= blocks) & (around < blocks + GUARD_BLOCKS)).all()
    plain = build_inputs(_case(name)).block_table
    assert plain.untyped_storage().nbytes() == 4 * plain.numel()


@pytest.mark.parametrize("name", CASES)
def test_a_slot_is_its_tokens_place_in_its_requests_own_block(name: str) -> None:
    """slot = block_table[row, position // block_size] * block_size + position % block_size."""
    case = _case(name)
    inputs = build_inputs(case)
    size, wanted = case.block_size, []
    for row, (query_len, length) in enumerate(case.requests):
        for position in range(0 if case.attention == "cross" else length - query_len, length):
            block = int(inputs.block_table[row, position // size])
            wanted.append(block * size + position % size)
    assert inputs.slot_mapping[: len(wanted)].tolist() == wanted
    assert inputs.slot_mapping[len(wanted) :].tolist() == [-1] * case.pad_tokens
    if not case.shared_prefix:
        assert len(set(wanted)) == len(wanted)


# Poison.


def _roles(inputs: AttnInputs) -> dict[str, torch.Tensor]:
    """By role, the slots of the cache that have it, as [num_blocks, block_size] masks.

    context: keys written before this batch. new: those the batch writes. tail: in a request's
    last block, past its last key. The rest is nobody's.
    """
    case = inputs.case
    shape = (inputs.cache.shape[0], case.block_size)
    roles = {role: torch.zeros(shape, dtype=torch.bool) for role in ("context", "new", "tail")}
    for row, (query_len, length) in enumerate(case.requests):
        written = length if case.kv_sharing else length - query_len
        if case.attention in ("encoder", "cross"):
            written = 0
        for at in range(_freed(case, row), _blocks(case, row)):
            for offset in range(case.block_size):
                position = at * case.block_size + offset
                role = "context" if position < written else "new" if position < length else "tail"
                roles[role][int(inputs.block_table[row, at]), offset] = True
    return roles


def _slots(inputs: AttnInputs, mask: torch.Tensor) -> torch.Tensor:
    """[slots, num_kv_heads, 2 * head_size] float32: what the cache holds in them."""
    return inputs.cache.transpose(1, 2)[mask].float()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("poison", Poison)
def test_poison_is_where_it_says(name: str, poison: Poison) -> None:
    case = _case(name)
    inputs = build_inputs(case, poison=poison)
    roles = _roles(inputs)
    assert torch.isfinite(_slots(inputs, roles["context"])).all()
    assert _slots(inputs, roles["new"]).isnan().all()
    tails = _slots(inputs, roles["tail"])
    if poison is Poison.STRICT:
        assert tails.isnan().all()
    else:
        # The largest there is, as the cache's dtype holds it.
        kind = case.dtype if case.kv_dtype == "auto" else case.kv_dtype
        assert (tails == torch.tensor(HUGE[kind]).to(inputs.cache.dtype).float()).all()
    nobodys = ~(roles["context"] | roles["new"] | roles["tail"])
    assert nobodys[NULL_BLOCK].all()
    assert nobodys[-SPARE_BLOCKS:].all()
    assert _slots(inputs, nobodys).isnan().all()


@pytest.mark.parametrize("name", CASES)
def test_all_of_the_storage_outside_the_cache_is_nan(name: str) -> None:
    """The other layer and the guard blocks: overwrite the cache by zeros, and the rest is NaN."""
    inputs = build_inputs(_case(name))
    cache, storage = inputs.new_cache()
    cache.copy_(torch.zeros(cache.shape).to(cache.dtype))
    outside = storage.float().isnan()
    assert int(outside.sum()) == storage.numel() - cache.numel()
    assert not (~outside & (storage.float() != 0)).any()


@pytest.mark.parametrize("name", CASES)
def test_some_tail_and_some_context_exist(name: str) -> None:
    """Poison that is nowhere tells nothing; blocks of one slot have no tail, prompts no context."""
    roles = _roles(build_inputs(_case(name)))
    if name != "block1":
        assert roles["tail"].any()
    if name not in ("prefill", "encoder", "cross"):
        assert roles["context"].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_poison_is_finite_in_its_dtype(dtype: str) -> None:
    assert torch.tensor(HUGE[dtype]).to(TORCH_DTYPES[dtype]).isfinite()


# The reference's answer to them.

FEATURES: tuple[dict[str, Any], ...] = (
    {},
    {"sliding_window": 17, "dtype": "bf16"},
    {"softcap": 30.0, "logits": "extreme"},
    {"alibi": True, "sinks": True, "kv_dtype": "fp8_e4m3"},
)


def _broad() -> list[AttnCase]:
    """Every scenario but the longest with each of these, and the cases above."""
    cases = list(CASES.values())
    for scenario in SCENARIOS:
        kind = scenario.partition("_")[0]
        attention = kind if kind in ("encoder", "cross") else "decoder"
        if "32k" in scenario:
            continue
        for fields in FEATURES:
            plain = AttnCase(scenario=scenario, attention=attention, num_heads=4, head_size=16)
            if attention == "cross":
                fields = {**fields, "sliding_window": None, "alibi": False}
            cases.append(plain.replace(**fields))
    return cases


@pytest.mark.parametrize("sample", _broad(), ids=lambda case: case.id)
def test_the_reference_reads_no_poison(sample: AttnCase) -> None:
    """All is finite, though what is not read is NaN, and no budget is 0."""
    truth = expected(build_inputs(sample, poison=Poison.STRICT))
    for tensor in (truth.output, truth.budget, truth.lse, truth.lse_budget):
        assert torch.isfinite(tensor).all()
    assert (truth.budget > 0).all()
    assert (truth.lse_budget > 0).all()


@pytest.mark.parametrize("name", CASES)
def test_the_batch_writes_its_new_slots_and_no_other(name: str) -> None:
    case = _case(name)
    inputs = build_inputs(case)
    cache, storage = written_cache(inputs)
    changed = (_raw(storage) != _raw(inputs.storage)).view(storage.numel(), -1).any(dim=1)
    where = torch.zeros_like(storage, dtype=torch.bool).logical_or(changed)
    view = where.as_strided(cache.shape, cache.stride(), cache.storage_offset())
    new = _roles(inputs)["new"] & (case.attention != "encoder")
    assert torch.equal(view.transpose(1, 2).flatten(2).any(dim=2), new)
    assert int(where.sum()) == int(view.sum())
