"""Engine `endpoint`: a served policy is sampled as one in this process, and what a server does otherwise is refused.

The server is ours, over real sockets; tests/bench/test_bench_endpoint.py has vLLM's.
"""

import json
import re
import socket
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from schemas import MachineError, WinnowError
from stages.sampling.engines import POLICY_ITSELF, Request, Sampling, open_engine
from stages.sampling.engines.options import engine as engines
from stages.sampling.sample import sample
from tests.runs import plan_of
from tests.served import no_client_left, refusal, served  # noqa: F401 - a fixture
from tests.stages.network.test_limits import one_prompt
from tests.stages.sampling.test_engines import PROMPTS as PROMPT_IDS
from tests.stages.sampling.test_sampling_parameters import OTHER_LAWS, sampling_of

EOS = 1
REQUESTS = [Request(PROMPT_IDS[n % 3], n) for n in range(12)]
SAMPLING = Sampling(1.0, 0, 8, (EOS,))
KEY = "sk-hidden-0123456789"


@pytest.fixture(scope="module")
def shared(tiny):
    """A server of the tiny model for tests that leave it as it is."""
    with served(tiny) as server:
        yield server


@pytest.fixture
def server(shared):
    """The same, with no memory of other tests."""
    shared.requests.clear()
    shared.failures.clear()
    shared.alter, shared.on_post, shared.most_running = (lambda answer: None), (lambda number: None), 0
    shared.name, shared.fingerprint = "tiny", "one"
    return shared


@pytest.fixture
def opened(tiny):
    """Opens engines on servers; closes them at the end."""
    with ExitStack() as stack:

        def open_on(url, model=tiny, dtype="float32", **options):
            engine = open_engine(engines.bind(endpoint(url, **options)), model.folder, dtype)
            stack.callback(engine.close)
            return engine

        yield open_on


def endpoint(url, **options):
    return {"name": "endpoint", "url": url, "model": "tiny", "max_retries": 2} | options


def rows(table):
    return table.to_pylist()


# The draws.


def test_a_served_policy_gives_the_draws_of_an_engine_in_this_process(server, tiny, ctx):
    """Every column of `candidates`, seeds and log-probs included; the prompt is sent as ids."""
    options = dict(n=6, max_tokens=10, temperature=0.7, top_k=20, keep_special=True)
    own = sample(one_prompt(), tiny, ctx, engine="transformers", **options)
    by_server = sample(one_prompt(), tiny, ctx, engine=endpoint(server.url), **options)
    approximately = [row | {"logp": pytest.approx(row["logp"], abs=1e-4)} for row in rows(own)]
    assert rows(by_server) == approximately
    assert all(body["prompt"] == [0, 5, 9] for body in server.bodies())


@pytest.mark.parametrize("name", [*POLICY_ITSELF, "stop", "stop_token_ids", "ignore_eos", "max_tokens", "seed"])
def test_every_sampling_parameter_is_in_the_request(name, server, opened):
    """Also those that change nothing: a server's generation_config.json would fill what is left out."""
    changed = OTHER_LAWS | {
        "stop": ("\n",), "stop_token_ids": (EOS, 30), "ignore_eos": True, "max_tokens": 5, "seed": 77
    }  # fmt: skip
    neutral: dict[str, Any] = POLICY_ITSELF | {
        "stop": (),
        "stop_token_ids": (EOS,),
        "ignore_eos": False,
        "max_tokens": 8,
        "seed": 3,
    }
    engine, sent = opened(server.url, verify=False), []
    for value in (neutral[name], changed[name]):
        options: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "max_tokens": 8, "stop_token_ids": (EOS,)}
        options |= {} if name == "seed" else {name: value}
        engine.generate([Request(PROMPT_IDS[0], value if name == "seed" else 3)], Sampling(**options))
        as_json = {str(token): bias for token, bias in value} if name == "logit_bias" else value
        sent.append((server.bodies()[-1][name], list(as_json) if isinstance(as_json, tuple) else as_json))
    assert [got for got, _ in sent] == [expected for _, expected in sent]
    assert sent[0] != sent[1]
    assert server.bodies()[-1]["watermarking"] is server.bodies()[-1]["add_special_tokens"] is False


