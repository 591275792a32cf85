"""Which modules are mutated, what runs them, and what of them is left as it is."""

import functools
import hashlib
import tomllib
from dataclasses import dataclass
from pathlib import Path

from tests.museum.mutate import Mutant, MutantError, Without, mutants_of

EQUIVALENT = Path(__file__).parent / "equivalent.toml"


@dataclass(frozen=True)
class Lane:
    """A candidate as --candidate names it, and XFV1_OPS for it. interpreted: slow."""

    candidate: str
    ops: str = ""
    interpreted: bool = False

    @property
    def name(self) -> str:
        return self.ops or self.candidate


TORCH = Lane("xfv1", "torch")
OWN = Lane("xfv1", "triton", interpreted=True)
SPLITK = Lane("xfv1", "xformers_splitk,triton", interpreted=True)
GATHERED = Lane("tests.museum.twins:Gathered")
LOWPREC = Lane("tests.museum.twins:Lowprec")


@dataclass(frozen=True)
class Target:
    """A module to change. lanes: what runs it. tests: asked where the lanes notice nothing, as
    pytest takes them. one_in: of its mutants every so many-th is run, by its id's hash."""

    module: str
    lanes: tuple[Lane, ...]
    tests: tuple[str, ...] = ()
    one_in: int = 1


_DEBUG = "tests/backend/test_debug.py::test_what_is_wrong_is_named_before_an_op_runs"
_COMPAT = (
    "tests/backend/test_version.py",
    "tests/backend/test_write_kv.py",
    "tests/backend/test_impl.py",
)
_METADATA = ("tests/backend/test_phases.py", "tests/backend/test_metadata.py", _DEBUG)
_DISPATCH = "tests/backend/test_dispatch.py"
_IMPL = "tests/backend/test_impl.py"
_LSE = (
    "tests/backend/test_lse.py -k no_key",
    "tests/backend/test_lse.py::test_lse_is_the_references"
    "[edge_decode-h8kv2-gqa-head64-block16-fp16]",
)
_SPLITS = tuple(
    f"tests/backend/test_splits.py::{test}"
    for test in (
        "test_any_number_of_splits_gives_the_references_answer",
        "test_more_splits_than_are_merged_at_a_time",
    )
)
_FLOAT8 = "tests/backend/test_other_cards.py::test_every_float8_is_decoded_exactly"
_DEVICE_CODE, _LAUNCH = "xfv1.kernels.paged.device", "xfv1.kernels.paged.launch"
_GATHER = "xfv1.ops.xformers.gather"
TARGETS = (
    Target("xfv1.builder", (TORCH, GATHERED), _METADATA, one_in=6),
    Target("xfv1.step", (TORCH, GATHERED), _METADATA, one_in=6),
    Target("xfv1.phase", (TORCH, GATHERED), _METADATA, one_in=6),
    Target("xfv1.impl", (TORCH, GATHERED), (_IMPL, _DISPATCH, _DEBUG), one_in=8),
    Target("xfv1.dispatch", (TORCH,), (_DISPATCH,), one_in=6),
    Target("xfv1.support", (TORCH,), (_DISPATCH, _IMPL), one_in=6),
    Target("xfv1.rules", (TORCH,), (_DISPATCH,), one_in=6),
    Target("xfv1.device", (TORCH,), ("tests/cards/test_device.py",), one_in=3),
    Target("xfv1.compat", (TORCH,), _COMPAT, one_in=3),
    Target("xfv1.cache", (TORCH,), _COMPAT, one_in=3),
    Target("xfv1.ops.torch_cpu", (TORCH,), _LSE, one_in=8),
    Target("xfv1.ops.triton_paged", (OWN,), _LSE, one_in=2),
    Target(_DEVICE_CODE, (OWN,), (*_LSE, *_SPLITS, _FLOAT8), one_in=12),
    Target(_LAUNCH, (OWN,), (*_LSE, *_SPLITS, _FLOAT8), one_in=12),
    Target("xfv1.kernels.paged.tiling", (TORCH,), ("tests/cards/test_tilings.py",), one_in=16),
    Target("xfv1.ops.xformers.splitk", (SPLITK,)),
    Target("xfv1.ops.xformers.base", (GATHERED, SPLITK), (_IMPL, _LSE[1]), one_in=8),
    Target(_GATHER, (GATHERED,), ("tests/backend/test_gather.py",), one_in=4),
    Target("reference.lowprec", (LOWPREC,), ("tests/oracle/test_lowprec.py",), one_in=2),
)
_GPU = "a GPU's, or another vLLM's"
_TILING = "how the work is cut decides how fast it is, and no answer"
# vLLM's merge of ranks is Triton's, and asks for another vLLM than the CPU's: its tests
# (tests/backend/test_context_parallel.py) start a process, which no mutant reaches.
_RANKS = "for context parallelism, whose tests run in a process of their own"
_INVARIANT = "for batch invariance, whose tests run in a process of their own"
WITHOUT = (
    Without("xfv1.builder", "XFormersMetadataBuilder._parts", _RANKS),
    Without("xfv1.builder", "XFormersMetadataBuilder._context_batch", _RANKS),
    Without("xfv1.builder", "XFormersMetadataBuilder.__init__", _RANKS, "self._lens = *"),
    Without("xfv1.builder", "XFormersMetadataBuilder.__init__", _RANKS, "self.dcp_world_size > *"),
    Without("xfv1.builder", "XFormersMetadataBuilder.build", _RANKS, "metadata.parts = *"),
    Without("xfv1.step", "XFormersMetadata.over", _RANKS, "*parts*"),
    # Only for a group of ranks is a phase that begins later given another table.
    Without("xfv1.phase", "Phase.over", _RANKS, "*self.first*"),
    Without("xfv1.phase", "Phase.requests", _RANKS, "first=self.first + first"),
    Without("xfv1.impl", "XFormersImpl._run_parts", _RANKS),
    Without("xfv1.impl", "XFormersImpl.__init__", _RANKS, "*sharded*"),
    Without("xfv1.impl", "XFormersImpl._uses", _RANKS, "*sharded*"),
    Without("xfv1.impl", "XFormersImpl._uses", _RANKS, "*'lse': True*"),
    Without("xfv1.impl", "XFormersImpl._refusals", _RANKS, "*support.parallel_reasons*"),
    Without("xfv1.impl", "XFormersImpl.forward", _RANKS, "*parts*"),
    Without("xfv1.impl", "XFormersImpl.do_kv_cache_update", _GPU, "*slot_mapping.numel()*"),
    Without("xfv1.compat", "context_group", _RANKS),
    Without("xfv1.compat", "shard_merge", _RANKS),
    # What lies past the sums is weighed by zero, and NaN there by luck.
    Without(_DEVICE_CODE, "_merge_kernel", "for a memory checker", "tl.load(sum_ptr + *"),
    # Several tiles of keys right of those that all rows see: only a prefill of many rows has them.
    Without(
        _DEVICE_CODE,
        "_attention_kernel",
        "for prefills larger than the interpreter's, which the gpu tier asks of a GPU",
        "*tl.where(i + 1 < full_begin, *",
    ),
    Without(_LAUNCH, "paged_attention", _INVARIANT, "*num_splits = (False, 1)"),
    Without("xfv1.compat", "check_version", "what is logged"),
    Without("xfv1.compat", "log_once", "what is logged"),
    Without("xfv1.compat", "warn_once", "what is logged"),
    Without("xfv1.compat", "device_kind", _GPU),
    Without("xfv1.cache", "fp8_dtype", _GPU),
    Without("xfv1.compat", "stride_order", _GPU),
    Without("xfv1.cache", "write_kv", _GPU, "raw = *"),
    Without("xfv1.cache", "write_kv", _GPU, "_custom_ops.*"),
    Without("xfv1.cache", "write_kv", _GPU, "return"),
    Without("xfv1.cache", "write_kv", _GPU, "*WARP*"),
    Without("xfv1.cache", "write_kv", _GPU, "*key.shape[[]1]*"),
    *(
        Without("xfv1.support", name, "any batch of its kind would do", part)
        for name in ("typical_batches", "survey")
        for part in ("num_reqs=*", "max_query_len=*", "max_seq_len=*")
    ),
    *(
        Without(_LAUNCH, "paged_attention", _TILING, f"{name} = *")
        for name in ("decode", "config", "choose", "num_keys")
    ),
    Without(_LAUNCH, "paged_attention", _TILING, "num_splits = _num_splits*"),
    Without(_LAUNCH, "_num_splits", _TILING),
    Without(_LAUNCH, "paged_attention", _TILING, "num_warps=4"),
    Without(_LAUNCH, "paged_attention", _TILING, "BLOCK_S=16"),
)


@functools.cache
def generated(target: Target) -> list[Mutant]:
    """All of a module's, but what is not changed; those that are run with their source."""
    return mutants_of(target.module, WITHOUT, lambda name: digest(name) % target.one_in == 0)


def chosen(target: Target) -> list[Mutant]:
    """The mutants of a module that are run."""
    return [mutant for mutant in generated(target) if mutant.source]


def digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def explained() -> dict[str, str]:
    """By id of a mutant, why no answer changes."""
    reasons = {}
    for entry in tomllib.loads(EQUIVALENT.read_text()).get("equivalent", []):
        if set(entry) != {"reason", "ids"} or not entry["reason"] or not entry["ids"]:
            raise MutantError(f"{EQUIVALENT.name}: {entry}: expected a reason and ids")
        for name in entry["ids"]:
            if name in reasons:
                raise MutantError(f"{EQUIVALENT.name}: {name} is there twice")
            reasons[name] = entry["reason"]
    return reasons
