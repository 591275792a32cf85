"""Does xfv1 fit the plugin surface of a vLLM: the installed one, or a released one's sources?

XFV1_CONTRACT_SOURCES: a folder that `fetch` filled; unset, the installed vLLM is asked. Either
way a process of its own does the asking (`probe`), once, and needs no GPU.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from fixtures.cases import KV_LAYOUTS

ROOT = Path(__file__).resolve().parents[2]
SOURCES = os.environ.get("XFV1_CONTRACT_SOURCES", "")
ENVIRONMENT = {"VLLM_TARGET_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": "", "XFV1_CPU": "1"}
# What would change the answers.
UNSET = ("XFV1_OPS", "TRITON_INTERPRET", "VLLM_KV_CACHE_LAYOUT", "VLLM_PLUGINS")
BACKEND = "xfv1.backend.XFormersAttentionBackend"
GPUS = ("cuda 7.5", "cuda 8.0", "cuda 9.0", "cuda 10.0", "rocm gfx942")

Ask = Callable[[str], Any]


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory, testrun_uid: str) -> dict[str, Any]:
    """The probe's report, made once for all of pytest-xdist's workers."""
    path = tmp_path_factory.getbasetemp().parent / f"contract-{testrun_uid}.json"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            _probe(path)
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def _probe(path: Path) -> None:
    if SOURCES and not Path(SOURCES, "vllm").is_dir():
        pytest.fail(f"XFV1_CONTRACT_SOURCES={SOURCES}: no vLLM there; contract.fetch puts it there")
    environment = {name: value for name, value in os.environ.items() if name not in UNSET}
    folders = (SOURCES and str(Path(SOURCES).resolve()), str(ROOT), os.environ.get("PYTHONPATH"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    done = subprocess.run(
        [sys.executable, "-m", "tests.contract.probe", "--report", str(path)],
        cwd=ROOT,
        env=environment | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        pytest.fail(f"the probe failed:\n{done.stdout[-4000:]}")


@pytest.fixture
def ask(report: dict[str, Any]) -> Ask:
    """A section's answer; its traceback fails the test."""

    def answer(section: str) -> Any:
        if "error" in report[section]:
            pytest.fail(f"{section}:\n{report[section]['error']}")
        return report[section]["answer"]

    return answer


def test_the_vllm_meant_was_asked(ask: Ask) -> None:
    vllm = ask("vllm")
    if SOURCES:
        assert Path(vllm["file"]).is_relative_to(Path(SOURCES).resolve())
        (metadata,) = Path(SOURCES).glob("vllm-*.dist-info")
        assert metadata.name == f"vllm-{vllm['version']}+cpu.dist-info"


def test_version_is_among_those_tested(ask: Ask) -> None:
    from xfv1.compat import TESTED

    first, last = TESTED
    assert first <= tuple(map(int, re.findall(r"\d+", ask("vllm")["version"])[:2])) <= last


def test_register(ask: Ask) -> None:
    """CUSTOM is xfv1, and so is a name of its own where there can be one."""
    registration = ask("registration")
    name = "XFORMERS" if registration["takes names"] else "CUSTOM"
    assert registration["name"] == name
    assert registration["classes"] == dict.fromkeys({"CUSTOM", "CPU_ATTN", name}, BACKEND)
    assert registration["repeatable"]


def test_its_names_survive_the_way_into_a_process_without_plugins(ask: Ask) -> None:
    """As vLLM's configuration goes to its engine."""
    registration = ask("registration")
    names = {"CUSTOM", "CPU_ATTN", registration["name"]}
    assert registration["pickled"] == {name: name for name in names}


def test_no_method_is_left_abstract(ask: Ask) -> None:
    assert set(map(tuple, ask("abstract").values())) == {()}


def test_methods_take_what_vllm_declares(ask: Ask) -> None:
    refused = ask("signatures")
    assert refused == {"backend": [], "impl": [], "builder": [], "FLASH_ATTN": []}


