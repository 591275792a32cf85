"""Wrong answers that a backend could give: what each would put into the output of a case.

A case is worth running only if the faults it is meant for would leave the budget. `distinguishes`
says by how much each would. It needs the reference alone, no candidate.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fixtures.cases import AttnCase, effects
from fixtures.cases.effects import Hidden, first_of, most_keys, unless
from fixtures.inputs import AttnInputs
from reference import attend, visible
from reference.lowprec import attend_lowprec
from tests.harness.truth import SCALE_FAULT, Expected, Request, requests, semantics, written_cache

Arguments = dict[str, Any]
Answer = Callable[[AttnInputs, Request, Arguments], torch.Tensor]

# How many budgets away a wrong answer must be: an honest error may hide one, and this leaves two.
SEVERAL = 3.0


@dataclass(frozen=True)
class Perturbation:
    """One fault.

    answer: one request's output with the fault, [num_queries, num_heads, head_size] float64, from
        the inputs, the request and the arguments that `reference.attend` should be given.
    hidden: why the fault does not change a case's output, or None where it does.
    """

    name: str
    answer: Answer
    hidden: Hidden

    def applies(self, case: AttnCase) -> bool:
        """Whether a case's inputs are meant to tell this fault from the truth."""
        return self.hidden(case) is None

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
            read = request
            if not poison:
                read = request_with(read, read.key.nan_to_num(0.0), read.value.nan_to_num(0.0))
            result[request.rows] = self.answer(inputs, read, semantics(inputs))
        return result


def request_with(request: Request, key: torch.Tensor, value: torch.Tensor) -> Request:
    """The request with other keys and values, [num_keys, num_kv_heads, head_size]."""
    return Request(request.index, request.rows, request.query, key, value)


def distinguishes(
    inputs: AttnInputs, expected: Expected, names: Iterable[str] | None = None
) -> dict[str, float]:
    """By fault, the largest |wrong - truth| / budget of any element, or of the sum along the
    softmax scale: above 1, a test would fail.

    Infinite where numbers do not reach SEVERAL and the fault reads poison. The key just before a
    window may lie in a block that was freed, and then is no number.

    Args:
        names: the faults to look at, of `PERTURBATIONS`; None for all. Faults that do not apply
            to the case are left out.
    """
    shares = {}
    for name in PERTURBATIONS if names is None else names:
        fault = PERTURBATIONS[name]
        if fault.applies(inputs.case):
            share = output_share(fault.output(inputs), expected)
            if share < SEVERAL:
                share = output_share(fault.output(inputs, poison=True), expected)
            shares[name] = share
    return shares


def output_share(output: torch.Tensor, expected: Expected) -> float:
    """The larger of an output's two shares of its budget: any element's, and along the scale."""
    elements = worst_share(output, expected.output, expected.budget)
    return max(elements, expected.scale_share(output))


def worst_share(output: torch.Tensor, truth: torch.Tensor, budget: torch.Tensor) -> float:
    """The largest |output - truth| / budget; NaN and infinity are infinitely far from a number."""
    error = (output.double() - truth).abs().nan_to_num(math.inf, posinf=math.inf)
    return float(torch.where(error > 0, error / budget, 0.0).max())


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


# What the faults do.


def _wrong(**changes: Any) -> Answer:
    """The fault of taking other arguments than the layer's."""

    def answer(inputs: AttnInputs, request: Request, arguments: Arguments) -> torch.Tensor:
        return attend_request(request, arguments | changes)

    return answer


def _scaled(
    key_factor: Callable[[AttnInputs], float], value_factor: Callable[[AttnInputs], float]
) -> Answer:
    """The fault of dequantizing by other scales: keys and values come out times these factors."""

    def answer(inputs: AttnInputs, request: Request, arguments: Arguments) -> torch.Tensor:
        key, value = request.key * key_factor(inputs), request.value * value_factor(inputs)
        return attend_request(request_with(request, key, value), arguments)

    return answer


def _widened(by: int) -> Answer:
    """The fault of a window that holds ``by`` keys more."""

    def answer(inputs: AttnInputs, request: Request, arguments: Arguments) -> torch.Tensor:
        wrong = {"sliding_window": arguments["sliding_window"] + by}
        return attend_request(request, arguments | wrong)

    return answer


def _wrong_scale(inputs: AttnInputs, request: Request, arguments: Arguments) -> torch.Tensor:
    return attend_request(request, arguments | {"scale": arguments["scale"] * SCALE_FAULT})


def _shifted_slopes(inputs: AttnInputs, request: Request, arguments: Arguments) -> torch.Tensor:
    return attend_request(request, arguments | {"alibi_slopes": arguments["alibi_slopes"].roll(1)})


def _swapped_heads(inputs: AttnInputs, request: Request, arguments: Arguments) -> torch.Tensor:
    return attend_request(
        request_with(request, request.key.flip(1), request.value.flip(1)), arguments
    )


def _newest_lost(inputs: AttnInputs, request: Request, arguments: Arguments) -> torch.Tensor:
    distance, seen = _distance(request), _seen(request, arguments)
    newest = distance.masked_fill(~seen, distance.max() + 1).amin(dim=1, keepdim=True)
    return _attend_seen(request, arguments, seen & (distance != newest))


