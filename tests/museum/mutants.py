"""Generated faults: which small changes of the source the suite's own tests notice.

    python -m tests.museum.mutants --json tests/museum/mutants.json

Each mutant (`tests.museum.mutate`) is put in place of its module in a process of its own, which
the conformance tests are then run in, the very functions, on a few cases of the cpu tier; what
these do not notice, the suite's other tests of that module are asked about. Triton kernels run in
Triton's interpreter.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

from tests.harness.environment import prepare

prepare()

import pytest  # noqa: E402
import torch  # noqa: E402

from fixtures.cases import AttnCase  # noqa: E402
from fixtures.cases.effects import most_keys  # noqa: E402
from fixtures.cases.space import FEATURES, OTHER, features_of  # noqa: E402
from fixtures.cases.tables import TIERS, Row, rows  # noqa: E402
from tests.harness.driver import drive  # noqa: E402
from tests.harness.loading import load_candidate  # noqa: E402
from tests.harness.provenance import environment  # noqa: E402
from tests.harness.verdicts import Refused  # noqa: E402
from tests.museum.kill import (  # noqa: E402
    CPU,
    KILLED,
    KINDS,
    PASSED,
    REFUSED,
    SURVIVED,
    Attempt,
    applies,
    asked_in,
    attempt,
)
from tests.museum.mutate import Mutant  # noqa: E402
from tests.museum.targets import (  # noqa: E402
    EQUIVALENT,
    TARGETS,
    WITHOUT,
    Lane,
    Target,
    chosen,
    digest,
    explained,
    generated,
)

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("mutants.json")
CRASHED, TIMEOUT = "crashed", "timeout"
# What a process that runs into its alarm is given, over what the truth takes.
SLOWER, LEAST_SECONDS = 10, 10
# Tiles of rows and keys, of about 16 by 32, that Triton's interpreter does in two seconds.
HEAVY = 140
# Triton's interpreter copies what lies between blocks 2**31 elements apart.
INTERPRETABLE = tuple(kind for kind in KINDS if kind != "addressing")
# The first cases of a lane are asked in all ways.
DEEP = 2


# Which cases.


@dataclass(frozen=True)
class Ask:
    """A case for a lane. deep: in all ways."""

    lane: Lane
    row: Row
    deep: bool


def features(case: AttnCase) -> frozenset[str]:
    """The facts about a case that code may have a branch for."""
    uniform = len(set(case.query_lens)) == 1
    window = case.sliding_window or case.longest
    decodes = [k for q, k in case.requests if q == 1]
    splits = min(window, max(decodes, default=0)) >= 512
    # If a query sees one key alone, its logit does not matter.
    tells = most_keys(case) > 1
    one_key_window = case.windowed and window == 1
    # A mask or a weight depends on these, and has to be right for each kind of batch.
    layer = {feature: feature in features_of(case) for feature in FEATURES if feature != OTHER}
    layer |= {"plain": True, "sliding_window": case.windowed and not one_key_window}
    batch = {
        case.kind: True,
        case.attention: True,
        "splits": splits,
        "verification": uniform and 1 < case.query_lens[0] <= 16,
    }
    facts = {
        case.heads_word: True,
        case.kv_layout: True,
        case.dtype: True,
        case.kv_dtype: True,
        "softcap in float32": case.softcap is not None and case.dtype == "fp32",
        "alibi_sqrt": case.alibi_sqrt,
        "window of one": one_key_window,
        "splits of several": splits and len(decodes) > 1 and case.num_kv_heads > 1,
        "splits without keys": splits and min(decodes) <= 256,
        "ragged verification": not uniform and 1 not in case.query_lens,
        "padded requests": case.pad_reqs > 0,
        "padded tokens": case.pad_tokens > 0,
        "no query": 0 in case.query_lens,
        "fresh": all(q == k for q, k in case.requests),
        "fresh beside decodes": case.kind == "mixed" and any(q == k > 1 for q, k in case.requests),
        "many requests": len(case.requests) > 16,
        "long prefill": max(case.query_lens) > 64,
        "kv_sharing": case.kv_sharing,
        "shared_prefix": case.shared_prefix,
        "fused_qkv": case.fused_qkv,
        "extreme": case.logits == "extreme",
        "head size padded": tells and case.head_size & (case.head_size - 1) != 0,
        "head in two parts": tells and case.head_size == 192,
        "small head": tells and case.head_size < 64,
        "blocks of a tile's size or more": tells and case.block_size >= 64,
    }
    facts |= {f"{a}, {b}": tells and layer[a] and batch[b] for a in layer for b in batch}
    return frozenset(name for name, has in facts.items() if has)


def cases_for(lane: Lane) -> list[Row]:
    """A few rows of the cpu tier that together have every feature there is in those that the lane
    serves: by and by the one that adds most for its work."""
    left = [row for row in rows() if row.tier in TIERS[:2] and _tiles(row.case) <= HEAVY]
    left = [row for row in left if _served(lane, row.case)]
    missing = frozenset().union(*(features(row.case) for row in left))
    found: list[Row] = []
    while missing:
        best = max(left, key=lambda row: len(features(row.case) & missing) / (8 + _tiles(row.case)))
        found.append(best)
        missing -= features(best.case)
    return sorted(found, key=lambda row: _tiles(row.case))


def _tiles(case: AttnCase) -> int:
    """What a case takes, about, in tiles of rows by keys."""
    rows = [-(-q * case.group // 16) for q in case.query_lens]
    return case.num_kv_heads * sum(
        r * -(-min(k, (case.sliding_window or k) + q) // 32)
        for r, (q, k) in zip(rows, case.requests, strict=True)
    )


def _served(lane: Lane, case: AttnCase) -> bool:
    os.environ["XFV1_OPS"] = lane.ops
    try:
        drive(load_candidate(lane.candidate), case, CPU)
    except Refused:
        return False
    return True


def asked(ask: Ask) -> list[str]:
    """The kinds of test that the cpu tier asks of a case; of most, those about numbers alone."""
    kinds = INTERPRETABLE if ask.deep else ("output", "poison")
    return [k for k in kinds if applies(k, ask.row.case) and asked_in(k, ask.row) in TIERS[:2]]


def ask_once(ask: Ask, kind: str) -> Attempt:
    os.environ["XFV1_OPS"] = ask.lane.ops
    return attempt(load_candidate(ask.lane.candidate), kind, ask.row.case)


# One mutant.


@dataclass(frozen=True)
class Verdict:
    """What came of a mutant. verdict: killed, survived, crashed or timeout. kind: of the test
    that noticed it, or a file of tests. kinds: all that notice it on that case. equivalent: why
    nothing can."""

    id: str
    module: str
    function: str
    before: str
    after: str
    verdict: str
    kind: str = ""
    kinds: list[str] = field(default_factory=list)
    lane: str = ""
    case: str = ""
    seconds: float = 0.0
    message: str = ""
    equivalent: str = ""

    @property
    def noticed(self) -> bool:
        return self.verdict != SURVIVED


class _Finder:
    """Loads one module from another file."""

    def __init__(self, module: str, path: Path) -> None:
        self.module, self.path = module, path

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.module:
            return None
        return importlib.util.spec_from_file_location(name, self.path)


def put_in_place(mutant: Mutant, folder: Path) -> None:
    """From now on this process's xfv1, and what is built on it, has the mutant.

    The source lies in a file, because Triton reads its kernels' from there.
    """
    stale = ("xfv1", "reference.lowprec", "tests.museum.twins")
    for name in list(sys.modules):
        if any(name == top or name.startswith(f"{top}.") for top in stale):
            del sys.modules[name]
    path = folder / f"{mutant.module.rpartition('.')[2]}.py"
    path.write_text(mutant.source)
    sys.dont_write_bytecode = True
    sys.meta_path.insert(0, _Finder(mutant.module, path))


Say = Callable[[dict[str, Any]], None]


def examine(target: Target, asks: Sequence[Ask], usual: dict[Any, float], say: Say) -> None:
    """Ask about the mutant that is in place, until something notices it.

    Every case whether its output is right first, which most are noticed by, then all else.
    """
    plan = [(ask, "output") for ask in asks]
    plan += [(ask, kind) for ask in asks for kind in asked(ask) if kind != "output"]
    for ask, kind in plan:
        say({"kind": kind, "lane": ask.lane.name, "case": ask.row.case.id})
        _alarm(usual[ask, kind])
        made = ask_once(ask, kind)
        if made.outcome == PASSED:
            continue
        verb = "refused: " if made.outcome == REFUSED else ""
        say({"verdict": KILLED, "kinds": [kind], "message": verb + made.message})
        if made.outcome == KILLED and not ask.lane.interpreted:
            noticing = [kind]
            for other in asked(dataclasses.replace(ask, deep=True)):
                if other != kind:
                    _alarm(usual.get((ask, other), 1.0))
                    if ask_once(ask, other).outcome == KILLED:
                        noticing.append(other)
            say({"kinds": [k for k in KINDS if k in noticing]})
        return
    for tests in target.tests:
        kind = Path(tests.split()[0]).stem
        say({"kind": kind, "lane": "", "case": ""})
        _alarm(usual[tests])
        if message := failing(tests, target.lanes[0].ops):
            say({"verdict": KILLED, "kinds": [kind], "message": message})
            return
    say({"verdict": SURVIVED, "kind": "", "lane": "", "case": ""})


def failing(tests: str, ops: str) -> str:
    """The first of pytest's tests that fails, or nothing."""
    seen: list[str] = []

    class Watch:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                seen.append(report.nodeid.rpartition("::")[2])

        def pytest_collectreport(self, report: pytest.CollectReport) -> None:
            if report.failed:
                seen.append(f"collecting {report.nodeid}")

    os.environ["XFV1_OPS"] = ops
    with tempfile.TemporaryDirectory() as folder, _quiet():
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="]
        # The interpreter's, of lanes that are masked.
        options += ["-W", "ignore::RuntimeWarning"]
        code = pytest.main([*options, f"--report={folder}", *tests.split()], plugins=[Watch()])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not seen:
        seen.append(f"pytest ended with {code!r}")
    return seen[0] if seen else ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        yield


