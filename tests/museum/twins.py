"""Thin backends around code that no backend reaches on a CPU, to put it through the suite."""

from typing import Any

import torch

from reference.lowprec import attend_lowprec
from tests.museum.faults import INF, MuseumImpl, Plain, PlainOp, exp_minus, pieces, unread, weigh
from xfv1.ops.base import Call, Layer, Op
from xfv1.ops.xformers.gather import contiguous_bias, contiguous_kv
from xfv1.ops.xformers.gather import pieces as pieces_of
from xfv1.phase import DECODE, ENCODER


class _LowprecOp(PlainOp):
    """`reference.lowprec` request by request."""

    def run(self, call: Call) -> None:
        layer = call.layer
        for piece in pieces(call):
            key, value = self.read(piece, piece.length)
            call.out[piece.rows], _ = attend_lowprec(
                call.query[piece.rows],
                key.to(layer.dtype),
                value.to(layer.dtype),
                scale=call.scale,
                causal=layer.causal,
                sliding_window=layer.sliding_window,
                alibi_slopes=call.alibi_slopes,
                alibi_sqrt=layer.alibi_sqrt,
                softcap=layer.softcap,
                sinks=call.sinks,
            )


class GatheredOp(PlainOp):
    """Prefills as xFormers' ops get them: keys by `contiguous_kv`, a mask by `contiguous_bias`."""

    def run(self, call: Call) -> None:
        batch = call.batch
        if batch.kind == DECODE or not (batch.host_lens or batch.fresh or batch.kind == ENCODER):
            super().run(call)
            return
        for piece in pieces_of(call):
            self.answer(piece)

    def answer(self, call: Call) -> None:
        layer = call.layer
        key, value = (x.float() for x in contiguous_kv(call))
        rows = call.phase.num_tokens
        mask = contiguous_bias(call).materialize((rows, len(key)), dtype=torch.float32)
        query = call.query[:rows].float().unflatten(1, (layer.num_kv_heads, layer.group))
        logits = torch.einsum("qhgd,khd->hgqk", query, key).flatten(0, 1) * call.scale
        logits = logits.masked_fill(mask == -INF, -INF)
        # The poison before a window is gathered too.
        value = unread(logits, value)
        weights = exp_minus(logits, logits.logsumexp(dim=-1, keepdim=True))
        call.out[:rows] = weigh(weights, value).transpose(0, 1).to(call.out.dtype)


class _LowprecImpl(MuseumImpl):
    op = _LowprecOp()


class _GatheredImpl(MuseumImpl):
    op = GatheredOp()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.logits_soft_cap or self.alibi_slopes is not None or self.sinks is not None:
            raise NotImplementedError("no softcap, ALiBi or sinks, as xFormers' ops")

    def _op(self, facts: Layer, *args: Any) -> Op:
        """As xFormers' ops, without windows where there is no causality."""
        plain = facts.sliding_window is not None and not facts.causal
        return MuseumImpl.op if plain else self.op


class Lowprec(Plain):
    impl = _LowprecImpl


class Gathered(Plain):
    impl = _GatheredImpl
