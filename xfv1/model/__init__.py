"""A model's attention layers, read from its config.json as vLLM will make them.

`read` asks vLLM: `xfv1.model.build` makes vLLM's own class of the model on PyTorch's meta device,
in a process of its own, and looks at each attention layer. No weights are needed. Where vLLM
cannot be imported, `xfv1.model.fields` reads the config's fields, of few model types.

This package needs the standard library alone, but for `xfv1.model.build`.
"""

from xfv1.model.facts import LayerKind, Model, ModelError, NotAsked, spans
from xfv1.model.reader import Reader, read

__all__ = ["LayerKind", "Model", "ModelError", "NotAsked", "Reader", "read", "spans"]