def _alarm(usual: float) -> None:
    signal.alarm(int(LEAST_SECONDS + SLOWER * usual))


def in_a_child(mutant: Mutant, work: Callable[[Say], None]) -> Verdict:
    """Do it in a forked process; what it says, and how it ends, is the verdict."""
    start = time.perf_counter()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)

        def say(facts: dict[str, Any]) -> None:
            os.write(writer, (json.dumps(facts) + "\n").encode())

        code = 1
        try:
            with tempfile.TemporaryDirectory() as folder:
                put_in_place(mutant, Path(folder))
                work(say)
            code = 0
        except BaseException as error:
            say({"verdict": CRASHED, "message": f"{type(error).__name__}: {error}"[:300]})
        finally:
            os._exit(code)
    os.close(writer)
    facts: dict[str, Any] = {}
    with os.fdopen(reader) as said:
        for line in said:
            facts |= json.loads(line)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and "verdict" not in facts:
        stopped = os.WTERMSIG(status)
        facts["verdict"] = TIMEOUT if stopped == signal.SIGALRM else CRASHED
        facts["message"] = signal.Signals(stopped).name
        facts["kinds"] = [facts["kind"]]
    seconds = round(time.perf_counter() - start, 2)
    of = {n: getattr(mutant, n) for n in ("id", "module", "function", "before", "after")}
    return Verdict(**of, **facts, seconds=seconds)


