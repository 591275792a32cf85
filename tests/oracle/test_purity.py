"""Who imports whom, who changes what, and what an error says."""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from reference import attend, gather_kv, paged_attention, visible, write_kv

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = sorted((ROOT / "reference").rglob("*.py"))
FIXTURES = sorted((ROOT / "fixtures").rglob("*.py"))
XFV1 = sorted((ROOT / "xfv1").rglob("*.py"))
PLAIN = ROOT / "tests" / "museum" / "plain.py"


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _imports(path: Path) -> Iterator[str]:
    """Top-level packages that a file imports anywhere in it; "." for a relative import."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else (node.module or "").partition(".")[0]


def test_there_are_files_to_look_at() -> None:
    assert REFERENCE
    assert FIXTURES
    assert XFV1


@pytest.mark.parametrize("path", REFERENCE, ids=_name)
def test_the_reference_imports_torch_and_the_standard_library_alone(path: Path) -> None:
    assert set(_imports(path)) <= {"torch", "reference", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", XFV1, ids=_name)
def test_the_backend_imports_nothing_of_the_suite(path: Path) -> None:
    assert not set(_imports(path)) & {"reference", "fixtures", "tests"}


def test_the_plain_backend_imports_neither_the_reference_nor_xfv1() -> None:
    assert set(_imports(PLAIN)) <= {"torch", "vllm", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", FIXTURES, ids=_name)
def test_fixtures_import_no_backend(path: Path) -> None:
    assert not set(_imports(path)) & {"xfv1", "vllm", "xformers", "tests"}


@pytest.mark.parametrize("path", FIXTURES, ids=_name)
def test_fixtures_assert_nothing(path: Path) -> None:
    """Except `assert x is not None` and `assert isinstance(x, T)`, which narrow a type."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assert):
            assert re.match(r".* is not None$|isinstance\(", ast.unparse(node.test)), (
                f"{_name(path)}:{node.lineno}: {ast.unparse(node)}"
            )


# Nothing is changed. Tensors are compared as bytes: NaN must stay the NaN it was.

NAN = float("nan")


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(torch.uint8).flatten().tolist())


def _batch() -> dict[str, torch.Tensor]:
    """A chunk of 3 of 7 keys, 2 of blocks 4 in use, NaN wherever a window of 2 does not look."""
    rng = torch.Generator().manual_seed(0)
    cache = torch.randn(4, 4, 2, 8, generator=rng, dtype=torch.float32)
    cache[0], cache[3], cache[1, 3] = NAN, NAN, NAN
    cache[2, :2] = NAN
    return {
        "query": torch.randn(4, 4, 8, generator=rng),
        "key_cache": cache,
        "value_cache": cache.clone(),
        "block_table": torch.tensor([[2, 1, 99]], dtype=torch.int32),
        "seq_lens": torch.tensor([7], dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 3], dtype=torch.int32),
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625]),
        "sinks": torch.tensor([0.0, 1.0, 2.0, 3.0]),
    }


def test_paged_attention_changes_no_input() -> None:
    batch = _batch()
    before = {name: _bytes(tensor) for name, tensor in batch.items()}
    output, lse = paged_attention(**batch, scale=0.3, sliding_window=2, softcap=1.0)  # type: ignore[arg-type]
    assert torch.isfinite(output).all()
    assert torch.isfinite(lse[:3]).all()
    assert {name: _bytes(tensor) for name, tensor in batch.items()} == before


def test_attend_changes_no_input() -> None:
    """float64 in, so that a conversion makes no copy by chance."""
    rng = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, h, 8, generator=rng).double() for n, h in ((3, 4), (7, 2), (7, 2))]
    tensors[1][:3], tensors[2][:3] = NAN, NAN
    per_head = [torch.tensor([0.5, 0.25, 0.125, 0.0625]).double(), torch.zeros(4).double()]
    before = [_bytes(tensor) for tensor in (*tensors, *per_head)]
    result = attend(
        *tensors,
        scale=0.3,
        sliding_window=2,
        softcap=1.0,
        alibi_slopes=per_head[0],
        sinks=per_head[1],
    )
    assert torch.isfinite(result.output).all()
    assert [_bytes(tensor) for tensor in (*tensors, *per_head)] == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_write_kv_changes_its_slots_alone(dtype: torch.dtype) -> None:
    key = torch.ones(3, 2, 8)
    slots = torch.tensor([5, -1, 8])
    caches = (torch.full((4, 4, 2, 8), NAN).to(dtype), torch.full((4, 4, 2, 8), NAN).to(dtype))
    before = [[_bytes(slot) for slot in cache.flatten(0, 1)] for cache in caches]
    inputs = [_bytes(key), _bytes(slots)]
    write_kv(key, key, caches[0], caches[1], slots, k_scale=0.5, v_scale=0.25)
    assert [_bytes(key), _bytes(slots)] == inputs
    for cache, was in zip(caches, before, strict=True):
        now = [_bytes(slot) for slot in cache.flatten(0, 1)]
        assert [at for at in range(16) if now[at] != was[at]] == [5, 8]


