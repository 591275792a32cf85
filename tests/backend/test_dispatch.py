"""Does the dispatch choose an op that can serve, on cards not here too, and say why if none can?"""

import dataclasses
import importlib.util
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.cards.cards import CARDS
from xfv1 import cache, compat, dispatch, support
from xfv1.device import Device
from xfv1.dispatch import OPS, NoOp, choose, order_of
from xfv1.ops import vllm_fa
from xfv1.ops.base import Layer
from xfv1.ops.xformers import base as xformers
from xfv1.phase import DECODE, ENCODER, KINDS, PREFILL, Batch, Phase
from xfv1.rules import RULES, Rule
from xfv1.support import layer_reasons

pytestmark = pytest.mark.cpu

TURING, AMPERE, HOPPER, BLACKWELL, MI300 = (
    CARDS[name].device for name in ("sm_75", "sm_80", "sm_90", "sm_100", "gfx942")
)
CPU, INTERPRETED = Device("cpu"), Device("cpu", interpreted=True)
DEVICES = {
    **{name: card.device for name, card in CARDS.items()},
    "cpu": CPU,
    "interpreter": INTERPRETED,
}
PACKAGES = ("xformers", "flash_attn_3", "triton")
EVERYTHING = (*PACKAGES, "vllm_fa")

PLAIN = Layer(
    num_heads=8,
    num_kv_heads=2,
    head_size=128,
    dtype=torch.float16,
    kv_dtype=torch.float16,
    block_size=16,
)
BFLOAT16 = dataclasses.replace(PLAIN, dtype=torch.bfloat16, kv_dtype=torch.bfloat16)
FLOAT32 = dataclasses.replace(PLAIN, dtype=torch.float32, kv_dtype=torch.float32)
FEATURES: dict[str, dict[str, Any]] = {
    "sliding window": {"sliding_window": 64},
    "softcap": {"softcap": 30.0},
    "alibi": {"alibi": True},
    "alibi sqrt": {"alibi": True, "alibi_sqrt": True},
    "sinks": {"sinks": True},
    "fp8": {"kv_dtype": torch.float8_e5m2},
    "noncausal": {"causal": False},
}
LAYERS = {
    "plain": PLAIN,
    "bfloat16": BFLOAT16,
    "float32": FLOAT32,
    **{f"head size {n}": dataclasses.replace(PLAIN, head_size=n) for n in (16, 80, 100, 256, 512)},
    **{f"block size {n}": dataclasses.replace(PLAIN, block_size=n) for n in (32, 64, 48)},
    **{name: dataclasses.replace(PLAIN, **facts) for name, facts in FEATURES.items()},
}
DECODES = Batch(DECODE, num_reqs=64, max_seq_len=4096)
VERIFICATION = Batch(DECODE, num_reqs=8, max_query_len=4, max_seq_len=4096)
PREFILLS = Batch(PREFILL, num_reqs=4, max_query_len=512, max_seq_len=4096, uniform=False)
FRESH = Batch(PREFILL, num_reqs=4, max_query_len=512, max_seq_len=512, uniform=False, fresh=True)
FEW_OF_LONG = Batch(PREFILL, num_reqs=4, max_query_len=8, max_seq_len=4096, uniform=False)
ENCODERS = Batch(ENCODER, num_reqs=4, max_query_len=512, max_seq_len=512, uniform=False, fresh=True)
BATCHES = {
    "decodes": DECODES,
    "verification": VERIFICATION,
    "uneven verification": dataclasses.replace(VERIFICATION, uniform=False),
    "decodes, HND": dataclasses.replace(DECODES, token_major=False),
    "prefills": PREFILLS,
    "prefills, HND": dataclasses.replace(PREFILLS, token_major=False),
    "fresh prefills": FRESH,
    "encoders": ENCODERS,
}


