"""Which models of Transformers does `xfv1.model` read, and does it read any wrongly?

    python -m tests.programs.read_models --json docs/results/models.json

Every config class of Transformers that can be made without arguments is tried, once for each of
its models' classes that vLLM has, or had. Each read layer kind is compared with the fields of the
Transformers config (`expected`), which vLLM's model does not go through: heads, KV heads, head
size, window, softcap and scale, as far as the config names them. About 15 minutes of one core.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.harness.environment import prepare
from tests.harness.output import save, say
from tests.harness.provenance import environment
from xfv1.model import LayerKind, Model, ModelError, Reader

READ, REFUSED, NOT_ASKED, NO_CONFIG, LATE = (
    "read",
    "refused",
    "not asked",
    "no default config",
    "late",
)
OUTCOMES = (READ, REFUSED, NOT_ASKED, NO_CONFIG, LATE)
# The names that Transformers, and vLLM, give to models that generate or pool.
MAPPINGS = "MODEL_*_MAPPING_NAMES"
# Fields by which a config names a fact, the first that is there counts.
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
HEAD_SIZE = ("head_dim", "kv_channels", "attention_head_dim", "d_kv")
WIDTH = ("hidden_size", "n_embd", "d_model", "embed_dim")


# Facts that vLLM's model makes of a config otherwise than the config's field says, by the type of
# the text model, and why.
COHERE = "vLLM gives a windowed layer sliding_window + 1 keys (commandr.py)"
BESIDE = "the config counts the keys on one side of the query, vLLM also the query's own"
EXPLAINED = {
    ("cohere2", "windows"): COHERE,
    ("cohere2_moe", "windows"): COHERE,
    ("modernbert", "windows"): BESIDE,
    ("openai_privacy_filter", "windows"): BESIDE,
}


@dataclass(frozen=True)
class Expected:
    """The layers of the text model as a Transformers config states them; None where it does not.

    windows: how many layers have each window, None for all keys.
    """

    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_size: int | None = None
    windows: dict[int | None, int] | None = None
    softcap: float | None = None
    scale: float | None = None


@dataclass
class Row:
    """One config and class.

    compared: the facts that the config names. wrong: the facts that were read otherwise.
    explained: those of them that vLLM itself makes otherwise (`EXPLAINED`).
    """

    model_type: str
    architecture: str
    outcome: str
    reason: str = ""
    kinds: list[str] = field(default_factory=list)
    not_asked: list[str] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    explained: list[str] = field(default_factory=list)


def default_configs() -> Iterator[tuple[str, Any, str]]:
    """Each model type of Transformers with its default config, or None and why there is none."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for model_type in sorted(CONFIG_MAPPING):
        try:
            yield model_type, CONFIG_MAPPING[model_type](), ""
        except Exception as error:
            yield model_type, None, " ".join(f"{type(error).__name__}: {error}".split())


def classes(model_type: str) -> list[str]:
    """The names of Transformers' classes for a model type that vLLM has, or had, under the name."""
    from transformers.models.auto import modeling_auto
    from vllm.model_executor.models import registry

    known = {*registry._VLLM_MODELS, *registry._PREVIOUSLY_SUPPORTED_MODELS}
    found: dict[str, None] = {}
    for name, mapping in vars(modeling_auto).items():
        if Path(name).match(MAPPINGS) and model_type in mapping:
            names = mapping[model_type]
            found |= dict.fromkeys([names] if isinstance(names, str) else names)
    return sorted(known & found.keys())


def expected(config: Any) -> Expected:
    """The values of a Transformers config's fields."""
    text = config.get_text_config(decoder=True)
    heads, width = _first(text, HEADS), _first(text, WIDTH)
    size = _first(text, HEAD_SIZE)
    if "head_dim" in _per_layer(text):
        size = None
    elif _field(text, "qk_nope_head_dim") and _field(text, "qk_rope_head_dim"):
        # Multi-head latent attention, which vLLM serves as multi-head attention in MiniCPM 3.
        size = text.qk_nope_head_dim + text.qk_rope_head_dim
    elif size is None and heads and width:
        size = width // heads
    kv_heads = _first(text, KV_HEADS)
    if _field(text, "multi_query") and not _field(text, "new_decoder_architecture"):
        kv_heads = 1
    scalar = _field(text, "query_pre_attn_scalar")
    return Expected(
        num_heads=heads,
        num_kv_heads=kv_heads if kv_heads is not None else heads,
        head_size=size,
        windows=_windows(text),
        softcap=_field(text, "attn_logit_softcapping"),
        scale=scalar**-0.5 if scalar else _field(text, "attention_multiplier"),
    )


def _field(config: Any, name: str) -> Any:
    """A field's value; None where there is none, or where it differs from layer to layer."""
    return None if name in _per_layer(config) else getattr(config, name, None)


