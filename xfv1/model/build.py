"""Read a model by building vLLM's own class of it, whose weights lie on PyTorch's meta device.

Import this in a process that does nothing else (`xfv1.model.serve`): `prepare` changes vLLM, and a
model leaves its configuration, its layers and its groups of ranks in vLLM's global variables.
Every attention layer is given `Backend` below, which accepts all that vLLM asks for and keeps it.
"""

import inspect
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder

from xfv1.model.facts import LayerKind, Model, NotAsked

# vLLM's attention types, and `LayerKind.attention`.
ATTENTION = {
    "decoder": "decoder",
    "encoder": "encoder",
    "encoder_only": "encoder",
    "encoder_decoder": "cross",
}


class Impl(AttentionImpl[Any]):
    """Keeps what vLLM asks an attention layer's implementation for."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Any = None,
        use_alibi_sqrt: bool = False,
        **others: Any,
    ) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = scale
        self.alibi_slopes = alibi_slopes
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        self.use_alibi_sqrt = use_alibi_sqrt
        self.others = others

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("a model on the meta device computes nothing")


class Builder(AttentionMetadataBuilder[Any]):
    def build(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("a model on the meta device computes nothing")


class Backend(AttentionBackend):
    """Accepts every layer."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        return Impl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder

    @classmethod
    def supports_alibi_sqrt(cls) -> bool:
        return True

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        return []


# These functions allocate memory, and write nothing to it.
UNINITIALIZED = (torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty)


class Uninitialized(TorchFunctionMode):
    """Within it, memory that nothing is written to lies on the meta device, and costs nothing.

    Weights are such memory. Tensors that begin with numbers, such as ALiBi's slopes, stay on the
    CPU, because some models look at these numbers.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in UNINITIALIZED:
            kwargs["device"] = "meta"
            kwargs.pop("pin_memory", None)
        return func(*args, **kwargs)


def prepare() -> str:
    """Make vLLM ready for `read`. Returns vLLM's version.

    vLLM then gives every attention layer `Backend`. It also looks at a model's class in this
    process, where it would start one for each class, which costs 10 s.
    """
    import vllm

    # Most models import what these do: it is then imported once.
    from vllm.engine import arg_utils  # noqa: F401
    from vllm.model_executor.model_loader import utils  # noqa: F401
    from vllm.model_executor.models import llama, registry  # noqa: F401
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    load_general_plugins()
    path = f"{Backend.__module__}.{Backend.__qualname__}"
    register_backend(AttentionBackendEnum.CUSTOM, path)
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, path)

    def inspect_here(model: Any) -> Any:
        try:
            return registry._ModelInfo.from_model_cls(model.load_model_cls())
        except Exception as error:
            _NOT_IMPORTED.append(error)
            raise

    registry._LazyRegisteredModel.inspect_model_cls = inspect_here
    return str(vllm.__version__)


# Why models' classes were not imported: vLLM writes that to its log alone.
_NOT_IMPORTED: list[Exception] = []


def read(folder: str, tensor_parallel_size: int, dtype: str) -> Model:
    """The attention layers of a model, which is built in this process.

    Raises:
        Exception: whatever vLLM or Transformers raises for a config that it refuses.
    """
    import vllm

    try:
        config = _configured(folder, tensor_parallel_size, dtype)
    except Exception as error:
        if _NOT_IMPORTED and "inspected" in str(error):
            raise _NOT_IMPORTED[-1] from error
        raise

    model = _built(config)
    layers = config.compilation_config.static_forward_context
    kinds, not_asked = _sorted(layers, model)
    return Model(
        reader=f"vLLM {vllm.__version__}",
        architecture=type(model).__name__,
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        kinds=tuple(LayerKind(layers=tuple(at), **dict(facts)) for facts, at in kinds.items()),
        not_asked=tuple(
            NotAsked(layer=layer, reason=reason, layers=tuple(at))
            for (layer, reason), at in not_asked.items()
        ),
        refused=tuple(_refused(config)),
    )


def _configured(folder: str, tensor_parallel_size: int, dtype: str) -> Any:
    """vLLM's configuration of a server for the model."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=folder,
        dtype=dtype,
        skip_tokenizer_init=True,
        load_format="dummy",
        attention_backend="CUSTOM",
        tensor_parallel_size=tensor_parallel_size,
        # vLLM does not compare the number of ranks with this machine's GPUs then.
        distributed_executor_backend="mp" if tensor_parallel_size > 1 else None,
    ).create_engine_config()