def test_views_are_canonical_and_in_the_layout_named(ask: Ask) -> None:
    """[num_blocks, num_kv_heads, block_size, 2 * head_size], whatever the strides."""
    for name, view in ask("layouts")["views"].items():
        assert view == {"shape": [5, 2, 16, 128], "axes": name.replace("L", "")}


def test_every_layout_is_read_and_token_by_token_preferred(ask: Ask) -> None:
    layouts = ask("layouts")
    assert next(iter(layouts["views"])) == "LBNHC"
    assert set(layouts["views"]) == set(layouts["every"]) <= set(KV_LAYOUTS)


def test_blocks_are_outermost_with_all_layers_in_one_tensor(ask: Ask) -> None:
    """So that vLLM pads pages and moves blocks of all layers at once."""
    layouts = ask("layouts")
    if "layered" not in layouts:
        pytest.skip("this vLLM owns the cache's strides")
    assert layouts["layered"] == {"NHD": "BLNHC", "HND": "BHLNC"}
    assert layouts["indexes_kv_by_block_stride"] == {"NHD": True, "HND": True}
    assert layouts["block_dim"] == 0


def test_batches_match_the_reference(ask: Ask) -> None:
    """Numbers and cache, through the real Attention layer."""
    batches = ask("batches")
    assert {name: wrong for name, wrong in batches.items() if wrong} == {}
    layouts = {f"layout {name}" for name in ask("layouts")["views"]}
    assert batches.keys() > layouts | {"decodes", "fp8", "encoder", "cross"}


def test_builder_builds_in_every_way(ask: Ask) -> None:
    builder = ask("builder")
    ways = {"build", "capture", "drafting", "update_block_table", "unpadded"}
    assert builder["phases"].keys() == ways
    for phases in builder["phases"].values():
        assert phases == [["decode", 2], ["prefill", 2]]
    assert builder["updated"]
    assert builder["cudagraph support"] == "UNIFORM_BATCH"


def test_decode_context_parallelism_is_refused(ask: Ask) -> None:
    assert "XFormersImpl" in ask("context_parallelism")


def test_cpu_platform_takes_xfv1_where_told(ask: Ask) -> None:
    assert ask("cpu_selection") == BACKEND


@pytest.mark.parametrize("gpu", GPUS)
def test_gpu_platform_selects_xfv1_by_its_names(ask: Ask, gpu: str) -> None:
    served = ask("gpu_selection")[gpu]["served"]
    assert served.keys() == {"CUSTOM", ask("registration")["name"]}
    for answers in served.values():
        assert answers == dict.fromkeys(answers, BACKEND)


@pytest.mark.parametrize("gpu", GPUS)
def test_gpu_platform_refuses_what_xfv1_does(ask: Ask, gpu: str) -> None:
    refused = ask("gpu_selection")[gpu]["refused"]
    assert {what for what, answer in refused.items() if not _is_refusal(answer)} == set()
    # Each names the value that was asked for and what is accepted.
    unclear = {what for what, answer in refused.items() if not re.search("=.+: expected ", answer)}
    assert unclear == set()
    assert refused.keys() >= {"head size 513", "block size 24", "cache", "MLA", "sparse"}


@pytest.mark.parametrize("gpu", GPUS)
def test_gpu_platform_gives_each_ops_reasons(ask: Ask, gpu: str) -> None:
    answer = ask("gpu_selection")[gpu]["splitk alone"]
    assert _is_refusal(answer)
    for phase in ("decode", "prefill"):
        assert re.search(f"no op serves {phase}: xformers_splitk: [^;]*head size 80", answer)


def _is_refusal(answer: str) -> bool:
    """In vLLM's words; it names the backend and the reasons."""
    return (
        re.match(r"ValueError: Selected backend .*CUSTOM.* is not valid .* Reason: ", answer)
        is not None
    )