# All of them.


@dataclass
class Plan:
    """Each target's cases, and how long the truth takes for each test."""

    asks: dict[str, list[Ask]]
    usual: dict[Any, float]


def prepared(targets: Iterable[Target]) -> Plan:
    """Choose the cases, and run the source as it is through all that its mutants may be asked.

    Raises:
        RuntimeError: if it fails a test: nothing then is said by a mutant that fails it.
    """
    plan = Plan({}, {})
    by_lane: dict[Lane, list[Ask]] = {}
    for target in targets:
        for lane in target.lanes:
            if lane not in by_lane:
                by_lane[lane] = [
                    Ask(lane, row, at < DEEP) for at, row in enumerate(cases_for(lane))
                ]
                for ask in by_lane[lane]:
                    for kind in asked(ask):
                        made = ask_once(ask, kind)
                        if made.outcome != PASSED:
                            raise RuntimeError(f"{lane} without a mutant: {made}")
                        plan.usual[ask, kind] = made.seconds
        plan.asks[target.module] = [ask for lane in target.lanes for ask in by_lane[lane]]
        for tests in target.tests:
            # In a process of its own, for a mutant's to import the tests anew.
            if tests not in plan.usual:
                plan.usual[tests] = _seconds_of(tests, target.lanes[0].ops)
    return plan


