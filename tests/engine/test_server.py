"""Does a real server, started as the README says, serve through xfv1, and survive its clients?

Every engine here runs in processes of its own, as vLLM starts them by default, and xfv1 is the
wheel that the checkout builds. The server's answers are compared with those of engines that a
script starts by `LLM(...)`: through xfv1 with two ranks, and through vLLM's own CPU_ATTN.
"""

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engine import agreement
from tests.engine.checkpoint import VOCABULARY, save_llama
from tests.engine.engine import Answers
from tests.engine.installed import ROOT, environment, install
from tests.engine.models import prompt
from tests.engine.server import PATIENCE, Offline, Server, answers_of, run_script

pytestmark = [pytest.mark.cpu, pytest.mark.xdist_group("server")]

XFV1 = ("xfv1.backend.XFormersAttentionBackend", "xfv1.impl.XFormersImpl")
_CPU_ATTN = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"
CPU_ATTN = (_CPU_ATTN, f"{_CPU_ATTN}Impl")
LAYERS = 2
# Mixed lengths: one token, around blocks of 32, and past the budget of a step.
LENGTHS = (1, 2, 5, 16, 31, 32, 33, 64, 65, 100, 129, 150, 200, 257, 300, 330)
PROMPTS = [prompt(seed, length, VOCABULARY) for seed, length in enumerate(LENGTHS)]
MAX_TOKENS = 16
# Settings that fit the machine, whatever starts the engine.
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 128,
    "kv_cache_memory_bytes": 256 << 20,
}
# How far apart float32 may put the logprobs of two right answers: its relative error of 2**-24,
# for each of up to 512 terms of a sum, in two layers, times logits of up to 10 or so: 6e-4.
ROUNDING = 1e-3
# Bodies that no server can answer, by what is wrong with them.
MALFORMED: dict[str, dict[str, Any]] = {
    "no prompt": {"prompt": None},
    "an unknown model": {"model": "no-such-model"},
    "a prompt of another type": {"prompt": {"text": "w5"}},
    "a token that is not in the vocabulary": {"prompt": [VOCABULARY + 1]},
    "a prompt longer than the model takes": {"prompt": [5] * (ENGINE["max_model_len"] + 1)},
    "a negative number of tokens": {"max_tokens": -1},
    "more tokens than the model takes": {"max_tokens": 1 << 20},
    "a negative temperature": {"temperature": -1.0},
    "more logprobs than the server gives": {"logprobs": 1 << 10},
    "a wrong type": {"max_tokens": "many"},
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("needs vLLM's build for CPUs")
    return install(tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("checkpoint"), layers=LAYERS)


@pytest.fixture(scope="module")
def starting(site: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server, by README's own command; the settings after it are this machine's."""
    readme = (ROOT / "README.md").read_text()
    line = re.search(r"^vllm serve MODEL .*?(?=\s*(#|$))", readme, re.M)
    assert line
    (program, *arguments) = shlex.split(line[0].replace("MODEL", str(model)))
    assert program == "vllm"
    for name, value in ENGINE.items():
        option = f"--{name.replace('_', '-')}"
        arguments += [option] if value is True else [option, str(value)]
    arguments += ["--worker-extension-cls", "observed.Worker"]
    # Only a server in development mode is asked about its workers.
    settings = {"XFV1_CPU": "1", "VLLM_SERVER_DEV_MODE": "1"}
    folder = tmp_path_factory.mktemp("server")
    with Server(arguments, environment(site, **settings), folder) as server:
        yield server


@pytest.fixture(scope="module")
def scripts(
    starting: Server, site: Path, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Offline]:
    """Two scripts' engines, while the server starts."""
    ranks = {"tensor_parallel_size": 2}
    backend = {"attention_config": {"backend": "XFORMERS"}}
    folder = tmp_path_factory.mktemp("scripts")
    requests: dict[str, tuple[dict[str, Any], dict[str, str], dict[str, list[Any]]]] = {
        "xfv1": ({**backend, **ranks}, {"XFV1_CPU": "1"}, {"count_ops": []}),
        "CPU_ATTN": ({}, {}, {}),
    }
    with ThreadPoolExecutor() as pool:
        ran = {
            name: pool.submit(
                run_script,
                folder / name,
                environment(site, **settings),
                {"model": str(model), **ENGINE, **engine},
                PROMPTS,
                MAX_TOKENS,
                before,
            )
            for name, (engine, settings, before) in requests.items()
        }
        return {name: future.result() for name, future in ran.items()}


@pytest.fixture(scope="module")
def server(starting: Server, scripts: dict[str, Offline]) -> Server:
    starting.wait()
    starting.workers("count_ops")
    return starting


def complete(server: Server, ids: list[int]) -> dict[str, Any]:
    return server.complete(ids, MAX_TOKENS)


def differences(answers: Answers, expected: Answers) -> list[str]:
    return agreement.compare(answers, expected, ROUNDING).problems()


def test_the_engines_processes_run_xfv1_from_the_wheel(
    server: Server, scripts: dict[str, Offline], site: Path
) -> None:
    """And not the process that was started, nor the checkout."""
    complete(server, PROMPTS[5])
    workers = [(server.process.pid, worker) for worker in server.workers("attention")]
    ranks = [(scripts["xfv1"].pid, worker) for worker in scripts["xfv1"].workers]
    assert (len(workers), len(ranks)) == (1, 2)
    for parent, worker in workers + ranks:
        assert worker["pid"] != parent
        assert (worker["backends"], worker["impls"]) == ([XFV1[0]] * LAYERS, [XFV1[1]] * LAYERS)
        assert worker["file"] == str(site / "xfv1" / "__init__.py")
        assert {"torch prefill", "torch decode"} <= worker["calls"].keys()
    assert "xfv1: XFormersAttentionBackend serves" in server.printed()


def test_a_cpu_without_the_setting_runs_its_own_backend_and_says_so(
    scripts: dict[str, Offline], site: Path, model: Path, tmp_path: Path
) -> None:
    (worker,) = scripts["CPU_ATTN"].workers
    assert worker["backends"] == [CPU_ATTN[0]] * LAYERS
    assert worker["impls"] == [CPU_ATTN[1]] * LAYERS
    said = _python(tmp_path, site, f"from vllm import EngineArgs; EngineArgs({str(model)!r})")
    assert "To serve with xfv1 on a CPU, set XFV1_CPU=1." in said


def test_no_answer_is_a_near_tie(scripts: dict[str, Offline]) -> None:
    """So that rounding cannot excuse another token."""
    margins = [margin for answer in scripts["CPU_ATTN"].answers.margins for margin in answer]
    assert min(margins) > ROUNDING


def test_engines_of_two_ranks_answer_as_vllms_own_backend(scripts: dict[str, Offline]) -> None:
    assert differences(scripts["xfv1"].answers, scripts["CPU_ATTN"].answers) == []


def test_completions_are_the_offline_engines(server: Server, scripts: dict[str, Offline]) -> None:
    """One after another, each alone."""
    answers = answers_of([complete(server, ids) for ids in PROMPTS])
    assert differences(answers, scripts["xfv1"].answers) == []


def test_a_stream_is_the_same_completion(server: Server, scripts: dict[str, Offline]) -> None:
    longest = len(PROMPTS) - 1
    stream = server.client().completions.create(
        model=server.model, prompt=PROMPTS[longest], max_tokens=MAX_TOKENS, temperature=0.0,
        stream=True, extra_body={"ignore_eos": True, "return_token_ids": True},
    )  # fmt: skip
    parts: list[Any] = [part.choices[0] for part in stream if part.choices]
    assert len(parts) > 1
    tokens = [token for part in parts for token in part.token_ids or []]
    assert tokens == scripts["xfv1"].answers.tokens[longest]


def test_32_requests_at_once_get_their_ownanswers_of(
    server: Server, scripts: dict[str, Offline]
) -> None:
    """Twice the prompts, whose lengths differ, in one batch with chunks of the long ones."""
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda ids: complete(server, ids), PROMPTS * 2))
    for half in (found[: len(PROMPTS)], found[len(PROMPTS) :]):
        assert differences(answers_of(half), scripts["xfv1"].answers) == []