def test_attended_is_not_a_view_of_an_input() -> None:
    query, key = torch.ones(1, 1, 4).double(), torch.ones(1, 1, 4).double()
    result = attend(query, key, key, scale=1.0)
    storages = {tensor.untyped_storage().data_ptr() for tensor in (query, key)}
    assert not storages & {tensor.untyped_storage().data_ptr() for tensor in result}


# Errors name the argument, what it is and what is accepted.


def _attend(**changes: Any) -> None:
    tensors = {"query": (2, 4, 8), "key": (3, 2, 8), "value": (3, 2, 8)} | {
        name: changes.pop(name) for name in ("query", "key", "value") if name in changes
    }
    query, key, value = (torch.zeros(tensors[name]) for name in ("query", "key", "value"))
    attend(query, key, value, scale=1.0, **changes)


def _paged(**changes: Any) -> None:
    paged_attention(**(_batch() | changes), scale=1.0)


def _write(slot: int) -> None:
    key, cache = torch.zeros(1, 1, 4), torch.zeros(2, 4, 1, 4)
    write_kv(key, key, cache, cache, torch.tensor([slot]))


def _positions(count: int) -> torch.Tensor:
    return torch.arange(count)


ERRORS: list[tuple[str, Callable[[], Any], str]] = [
    (
        "visible",
        lambda: visible(_positions(2), _positions(2), sliding_window=0),
        r"sliding_window=0: expected None or at least 1",
    ),
    ("attend", lambda: _attend(sliding_window=-1), r"sliding_window=-1: expected None or at least"),
    (
        "attend",
        lambda: _attend(query=(2, 3, 8)),
        r"num_heads=3: expected a multiple of num_kv_heads=2",
    ),
    (
        "attend",
        lambda: _attend(key=(3, 2, 9)),
        r"key of shape \(3, 2, 9\) and value of shape \(3, 2, 8\) do not fit query of shape"
        r" \(2, 4, 8\)",
    ),
    ("attend", lambda: _attend(value=(4, 2, 8)), r"value of shape \(4, 2, 8\) do not fit"),
    ("attend", lambda: _attend(softcap=0.0), r"softcap=0.0: expected None or above 0"),
    (
        "attend",
        lambda: _attend(alibi_slopes=torch.zeros(2)),
        r"alibi_slopes of shape \(2,\): expected \(4,\)",
    ),
    (
        "attend",
        lambda: _attend(sinks=torch.zeros(4, 1)),
        r"sinks of shape \(4, 1\): expected \(4,\)",
    ),
    (
        "gather_kv",
        lambda: gather_kv(torch.zeros(4, 2, 1, 1), torch.tensor([0]), 3),
        r"block_table row of 1 blocks of 2: expected at least 2 for a length of 3",
    ),
    (
        "gather_kv",
        lambda: gather_kv(torch.zeros(4, 2, 1, 1), torch.tensor([0, 4]), 3),
        r"block_table row \[0, 4\]: expected ids below 4",
    ),
    (
        "gather_kv",
        lambda: gather_kv(torch.zeros(4, 2, 1, 1), torch.tensor([-1, 0]), 3),
        r"block_table row \[-1, 0\]: expected ids below 4",
    ),
    (
        "paged_attention",
        lambda: _paged(query_start_loc=torch.tensor([0, 1, 3])),
        r"query_start_loc of 3 entries: expected 2",
    ),
    (
        "paged_attention",
        lambda: _paged(block_table=torch.zeros(0, 3, dtype=torch.int32)),
        r"block_table of 0 rows: expected 1",
    ),
    ("write_kv", lambda: _write(8), r"slot_mapping holds 8: expected below 8"),
]


@pytest.mark.parametrize(
    ("call", "message"),
    [pytest.param(*row, id=f"{name}-{at}") for at, (name, *row) in enumerate(ERRORS)],
)
def test_an_error_names_the_argument(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_every_error_is_tried() -> None:
    """Each `raise` in reference/ is reached by a call above, by its line."""
    raises = {
        (path.name, node.lineno)
        for path in REFERENCE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise)
    }
    reached = set()
    for _, call, message in ERRORS:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        entry = caught.traceback[-1]
        reached.add((Path(entry.path).name, entry.lineno + 1))
    assert reached == raises


def test_the_last_slot_is_inside() -> None:
    _write(7)