def runs_on(name: str, device: Device) -> bool:
    """Where an op's kernels exist at all, from their authors' words."""
    if name == "torch":
        return device.kind == "cpu"
    if name in ("triton", "xformers_splitk"):
        # xFormers builds split-K for neither Pascal nor Turing.
        least = (8, 0) if name == "xformers_splitk" else (7, 5)
        return {
            "cuda": device.capability >= least,
            "hip": True,
            "cpu": device.interpreted,
        }[device.kind]
    kind, first, last = {
        "vllm_fa3": ("cuda", (9, 0), (9, 0)),
        "vllm_fa2": ("cuda", (8, 0), (99, 0)),
        "xformers_fa3": ("cuda", (8, 0), (9, 0)),
        "xformers_fa2": ("cuda", (8, 0), (99, 0)),
        "xformers_cutlass": ("cuda", (5, 0), (9, 0)),
        "xformers_ck": ("hip", (9, 0), (9, 4)),
    }[name]
    return device.kind == kind and first <= device.capability <= last


# Features that an op would ignore in silence: it has no argument for them.
IGNORES = {
    "xformers_splitk": {"sliding window", "softcap", "alibi", "alibi sqrt", "sinks", "fp8"},
    "xformers_fa3": {"softcap", "alibi", "alibi sqrt", "sinks"},
    "xformers_fa2": {"softcap", "alibi", "alibi sqrt", "sinks"},
    "xformers_cutlass": {"softcap", "alibi sqrt", "sinks"},
    "xformers_ck": {"softcap", "alibi sqrt", "sinks"},
    "vllm_fa3": {"alibi", "alibi sqrt"},
    "vllm_fa2": {"sinks", "alibi sqrt"},
    "triton": set(),
    "torch": set(),
}

Install = Callable[..., None]
# The real function, which the fixture below replaces.
UNAVAILABLE = xformers._unavailable


