"""Faults that the reference computes: it answers a question that was changed by the fault.

A case is worth running only if the faults it is meant for would leave the budget. `distinguishes`
says by how much each would. It needs the reference alone, no candidate. After a failure,
`tests.museum.nearest` looks for the fault whose answer the candidate gave.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fixtures.cases import effects
from fixtures.cases.effects import Hidden, first_of, most_keys, unless
from fixtures.inputs import AttnInputs
from reference import attend, visible
from reference.attention import Attended
from reference.lowprec import attend_lowprec
from tests.harness.budget import worst_share
from tests.harness.truth import (
    SCALE_FAULT,
    Expected,
    Request,
    requests,
    semantics,
    written_cache,
)
from tests.museum.registry import Fault, enter

# How many budgets away a wrong answer must be: an honest error may hide one, and this leaves two.
SEVERAL = 3.0


@dataclass(frozen=True)
class Question:
    """The question that the reference is asked about one request.

    query: [num_queries, num_heads, head_size].
    key, value: [num_keys, num_kv_heads, head_size], dequantized by k_scale and v_scale.
    arguments: all other arguments of `reference.attend`.
    seen: [num_queries, num_keys] bool, which keys each query sees. None: those that causality and
        the window of `arguments` leave.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    k_scale: float
    v_scale: float
    arguments: dict[str, Any] = field(default_factory=dict)
    seen: torch.Tensor | None = None

    def told(self, **changes: Any) -> "Question":
        """The question with other arguments of `reference.attend`."""
        return replace(self, arguments=self.arguments | changes)


Change = Callable[[Question], Question]


@dataclass(frozen=True)
class ReferenceFault(Fault):
    """A fault planted in the question. change: makes the wrong question from the right one."""

    change: Change

    def output(self, inputs: AttnInputs, *, poison: bool = False) -> torch.Tensor:
        """[num_tokens, num_heads, head_size] float64: what a backend with the fault would answer.

        Args:
            poison: leave the NaN that lies before a window where it is. Without, it counts as the
                zeros vLLM allocates a cache with, and the fault shows by its numbers alone.
        """
        case = inputs.case
        shape = (case.num_tokens, case.num_heads, case.head_size)
        result = torch.zeros(shape, dtype=torch.float64, device=inputs.query.device)
        for request in requests(inputs, written_cache(inputs)[0]):
            asked = self.change(question(inputs, request, poison=poison))
            result[request.rows] = answer(asked).output
        return result


def question(inputs: AttnInputs, request: Request, *, poison: bool = False) -> Question:
    """The right question about a request. poison: see `ReferenceFault.output`."""
    key, value = request.key, request.value
    if not poison:
        key, value = key.nan_to_num(0.0), value.nan_to_num(0.0)
    scales = inputs.k_scale, inputs.v_scale
    return Question(request.query, key, value, *scales, semantics(inputs))


def answer(asked: Question) -> Attended:
    """The reference's answer to a question."""
    if asked.seen is not None:
        return _attend_seen(asked, asked.seen)
    return attend(asked.query, asked.key, asked.value, **asked.arguments)


def distinguishes(
    inputs: AttnInputs, expected: Expected, names: Iterable[str] | None = None
) -> dict[str, float]:
    """By fault, the largest |wrong - truth| / budget of any element, or of the sum along the
    softmax scale: above 1, a test would fail.

    Infinite where numbers do not reach SEVERAL and the fault reads poison. The key just before a
    window may lie in a block that was freed, and then is no number.

    Args:
        names: the faults to look at, of `REFERENCE_FAULTS`; None for all. Faults that cannot show
            in the case are left out.
    """
    shares = {}
    for name in REFERENCE_FAULTS if names is None else names:
        fault = REFERENCE_FAULTS[name]
        if fault.shows(inputs.case):
            share = output_share(fault.output(inputs), expected)
            if share < SEVERAL:
                share = output_share(fault.output(inputs, poison=True), expected)
            shares[name] = share
    return shares


