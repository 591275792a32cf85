"""Does the impl tell its ops what the layer is, and run each phase once, by the op for it?"""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fixtures.cases import KV_LAYOUTS, AttnCase
from fixtures.inputs import AttnInputs, build_inputs
from tests.harness.driver import Driver, drive
from tests.harness.environment import has_xformers
from tests.harness.memory import new_output
from tests.integration import test_dispatch
from tests.integration.calls import whole_call
from xfv1 import compat, dispatch, support
from xfv1.backend import XFormersAttentionBackend
from xfv1.device import Device
from xfv1.impl import XFormersImpl
from xfv1.ops.base import Call, Layer
from xfv1.ops.torch_cpu import TorchCpu
from xfv1.ops.xformers.base import packed_lse, pages_info, query_info
from xfv1.phase import Batch

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")
MIXED = AttnCase(scenario="mixed_small")
PLAIN = dataclasses.replace(test_dispatch.PLAIN, head_size=64)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever vLLM's platform is."""
    monkeypatch.setattr(compat, "device_kind", lambda: "cpu")


def driven(case: AttnCase) -> tuple[AttnInputs, Driver]:
    return build_inputs(case, CPU), drive(XFormersAttentionBackend, case, CPU)


class Recording(TorchCpu):
    """The op of a CPU, which remembers what it was called with."""

    def __init__(self, ragged: bool) -> None:
        self.ragged = ragged
        self.calls: list[Call] = []

    def run(self, call: Call) -> None:
        self.calls.append(call)
        super().run(call)


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({}, {}),
        ({"sliding_window": 17}, {"sliding_window": 17}),
        ({"softcap": 30.0}, {"softcap": 30.0}),
        ({"alibi": True}, {"alibi": True}),
        ({"alibi": True, "alibi_sqrt": True}, {"alibi": True, "alibi_sqrt": True}),
        ({"sinks": True}, {"sinks": True}),
        ({"kv_dtype": "fp8_e5m2"}, {"kv_dtype": torch.float8_e5m2}),
        ({"attention": "noncausal"}, {"causal": False}),
        ({"block_size": 64}, {"block_size": 64}),
    ],
    ids=str,
)
def test_ops_are_chosen_by_the_layer_as_it_is(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], facts: dict[str, Any]
) -> None:
    inputs, driver = driven(MIXED.replace(**fields))
    asked: list[Layer] = []

    def choose(layer: Layer, batch: Batch, device: Device) -> TorchCpu:
        asked.append(layer)
        return TorchCpu()

    monkeypatch.setattr(dispatch, "choose", choose)
    driver.run(inputs)
    expected = {name: getattr(PLAIN, name) for name in PLAIN.__dataclass_fields__} | facts
    assert {Layer(**expected)} == set(asked)


@pytest.mark.parametrize(
    ("ragged", "same", "rows"),
    [
        (True, True, [12]),
        (False, True, [2, 10]),
        (True, False, [2, 10]),
    ],
)
def test_phases_are_run_together_where_one_op_would_have_them_so(
    monkeypatch: pytest.MonkeyPatch, ragged: bool, same: bool, rows: list[int]
) -> None:
    inputs, driver = driven(MIXED)
    one, other = Recording(ragged), Recording(ragged)
    ops = {"decode": one, "prefill": one if same else other}
    monkeypatch.setattr(dispatch, "choose", lambda layer, batch, device: ops[batch.kind])
    driver.run(inputs)
    assert [len(call.query) for call in one.calls + other.calls] == rows


def test_an_encoder_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """With lengths of one token beside others, which would be decodes of a decoder."""
    lens = (1, 1, 9)
    inputs, driver = driven(AttnCase(query_lens=lens, seq_lens=lens, attention="encoder"))
    op = Recording(ragged=False)
    monkeypatch.setattr(dispatch, "choose", lambda layer, batch, device: op)
    driver.run(inputs)
    (call,) = op.calls
    assert (call.batch.kind, len(call.query), call.batch.max_seq_len) == ("encoder", 11, 9)
    assert call.key_cache is None
    assert call.batch.fresh


@pytest.mark.parametrize(
    ("sample", "fresh"),
    [
        (AttnCase(scenario="odd_prefill"), True),
        (AttnCase(scenario="odd_prefill", attention="noncausal"), True),
        (AttnCase(scenario="odd_prefill", kv_sharing=True), False),
        (AttnCase(scenario="odd_prefill", kv_dtype="fp8_e4m3"), False),
        (AttnCase(scenario="chunked_prefill"), False),
        (AttnCase(query_lens=(3, 4), seq_lens=(3, 2), attention="cross"), False),
    ],
    ids=lambda value: getattr(value, "id", str(value)),
)
def test_fresh_keys_are_all_there_is_and_the_layers_own(
    monkeypatch: pytest.MonkeyPatch, sample: AttnCase, fresh: bool
) -> None:
    """A shared layer's are another's, and what is quantized has to be seen as it is stored."""
    inputs, driver = driven(sample)
    op = Recording(ragged=True)
    monkeypatch.setattr(dispatch, "choose", lambda layer, batch, device: op)
    driver.run(inputs)
    (call,) = op.calls
    assert call.batch.fresh == fresh
    # Cross attention's are not its queries'.
    assert (call.key is None) == (call.value is None) == (sample.attention == "cross")


