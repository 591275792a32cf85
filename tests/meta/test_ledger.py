"""Known failures are data: a broken entry says what is wrong, one that is out of date fails."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.harness.ledger import LEDGER, LISTS, OPTIONAL, REQUIRED, Known, LedgerError, load_ledger
from tests.meta.runs import CASE, WRONG, run_suite

BLIND = f"{WRONG}:NewestKeyLost"
ENTRY: dict[str, Any] = {
    "candidate": BLIND,
    "test": "test_output_matches_reference",
    "case": CASE,
    "reason": "the newest key is lost",
    "link": "tests/meta/candidates.py",
    "versions": ["*"],
    "devices": ["*"],
}


def _written(folder: Path, *entries: dict[str, Any], name: str = "ledger.toml") -> Path:
    """A ledger of these entries."""
    lines = []
    for entry in entries:
        # What JSON has for strings, numbers and lists of them is TOML's too.
        lines += ["[[known]]", *(f"{key} = {json.dumps(value)}" for key, value in entry.items())]
    path = folder / name
    path.write_text("\n".join(lines))
    return path


def test_an_entry_reads_back(tmp_path: Path) -> None:
    entries = load_ledger(_written(tmp_path, ENTRY, ENTRY | {"versions": ["0.32.*", "0.33.*"]}))
    assert entries[0] == Known(**ENTRY | {"versions": ("*",), "devices": ("*",)})
    assert entries[1].versions == ("0.32.*", "0.33.*")
    (optional,) = load_ledger(_written(tmp_path, ENTRY | {"unless": ["XFV1_OPS"]}))
    assert optional.unless == ("XFV1_OPS",)


def test_the_suites_own_ledger_loads() -> None:
    assert LEDGER.is_file()
    assert all(entry.reason and entry.link for entry in load_ledger())


@pytest.mark.parametrize("field", REQUIRED)
def test_a_missing_field_is_named_with_its_entry(tmp_path: Path, field: str) -> None:
    broken = {name: value for name, value in ENTRY.items() if name != field}
    with pytest.raises(LedgerError, match=rf"/ledger.toml, entry 2: {field} is missing$"):
        load_ledger(_written(tmp_path, ENTRY, broken))


@pytest.mark.parametrize("field", REQUIRED + OPTIONAL)
@pytest.mark.parametrize("value", ["", [], [""], [3], 3, True])
def test_a_value_that_is_none_is_named_with_what_is_expected(
    tmp_path: Path, field: str, value: object
) -> None:
    kind = "list" if field in LISTS else "str"
    with pytest.raises(LedgerError, match=rf"entry 1: {field}=.*: expected a {kind}"):
        load_ledger(_written(tmp_path, ENTRY | {field: value}))


def test_an_unknown_field_is_named(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"/ledger.toml, entry 1: since is no field$"):
        load_ledger(_written(tmp_path, ENTRY | {"since": "today"}))


def test_what_is_no_toml_is_said_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger.toml"
    path.write_text("[[known]]\ncandidate =\n")
    with pytest.raises(LedgerError, match=r"/ledger.toml: .*line 2.*: expected TOML$"):
        load_ledger(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("known = 3", "known=3: expected [[known]]"),
        ("known = {a = 1}", "known={'a': 1}: expected [[known]]"),
        ("known = [3]", "entry 1: 3: expected a table"),
        ("[[kown]]", "kown is no key: expected [[known]]"),
        ("x = " + "[" * 10_000, "maximum recursion depth exceeded"),
        ("\udcff", "'utf-8' codec can't decode byte 0xff in position 0"),
    ],
)
def test_a_file_that_is_no_ledger_says_what_is_wrong(
    content: str, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "ledger.toml"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(LedgerError, match=re.escape(said)) as raised:
        load_ledger(path)
    assert str(raised.value).startswith(f"{path}")


def test_a_field_is_named_that_was_nearly_right(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"Reason is no field \(did you mean reason\?\)$"):
        load_ledger(_written(tmp_path, ENTRY | {"Reason": "none"}))


def test_patterns_are_a_shells() -> None:
    patterns = {"test": "test_output*", "case": "*-alibi*", "versions": ("0.3?.*",)}
    known = Known(**ENTRY | patterns | {"devices": ("*H?00*", "*A100*")})
    assert known.applies(BLIND, "0.32.0", "NVIDIA H100 80GB HBM3")
    assert not known.applies(BLIND, "0.32.0", "cpu")
    assert not known.applies(BLIND, "0.4.0", "NVIDIA H100 80GB HBM3")
    assert not known.applies("xfv1", "0.32.0", "NVIDIA H100 80GB HBM3")
    assert known.matches("test_output_matches_reference", "mixed_small-alibi-sinks")
    assert not known.matches("test_cache", "mixed_small-alibi-sinks")
    assert not known.matches("test_output_matches_reference", "mixed_small-sinks")


def test_a_setting_voids_an_entry_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = {"versions": ("*",), "devices": ("*",)}
    always, unset = Known(**ENTRY | lists), Known(**ENTRY | lists | {"unless": ("XFV1_OPS",)})
    for value, applies in (("", True), ("triton", False)):
        monkeypatch.setenv("XFV1_OPS", value)
        assert unset.applies(BLIND, "0.32.0", "cpu") == applies
        assert always.applies(BLIND, "0.32.0", "cpu")


def test_the_ledger_is_strict_both_ways(tmp_path: Path) -> None:
    """What fails as known is green; what passes all the same, or matches nothing, is red."""
    passes = ENTRY | {"test": "test_cache_holds*"}
    elsewhere = ENTRY | {"case": "no_such_case", "versions": ["0.0.*"]}
    others = ENTRY | {"case": "no_such_case", "candidate": "xfv1"}
    later = ENTRY | {"case": "large_prefill-*"}
    stale = ENTRY | {"case": "no_such_case"}

    def command(entries: list[dict[str, Any]], *arguments: str) -> list[str]:
        path = _written(tmp_path, *entries, name=f"{len(list(tmp_path.iterdir()))}.toml")
        return [f"--candidate={BLIND}", f"--ledger={path}", *arguments]

    files = ("tests/conformance/test_output.py", "tests/conformance/test_cache.py")
    few = ("-m", "smoke", "-k", f"test_cache_holds and {CASE}")
    known, alone, passed, unused = run_suite(
        tmp_path / "runs",
        command([ENTRY], *files, f"--case={CASE}"),
        command([ENTRY], files[0], f"--case={CASE}"),
        command([passes], *files, f"--case={CASE}"),
        command([later, elsewhere, others, stale], "tests/conformance", *few),
    )

    assert known.status == 0, known.output
    assert known.counts == {"passed": 1, "refused": 0, "known": 1, "failed": 0}
    assert known.statuses["test_output_matches_reference"] == "known"
    reasons = [result["reason"] for result in known.results["results"]]
    assert "the newest key is lost" in reasons

    # Nothing passed, yet all has been compared.
    assert alone.status == 0, alone.output
    assert alone.counts == {"passed": 0, "refused": 0, "known": 1, "failed": 0}
    assert alone.results["problems"] == []

    assert passed.status == 1
    assert passed.statuses["test_cache_holds_new_tokens_and_nothing_else_changes"] == "failed"
    assert "the newest key is lost" in passed.output

    # An entry of another version, another candidate or another tier is not stale.
    assert unused.status == 1
    assert unused.counts["failed"] == 0
    assert unused.results["problems"] == [
        "known failure matches no case: test_output_matches_reference, no_such_case"
    ]


def test_a_drawn_case_that_fails_as_known_does_not_fail_the_run(tmp_path: Path) -> None:
    """By the entries for the test that asks the same; what none of them names still fails."""
    runs = []
    for number, case in enumerate(("custom-*", "custom-*-sinks*")):
        path = _written(tmp_path, ENTRY | {"case": case}, name=f"{number}.toml")
        drawn = "tests/conformance/test_properties.py"
        runs.append([drawn, f"--candidate={BLIND}", f"--ledger={path}"])
    every, some = run_suite(tmp_path / "runs", *runs)

    assert every.status == 0, every.output
    assert every.counts == {"passed": 0, "refused": 0, "known": 1, "failed": 0}
    # Some pass, those in which a query sees but its own key: no entry is too wide for that.
    (result,) = every.results["results"]
    assert result["elements"] > 0
    found = re.fullmatch(r"25 drawn, (\d+) known: the newest key is lost", result["reason"])
    assert found and 0 < int(found[1]) < 25
    assert f"known 1: {result['reason']}" in every.output

    assert some.status == 1
    (result,) = some.results["results"]
    assert result["status"] == "failed"
    assert "sinks" not in result["case"]