def _per_layer(config: Any) -> frozenset[str]:
    """The fields that differ from layer to layer."""
    spec = vars(config).get("_heterogeneity_spec")
    return frozenset(spec.per_layer_attributes if spec else ())


def _windows(text: Any) -> dict[int | None, int] | None:
    """How many layers have each window; None where `layer_types` names other kinds of layers."""
    layers, window = _field(text, "num_hidden_layers"), _field(text, "sliding_window")
    types = _field(text, "layer_types")
    if types is None:
        types = ["sliding_attention" if window else "full_attention"] * (layers or 0)
    if not types or set(types) - {"sliding_attention", "full_attention"}:
        return None
    if _field(text, "use_sliding_window") is False:
        window = None
    return dict(Counter(window if kind == "sliding_attention" else None for kind in types))


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    values = (_field(config, name) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def compare(model: Model, want: Expected) -> tuple[list[str], dict[str, str]]:
    """The facts that a config names, and how the read ones differ from them, by fact."""
    own = [kind for kind in model.kinds if kind.attention == "decoder"] or list(model.kinds)
    compared: list[str] = []
    differ: dict[str, str] = {}
    for name in ("num_heads", "num_kv_heads", "head_size", "softcap", "scale"):
        value = getattr(want, name)
        if value is None:
            continue
        compared.append(name)
        found = {getattr(kind, name) for kind in own}
        if any(abs((one or 0) - value) > 1e-6 * abs(value) for one in found):
            differ[name] = f"{name}: read {_listed(found)}, the config says {value!r}"
    # The text model's layers that no backend of this kind is asked for have a window, or none.
    others = [layers for layers in model.not_asked if "encoder" not in layers.reason]
    if want.windows is not None and not others:
        compared.append("windows")
        read = _counted(own)
        if read != want.windows:
            differ["windows"] = f"windows: read {read}, the config says {want.windows}"
    return compared, differ


def _counted(kinds: list[LayerKind]) -> dict[int | None, int]:
    counts: Counter[int | None] = Counter()
    for kind in kinds:
        counts[kind.sliding_window] += len(kind.layers)
    return dict(counts)


def _listed(values: set[Any]) -> str:
    return ", ".join(sorted(map(repr, values)))


def try_one(reader: Reader, model_type: str, architecture: str, config: Any) -> Row:
    """Read one config as a model of one class."""
    row = Row(model_type, architecture, REFUSED)
    with tempfile.TemporaryDirectory() as folder:
        values = {**config.to_dict(), "architectures": [architecture]}
        Path(folder, "config.json").write_text(json.dumps(values, default=str))
        try:
            model = reader.read(folder)
        except ModelError as error:
            row.reason = str(error).replace(folder, "MODEL")
            row.outcome = LATE if "took more than" in row.reason else REFUSED
            return row
    row.kinds = [str(kind) for kind in model.kinds]
    row.not_asked = [str(layers) for layers in model.not_asked]
    row.outcome = READ if model.kinds else NOT_ASKED
    if model.kinds:
        row.compared, differ = compare(model, expected(config))
        text_type = config.get_text_config(decoder=True).model_type
        for fact, text in differ.items():
            if why := EXPLAINED.get((text_type, fact)):
                row.explained.append(f"{text}: {why}")
            else:
                row.wrong.append(text)
    return row


def rows(only: list[str]) -> Iterator[Row]:
    """A row for each default config and class; `only` names model types, none: all."""
    with Reader() as reader:
        for model_type, config, reason in default_configs():
            if only and model_type not in only:
                continue
            for architecture in classes(model_type):
                if config is None:
                    yield Row(model_type, architecture, NO_CONFIG, reason)
                else:
                    yield try_one(reader, model_type, architecture, config)


def _model_types(found: list[Row]) -> dict[str, int]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    tried = {row.model_type for row in found}
    return {"of Transformers": len(CONFIG_MAPPING.keys()), "with a class in vLLM": len(tried)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--only", nargs="*", default=[], help="model types; none: all")
    args = parser.parse_args()
    prepare()
    found = []
    for row in rows(args.only):
        say(f"{row.model_type} {row.architecture}: {row.outcome} {row.reason}")
        for line in [*row.kinds, *row.not_asked, *(f"WRONG {wrong}" for wrong in row.wrong)]:
            say(f"    {line}")
        found.append(row)
    counts = Counter(row.outcome for row in found)
    result = {
        "environment": environment(),
        "model_types": _model_types(found),
        "counts": {name: counts[name] for name in OUTCOMES},
        "wrong": sum(bool(row.wrong) for row in found),
        "rows": [vars(row) for row in found],
    }
    say(json.dumps({"counts": result["counts"], "wrong": result["wrong"]}))
    if args.json:
        save(args.json, result)


if __name__ == "__main__":
    main()