def _built(config: Any) -> torch.nn.Module:
    """The model, on the meta device, as the first of the configured ranks has it."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    with set_current_vllm_config(config):
        _make_groups(config.parallel_config.tensor_parallel_size)
        torch.set_default_dtype(config.model_config.dtype)
        with Uninitialized():
            model: torch.nn.Module = initialize_model(config)
    return model


def _make_groups(size: int) -> None:
    """Make this process the first of `size` ranks, of which no other exists.

    PyTorch's fake process group takes part in no communication. vLLM builds its real groups on
    it, without the parts that reach for the other ranks.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from vllm.distributed import parallel_state

    torch.distributed.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    new_group = torch.distributed.new_group
    init = parallel_state.GroupCoordinator.__init__
    signature = inspect.signature(init)

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **{**kwargs, "backend": "fake"})

    def alone(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.arguments["use_device_communicator"] = False
        bound.arguments["use_message_queue_broadcaster"] = False
        init(*bound.args, **bound.kwargs)

    torch.distributed.new_group = fake_group
    parallel_state.GroupCoordinator.__init__ = alone
    parallel_state._node_count = lambda group: 1
    parallel_state.init_distributed_environment(size, 0, "", 0, "fake")
    parallel_state.initialize_model_parallel(size, backend="fake")


_Facts = tuple[tuple[str, Any], ...]


def _sorted(
    layers: dict[str, Any], model: torch.nn.Module
) -> tuple[dict[_Facts, list[int]], dict[tuple[str, str], list[int]]]:
    """The indices of layers by their facts, and by why they are not asked."""
    from vllm.model_executor.layers.attention import Attention, MMEncoderAttention
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    kinds: dict[_Facts, list[int]] = {}
    not_asked: dict[tuple[str, str], list[int]] = {}
    for name, layer in layers.items():
        if not isinstance(layer, AttentionLayerBase):
            # vLLM registers experts in the same place.
            continue
        reason = _facts_unknown(layer) if isinstance(layer, Attention) else _other_layer(layer)
        if reason:
            at = not_asked.setdefault((type(layer).__name__, reason), [])
        else:
            at = kinds.setdefault(tuple(_facts(layer).items()), [])
        at.append(_index(name, len(at)))
    encoders = [m for m in model.modules() if isinstance(m, MMEncoderAttention)]
    if encoders:
        reason = "attention of an encoder of images or sound, for which vLLM has other backends"
        not_asked[type(encoders[0]).__name__, reason] = list(range(len(encoders)))
    return kinds, not_asked


def _index(name: str, otherwise: int) -> int:
    """The index of a layer: the only number in its name."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if len(numbers) == 1 else otherwise


def _facts(layer: Any) -> dict[str, Any]:
    """The fields of `LayerKind` for one of vLLM's `Attention` layers."""
    impl = layer.impl
    return {
        "attention": ATTENTION[str(getattr(impl.attn_type, "value", impl.attn_type))],
        "num_heads": impl.num_heads,
        "num_kv_heads": impl.num_kv_heads,
        "head_size": impl.head_size,
        "scale": float(impl.scale),
        "sliding_window": impl.sliding_window,
        "softcap": impl.logits_soft_cap or None,
        "alibi": impl.alibi_slopes is not None,
        "alibi_sqrt": bool(impl.use_alibi_sqrt),
        "sinks": impl.sinks is not None,
        "kv_sharing": impl.kv_sharing_target_layer_name is not None,
        "kv_cache_dtype": impl.kv_cache_dtype,
    }


def _facts_unknown(layer: Any) -> str:
    """A fact about an `Attention` layer that `LayerKind` cannot say; empty if there is none."""
    if chunk := getattr(layer, "attention_chunk_size", None):
        return f"vLLM cuts each sequence into chunks of {chunk} tokens"
    if (size := getattr(layer, "head_size_v", layer.head_size)) != layer.head_size:
        return f"heads of {layer.head_size} elements in queries and keys, of {size} in values"
    if not isinstance(layer.impl, Impl):
        return f"vLLM gives this layer a backend of its own: {type(layer.impl).__name__}"
    unlike = {name: value for name, value in layer.impl.others.items() if value is not None}
    return ", ".join(f"{name}={value!r}" for name, value in unlike.items())


def _other_layer(layer: Any) -> str:
    """The kind of a layer that is no `Attention`."""
    from vllm.model_executor.layers.attention import MLAAttention
    from vllm.model_executor.layers.mamba.abstract import MambaBase

    if isinstance(layer, MLAAttention):
        return "multi-head latent attention (MLA)"
    if isinstance(layer, MambaBase):
        kind = getattr(layer, "mamba_type", "")
        # An enum's member, or in older releases of vLLM a name.
        return f"state space or linear attention ({getattr(kind, 'name', kind).lower()})"
    return "a layer with a cache of its own"


def _refused(config: Any) -> list[str]:
    from vllm.config import set_current_vllm_config

    from xfv1 import support

    with set_current_vllm_config(config):
        return support.model_reasons()