@pytest.mark.parametrize("layout", KV_LAYOUTS)
def test_token_major_caches_are_known_by_their_strides(
    monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """Viewed as tokens, one after the other, with no copy."""
    inputs, driver = driven(AttnCase(scenario="small_prefill", kv_layout=layout))
    op = Recording(ragged=True)
    monkeypatch.setattr(dispatch, "choose", lambda layer, batch, device: op)
    driver.run(inputs)
    (call,) = op.calls
    assert call.key_cache is not None
    flat = (-1, *call.key_cache.shape[2:])
    if call.batch.token_major:
        assert call.key_cache.view(flat).data_ptr() == call.key_cache.data_ptr()
    else:
        with pytest.raises(RuntimeError, match="view"):
            call.key_cache.view(flat)


@pytest.mark.skipif(not has_xformers(), reason="xformers is not installed")
def test_xformers_is_told_the_lengths_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ops differ in which of these they go by, and only one of them runs on a CPU."""
    inputs, driver = driven(MIXED)
    op = Recording(ragged=True)
    monkeypatch.setattr(dispatch, "choose", lambda layer, batch, device: op)
    driver.run(inputs)
    (call,) = op.calls
    queries = query_info(call.phase)
    assert (queries.min_seqlen, queries.max_seqlen) == (1, 5)
    assert queries.seqstart.tolist() == queries.seqstart_py == [0, 1, 2, 7, 12]
    pages = pages_info(call.phase, 64)
    assert pages.seqstart.tolist() == pages.seqstart_py == [0, 64, 128, 192, 256]
    assert pages.seqlen.tolist() == [32, 40, 48, 56]
    assert (pages.padding, pages.max_seqlen) == (64, 56)
    assert pages.seqlen_py == [56] * 4


def test_the_lse_is_found_where_each_op_leaves_it() -> None:
    """A row to a token, or a row to a request, as long as the longest and more."""
    case = AttnCase(scenario="mixed_empty")
    call = whole_call(build_inputs(case))
    tokens, heads = call.query.shape[:2]
    lse = torch.arange(tokens * heads, dtype=torch.float32).view(tokens, heads)
    by_head = lse.t().unflatten(0, (case.num_kv_heads, -1))
    assert torch.equal(packed_lse(call, by_head[None], packed=True), lse)
    padded = torch.full(
        (len(case.query_lens), *by_head.shape[:2], max(case.query_lens) + 3), torch.nan
    )
    starts = call.phase.query_start_loc.tolist()
    for request, query_len in enumerate(case.query_lens):
        own = slice(starts[request], starts[request + 1])
        padded[request, :, :, :query_len] = by_head[:, :, own]
    assert torch.equal(packed_lse(call, padded, packed=False), lse)


def test_a_profiling_run_gives_zeros() -> None:
    """vLLM then has no batch to tell of."""
    inputs, driver = driven(MIXED)
    output = new_output(inputs)
    driver.forward(inputs, inputs.cache, None, output)
    assert not output.any()


def test_no_cap_is_spelt_both_ways() -> None:
    assert XFormersImpl(8, 64, 0.125, logits_soft_cap=0.0).logits_soft_cap is None
    assert XFormersImpl(8, 64, 0.125).num_kv_heads == 8


@pytest.mark.parametrize(("config", "drafts"), [(None, False), ({}, False), ({"drafts": 2}, True)])
def test_drafts_are_the_servers(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any] | None, drafts: bool
) -> None:
    made = None if config is None else SimpleNamespace(speculative_config=config or None)
    monkeypatch.setattr("vllm.config.get_current_vllm_config_or_none", lambda: made)
    assert compat.speculates() == drafts


@pytest.mark.parametrize(
    "model", [SimpleNamespace(rswa_window=None), SimpleNamespace(), None], ids=repr
)
def test_a_model_without_windows_beside_its_prompt_is_served(
    monkeypatch: pytest.MonkeyPatch, model: SimpleNamespace | None
) -> None:
    made = SimpleNamespace(
        model_config=model, cache_config=SimpleNamespace(), speculative_config=None
    )
    for config in (made, None):
        monkeypatch.setattr(compat, "served_config", lambda config=config: config)
        assert support.model_reasons() == []
        assert XFormersImpl(8, 64, 0.125, 2).head_size == 64


def test_windows_beside_a_whole_prompt_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 0.26 to 0.29 ask no backend whether it knows them, and a layer does not say."""
    model = SimpleNamespace(rswa_window=64)
    made = SimpleNamespace(
        model_config=model, cache_config=SimpleNamespace(), speculative_config=None
    )
    monkeypatch.setattr(compat, "served_config", lambda: made)
    with pytest.raises(NotImplementedError, match="rswa_window=64"):
        XFormersImpl(8, 64, 0.125, 2)