def _seconds_of(tests: str, ops: str) -> float:
    none = Mutant("none", "none", "", "", "", "")

    def work(say: Say) -> None:
        message = failing(tests, ops)
        say({"verdict": KILLED if message else SURVIVED, "message": message})

    found = in_a_child(none, work)
    if found.verdict != SURVIVED:
        raise RuntimeError(f"{tests} without a mutant: {found.message}")
    return found.seconds


def run(mutants: Sequence[tuple[Target, Mutant]], plan: Plan) -> Iterator[Verdict]:
    reasons = explained()
    for target, mutant in mutants:
        asks = plan.asks[target.module]
        found = in_a_child(mutant, lambda say: examine(target, asks, plan.usual, say))  # noqa: B023
        why = reasons.get(mutant.id, "")
        yield Verdict(**{**asdict(found), "equivalent": why})


def problems(verdicts: Sequence[Verdict]) -> list[str]:
    """What is not as equivalent.toml says."""
    known = {m.id for target in TARGETS for m in generated(target)}
    stale = [name for name in explained() if name not in known]
    wrong = [f"{EQUIVALENT.name}: {name} is no mutant" for name in stale]
    for verdict in verdicts:
        if verdict.noticed and verdict.equivalent:
            wrong.append(f"said to be equivalent, and noticed by {verdict.kind}: {verdict.id}")
        if not verdict.noticed and not verdict.equivalent:
            wrong.append(f"survives: {verdict.id}")
    return wrong


def report(verdicts: Sequence[Verdict], plan: Plan, before: dict[str, list[str]]) -> dict[str, Any]:
    """What --json writes. before: by lane, the cases of a report that this one goes on from."""
    files = {}
    for target in TARGETS:
        own = [v for v in verdicts if v.module == target.module]
        counts = Counter(v.verdict for v in own)
        real = [v for v in own if not v.equivalent]
        files[target.module] = {
            "generated": len(generated(target)),
            "run": len(own),
            **{name: counts[name] for name in (KILLED, CRASHED, TIMEOUT, SURVIVED)},
            "equivalent": len(own) - len(real),
            "rate": round(sum(v.noticed for v in real) / max(len(real), 1), 4),
        }
    real = [v for v in verdicts if not v.equivalent]
    first = Counter(v.kind for v in verdicts if v.noticed)
    # Of the candidates that are quick all kinds are asked.
    slow = {lane.name for target in TARGETS for lane in target.lanes if lane.interpreted}
    all_asked = [v for v in verdicts if v.case and v.lane not in slow]
    alone = Counter(v.kinds[0] for v in all_asked if len(v.kinds) == 1)
    asks = {ask: None for asks in plan.asks.values() for ask in asks}
    cases: dict[str, list[str]] = {}
    for ask in asks:
        cases.setdefault(ask.lane.name, []).append(ask.row.case.id)
    return {
        **environment(),
        "seconds": round(sum(v.seconds for v in verdicts), 1),
        "mutants": len(verdicts),
        "noticed": sum(v.noticed for v in real),
        "equivalent": len(verdicts) - len(real),
        "rate": round(sum(v.noticed for v in real) / max(len(real), 1), 4),
        "files": files,
        "noticed_first_by": dict(first.most_common()),
        "noticed_only_by": dict(alone.most_common()),
        "without": [asdict(w) for w in WITHOUT],
        "cases": before | cases,
        "results": [asdict(v) for v in verdicts],
    }


def sampled(count: int) -> list[tuple[Mutant, Ask, str]]:
    """Some mutants of the report, of each module in turn, with what noticed them: the first by
    their hash, of those that the same few cases notice."""
    results = json.loads(RESULTS.read_text())["results"]
    found: list[list[tuple[Mutant, Ask, str]]] = []
    for target in TARGETS:
        lanes = {lane.name: lane for lane in target.lanes}
        known = {mutant.id: mutant for mutant in chosen(target)}
        own = [r for r in results if r["module"] == target.module and r["verdict"] == KILLED]
        own = [r for r in own if r["lane"] in lanes and r["id"] in known]
        common = Counter((r["lane"], r["case"]) for r in own).most_common(1)
        own = [r for r in own if (r["lane"], r["case"]) == common[0][0]]
        own.sort(key=lambda r: digest(r["id"]))
        found.append(
            [(known[r["id"]], Ask(lanes[r["lane"]], _row(r["case"]), True), r["kind"]) for r in own]
        )
    turns = itertools.chain.from_iterable(itertools.zip_longest(*found))
    return [each for each in turns if each is not None][:count]


