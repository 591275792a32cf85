"""Facts about a model's attention layers: plain data, which JSON can carry."""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

ATTENTION = ("decoder", "encoder", "cross")


class ModelError(ValueError):
    """A model cannot be read. The message is one line: the path, and the reason."""


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """Attention layers of a model that are alike, as one tensor parallel rank has them.

    layers: the index of each such layer.
    attention: decoder (causal), encoder (bidirectional, no KV cache) or cross.
    num_heads, num_kv_heads: heads of the rank.
    head_size: elements of a head.
    scale: the factor of the attention logits.
    sliding_window: keys that a query sees, its own included. None: all.
    softcap: the cap of the attention logits, or None.
    alibi, alibi_sqrt, sinks: whether the layers have ALiBi slopes, their square root form, and a
        sink logit for each head.
    kv_sharing: the layers read another layer's KV cache, and write none.
    kv_cache_dtype: vLLM's name for what the KV cache stores. "auto": the model's dtype.
    """

    layers: tuple[int, ...]
    attention: str = "decoder"
    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    alibi: bool = False
    alibi_sqrt: bool = False
    sinks: bool = False
    kv_sharing: bool = False
    kv_cache_dtype: str = "auto"

    @property
    def name(self) -> str:
        """The kind in words: its features, its query and KV heads, and how many layers it has."""
        words = [
            (self.attention != "decoder", f"{self.attention} attention"),
            (self.sliding_window is not None, f"sliding window {self.sliding_window}"),
            (self.softcap is not None, f"softcap {self.softcap:g}" if self.softcap else ""),
            (self.alibi, "ALiBi (square root form)" if self.alibi_sqrt else "ALiBi"),
            (self.sinks, "sinks"),
            (self.kv_sharing, "another layer's KV cache"),
            (self.kv_cache_dtype != "auto", f"{self.kv_cache_dtype} KV cache"),
            (self.scale != self.head_size**-0.5, f"scale {self.scale:g}"),
        ]
        features = ", ".join(word for present, word in words if present) or "full attention"
        heads = f"{self.num_heads}/{self.num_kv_heads} heads of {self.head_size}"
        return f"{features}, {heads} ({_counted(self.layers)})"

    def __str__(self) -> str:
        return f"{self.name}: {spans(self.layers)}"


@dataclass(frozen=True, kw_only=True)
class NotAsked:
    """Layers that no backend of this kind is asked to serve.

    layer: the name of vLLM's class. reason: what these layers are. layers: as in `LayerKind`.
    """

    layer: str
    reason: str
    layers: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.layer} ({_counted(self.layers)}): {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model's attention layers.

    reader: who read them: vLLM and its version, or the fields of the config.
    architecture: the name of the model's class.
    dtype: the dtype of the model's activations, as torch names it.
    kinds: the distinct kinds of layers, in the order of their first layers.
    refused: why xfv1 serves no layer of this model, if that is so.
    """

    reader: str
    architecture: str
    dtype: str
    kinds: tuple[LayerKind, ...]
    not_asked: tuple[NotAsked, ...] = ()
    refused: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Model":
        """The model that `to_json` described."""
        kinds, not_asked = (
            tuple(made(**{**row, "layers": tuple(row["layers"])}) for row in values[name])
            for name, made in (("kinds", LayerKind), ("not_asked", NotAsked))
        )
        refused = tuple(values["refused"])
        return cls(**{**values, "kinds": kinds, "not_asked": not_asked, "refused": refused})


def spans(indices: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) as "0-2, 5"; with a constant step, (0, 2, 4) as "0, 2, ... 4"."""
    steps = {after - before for before, after in itertools.pairwise(indices)}
    if len(indices) > 3 and len(steps) == 1 and steps != {1} and min(steps) > 0:
        return f"{indices[0]}, {indices[1]}, ... {indices[-1]}"
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _counted(layers: tuple[int, ...]) -> str:
    return f"{len(layers)} layer{'s' if len(layers) != 1 else ''}"
