"""Backends that are wrong in one way each: what --candidate must not let pass."""

import ctypes
import faulthandler
import os
import sys
import time
from typing import Any

from vllm.v1.attention.backend import AttentionBackend

from xfv1.backend import XFormersAttentionBackend
from xfv1.builder import XFormersMetadataBuilder
from xfv1.impl import XFormersImpl

NOT_A_BACKEND = 42


class _BlindBuilder(XFormersMetadataBuilder):
    def build(self, common_prefix_len: int, common_attn_metadata: Any, *args: Any) -> Any:
        """A batch of sequences that are one key shorter, where the queries leave any."""
        common = common_attn_metadata
        context = common.seq_lens - common.query_start_loc.diff()
        lost = (context > 0).to(common.seq_lens.dtype)
        shorter = common.replace(
            seq_lens=common.seq_lens - lost,
            seq_lens_cpu_upper_bound=common.seq_lens_cpu_upper_bound - lost.cpu(),
        )
        return super().build(common_prefix_len, shorter, *args)


class NewestKeyLost(XFormersAttentionBackend):
    """xfv1, but no query sees the newest key of its sequence."""

    @staticmethod
    def get_builder_cls() -> type[XFormersMetadataBuilder]:
        return _BlindBuilder


class _ForgetfulImpl(XFormersImpl):
    def do_kv_cache_update(self, *args: Any) -> None:
        pass


class CacheNeverWritten(XFormersAttentionBackend):
    """xfv1, but the new keys and values are lost."""

    @staticmethod
    def get_impl_cls() -> type[XFormersImpl]:
        return _ForgetfulImpl


class RefusesAll(XFormersAttentionBackend):
    """xfv1, but with a reason against everything."""

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return False


class _EndlessImpl(XFormersImpl):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs["output"].shape[0] > 2:
            # The limit that pytest has set for the test, but sooner.
            faulthandler.dump_traceback_later(1, exit=True)
            time.sleep(3600)
        return super().forward(*args, **kwargs)


class PrefillsNeverEnd(XFormersAttentionBackend):
    """xfv1, but a batch of more than two tokens is never done."""

    @staticmethod
    def get_impl_cls() -> type[XFormersImpl]:
        return _EndlessImpl


# Candidates that end the process, or try to.


class ValidationExits(XFormersAttentionBackend):
    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        sys.exit("left in validate_configuration")


class _LeavingImpl(XFormersImpl):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        sys.exit("left in the constructor")


class ConstructorExits(XFormersAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[XFormersImpl]:
        return _LeavingImpl


class _ForwardExits(XFormersImpl):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        sys.exit("left in forward")


class ForwardExits(XFormersAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[XFormersImpl]:
        return _ForwardExits


class _ForwardInterrupts(XFormersImpl):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt


class ForwardInterrupts(XFormersAttentionBackend):
    """xfv1, but the user ends the run meanwhile."""

    @staticmethod
    def get_impl_cls() -> type[XFormersImpl]:
        return _ForwardInterrupts


class _ForwardDies(XFormersImpl):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        os._exit(3)


class ForwardDies(XFormersAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[XFormersImpl]:
        return _ForwardDies


class _ForwardCrashes(XFormersImpl):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        ctypes.string_at(0)


class ForwardCrashes(XFormersAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[XFormersImpl]:
        return _ForwardCrashes


# Candidates that do not say what they are made of.


class Bare(AttentionBackend):
    pass


class NoBuilder(XFormersAttentionBackend):
    get_builder_cls = None  # type: ignore[assignment]


class ImplRaises(XFormersAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[XFormersImpl]:
        raise RuntimeError("no kernel\nfor this card")


class ImplIsNone(XFormersAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[XFormersImpl]:
        return None  # type: ignore[return-value]


class NameExits(XFormersAttentionBackend):
    @staticmethod
    def get_name() -> str:
        sys.exit(5)


class _NoForward(XFormersImpl):
    forward = None  # type: ignore[assignment]


class NoForward(XFormersAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[XFormersImpl]:
        return _NoForward