def _row(case: str) -> Row:
    """Of a case that need not be in the tables any more."""
    return Row(AttnCase.from_id(case), "cpu", "noticed a mutant")


def rerun(count: int) -> list[str]:
    """What is not as the report says, of some mutants."""
    wrong = []
    truth: dict[tuple[Ask, str], Attempt] = {}
    for mutant, ask, kind in sampled(count):
        if (ask, kind) not in truth:
            truth[ask, kind] = ask_once(ask, kind)
            if truth[ask, kind].outcome != PASSED:
                wrong.append(f"without a mutant: {truth[ask, kind]}")

        def again(say: Say, ask: Ask = ask, kind: str = kind) -> None:
            _alarm(truth[ask, kind].seconds)
            made = ask_once(ask, kind)
            say({"verdict": SURVIVED if made.outcome == PASSED else KILLED, "kind": kind})

        found = in_a_child(mutant, again)
        print(f"{found.verdict:9}{found.seconds:7.1f}  {mutant.id}", flush=True)
        if not found.noticed:
            wrong.append(f"not noticed again by {kind} of {ask.row.case.id}: {mutant.id}")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """0 if every mutant is noticed, or is among those said to be equivalent."""
    parser = argparse.ArgumentParser(prog="python -m tests.museum.mutants", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write a report")
    parser.add_argument("--new", action="store_true", help="those alone that --json has not yet")
    parser.add_argument("--module", action="append", default=[], help="of these modules alone")
    parser.add_argument("--list", action="store_true", help="list them, and run none")
    parser.add_argument("--sample", type=int, help="so many of the report's, by what noticed them")
    options = parser.parse_args(arguments)
    if options.module and options.json and not options.new:
        parser.error("--json of some modules alone: expected --new too, which keeps the others")
    targets = [t for t in TARGETS if t.module in (options.module or [t.module])]
    mutants = [(t, m) for t in targets for m in chosen(t)]
    if options.list:
        print("\n".join(mutant.id for _, mutant in mutants))
        return 0
    torch.set_num_threads(1)
    if options.sample:
        wrong = rerun(options.sample)
        print("\n".join(wrong))
        return 1 if wrong else 0
    start = time.perf_counter()
    kept: dict[str, Verdict] = {}
    before: dict[str, list[str]] = {}
    if options.new:
        kept, before = _of_before(options.json)
        mutants = [(t, m) for t, m in mutants if m.id not in kept]
        targets = [t for t in targets if any(t is of for of, _ in mutants)]
    plan = prepared(targets)
    print(f"{len(mutants)} mutants; the truth has passed in {time.perf_counter() - start:.0f} s")
    order = [m.id for t in TARGETS for m in chosen(t)]

    def found() -> list[Verdict]:
        return [kept[name] for name in order if name in kept]

    def write() -> dict[str, Any]:
        """As far as it has come: --new goes on from there."""
        content = report(found(), plan, before)
        if options.json:
            options.json.write_text(json.dumps(content, indent=1) + "\n")
        return content

    content = write()
    for verdict in run(mutants, plan):
        kept[verdict.id] = verdict
        kind, known = verdict.kind or "-", " (equivalent)" if verdict.equivalent else ""
        what = f"{verdict.verdict:9}{kind:14}{verdict.seconds:7.1f}"
        print(f"{what}  {verdict.id}{known}", flush=True)
        content = write()
    wrong = problems(found())
    print("\n".join(wrong))
    print(
        f"{content['noticed']} of {content['mutants'] - content['equivalent']} mutants noticed"
        f" ({content['rate']:.1%}), {content['equivalent']} equivalent; {content['seconds']} s"
    )
    return 1 if wrong else 0


def _of_before(path: Path) -> tuple[dict[str, Verdict], dict[str, list[str]]]:
    """A report's verdicts, but for survivors, who are asked again; and its cases."""
    if not path.exists():
        return {}, {}
    content = json.loads(path.read_text())
    reasons = explained()
    found = {}
    for result in content["results"]:
        verdict = Verdict(**{**result, "equivalent": reasons.get(result["id"], "")})
        if verdict.noticed or verdict.equivalent:
            found[verdict.id] = verdict
    return found, content["cases"]


if __name__ == "__main__":
    sys.exit(main())