def test_no_more_requests_are_on_their_way_than_allowed(server, opened):
    """Two threads share the limit, as the parts of a step do. Each request is held until three are there, or a while:
    those that check the server come alone."""
    engine = opened(server.url, concurrency=3, verify=False)

    def hold(number):
        deadline = time.monotonic() + 0.3
        while server.most_running < 3 and time.monotonic() < deadline:
            time.sleep(0.005)

    server.on_post = hold
    engine.generate(REQUESTS, SAMPLING)
    assert server.most_running == 3


def test_a_stop_string_ends_a_response_for_that_reason(server, opened):
    (answer,) = opened(server.url).generate(REQUESTS[:1], sampling_of(12, stop=(" ", "a", "e", "o", "i", "t", "s")))
    assert answer.finish_reason == "stop_string"


# Failures.


@pytest.mark.parametrize("failure", [None, refusal(429, "slow down", retry_after="0.01"), refusal(503, "overloaded")])
def test_what_passes_is_tried_again(failure, server, opened):
    """A lost connection, 429 and 5xx: the draws are those without it, and the lost server is checked anew."""
    engine = opened(server.url)
    undisturbed = engine.generate(REQUESTS, SAMPLING)
    before = len(server.bodies())
    server.failures.append(failure)
    assert engine.generate(REQUESTS, SAMPLING) == undisturbed
    checks = 6 if failure is None else 0  # two of the log-probs' mode, three draws, and one of them again
    assert len(server.bodies()) == before + len(REQUESTS) + 1 + checks


