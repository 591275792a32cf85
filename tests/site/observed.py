"""A vLLM worker's report on its attention layers, from the process that runs them.

vLLM adds `Worker`'s methods to its own worker (`worker_extension_cls`), wherever that runs. The
module imports nothing of the checkout: a server finds it in a folder on its PYTHONPATH.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

CALLS: Counter[str] = Counter()


class Worker:
    """Methods for `collective_rpc`."""

    vllm_config: Any

    def count_ops(self) -> dict[str, int]:
        """From now on, count the calls of xfv1's ops. Returns an empty count."""
        from xfv1.dispatch import OPS

        CALLS.clear()
        for name, op in OPS.items():
            # Once: a second request to count starts from zero.
            if not hasattr(op.run, "counted"):
                setattr(op, "run", _counting(name, op.run))  # noqa: B010
        return dict(CALLS)

    def jitter(self, units: float) -> None:
        """From now on, move each attention output at random, by up to so many units in its last
        place, as another right answer may be. A captured graph repeats one move."""
        import torch

        for layer in self._layers():
            forward = layer.impl.forward

            def moved(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
                output = forward(*args, **kwargs)
                random = 2 * torch.rand(output.shape, device=output.device) - 1
                return output.mul_(1 + units * torch.finfo(output.dtype).eps * random)

            layer.impl.forward = moved

    def attention(self) -> dict[str, Any]:
        """This process, the classes of its attention layers, and the counted calls of ops.

        calls: by "op phase". file: the xfv1 that was imported, or None.
        """
        layers = self._layers()
        xfv1 = sys.modules.get("xfv1")
        return {
            "pid": os.getpid(),
            "file": getattr(xfv1, "__file__", None),
            "impls": [_path(type(layer.impl)) for layer in layers],
            "backends": [_path(layer.get_attn_backend()) for layer in layers],
            "calls": dict(CALLS),
        }

    def _layers(self) -> list[Any]:
        from vllm.model_executor.layers.attention import Attention

        context = self.vllm_config.compilation_config.static_forward_context
        return [layer for layer in context.values() if isinstance(layer, Attention)]


def _counting(name: str, run: Callable[[Any], None]) -> Callable[[Any], None]:
    def call(call: Any) -> None:
        run(call)
        CALLS[f"{name} {call.batch.kind}"] += 1

    call.counted = True  # type: ignore[attr-defined]
    return call


def _path(kind: type[Any]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