def _look_ahead(inputs: AttnInputs, request: Request, arguments: Arguments) -> torch.Tensor:
    return _attend_seen(request, arguments, _seen(request, arguments) | (_distance(request) == -1))


def attend_request(request: Request, arguments: Arguments) -> torch.Tensor:
    """[num_queries, num_heads, head_size] float64: `reference.attend` of one request."""
    return attend(request.query, request.key, request.value, **arguments).output


def _attend_seen(request: Request, arguments: Arguments, seen: torch.Tensor) -> torch.Tensor:
    """`attend` with a visibility of one's own, [num_queries, num_keys] bool."""
    unread = ~seen.any(dim=0)[:, None, None]
    key, value = request.key.masked_fill(unread, 0.0), request.value.masked_fill(unread, 0.0)
    unmasked = arguments | {"causal": False, "sliding_window": None}
    logits = attend(request.query, key, value, **unmasked).logits
    logits = logits.masked_fill(~seen, -math.inf)
    total = logits.logsumexp(dim=-1)
    if arguments["sinks"] is not None:
        total = torch.logaddexp(total, arguments["sinks"].double()[:, None])
    weights = torch.exp(logits - total.nan_to_num(neginf=0.0)[..., None])
    group = len(weights) // value.shape[1]
    return torch.einsum("hqk,khd->qhd", weights, value.double().repeat_interleave(group, dim=1))


def _positions(request: Request) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the queries, the last of the sequence, and of the keys."""
    length = len(request.key)
    keys = torch.arange(length, device=request.key.device)
    return torch.arange(length - len(request.query), length, device=keys.device), keys


def _distance(request: Request) -> torch.Tensor:
    """[num_queries, num_keys]: how far before its query a key lies."""
    queries, keys = _positions(request)
    return queries[:, None] - keys[None, :]


def _seen(request: Request, arguments: Arguments) -> torch.Tensor:
    """[num_queries, num_keys]: the truth's visibility."""
    mask = {name: arguments[name] for name in ("causal", "sliding_window")}
    return visible(*_positions(request), **mask)


# Why they cannot show, beside the reasons in `fixtures.cases.effects`.

_one_hot = unless(
    lambda case: case.logits != "extreme",
    "of extreme logits the largest has all the weight, and a small change leaves it the largest",
)
_planted = unless(
    lambda case: case.logits != "extreme",
    "of extreme logits the largest has all the weight, whether a key at an edge has it is chance",
)

_ALL = (
    Perturbation("window_ignored", _wrong(sliding_window=None), effects.wide_window),
    Perturbation("window_plus_one", _widened(1), first_of(effects.wide_window, _planted)),
    Perturbation(
        "window_minus_one",
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
    Perturbation(
        "softcap_dropped",
        _wrong(softcap=None),
        first_of(effects.no_softcap, effects.one_key),
    ),
    Perturbation(
        "alibi_shifted",
        _shifted_slopes,
        first_of(
            effects.no_alibi,
            unless(lambda case: case.num_heads > 1, "one head has no neighbour's slope to take"),
            effects.no_bias,
            _one_hot,
        ),
    ),
    Perturbation(
        "alibi_linear",
        _wrong(alibi_sqrt=False),
        first_of(
            unless(lambda case: case.alibi_sqrt, "no ALiBi of the sqrt form"),
            unless(
                lambda case: most_keys(case) > 2, "distances 0 and 1 are their own square roots"
            ),
            _one_hot,
        ),
    ),
    Perturbation("sinks_dropped", _wrong(sinks=None), unless(lambda case: case.sinks, "no sinks")),
    Perturbation("scale_one_percent", _wrong_scale, first_of(effects.one_key, _one_hot)),
    Perturbation(
        "kv_heads_swapped",
        _swapped_heads,
        unless(lambda case: case.num_kv_heads > 1, "one KV head cannot be another"),
    ),
    Perturbation("newest_lost", _newest_lost, _planted),
    Perturbation(
        "look_ahead",
        _look_ahead,
        first_of(
            unless(lambda case: case.causal, "without causality a query sees what is ahead"),
            effects.no_future,
            _planted,
        ),
    ),
    Perturbation(
        "made_causal",
        _wrong(causal=True),
        effects.no_lookahead,
    ),
    Perturbation(
        "k_scale_dropped",
        _scaled(lambda inputs: 1 / inputs.k_scale, lambda inputs: 1.0),
        first_of(effects.no_scales, effects.one_key, _one_hot),
    ),
    Perturbation(
        "v_scale_dropped",
        _scaled(lambda inputs: 1.0, lambda inputs: 1 / inputs.v_scale),
        effects.no_scales,
    ),
    Perturbation(
        "kv_scales_swapped",
        _scaled(
            lambda inputs: inputs.v_scale / inputs.k_scale,
            lambda inputs: inputs.k_scale / inputs.v_scale,
        ),
        effects.no_scales,
    ),
)
PERTURBATIONS = {fault.name: fault for fault in _ALL}