KILLED_CLIENT = """
import json, sys, urllib.request
url, body = sys.argv[1:]
request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
for line in urllib.request.urlopen(request):
    print(line.decode(), flush=True)
"""


def test_clients_killed_in_mid_stream_leave_nothing_running(
    server: Server, scripts: dict[str, Offline]
) -> None:
    body = {
        "model": server.model, "prompt": PROMPTS[3], "max_tokens": 400, "stream": True,
        "ignore_eos": True,
    }  # fmt: skip
    arguments = [sys.executable, "-c", KILLED_CLIENT, f"{server.url}/v1/completions"]
    clients = [
        subprocess.Popen([*arguments, json.dumps(body)], stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    for client in clients:
        assert client.stdout
        # A first token has come, and many more are to come.
        assert client.stdout.readline().startswith("data: ")
        client.kill()
    for client in clients:
        client.communicate()
        assert client.returncode == -signal.SIGKILL
    assert complete(server, PROMPTS[4])["tokens"] == scripts["xfv1"].answers.tokens[4]
    server.wait_until_idle()


@pytest.mark.parametrize("wrong", MALFORMED)
def test_a_malformed_request_is_the_clients_error(server: Server, wrong: str) -> None:
    body = {"model": server.model, "prompt": PROMPTS[3], "max_tokens": 4} | MALFORMED[wrong]
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE)
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.json()["error"]["message"]


def test_a_body_that_is_not_json_is_the_clients_error(server: Server) -> None:
    answer = httpx.post(
        f"{server.url}/v1/completions", content=b"{'prompt", timeout=PATIENCE,
        headers={"Content-Type": "application/json"},
    )  # fmt: skip
    assert 400 <= answer.status_code < 500


def test_after_all_of_this_it_answers_and_shuts_down_clean(
    server: Server, scripts: dict[str, Offline]
) -> None:
    """The last test: it ends the server."""
    assert complete(server, PROMPTS[-1])["tokens"] == scripts["xfv1"].answers.tokens[-1]
    server.wait_until_idle()
    assert server.stop() == 0
    # vLLM's front end, another process, logs a malformed request with its stack. It also logs that
    # the engine is gone, if the engine happens to end first.
    assert not re.search(r"^\((EngineCore|Worker).*Traceback", server.printed(), re.M)


# The tests below start no engine: they look at names on their way into its configuration.

WAYS = """
import json, pickle, sys
from multiprocessing.reduction import ForkingPickler
from unittest import mock

import cloudpickle
from vllm import EngineArgs
from vllm.entrypoints.cli import main, serve

model, name, config_file = sys.argv[1:]
found = {}

def keep(way, arguments):
    found[way] = arguments.create_engine_config().attention_config

keep("EngineArgs(attention_config)", EngineArgs(model, attention_config={"backend": name}))
keep("EngineArgs(attention_backend)", EngineArgs(model, attention_backend=name))
for way, line in {
    "--attention-backend": ["--attention-backend", name],
    "--attention-config": ["--attention-config", json.dumps({"backend": name})],
    "--attention-config.backend": ["--attention-config.backend", name],
    "--config": ["--config", config_file],
}.items():
    def parse(args):
        args.model = args.model_tag
        keep(way, EngineArgs.from_cli_args(args))

    with (
        mock.patch.object(sys, "argv", ["vllm", "serve", model, *line]),
        mock.patch.object(serve.ServeSubcommand, "cmd", staticmethod(parse)),
    ):
        main.main()
(config,) = {repr(each): each for each in found.values()}.values()
pickled = {
    "pickle 2": pickle.dumps(config, 2),
    "pickle 5": pickle.dumps(config, 5),
    "cloudpickle": cloudpickle.dumps(config),
    "multiprocessing": bytes(ForkingPickler.dumps(config)),
}
names = {way: config.backend.name for way, config in found.items()}
print("FOUND", json.dumps([names, {way: text.hex() for way, text in pickled.items()}]))
"""
# A process that has imported nothing yet.
UNPICKLE = """
import pickle, sys
for line in sys.stdin:
    backend = pickle.loads(bytes.fromhex(line)).backend
    print("FOUND", backend.name, backend.get_path())
"""


@pytest.mark.parametrize("name", ["XFORMERS", "CUSTOM"])
def test_every_way_to_name_it_survives_a_new_process(
    site: Path, model: Path, tmp_path: Path, name: str
) -> None:
    config_file = tmp_path / "serve.yaml"
    config_file.write_text(f"attention-backend: {name}\n")
    ran = _python(tmp_path, site, WAYS, str(model), name, str(config_file))
    (line,) = [line for line in ran.splitlines() if line.startswith("FOUND ")]
    names, pickled = json.loads(line.removeprefix("FOUND "))
    assert len(names) == 6
    assert set(names.values()) == {name}
    read = _python(tmp_path, site, UNPICKLE, given="\n".join(pickled.values()))
    lines = [line for line in read.splitlines() if line.startswith("FOUND ")]
    assert lines == [f"FOUND {name} {XFV1[0]}"] * len(pickled)


def test_the_environment_is_answered_with_what_to_write(
    site: Path, model: Path, tmp_path: Path
) -> None:
    """vLLM reads no such variable."""
    script = f"from vllm import EngineArgs; EngineArgs({str(model)!r})"
    said = _python(tmp_path, site, script, VLLM_ATTENTION_BACKEND="XFORMERS")
    assert "VLLM_ATTENTION_BACKEND=XFORMERS. Write --attention-backend XFORMERS." in said


def _python(
    folder: Path, site: Path, script: str, *arguments: str, given: str = "", **settings: str
) -> str:
    """The output of a script in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=folder, env=environment(site, **settings), input=given,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout
