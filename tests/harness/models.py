"""The cases of a model that --hf-config names."""

from typing import Any

from fixtures.cases import AttnCase
from fixtures.cases.case import CaseError
from fixtures.cases.models import cases_of
from xfv1.model import LayerKind, Model, ModelError, NotAsked, Reader

# torch's names of dtypes, and vLLM's of KV caches, in the words of a case.
DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
KV_DTYPES = {
    "auto": "auto",
    "fp8": "fp8_e4m3",
    "fp8_e4m3": "fp8_e4m3",
    "fp8_e5m2": "fp8_e5m2",
}
BLOCK_SIZE = 16


def read_cases(paths: list[str], tensor_parallel_size: int) -> tuple[list[AttnCase], list[str]]:
    """The cases of some models, and lines that say what was read and what has no cases.

    Raises:
        ModelError: a config cannot be read, or gives no case.
    """
    cases: dict[str, AttnCase] = {}
    lines: list[str] = []
    with Reader() as reader:
        for path in paths:
            model = reader.read(path, tensor_parallel_size=tensor_parallel_size)
            found, not_asked = model_cases(model)
            lines += [f"{path}: {model.architecture}, {model.dtype}, read by {model.reader}"]
            lines += [f"  {kind}" for kind in model.kinds if kind in found]
            lines += [f"  not asked: {layers}" for layers in not_asked]
            if not found:
                reasons = "; ".join(map(str, not_asked)) or "it has no attention layer"
                raise ModelError(f"{path}: no layer to test: {reasons}")
            cases |= {case.id: case for own in found.values() for case in own}
    return list(cases.values()), lines


def model_cases(model: Model) -> tuple[dict[LayerKind, list[AttnCase]], list[NotAsked]]:
    """The cases of each kind of layer, and the layers that no case can describe."""
    found: dict[LayerKind, list[AttnCase]] = {}
    not_asked = list(model.not_asked)
    for kind in model.kinds:
        try:
            found[kind] = cases_of(case_fields(kind, model.dtype))
        except CaseError as error:
            no_case = NotAsked(layer="Attention", reason=str(error), layers=kind.layers)
            not_asked.append(no_case)
    return found, not_asked


def case_fields(kind: LayerKind, dtype: str) -> dict[str, Any]:
    """A kind of layer as fields of a case.

    Raises:
        CaseError: no case can say what the layer's KV cache stores.
    """
    stored = "auto" if kind.kv_cache_dtype == dtype else kind.kv_cache_dtype
    if stored not in KV_DTYPES or dtype not in DTYPES:
        accepted = ", ".join((*KV_DTYPES, "or the model's dtype"))
        raise CaseError(f"kv_cache_dtype={stored!r} of a {dtype} model: expected {accepted}")
    return {
        "num_heads": kind.num_heads,
        "num_kv_heads": kind.num_kv_heads,
        "head_size": kind.head_size,
        "block_size": BLOCK_SIZE,
        "dtype": DTYPES[dtype],
        "kv_dtype": KV_DTYPES[stored],
        "sliding_window": kind.sliding_window,
        "softcap": kind.softcap,
        "alibi": kind.alibi,
        "alibi_sqrt": kind.alibi_sqrt,
        "sinks": kind.sinks,
        "attention": kind.attention,
        "kv_sharing": kind.kv_sharing,
    }