def output_share(output: torch.Tensor, expected: Expected) -> float:
    """The larger of an output's two shares of its budget: any element's, and along the scale."""
    elements = worst_share(output, expected.output, expected.budget)
    return max(elements, expected.scale_share(output))


def honest(inputs: AttnInputs, **changes: Any) -> torch.Tensor:
    """[num_tokens, num_heads, head_size] of the model's dtype: what a real kernel would answer.

    Args:
        changes: arguments of `reference.attend` to be wrong about.
    """
    case = inputs.case
    result = inputs.query.new_zeros(case.num_tokens, case.num_heads, case.head_size)
    for request in requests(inputs, written_cache(inputs)[0]):
        key, value = request.key.to(result.dtype), request.value.to(result.dtype)
        arguments = semantics(inputs) | changes
        result[request.rows] = attend_lowprec(request.query, key, value, **arguments)[0]
    return result


# The changes that faults make.


def _wrong(**changes: Any) -> Change:
    """The fault of taking other arguments than the layer's."""
    return lambda asked: asked.told(**changes)


def _scaled(
    key_factor: Callable[[Question], float], value_factor: Callable[[Question], float]
) -> Change:
    """The fault of dequantizing by other scales: keys and values come out times these factors."""

    def change(asked: Question) -> Question:
        key, value = asked.key * key_factor(asked), asked.value * value_factor(asked)
        return replace(asked, key=key, value=value)

    return change


def _widened(by: int) -> Change:
    """The fault of a window that holds ``by`` keys more."""
    return lambda asked: asked.told(sliding_window=asked.arguments["sliding_window"] + by)


def _wrong_scale(asked: Question) -> Question:
    return asked.told(scale=asked.arguments["scale"] * SCALE_FAULT)


def _shifted_slopes(asked: Question) -> Question:
    return asked.told(alibi_slopes=asked.arguments["alibi_slopes"].roll(1))


def _swapped_heads(asked: Question) -> Question:
    return replace(asked, key=asked.key.flip(1), value=asked.value.flip(1))


def _newest_lost(asked: Question) -> Question:
    distance, seen = _distance(asked), _seen(asked)
    newest = distance.masked_fill(~seen, distance.max() + 1).amin(dim=1, keepdim=True)
    return replace(asked, seen=seen & (distance != newest))


def _look_ahead(asked: Question) -> Question:
    return replace(asked, seen=_seen(asked) | (_distance(asked) == -1))


def _attend_seen(asked: Question, seen: torch.Tensor) -> Attended:
    """`attend` with a visibility of one's own, [num_queries, num_keys] bool."""
    unread = ~seen.any(dim=0)[:, None, None]
    key, value = asked.key.masked_fill(unread, 0.0), asked.value.masked_fill(unread, 0.0)
    unmasked = asked.arguments | {"causal": False, "sliding_window": None}
    logits = attend(asked.query, key, value, **unmasked).logits
    logits = logits.masked_fill(~seen, -math.inf)
    total = logits.logsumexp(dim=-1)
    if asked.arguments["sinks"] is not None:
        total = torch.logaddexp(total, asked.arguments["sinks"].double()[:, None])
    weights = torch.exp(logits - total.nan_to_num(neginf=0.0)[..., None])
    group = len(weights) // value.shape[1]
    repeated = value.double().repeat_interleave(group, dim=1)
    output = torch.einsum("hqk,khd->qhd", weights, repeated)
    return Attended(output, total.transpose(0, 1), weights, logits)


def _positions(asked: Question) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the queries, the last of the sequence, and of the keys."""
    length = len(asked.key)
    keys = torch.arange(length, device=asked.key.device)
    return torch.arange(length - len(asked.query), length, device=keys.device), keys


def _distance(asked: Question) -> torch.Tensor:
    """[num_queries, num_keys]: how far before its query a key lies."""
    queries, keys = _positions(asked)
    return queries[:, None] - keys[None, :]


def _seen(asked: Question) -> torch.Tensor:
    """[num_queries, num_keys]: the truth's visibility."""
    mask = {name: asked.arguments[name] for name in ("causal", "sliding_window")}
    return visible(*_positions(asked), **mask)


