"""Small cases, most of one feature each, that the suite's own tests look at from several sides."""

from typing import Any

from fixtures.cases import AttnCase


def mixed(**choices: Any) -> AttnCase:
    """Verification of drafts beside a chunk and a prompt."""
    return AttnCase(scenario="mixed_spec", **choices)


SAMPLES: dict[str, AttnCase] = {
    "plain": mixed(),
    "decode": AttnCase(scenario="edge_decode"),
    "no_query": AttnCase(scenario="mixed_empty"),
    "window1": AttnCase(scenario="edge_chunked", sliding_window=1),
    "window17": mixed(sliding_window=17),
    "softcap": mixed(softcap=30.0),
    "alibi": mixed(alibi=True),
    "sinks": mixed(sinks=True),
    "fp8_e4m3": mixed(kv_dtype="fp8_e4m3"),
    "extreme": mixed(logits="extreme"),
    "extreme_softcap": mixed(logits="extreme", softcap=30.0),
    "noncausal_window": mixed(attention="noncausal", sliding_window=11),
    "encoder": AttnCase(scenario="encoder_small", attention="encoder"),
    "cross": AttnCase(scenario="cross_small", attention="cross"),
}