@pytest.mark.parametrize(
    ("failure", "kind", "facts"),
    [
        (refusal(400, "min_p must be\n in [0, 1]"), WinnowError, ["status 400", "min_p must be in [0, 1]"]),
        (refusal(401, f"wrong key {KEY}"), WinnowError, ["status 401", "wrong key ***", "MY_KEY"]),
        (refusal(404, "Not Found"), WinnowError, ["status 404", "/v1"]),
        (refusal(500, "out of memory"), MachineError, ["status 500", "out of memory", "3 attempts", "server's log"]),
        ((200, "<html>hello</html>", {}), WinnowError, ["OpenAI-compatible", "/v1"]),
        (None, MachineError, ["no connection", "3 attempts", "start the server"]),
    ],
)
def test_what_does_not_pass_is_one_line_with_the_servers_message(failure, kind, facts, server, opened, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    engine = opened(server.url, api_key_env="MY_KEY")
    server.failures.extend([failure] * 3)
    with pytest.raises(WinnowError) as refused:
        engine.generate(REQUESTS[:1], SAMPLING)
    assert type(refused.value) is kind
    assert "\n" not in str(refused.value)
    for fact in [server.url, *facts]:
        assert fact in str(refused.value)
    assert KEY not in str(refused.value)


def test_a_server_that_does_not_answer_in_time_is_named_with_what_to_raise(server, opened):
    engine = opened(server.url, timeout=0.2, max_retries=1)
    release = threading.Event()
    server.on_post = lambda number: release.wait()
    with pytest.raises(MachineError, match=r"no answer within 0\.2 s, in 2 attempts.*timeout.*concurrency"):
        engine.generate(REQUESTS[:1], SAMPLING)
    release.set()


def test_a_server_whose_answer_drips_is_given_up_at_the_timeout(server, opened):
    """One that sends a byte now and then: the limit is of the whole answer, not of the time between two bytes."""
    engine = opened(server.url, timeout=0.5, max_retries=0, verify=False)
    engine.generate(REQUESTS[:1], SAMPLING)
    release = threading.Event()

    def drip(handler, answer):
        handler.send_response(200)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", "100000")
        handler.end_headers()
        with suppress(OSError):
            while not release.wait(0.05):
                handler.wfile.write(b" ")

    server.answer = drip
    try:
        with pytest.raises(MachineError, match=r"no answer within 0\.5 s"):
            engine.generate(REQUESTS[:1], SAMPLING)
    finally:
        release.set()
        del server.answer


@pytest.mark.parametrize(
    ("alter", "facts"),
    [
        (lambda choice: choice.pop("token_ids"), ["no token ids", "vLLM", "engine: vllm"]),
        (lambda choice: choice.update(logprobs=None), ["log-probs", "vLLM"]),
        (lambda choice: choice["prompt_token_ids"].insert(0, 0), ["prompt ids"]),
        (lambda choice: choice["token_ids"].pop(), ["log-probs of"]),
        (lambda choice: cut(choice, "length"), ["max_tokens", "generation-config"]),
        (lambda choice: cut(choice, "stop"), ["no end of this policy", "stop_token_ids"]),
        (lambda choice: choice.update(finish_reason="abort"), ["abort"]),
        (lambda choice: choice["token_ids"].__setitem__(0, 99_999), ["id 99999", "another model"]),
        (lambda choice: choice["token_ids"].__setitem__(0, -1), ["id -1", "another model"]),
        (lambda choice: choice["token_ids"].__setitem__(0, True), ["token_ids", "integer"]),
        (lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(0, 0.5), ["log-prob 0.5", "above 0"]),
    ],
)
def test_what_a_server_did_otherwise_than_asked_is_refused(alter, facts, server, opened):
    engine = opened(server.url, verify=False)
    engine.generate(REQUESTS[:1], SAMPLING)
    server.alter = lambda answer: alter(answer["choices"][0])
    with pytest.raises(WinnowError) as refused:
        engine.generate(REQUESTS[:1], Sampling(1.0, 0, 8, (), ignore_eos=True))
    for fact in facts:
        assert fact in str(refused.value)


def cut(choice, reason):
    """Take a token away, as a server with a limit or an end of its own would."""
    choice["token_ids"].pop()
    choice["logprobs"]["token_logprobs"].pop()
    choice["finish_reason"] = reason


# What is served.


def test_another_model_than_the_policy_is_refused_before_anything_is_drawn(sharp, opened):
    with served(sharp) as server, pytest.raises(WinnowError) as refused:
        opened(server.url).generate(REQUESTS, SAMPLING)
    for fact in ["is not the network in", "vllm serve", "--dtype float32", "nats per token"]:
        assert fact in str(refused.value)
    assert len(server.bodies()) < len(REQUESTS)


@pytest.mark.parametrize("is_idle", [False, True])
def test_a_server_that_comes_back_with_another_model_is_refused(is_idle, tiny, sharp, opened, monkeypatch):
    """It was lost in the middle of a call, or started anew while nothing was asked: what it gave is not kept."""
    with served(tiny) as server:
        engine = opened(server.url)
        engine.generate(REQUESTS, SAMPLING)
        if is_idle:
            monkeypatch.setattr("stages.endpoint.IDLE_SECONDS", 0.0)
        else:
            server.failures.append(None)
        server.engine = open_engine("transformers", sharp.folder, "float32")
        with pytest.raises(WinnowError, match="is not the network in"):
            engine.generate(REQUESTS, SAMPLING)


def test_a_fingerprint_that_changes_is_checked_anew(server, opened):
    engine = opened(server.url)
    engine.generate(REQUESTS[:2], SAMPLING)
    before = len(server.bodies())
    engine.generate(REQUESTS[:2], SAMPLING)
    assert len(server.bodies()) == before + 2
    server.fingerprint = "two"
    engine.generate(REQUESTS[:2], SAMPLING)
    assert len(server.bodies()) > before + 4


def test_log_probs_after_the_cuts_are_refused(server, opened):
    """Even without the comparison of weights: two tokens cannot both be certain."""

    def process(answer):
        if server.bodies()[-1]["logit_bias"]:
            answer["choices"][0]["logprobs"]["token_logprobs"] = [0.0]

    server.alter = process
    with pytest.raises(WinnowError, match="raw_logprobs"):
        opened(server.url, verify=False).generate(REQUESTS, SAMPLING)


def test_bad_words_that_the_server_reads_as_other_ids_are_refused(server, opened):
    server.tokenizer, own = (
        type("Other", (), {"encode": lambda *_, **__: [3], "decode": lambda *_: ""})(),
        server.tokenizer,
    )
    try:
        with pytest.raises(WinnowError, match=r"bad_words: .*'boat'.*tokenizer"):
            opened(server.url).generate(REQUESTS, sampling_of(8, bad_words=("boat",)))
    finally:
        server.tokenizer = own
    opened(server.url).generate(REQUESTS, sampling_of(8, bad_words=("boat",)))


def test_a_server_with_less_room_than_a_prompt_needs_is_refused(server, opened):
    with pytest.raises(WinnowError, match=r"max-model-len 133"):
        opened(server.url).generate([Request([5] * 125, 0)], SAMPLING)


def test_a_model_that_is_not_served_is_named_beside_those_that_are(server, opened):
    with pytest.raises(WinnowError, match=r"no model 'other'; it serves tiny"):
        open_engine(engines.bind(endpoint(server.url, model="other")), Path("unused"), "float32")


# The key.


def test_the_key_goes_to_the_server_and_nowhere_else(server, tiny, tmp_path, data_dir, winnow, monkeypatch, caplog):
    """Neither into a file of the store nor into what is printed; without `api_key_env`, OpenAI's own is not sent."""
    monkeypatch.setenv("MY_KEY", KEY)
    config = write_config(tmp_path, tiny, server.url, api_key_env="MY_KEY")
    caplog.set_level("DEBUG")
    code, output = run(winnow, data_dir, config)
    assert code == 0, output
    assert {headers["authorization"] for _, _, headers in server.requests} == {f"Bearer {KEY}"}
    contents = [file.read_bytes() for file in (tmp_path / "store").rglob("*") if file.is_file()]
    assert contents
    assert not any(KEY.encode() in content for content in contents)
    assert KEY not in output + caplog.text


def test_the_key_of_openai_is_not_sent_to_other_servers(server, opened, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, KEY)
    opened(server.url).generate(REQUESTS[:1], SAMPLING)
    assert not any(KEY in value for _, _, headers in server.requests for value in headers.values())


def test_a_variable_that_is_not_set_is_named(server, opened, monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(WinnowError, match="environment variable MY_KEY is not set"):
        opened(server.url, api_key_env="MY_KEY")


@pytest.mark.parametrize("key", ["sk-one\nsk-two", "sk one", "sk-\x7f", "sk-é", "\nsk-one", " "])
def test_a_key_that_no_header_can_hold_is_refused_and_not_repeated(key, server, opened, monkeypatch):
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(WinnowError, match="api_key_env: the key in the environment variable MY_KEY has") as refused:
        opened(server.url, api_key_env="MY_KEY")
    assert "sk" not in str(refused.value)
    assert not server.requests


def test_a_line_break_after_the_key_is_the_files_that_it_is_from(server, opened, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY + "\n")
    opened(server.url, api_key_env="MY_KEY", verify=False).generate(REQUESTS[:1], SAMPLING)
    assert {headers["authorization"] for _, _, headers in server.requests} == {f"Bearer {KEY}"}


@pytest.mark.parametrize(
    "url", ["http://h:99999/v1", "http://h:abc/v1", "http://h:0/v1", "http://[::1/v1", "http://h h/v1"]
)
def test_an_address_that_is_none_is_refused_when_the_plan_is_made(url):
    with pytest.raises(WinnowError, match=r"url: must be the address of a server.*port from 1 to 65535"):
        engines.bind(endpoint(url))


@pytest.mark.parametrize(
    "options", [{"api_key_env": "hf_secret"}, {"api_key_env": "sk-secret"}, {"url": "http://u:secret@h/v1"},
                {"url": "http://h/v1?key=secret"}],
)  # fmt: skip
def test_a_key_in_the_config_is_refused_and_not_repeated(options):
    with pytest.raises(WinnowError, match=r"api_key_env|environment variable") as refused:
        engines.bind(endpoint("http://h/v1") | options)
    assert "secret" not in str(refused.value)


# Plans and runs.


def write_config(folder, tiny, url, **options):
    """Write a config that samples the tiny model from a server, and return its path."""
    path = folder / "my.yaml"
    steps = {
        "sft": {"use": "model", "with": {"path": str(tiny.folder)}},
        "sample": {"with": {"engine": endpoint(url, **options), "n": 6, "max_tokens": 5}},
        "eval_sample": {"with": {"engine": "transformers"}},
        "prompts": {"from": {"tokenizer": "sft"}},
    }
    path.write_text(json.dumps(steps))
    return path


def run(winnow, data_dir, config, *words, store="store"):
    configs = ["--config", data_dir / "demo.yaml", "--config", config]
    return winnow("run", "rso", *configs, "--until", "sample", "--store", store, *words)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def parts(folder):
    """Return the records of the parts of `candidates` by number, from a sidecar of each or from that of all."""
    sidecars = [json.loads(path.read_bytes()) for path in (folder / "sample").glob("*/part-*.json")]
    return {part["shard"]: part for sidecar in sidecars for part in sidecar.get("parts", [sidecar])}


def assert_resumed(before, after, undisturbed):
    """Finished parts are those that they were, as what they took says, and the tables those of an undisturbed run."""
    assert {shard: after[shard]["cpu_seconds"] for shard in before} == {
        shard: part["cpu_seconds"] for shard, part in before.items()
    }
    assert [after[n]["files"] for n in sorted(after)] == [undisturbed[n]["files"] for n in sorted(undisturbed)]


def test_a_server_that_is_down_is_missed_when_the_step_starts_and_not_before(data_dir, tiny, tmp_path, winnow):
    config = write_config(tmp_path, tiny, f"http://127.0.0.1:{free_port()}/v1")
    configs = ["--config", data_dir / "demo.yaml", "--config", config]
    code, output = winnow("plan", "rso", *configs, "--store", "store")
    assert code == 0, output
    code, output = run(winnow, data_dir, config)
    assert code == 2
    (line,) = [line for line in output.splitlines() if line.startswith("winnow: sample: endpoint")]
    assert re.search(r"no connection.*start the server.*tiny", line)
    assert "winnow run rso" in output.partition(line)[2]  # the command that goes on


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of the server that dies
def test_a_server_that_dies_in_the_middle_costs_only_the_parts_that_are_missing(data_dir, tiny, tmp_path, winnow):
    """Killed after a part, started again on its port: finished parts stay, and the tables are those undisturbed."""
    with served(tiny) as server:
        config = write_config(tmp_path, tiny, server.url, max_retries=0)
        code, output = run(winnow, data_dir, config, store="undisturbed")
        assert code == 0, output
        whole = len(server.bodies())
        port = server.port
    with served(tiny, port) as server:
        server.on_post = lambda number: sys.exit() if number > whole // 2 else None  # ends its thread and connection
        code, output = run(winnow, data_dir, config)
        assert code == 2
        assert "finished parts" in output
    kept = parts(tmp_path / "store")
    assert 0 < len(kept) < 3
    with served(tiny, port) as server:
        code, output = run(winnow, data_dir, config)
        assert code == 0, output
        assert len(server.bodies()) < whole
    assert_resumed(kept, parts(tmp_path / "store"), parts(tmp_path / "undisturbed"))


def plan_on(data_dir, url, *sets, **options):
    engine = json.dumps(endpoint(url, **options))
    return plan_of(data_dir, f"sample.engine={engine}", "eval_sample.engine=fake", "eval_baseline.engine=fake", *sets)


def key_of_sample(plan):
    return next(step.key for step in plan.steps if step.name == "sample")


@pytest.mark.filterwarnings("ignore:.*engine endpoint, and its policy")
def test_where_and_how_a_server_is_asked_is_not_part_of_the_key(data_dir):
    options = dict(model="other", api_key_env="MY_KEY", concurrency=3, timeout=5.0, max_retries=0, verify=False)
    keys = {key_of_sample(plan_on(data_dir, url, **more)) for url, more in [
        ("http://one:8000/v1", {}), ("https://two/v1", options)
    ]}  # fmt: skip
    assert len(keys) == 1
    assert keys != {key_of_sample(plan_of(data_dir, "sample.engine=vllm"))}


@pytest.mark.filterwarnings("ignore:.*engine endpoint, and its policy")
def test_engine_options_are_the_servers_own(data_dir):
    with pytest.raises(WinnowError, match="engine_options: they are the server's"):
        plan_on(data_dir, "http://h/v1", "sample.engine_options={max_num_seqs: 8}")


def test_a_plan_warns_of_a_served_policy_that_it_makes_itself(data_dir):
    """An evaluation's policy is trained by the run: the server can have it only later."""
    with pytest.warns(UserWarning, match="made by a step of stage optimize.*engine: vllm"):
        plan_on(data_dir, "http://h/v1")


@pytest.mark.filterwarnings("ignore:.*engine endpoint, and its policy")
def test_a_plan_says_what_to_install(data_dir, monkeypatch):
    monkeypatch.setattr("stages.endpoint.find_spec", lambda name: None)
    with pytest.raises(WinnowError, match=r"engine: .* needs the library openai: .* -m pip install .*openai"):
        plan_on(data_dir, "http://h/v1")


def test_a_server_has_gpus_of_its_own():
    with pytest.raises(WinnowError, match=r"tensor_parallel: 2.*endpoint"):
        open_engine(engines.bind(endpoint("http://h/v1")), Path("unused"), "float32", tensor_parallel=2)