# Why they cannot show, beside the reasons in `fixtures.cases.effects`.

_one_hot = unless(
    lambda case: case.logits != "extreme",
    "of extreme logits the largest has all the weight, and a small change leaves it the largest",
)
_planted = unless(
    lambda case: case.logits != "extreme",
    "of extreme logits the largest has all the weight, whether a key at an edge has it is chance",
)


def _fault(name: str, what: str, change: Change, hidden: Hidden) -> ReferenceFault:
    return enter(ReferenceFault(name, what, hidden, change))


_ALL = (
    _fault("window_ignored", "window ignored", _wrong(sliding_window=None), effects.wide_window),
    _fault(
        "window_plus_one",
        "window one key longer",
        _widened(1),
        first_of(effects.wide_window, _planted),
    ),
    _fault(
        "window_minus_one",
        "window one key shorter",
        _widened(-1),
        first_of(
            effects.no_window,
            unless(
                lambda case: case.longest >= (case.sliding_window or 0),
                "no request fills the window",
            ),
            unless(lambda case: case.sliding_window != 1, "a window cannot hold 0 keys"),
            _planted,
        ),
    ),
    _fault(
        "softcap_dropped",
        "softcap ignored",
        _wrong(softcap=None),
        first_of(effects.no_softcap, effects.one_key),
    ),
    _fault(
        "alibi_shifted",
        "ALiBi slope of the neighbouring head",
        _shifted_slopes,
        first_of(
            effects.no_alibi,
            unless(lambda case: case.num_heads > 1, "one head has no neighbour's slope to take"),
            effects.no_bias,
            _one_hot,
        ),
    ),
    _fault(
        "alibi_linear",
        "ALiBi by the distance, not by its square root",
        _wrong(alibi_sqrt=False),
        first_of(
            unless(lambda case: case.alibi_sqrt, "no ALiBi of the sqrt form"),
            unless(
                lambda case: most_keys(case) > 2, "distances 0 and 1 are their own square roots"
            ),
            _one_hot,
        ),
    ),
    _fault(
        "sinks_dropped",
        "attention sinks ignored",
        _wrong(sinks=None),
        unless(lambda case: case.sinks, "no sinks"),
    ),
    _fault(
        "scale_one_percent",
        "softmax scale one percent too large",
        _wrong_scale,
        first_of(effects.one_key, _one_hot),
    ),
    _fault(
        "kv_heads_swapped",
        "KV heads in reverse order",
        _swapped_heads,
        unless(lambda case: case.num_kv_heads > 1, "one KV head cannot be another"),
    ),
    _fault("newest_lost", "newest visible key of each query lost", _newest_lost, _planted),
    _fault(
        "look_ahead",
        "next key after each query seen",
        _look_ahead,
        first_of(
            unless(lambda case: case.causal, "without causality a query sees what is ahead"),
            effects.no_future,
            _planted,
        ),
    ),
    _fault(
        "made_causal",
        "causal mask on attention without causality",
        _wrong(causal=True),
        effects.no_lookahead,
    ),
    _fault(
        "k_scale_dropped",
        "k_scale not applied to the keys",
        _scaled(lambda asked: 1 / asked.k_scale, lambda asked: 1.0),
        first_of(effects.no_scales, effects.one_key, _one_hot),
    ),
    _fault(
        "v_scale_dropped",
        "v_scale not applied to the values",
        _scaled(lambda asked: 1.0, lambda asked: 1 / asked.v_scale),
        effects.no_scales,
    ),
    _fault(
        "kv_scales_swapped",
        "k_scale and v_scale exchanged",
        _scaled(
            lambda asked: asked.v_scale / asked.k_scale,
            lambda asked: asked.k_scale / asked.v_scale,
        ),
        effects.no_scales,
    ),
)
REFERENCE_FAULTS = {fault.name: fault for fault in _ALL}