@pytest.fixture(autouse=True)
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Sets which packages the ops find; everything, until told otherwise."""
    found = importlib.util.find_spec

    def install(*names: str) -> None:
        def find_spec(name: str, package: str | None = None) -> Any:
            if name in PACKAGES:
                return object() if name in names else None
            return found(name, package)

        def unavailable(version: int) -> str | None:
            return None if "vllm_fa" in names else f"no FlashAttention {version}"

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)
        monkeypatch.setattr(vllm_fa, "_unavailable", unavailable)
        # A build with all of xFormers' ops.
        monkeypatch.setattr(xformers, "_unavailable", lambda module: None)
        dispatch._choose.cache_clear()

    monkeypatch.delenv("XFV1_OPS", raising=False)
    install(*EVERYTHING)
    yield install
    dispatch._choose.cache_clear()


def only(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setenv("XFV1_OPS", setting)


@pytest.mark.parametrize("packages", [EVERYTHING, PACKAGES, ("xformers", "triton"), ("triton",)])
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_chosen_op_is_the_first_that_can(
    install: Install, device: Device, packages: tuple[str, ...]
) -> None:
    """For every layer and batch; and it exists there, and ignores nothing of the layer."""
    install(*packages)
    for name, layer in LAYERS.items():
        for batch in BATCHES.values():
            op = choose(layer, batch, device)
            order = order_of(layer, batch, device)
            able = [n for n in order if not OPS[n].not_supported_reasons(layer, batch, device)]
            assert op.name == able[0]
            assert runs_on(op.name, device)
            assert name not in IGNORES[op.name]


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_every_device_serves_every_layer_with_triton_alone(
    install: Install, layer: Layer, device: Device
) -> None:
    install("triton")
    assert layer_reasons(layer, device) == []
    assert layer_reasons(layer, device, encoder=True) == []
    expected = {"torch"} if device.kind == "cpu" else {"triton"}
    names = {choose(layer, batch, device).name for batch in BATCHES.values()}
    assert names <= expected | ({"triton"} if device.interpreted else set())


@pytest.mark.parametrize(
    ("device", "layer", "batch", "expected"),
    [
        pytest.param(TURING, PLAIN, DECODES, "triton", id="turing decodes"),
        pytest.param(TURING, PLAIN, VERIFICATION, "triton", id="turing verification"),
        pytest.param(TURING, PLAIN, PREFILLS, "xformers_cutlass", id="turing prefills"),
        pytest.param(TURING, PLAIN, FEW_OF_LONG, "triton", id="turing, few queries of long"),
        pytest.param(TURING, PLAIN, FRESH, "xformers_cutlass", id="turing fresh prefills"),
        pytest.param(TURING, PLAIN, ENCODERS, "xformers_cutlass", id="turing encoders"),
        pytest.param(TURING, BFLOAT16, PREFILLS, "triton", id="turing bfloat16"),
        pytest.param(AMPERE, FLOAT32, PREFILLS, "xformers_cutlass", id="ampere float32"),
        pytest.param(AMPERE, FLOAT32, DECODES, "triton", id="ampere float32 decodes"),
        pytest.param(HOPPER, LAYERS["alibi sqrt"], PREFILLS, "triton", id="hopper alibi sqrt"),
        pytest.param(BLACKWELL, LAYERS["sinks"], DECODES, "triton", id="blackwell sinks"),
        pytest.param(MI300, LAYERS["sinks"], PREFILLS, "triton", id="mi300 sinks"),
        pytest.param(MI300, FLOAT32, PREFILLS, "triton", id="mi300 float32"),
        pytest.param(INTERPRETED, BFLOAT16, DECODES, "torch", id="interpreter bfloat16"),
    ],
)
def test_where_little_choice_is_left(
    device: Device, layer: Layer, batch: Batch, expected: str
) -> None:
    assert choose(layer, batch, device).name == expected


@pytest.mark.parametrize(
    ("setting", "device", "batch", "expected"),
    [
        ("xformers_splitk,triton", AMPERE, DECODES, "xformers_splitk"),
        ("triton,xformers_splitk", AMPERE, DECODES, "triton"),
        ("xformers_splitk,triton", TURING, DECODES, "triton"),
        ("xformers_splitk,triton", AMPERE, VERIFICATION, "xformers_splitk"),
        ("xformers_splitk,triton", AMPERE, BATCHES["uneven verification"], "triton"),
        ("xformers_splitk,triton", AMPERE, BATCHES["decodes, HND"], "triton"),
        ("xformers_splitk,triton", AMPERE, PREFILLS, "triton"),
        ("xformers_splitk,triton", MI300, DECODES, "xformers_splitk"),
        ("xformers_fa3,triton", HOPPER, PREFILLS, "xformers_fa3"),
        ("xformers_fa3,triton", HOPPER, BATCHES["prefills, HND"], "triton"),
        ("xformers_fa3,triton", BLACKWELL, PREFILLS, "triton"),
        ("vllm_fa3,vllm_fa2,triton", HOPPER, DECODES, "vllm_fa3"),
        ("vllm_fa3,vllm_fa2,triton", BLACKWELL, DECODES, "vllm_fa2"),
        ("vllm_fa3,vllm_fa2,triton", AMPERE, DECODES, "vllm_fa2"),
        ("vllm_fa2,triton", AMPERE, dataclasses.replace(DECODES, uniform=False), "triton"),
        ("vllm_fa2,triton", AMPERE, BATCHES["uneven verification"], "vllm_fa2"),
        ("vllm_fa3,triton", HOPPER, dataclasses.replace(DECODES, uniform=False), "vllm_fa3"),
        ("vllm_fa3,vllm_fa2,triton", TURING, DECODES, "triton"),
        ("vllm_fa3,vllm_fa2,triton", MI300, DECODES, "triton"),
        (" xformers_ck , triton ", MI300, PREFILLS, "xformers_ck"),
    ],
)
def test_setting_gives_the_order(
    monkeypatch: pytest.MonkeyPatch, setting: str, device: Device, batch: Batch, expected: str
) -> None:
    only(monkeypatch, setting)
    assert choose(PLAIN, batch, device).name == expected
    assert list(order_of(PLAIN, batch, device)) == re.findall(r"\w+", setting)


@pytest.mark.parametrize(
    ("features", "batch", "lse", "refused"),
    [
        ({}, PREFILLS, False, ""),
        ({"sliding_window": 512}, PREFILLS, False, "no windows"),
        ({"sliding_window": 512}, DECODES, False, "no windows"),
        # Its own keys are all there.
        ({"sliding_window": 512}, ENCODERS, False, ""),
        ({}, DECODES, True, "no LSE"),
        ({}, ENCODERS, True, ""),
        ({"alibi": True}, PREFILLS, False, ""),
        ({"alibi": True}, ENCODERS, False, ""),
        ({"alibi": True}, ENCODERS, True, "no LSE with ALiBi"),
        ({}, dataclasses.replace(ENCODERS, max_query_len=1), True, "no request without a token"),
        ({}, dataclasses.replace(ENCODERS, max_query_len=1, uniform=True), True, ""),
    ],
)
def test_what_flash_attention_2_leaves_out(
    features: dict[str, Any], batch: Batch, lse: bool, refused: str
) -> None:
    """Seen on an H100: NaN of blocks before a window, an LSE of none or of other logits."""
    layer = dataclasses.replace(PLAIN, **features)
    given = dataclasses.replace(batch, lse=lse)
    reasons = OPS["vllm_fa2"].not_supported_reasons(layer, given, AMPERE)
    assert len(reasons) == bool(refused)
    assert all(reason.startswith(refused) for reason in reasons)


def test_setting_is_heeded_when_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("triton", "vllm_fa2", "triton"):
        only(monkeypatch, name)
        assert choose(PLAIN, DECODES, AMPERE).name == name


def test_unknown_op_is_answered_with_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "triton,flash")
    with pytest.raises(ValueError, match=r"XFV1_OPS='triton,flash': no op 'flash'") as raised:
        choose(PLAIN, DECODES, AMPERE)
    assert all(name in str(raised.value) for name in OPS)


def test_no_op_is_answered_with_every_ops_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("xformers_splitk", "vllm_fa2", "xformers_ck")
    only(monkeypatch, ",".join(names))
    with pytest.raises(NoOp, match="no op serves prefill: ") as raised:
        choose(FLOAT32, PREFILLS, TURING)
    for name in names:
        reasons = OPS[name].not_supported_reasons(FLOAT32, PREFILLS, TURING)
        assert len(reasons) > 1
        assert f"{name}: {', '.join(reasons)}" in str(raised.value)


def test_layer_is_refused_by_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "xformers_splitk")
    (reason,) = layer_reasons(PLAIN, AMPERE)
    assert reason.startswith("no op serves prefill: xformers_splitk: ")
    assert len(layer_reasons(FLOAT32, AMPERE)) == 2
    (reason,) = layer_reasons(PLAIN, AMPERE, encoder=True)
    assert reason.startswith("no op serves encoder: xformers_splitk: ")


def unavailable(monkeypatch: pytest.MonkeyPatch, found: Any) -> list[str]:
    """The reason for xFormers' FlashAttention 2 where importing its module gives that."""

    def import_module(name: str) -> Any:
        assert name == "xformers.ops.fmha.flash"
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(xformers, "_unavailable", UNAVAILABLE.__wrapped__)
    monkeypatch.setattr(importlib, "import_module", import_module)
    return OPS["xformers_fa2"].not_supported_reasons(PLAIN, FRESH, AMPERE)


@pytest.mark.parametrize(
    "error",
    [
        ImportError("Requires Flash-Attention version >=2.7.1"),
        OSError("libcudart.so.13: cannot open shared object file"),
        RuntimeError("Unknown type specifier"),
    ],
    ids=repr,
)
def test_an_xformers_that_does_not_load_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    (reason,) = unavailable(monkeypatch, error)
    assert reason == f"xformers does not load: {type(error).__name__}: {error}"


def test_an_op_that_this_build_of_xformers_lacks_is_not_offered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As PyPI's, which is built for CUDA, on AMD; nor one that it has turned off."""
    operator = SimpleNamespace(is_available=lambda: False)
    (reason,) = unavailable(monkeypatch, SimpleNamespace(FwOp=operator))
    assert reason.startswith("this build of xformers lacks the op")
    operator.is_available = lambda: True
    off = SimpleNamespace(FwOp=operator, _fwd_kernel_splitK=None)
    (reason,) = unavailable(monkeypatch, off)
    assert "XFORMERS_ENABLE_TRITON=1" in reason
    assert unavailable(monkeypatch, SimpleNamespace(FwOp=operator)) == []


def test_the_next_op_serves_where_xformers_lacks_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(PLAIN, FRESH, MI300).name == "xformers_ck"
    monkeypatch.setattr(xformers, "_unavailable", lambda module: f"no {module}")
    dispatch._choose.cache_clear()
    assert choose(PLAIN, FRESH, MI300).name == "triton"
    assert choose(PLAIN, DECODES, MI300).name == "triton"
    assert choose(PLAIN, FRESH, TURING).name == "triton"


def test_xformers_is_asked_once_and_only_where_it_might_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes a second to import."""
    assert hasattr(UNAVAILABLE, "cache_clear")
    asked: list[str] = []
    monkeypatch.setattr(xformers, "_unavailable", asked.append)
    for op in OPS.values():
        for batch in BATCHES.values():
            op.not_supported_reasons(PLAIN, batch, CPU)
    assert asked == []


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_amd_is_given_its_own_ops(batch: Batch) -> None:
    order = order_of(PLAIN, batch, MI300)
    assert "triton" in order
    assert batch.kind == DECODE or "xformers_ck" in order
    able = [n for n in order if not OPS[n].not_supported_reasons(PLAIN, batch, MI300)]
    assert "triton" in able
    assert set(able) <= {"triton", "xformers_splitk", "xformers_ck"}


def test_rules_name_ops_that_exist_once_each() -> None:
    """Each for one kind of device, and with its reason."""
    for rule in RULES:
        assert set(rule.order) <= OPS.keys()
        assert len(set(rule.order)) == len(rule.order)
        assert rule.kind in KINDS
        assert rule.why
        assert set(rule.devices) < {"cuda", "hip", "cpu"}
        assert len(rule.devices) == 1


def test_only_hoppers_rules_are_measured() -> None:
    """A time on an H100 says nothing about later cards, or about AMD's of a near capability."""
    measured = [rule for rule in RULES if rule.why.startswith("measured: ")]
    assert len(measured) == 4
    for rule in measured:
        batch = Batch(rule.kind, num_reqs=4, max_seq_len=4096, max_query_len=64)
        layer = dataclasses.replace(PLAIN, head_size=max(rule.head_sizes[0], 64))
        fitting = [name for name, device in DEVICES.items() if rule.fits(layer, batch, device)]
        assert fitting == ["sm_90"]


RULE = Rule(
    DECODE,
    ("triton",),
    head_sizes=(64, 128),
    num_reqs=(2, 16),
    seq_lens=(256, 4096),
    query_lens=(1, 32),
    dtypes=(torch.float16,),
    devices=("cuda",),
    capability=((8, 0), (9, 0)),
)


