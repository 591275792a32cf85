"""XFV1_DEBUG=1: is every wrong argument named before an op runs, and nothing that is right?"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fixtures.cases import AttnCase
from fixtures.cases.tables import cases
from fixtures.inputs import Poison, build_inputs
from tests.harness.batch import common_metadata
from tests.harness.compare import check_cache, check_output
from tests.harness.driver import Driver, drive
from tests.harness.memory import UNTOUCHED, bits, new_output
from tests.harness.truth import expected, written_cache
from xfv1 import debug
from xfv1.backend import XFormersAttentionBackend
from xfv1.dispatch import OPS

pytestmark = pytest.mark.cpu

CASE = AttnCase(scenario="mixed_small")
ENCODER = AttnCase(scenario="encoder_small", attention="encoder")
CROSS = AttnCase(scenario="cross_small", attention="cross")
SHARING = AttnCase(scenario="mixed_small", kv_sharing=True)
FP8 = AttnCase(scenario="mixed_small", kv_dtype="fp8_e4m3")
# Beyond the smoke tier: what a check too strict would take for a fault.
RIGHT = (
    *cases("smoke"),
    AttnCase(scenario="edge_decode", pad_reqs=3, pad_tokens=3),
    AttnCase(scenario="spec_uniform5", pad_reqs=2, pad_tokens=10),
    AttnCase(scenario="mixed_small", pad_tokens=5),
    AttnCase(scenario="mixed_empty"),
    AttnCase(scenario="mixed_small", fused_qkv=True),
    SHARING,
    AttnCase(scenario="fresh_prefill", kv_sharing=True, kv_dtype="fp8_e5m2"),
    AttnCase(scenario="chunked_prefill", attention="noncausal"),
    AttnCase(scenario="chunked_prefill", shared_prefix=True),
    AttnCase(scenario="mixed_small", kv_layout="BHLNC", num_heads=8, num_kv_heads=1),
    ENCODER,
    AttnCase(scenario="encoder_small", attention="encoder", fused_qkv=True, pad_tokens=4),
    CROSS,
)


@pytest.fixture(autouse=True)
def debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XFV1_OPS", raising=False)
    monkeypatch.setenv("XFV1_DEBUG", "1")


@dataclass
class Step:
    """One step's arguments, free to be spoiled."""

    driver: Driver
    common: Any
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    kv_cache: torch.Tensor
    slot_mapping: torch.Tensor
    output: torch.Tensor

    def spoil(self, name: str, change: Callable[[Any], Any]) -> None:
        """Change an argument; "common." is before the name of a field of the builder's."""
        owner = self.common if name.startswith("common.") else self
        name = name.removeprefix("common.")
        setattr(owner, name, change(getattr(owner, name)))

    @property
    def impl(self) -> Any:
        return self.driver.layer.impl

    def build(self) -> Any:
        return self.driver.builder.build(0, self.common)

    def forward(self, metadata: Any) -> None:
        tensors = (self.query, self.key, self.value, self.kv_cache)
        self.impl.forward(self.driver.layer, *tensors, metadata, self.output)

    def run(self) -> None:
        """What vLLM calls, in its order."""
        metadata = self.build()
        # Cross attention's layers write in their forward, those that share a cache not at all.
        if self.driver.case not in (CROSS, SHARING):
            writes = (self.key, self.value, self.kv_cache, self.slot_mapping)
            self.impl.do_kv_cache_update(self.driver.layer, *writes)
        self.forward(metadata)


def step_of(case: AttnCase, device: torch.device) -> Step:
    inputs = build_inputs(case, device)
    # On a CPU .cpu() copies nothing: the host's tensors must not change with the device's.
    common = common_metadata(inputs)
    names = ("query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping")
    common = common.replace(**{name: getattr(common, name).clone() for name in names})
    return Step(
        drive(XFormersAttentionBackend, case, device),
        common,
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.new_cache()[0],
        inputs.slot_mapping.clone(),
        new_output(inputs),
    )


