"""Faults that an engine plants in the calls of xfv1's ops: each takes one fact wrongly."""

from collections.abc import Callable
from dataclasses import replace

import torch

from xfv1.ops.base import Call
from xfv1.phase import DECODE

Fault = Callable[[Call], Call]
# These two faults change the answers of every model.
KEY_FAULTS = ("newest_key_lost", "one_key_ahead")


def _keys(more: int) -> Fault:
    """Each request has so many keys more than it should."""

    def fault(call: Call) -> Call:
        lens = (call.phase.seq_lens + more).clamp(min=0)
        return replace(call, phase=replace(call.phase, seq_lens=lens))

    return fault


def _newest_key_lost_at_decode(call: Call) -> Call:
    return _keys(-1)(call) if call.batch.kind == DECODE else call


def _scale_of_head_size(call: Call) -> Call:
    return replace(call, scale=call.layer.head_size**-0.5)


def _window_one_longer(call: Call) -> Call:
    window = call.layer.sliding_window
    if window is None:
        return call
    return replace(call, layer=replace(call.layer, sliding_window=window + 1))


def _softcap_ignored(call: Call) -> Call:
    return replace(call, layer=replace(call.layer, softcap=None))


def _sinks_ignored(call: Call) -> Call:
    return replace(call, sinks=None, layer=replace(call.layer, sinks=False))


def _slopes_of_another_schedule(call: Call) -> Call:
    """The schedule of a power of two: 2^(-8 / num_heads) and its powers."""
    heads = call.layer.num_heads
    slopes = 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1, device=call.query.device))
    return replace(call, alibi_slopes=slopes)


def _kv_heads_in_turns(call: Call) -> Call:
    """Query head i reads KV head i % num_kv_heads: right is i // group."""
    assert call.key_cache is not None and call.value_cache is not None
    times = (1, 1, call.layer.group, 1)
    return replace(
        call,
        layer=replace(call.layer, num_kv_heads=call.layer.num_heads),
        key_cache=call.key_cache.repeat(times),
        value_cache=call.value_cache.repeat(times),
    )


def _cross_attention_causal(call: Call) -> Call:
    return replace(call, layer=replace(call.layer, causal=True))


FAULTS: dict[str, Fault] = {
    "newest_key_lost": _keys(-1),
    "one_key_ahead": _keys(1),
    "newest_key_lost_at_decode": _newest_key_lost_at_decode,
    "scale_of_head_size": _scale_of_head_size,
    "window_one_longer": _window_one_longer,
    "softcap_ignored": _softcap_ignored,
    "sinks_ignored": _sinks_ignored,
    "slopes_of_another_schedule": _slopes_of_another_schedule,
    "kv_heads_in_turns": _kv_heads_in_turns,
    "cross_attention_causal": _cross_attention_causal,
}