@pytest.mark.parametrize(
    ("fits", "facts"),
    [
        *((True, {"head_size": n}) for n in (64, 80, 128)),
        *((False, {"head_size": n}) for n in (63, 129)),
        *((True, {"num_reqs": n}) for n in (2, 16)),
        *((False, {"num_reqs": n}) for n in (1, 17)),
        *((True, {"max_seq_len": n}) for n in (256, 4096)),
        *((False, {"max_seq_len": n}) for n in (255, 4097)),
        *((True, {"max_query_len": n}) for n in (1, 32)),
        *((False, {"max_query_len": n}) for n in (0, 33)),
        *((True, {"capability": n}) for n in ((8, 0), (8, 6), (9, 0))),
        *((False, {"capability": n}) for n in ((7, 5), (9, 1), (10, 0))),
        *((False, {"device": kind}) for kind in ("hip", "cpu")),
        (False, {"dtype": torch.bfloat16}),
        (False, {"kind": PREFILL}),
    ],
    ids=str,
)
def test_a_rules_bounds_are_within_it(fits: bool, facts: dict[str, Any]) -> None:
    all_facts: dict[str, Any] = {
        "kind": DECODE,
        "num_reqs": 4,
        "max_seq_len": 1024,
        "head_size": 128,
        "dtype": torch.float16,
        "device": "cuda",
        "capability": (8, 0),
    } | facts
    layer: Any
    batch: Any
    layer, batch = (
        dataclasses.replace(of, **{k: v for k, v in all_facts.items() if hasattr(of, k)})
        for of in (PLAIN, DECODES)
    )
    device = Device(all_facts["device"], all_facts["capability"])
    assert RULE.fits(layer, batch, device) == fits
    anything = Rule(batch.kind, ("triton",))
    assert anything.fits(layer, batch, device)


def test_batches_are_told_apart_by_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded up, so that one is in a rule's bounds if all are that round to it."""
    seen: list[Batch] = []
    rounded = {0: 0, 1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 16: 16, 17: 32}
    with monkeypatch.context() as patched:
        patched.setattr(dispatch, "_choose", lambda layer, batch, *_: seen.append(batch))
        for count in rounded:
            choose(PLAIN, Batch(DECODE, num_reqs=count, max_seq_len=max(count, 1)), AMPERE)
        for length in (1, 63, 64, 65):
            choose(PLAIN, Batch(PREFILL, max_query_len=length), AMPERE)
    assert [batch.num_reqs for batch in seen[:8]] == list(rounded.values())
    assert [batch.max_seq_len for batch in seen[:8]] == [1, *list(rounded.values())[1:]]
    assert [batch.max_query_len for batch in seen[8:]] == [1, 63, 64, 64]


@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_fits_whatever_a_phase_brings(kind: str) -> None:
    """And each ends with what serves all layers: Triton's op on a GPU, PyTorch's on a CPU."""
    fitting = set()
    for device in DEVICES.values():
        for head_size in (1, 16, 64, 128, 256, 512):
            layer = dataclasses.replace(PLAIN, head_size=head_size)
            for num_reqs in (1, 8, 256, 4096):
                for max_seq_len in (1, 512, 8192, 1 << 20):
                    batch = Batch(kind, num_reqs=num_reqs, max_seq_len=max_seq_len)
                    fitting.add(next(r for r in RULES if r.fits(layer, batch, device)))
    assert {rule.kind for rule in fitting} == {kind}
    assert all({"triton", "torch"} <= set(rule.order) for rule in fitting)