def at(index: int | tuple[int, ...], value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


def on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, every other element of twice as many."""
    return torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2]


def heads_apart(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]


@dataclass(frozen=True)
class Wrong:
    """spoiled: the argument. says: what the error must say, a part of it."""

    spoiled: str
    change: Callable[[Any], Any]
    says: str
    case: AttnCase = CASE

    @property
    def error(self) -> type[Exception]:
        return TypeError if ".dtype" in self.says else ValueError


# Of CASE: query lengths 1, 1, 5, 5; keys 32, 40, 48, 56; six columns of blocks of 16.
WRONG = (
    Wrong("common.seq_lens", at(1, -1), "seq_lens[1]=-1: expected 1 to 56"),
    Wrong("common.seq_lens", at(0, 0), "seq_lens[0]=0: expected 1 to 56"),
    Wrong("common.seq_lens", at(2, 4), "seq_lens[2]=4: expected 5 to 56"),
    Wrong("common.seq_lens", at(3, 57), "seq_lens[3]=57: expected 5 to 56"),
    Wrong("common.seq_lens", at(1, 63), "seq_lens[1]=63: expected 64 to 64", ENCODER),
    Wrong("common.encoder_seq_lens", at(1, -1), "seq_lens[1]=-1: expected 0 to 129", CROSS),
    Wrong("common.encoder_seq_lens", at(1, 130), "seq_lens[1]=130: expected 0 to 129", CROSS),
    Wrong("common.seq_lens", lambda t: t[:3], "seq_lens.shape=(3,): expected [>= 4]"),
    Wrong("common.seq_lens", torch.Tensor.long, "seq_lens.dtype=torch.int64: expected torch.int32"),
    Wrong("common.seq_lens", strided, "seq_lens.stride()=(2,): expected 1"),
    Wrong("common.seq_lens", on_meta, "seq_lens.device=meta: expected"),
    Wrong(
        "common.seq_lens_cpu_upper_bound",
        at(2, 47),
        "seq_lens_cpu_upper_bound[2]=47: expected 48 or more",
    ),
    Wrong("common.max_seq_len", lambda n: n - 1, "seq_lens[3]=56: expected 5 to 55"),
    Wrong("common.max_query_len", lambda n: n - 1, "max_query_len=4: expected >= 5"),
    Wrong("common.query_start_loc_cpu", at(0, 1), "query_start_loc_cpu[0]=1: expected 0"),
    Wrong("common.query_start_loc_cpu", at(2, 0), "query_start_loc_cpu[2]=0: expected 1 to 12"),
    Wrong("common.query_start_loc_cpu", at(4, 13), "query_start_loc_cpu[4]=13: expected 7 to 12"),
    Wrong(
        "common.num_actual_tokens", lambda n: n - 1, "query_start_loc_cpu[4]=12: expected 7 to 11"
    ),
    Wrong("common.query_start_loc", at(0, 1), "query_start_loc[0]=1: expected 0 to 0"),
    Wrong("common.query_start_loc", at(3, 8), "query_start_loc[3]=8: expected 7 to 7"),
    Wrong("common.query_start_loc", lambda t: t[1:], "query_start_loc.shape=(4,): expected [>= 5]"),
    Wrong(
        "common.query_start_loc", torch.Tensor.long, "query_start_loc.dtype=torch.int64: expected"
    ),
    Wrong("common.block_table_tensor", at((1, 2), -1), "block_table[1, 2]=-1: expected 0 to"),
    Wrong("common.block_table_tensor", at((3, 3), 99), "block_table[3, 3]=99: expected 0 to"),
    Wrong(
        "common.block_table_tensor",
        lambda t: t[:, :3].contiguous(),
        "block_table.shape=(4, 3): expected 4 columns or more for seq_lens to 56",
    ),
    Wrong("common.block_table_tensor", lambda t: t[:3], "block_table.shape=(3, 6): expected [4, "),
    Wrong(
        "common.block_table_tensor", torch.Tensor.long, "block_table.dtype=torch.int64: expected"
    ),
    Wrong("common.block_table_tensor", strided, "block_table.stride()=(12, 2): expected 1"),
    Wrong("common.block_table_tensor", on_meta, "block_table.device=meta: expected"),
    Wrong("common.slot_mapping", lambda t: t[:11], "slot_mapping.shape=(11,): expected [>= 12]"),
    Wrong("common.slot_mapping", torch.Tensor.int, "slot_mapping.dtype=torch.int32: expected"),
    Wrong("slot_mapping", at(5, -2), "slot_mapping[5]=-2: expected -1 to"),
    Wrong("slot_mapping", at(0, 10**6), "slot_mapping[0]=1000000: expected -1 to"),
    Wrong("slot_mapping", torch.Tensor.int, "slot_mapping.dtype=torch.int32: expected torch.int64"),
    Wrong("slot_mapping", strided, "slot_mapping.stride()=(2,): expected 1"),
    Wrong("slot_mapping", lambda t: t.repeat(2), "key.shape=(12, 2, 64): expected [>= 24, 2, 64]"),
    Wrong("key", lambda t: t[:, :1], "key.shape=(12, 1, 64): expected [>= 12, 2, 64]"),
    Wrong("key", heads_apart, "key.stride()=(256, 128, 1): expected (any, 64, 1)"),
    Wrong("key", strided, "key.stride()=(256, 128, 2): expected 1 in the last dimension"),
    Wrong("key", torch.Tensor.float, "value.dtype=torch.float16: expected torch.float32"),
    Wrong("value", lambda t: t[..., :32], "value.shape=(12, 2, 32): expected [>= 12, 2, 64]"),
    Wrong("value", torch.Tensor.bfloat16, "value.dtype=torch.bfloat16: expected torch.float16"),
    Wrong("value", heads_apart, "value.stride()=(256, 128, 1): expected (any, 64, 1)"),
    Wrong("value", on_meta, "value.device=meta: expected"),
    Wrong("value", lambda t: t[:9], "value.shape=(9, 2, 64): expected [>= 104, 2, 64]", ENCODER),
    Wrong("kv_cache", on_meta, "kv_cache.device=meta: expected"),
    Wrong("kv_cache", on_meta, "kv_cache.device=meta: expected", SHARING),
    Wrong(
        "kv_cache", torch.Tensor.bfloat16, "kv_cache.dtype=torch.bfloat16: expected torch.float16"
    ),
    Wrong(
        "kv_cache", torch.Tensor.half, "kv_cache.dtype=torch.float16: expected torch.uint8 or", FP8
    ),
    Wrong("kv_cache", lambda t: t[:, :1], "kv_cache.shape="),
    Wrong("kv_cache", lambda t: t[..., :64], "expected [num_blocks, 2, block_size, 128]"),
    Wrong("kv_cache", strided, "kv_cache.stride()="),
    Wrong("query", lambda t: t[:, :4], "query.shape=(12, 4, 64): expected [>= 12, 8, 64]"),
    Wrong("query", lambda t: t[:11], "query.shape=(11, 8, 64): expected [>= 12, 8, 64]"),
    Wrong("query", lambda t: t.flatten(1), "query.shape=(12, 512): expected [>= 12, 8, 64]"),
    Wrong("query", strided, "query.stride()=(1024, 128, 2): expected 1 in the last dimension"),
    Wrong("query", torch.Tensor.float, "output.dtype=torch.float16: expected torch.float32"),
    Wrong("output", torch.Tensor.float, "output.dtype=torch.float32: expected torch.float16"),
    Wrong("output", lambda t: t[:11], "output.shape=(11, 8, 64): expected [>= 12, 8, 64]"),
    Wrong("output", lambda t: t.repeat(2, 1, 1), "output.shape=(24, 8, 64): expected (12, 8, 64)"),
    Wrong("output", strided, "output.stride()=(1024, 128, 2): expected 1 in the last dimension"),
)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.says.partition(":")[0])
def test_what_is_wrong_is_named_before_an_op_runs(
    wrong: Wrong, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = step_of(wrong.case, device)
    for op in OPS.values():
        monkeypatch.setattr(op, "run", lambda call: pytest.fail("an op ran"))
    step.spoil(wrong.spoiled, wrong.change)
    with pytest.raises(wrong.error) as raised:
        step.run()
    assert wrong.says in str(raised.value)


def test_another_groups_block_table_is_checked_too(device: torch.device) -> None:
    """vLLM puts it in place of the first group's, past the builder."""
    step = step_of(CASE, device)
    table, slots = step.common.block_table_tensor, step.common.slot_mapping
    metadata, update = step.build(), step.driver.builder.update_block_table
    with pytest.raises(ValueError, match=r"block_table\[2, 1\]=-7: expected 0 to"):
        step.forward(update(metadata, at((2, 1), -7)(table), slots))
    with pytest.raises(ValueError, match=r"slot_mapping\.shape=\(3,\): expected \[>= 12\]"):
        step.forward(update(metadata, table, slots[:3]))


@pytest.mark.parametrize("right", RIGHT, ids=lambda case: case.id)
def test_what_is_right_is_served(right: AttnCase, device: torch.device) -> None:
    """Ids past the cache too, in the table's entries past a request's last block."""
    inputs = build_inputs(right, device, Poison.OUT_OF_RANGE)
    outcome = drive(XFormersAttentionBackend, right, device).run(inputs)
    check_cache(inputs, outcome, written_cache(inputs)[1])
    check_output(inputs, outcome, expected(inputs, outcome.query))


def test_cross_attention_before_its_encoder_has_run_is_served(device: torch.device) -> None:
    """So vLLM warms up. Queries that see no key: zeros."""
    step = step_of(CROSS, device)
    for name in ("encoder_seq_lens", "encoder_seq_lens_cpu"):
        step.spoil(f"common.{name}", lambda lens: lens * 0)
    for name in ("key", "value"):
        step.spoil(name, lambda tensor: tensor[:0])
    step.run()
    assert not step.output.any()


@pytest.mark.parametrize("setting", ["0", "1"])
@pytest.mark.parametrize(
    ("num_reqs", "rows", "max_query_len"), [(0, 0, 0), (0, 3, 1), (2, 0, 1), (2, 3, 0)]
)
@pytest.mark.parametrize("sample", [CASE, FP8, ENCODER], ids=lambda case: case.id)
def test_a_step_without_tokens_does_nothing(
    sample: AttnCase,
    num_reqs: int,
    rows: int,
    max_query_len: int,
    setting: str,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """rows: of query, key and value, all of them padding."""
    monkeypatch.setenv("XFV1_DEBUG", setting)
    step = step_of(sample, device)
    step.common = step.common.replace(
        num_reqs=num_reqs,
        num_actual_tokens=0,
        max_query_len=max_query_len,
        max_seq_len=0,
        query_start_loc=torch.zeros(num_reqs + 1, dtype=torch.int32, device=device),
        query_start_loc_cpu=torch.zeros(num_reqs + 1, dtype=torch.int32),
        seq_lens=torch.zeros(num_reqs, dtype=torch.int32, device=device),
        seq_lens_cpu_upper_bound=torch.zeros(num_reqs, dtype=torch.int32),
        block_table_tensor=step.common.block_table_tensor[:num_reqs],
        slot_mapping=step.slot_mapping[:0],
    )
    for name in ("query", "key", "value", "output"):
        step.spoil(name, lambda tensor: tensor[:rows])
    step.spoil("slot_mapping", lambda slots: slots[:0])
    before = bits(step.kv_cache).clone()
    step.run()
    builder, common = step.driver.builder, step.common
    again = builder.update_block_table(step.build(), common.block_table_tensor, common.slot_mapping)
    step.forward(again)
    assert torch.equal(bits(step.kv_cache), before)
    assert (bits(step.output) == UNTOUCHED[step.output.itemsize]).all()


def test_while_a_graph_is_captured_nothing_on_the_device_is_read(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without content can be asked all that the host knows; what is wrong there is said."""
    step = step_of(CASE, device)
    for name in ("query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping"):
        step.spoil(f"common.{name}", on_meta)
    for name in ("query", "key", "value", "output", "kv_cache", "slot_mapping"):
        step.spoil(name, on_meta)
    writes = (step.key, step.value, step.kv_cache)

    def check() -> None:
        metadata = step.build()
        layer, slots = step.impl._checked, step.slot_mapping
        debug.check_update(layer, *writes, slots)
        tensors = (step.query, *writes, metadata.slot_mapping, step.output)
        debug.check_forward(layer, metadata.whole, *tensors, cross=False)

    with pytest.raises(NotImplementedError, match="meta"):
        check()
    monkeypatch.setattr(debug, "_capturing", lambda device: True)
    check()
    step.spoil("common.query_start_loc_cpu", at(2, 0))
    with pytest.raises(ValueError, match=r"query_start_loc_cpu\[2\]=0: expected 1 to 12"):
        check()


@pytest.mark.parametrize("setting", [None, "", "0"])
def test_nothing_is_checked_unless_asked_for(
    setting: str | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    for name in ("check_batch", "check_update", "check_forward"):
        monkeypatch.setattr(debug, name, lambda *args, name=name, **kwargs: called.append(name))
    step_of(CASE, device).run()
    assert called == ["check_batch", "check_update", "check_forward"]
    called.clear()
    monkeypatch.delenv("XFV1_DEBUG")
    if setting is not None:
        monkeypatch.setenv("XFV1_DEBUG", setting)
    step = step_of(CASE, device)
    # Asked once, when the layer and its builder are made.
    monkeypatch.setenv("XFV1_DEBUG", "1")
    step.run()
    assert called == []


def test_another_setting_is_answered_with_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XFV1_DEBUG", "yes")
    with pytest.raises(ValueError, match="XFV1_DEBUG='yes': expected 0 or 1"):
        debug.enabled()
