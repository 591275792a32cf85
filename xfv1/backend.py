"""The attention backend: it answers vLLM's questions and names its other classes."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionBackend, AttentionType, MultipleOf

import xfv1
from xfv1 import compat, support
from xfv1.builder import XFormersMetadataBuilder
from xfv1.device import Device, device_of
from xfv1.impl import XFormersImpl
from xfv1.kernels.paged.tiling import MAX_HEAD_SIZE

Validate = Callable[..., list[str]]


def _with_vllms_signature(function: Validate) -> Validate:
    """Show the arguments of this vLLM's own validate_configuration to whoever asks for them."""
    declared = inspect.signature(AttentionBackend.validate_configuration.__func__)
    function.__signature__ = declared  # type: ignore[attr-defined]
    return function


class XFormersAttentionBackend(AttentionBackend):
    """xFormers' ops, and xfv1's own kernel for what they refuse, over vLLM's paged cache."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [*support.DTYPES]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [*support.KV_CACHE_DTYPES]
    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_name() -> str:
        return xfv1.registered_name()

    @staticmethod
    def get_impl_cls() -> type[XFormersImpl]:
        return XFormersImpl

    @staticmethod
    def get_builder_cls() -> type[XFormersMetadataBuilder]:
        return XFormersMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return 1 <= head_size <= MAX_HEAD_SIZE

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_alibi_sqrt(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        # The host's query lengths decide whether and how split-K is used.
        return False

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type in (
            AttentionType.DECODER,
            AttentionType.ENCODER,
            AttentionType.ENCODER_ONLY,
            AttentionType.ENCODER_DECODER,
        )

    @classmethod
    @_with_vllms_signature
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        """Why this backend cannot serve a layer; each reason names the value and what is accepted.

        vLLM finds the reasons. Its words for most of them name neither.
        """
        reasons: list[str] = super().validate_configuration(*args, **kwargs)
        asked = inspect.signature(super().validate_configuration).bind(*args, **kwargs).arguments
        return [support.in_full(reason, asked) for reason in reasons]

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: Any,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: DeviceCapability | None,
        *args: Any,
        **kwargs: Any,
    ) -> str | None:
        """Why no op serves a layer of these facts, or None.

        vLLM does not ask about ALiBi, softcap and windows here; the impl's constructor answers for
        these.
        """
        if use_mla or use_sparse:
            return None
        refused = support.combination_reasons(
            head_size, dtype, kv_cache_dtype, block_size, has_sink, _device(device_capability)
        )
        return "; ".join(refused) or None

    # 0.29 on: vLLM owns the cache's shape and asks which layouts can be read.

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...] | None:
        return compat.kv_cache_layouts()

    # 0.26 to 0.28: the backend states the cache's shape and physical order.

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        return (num_blocks, num_kv_heads, block_size, 2 * head_size)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        return compat.stride_order(include_num_layers_dimension)


def _device(capability: DeviceCapability | None) -> Device:
    device = device_of(compat.device_kind())
    if device.kind == "cpu" or capability is None:
        return device
    return replace(device, capability=(capability.major, capability.minor))