def test_layers_alike_but_for_whose_keys_they_read_choose_each_their_own_op(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A layer that reads another's cache has no fresh keys, though all else of it is the same."""
    from xfv1.impl import XFormersImpl

    asked: list[Batch] = []
    choose = dispatch.choose

    def record(layer: Layer, batch: Batch, device: Device) -> Any:
        asked.append(batch)
        return choose(layer, batch, device)

    own = XFormersImpl(8, 64, 0.125, 2)
    shared = XFormersImpl(8, 64, 0.125, 2, kv_sharing_target_layer_name="model.layers.0.attn")
    pages = torch.zeros(4, 2, 16, 128)
    lens = torch.tensor([0, 5, 12], dtype=torch.int32)
    batch = Batch(PREFILL, num_reqs=2, max_query_len=7, max_seq_len=7, uniform=False, fresh=True)
    table = torch.zeros(2, 1, dtype=torch.int32)
    phase = Phase(batch, slice(0, 12), lens, lens, lens[1:], lens[1:], table)
    monkeypatch.setattr(dispatch, "choose", record)
    for impl in (own, shared, own):
        facts = impl._layer(torch.float32, 16, True)
        batch = impl._batch(phase.batch, phase, cache.views(pages, 64, None))
        impl._op(facts, batch, phase, torch.zeros(12, 8, 64))
    assert [batch.fresh for batch in asked] == [True, False]


@pytest.mark.parametrize(
    ("attn_type", "causal", "block_size", "encoder", "host_lens"),
    [
        ("decoder", True, 16, False, [True]),
        ("encoder_only", False, 0, True, [True]),
        ("encoder", False, 0, True, [True]),
        ("encoder_decoder", False, 16, False, [False]),
        ("drafting decoder", True, 16, False, [True, False]),
    ],
)
def test_a_layer_is_asked_about_for_what_it_is(
    monkeypatch: pytest.MonkeyPatch,
    attn_type: str,
    causal: bool,
    block_size: int,
    encoder: bool,
    host_lens: list[bool],
) -> None:
    """When it is made: what no op serves is refused there, and cross attention's lengths are
    known on the device alone, as are at times those of verified drafts."""
    from xfv1.impl import XFormersImpl

    asked: list[tuple[Layer, dict[str, Any]]] = []

    def record(layer: Layer, device: Device, **kind: Any) -> list[str]:
        asked.append((layer, kind))
        return []

    monkeypatch.setattr(support, "layer_reasons", record)
    monkeypatch.setattr(compat, "speculates", lambda: attn_type.startswith("drafting"))
    XFormersImpl(8, 64, 0.125, 2, attn_type=attn_type.removeprefix("drafting "))
    for layer, kind in asked:
        assert (layer.causal, layer.block_size) == (causal, block_size)
        assert kind.pop("encoder", False) == encoder
        assert not kind.pop("lse", False)
    assert [kind for _, kind in asked] == [{"host_lens": known} for known in host_lens]


def test_a_drafting_servers_layer_is_refused_once_for_what_nobody_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from xfv1.impl import XFormersImpl

    def refuse(layer: Layer, device: Device, *, host_lens: bool = True, **kind: Any) -> list[str]:
        return ["neither"] if host_lens else ["neither", "only so"]

    monkeypatch.setattr(support, "layer_reasons", refuse)
    monkeypatch.setattr(compat, "speculates", lambda: True)
    with pytest.raises(NotImplementedError, match=r"^xfv1: neither; only so$"):
        XFormersImpl(8, 64, 0.125, 2)


def test_a_survey_asks_of_prompts_and_of_their_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk has keys from before the step; a whole prompt and an encoder's have none."""
    asked = []

    def reasons(layer: Layer, batch: Batch, device: Device) -> dict[str, list[str]]:
        asked.append(batch)
        return {"first": ["why not"], "second": []}

    monkeypatch.setattr(dispatch, "reasons", reasons)
    device = CARDS["sm_90"].device
    rows = [*support.survey(PLAIN, device), *support.survey(PLAIN, device, encoder=True)]
    assert [(phase, op, refused) for phase, op, refused in rows] == [
        (phase, "second", {"first": ["why not"]})
        for phase in ("decode", "prefill", "chunked prefill", "encoder")
    ]
    assert [batch.kind for batch in asked] == [DECODE, PREFILL, PREFILL, ENCODER]
    assert [batch.fresh for batch in asked] == [False, True, False, True]
    assert [batch.max_seq_len > batch.max_query_len for batch in asked] == [
        True,
        False,
        True,
        False,
    ]
