"""winnow submit, logs, stop: what is shipped has the keys of what is here, and a real head with a token runs it."""

import base64
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

import jobs.__main__  # noqa: F401 - registers every command
from jobs import bundle as shipment
from jobs import ray_client as dashboard
from jobs import recipes, submit
from jobs.commands.app import app
from jobs.commands.cluster import to_make
from pipeline.config.partial import narrowed
from pipeline.config.yaml import parse, written
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import PACKAGES, run
from pipeline.store.store import Store
from schemas import WinnowError
from tests.chain import planned, recipe, toys
from tests.heads import ROOT, Head, free_ports, ray_head
from tests.runs import Silent, local

RECIPE, WORLD = "own_candidates", ROOT / "tests" / "data" / "untrained.yaml"
SETS = ["target=own_candidates", "shards=2"]
ASKED = [RECIPE, "--config", WORLD, *(word for item in SETS for word in ("--set", item))]


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """None of Ray's variables, which may be those of the machine that tests."""
    for name in (*dashboard.OVERRIDES, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


# What is shipped.


values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.dates()
contents = st.recursive(values, lambda each: st.lists(each) | st.dictionaries(st.text(), each), max_leaves=8)


@given(contents)
@example(
    {"a": "5e-7", "b": 5e-7, "c": ".inf", "d": float("inf"), "e": "1.", "f": "yes", "g": "a: b", "h": "\x85\ud7ff"}
)
def test_what_is_written_is_read_as_it_was(content):
    """Also by our reader, which takes more for a number than plain PyYAML does."""
    assert parse(written(content), "here") == content


@pytest.mark.parametrize(
    ("recipe", "sets"),
    [
        ("rso", []),
        ("rso", ["select.rule.beta=0.05", "shards=2"]),
        ("ipo", ["about='a/b [c] 5e-7'"]),
        ("rest", []),
        ("raft", ["optimize@2.learning_rate=5e-7"]),
        ("spin", ["rounds=3"]),
        ("alright", []),
        ("cvx_rerank", []),
    ],
)
def test_a_plan_there_has_the_keys_and_the_name_of_the_plan_here(world, tmp_path, monkeypatch, recipe, sets):
    """The recipe in one file, without what it extends and without its world, is the same recipe."""
    worlds = [world / "demo.yaml"]
    here = recipes.plans([recipe], worlds, sets)
    shipped = shipment.pack(tmp_path, [recipe], worlds, "laptop")
    monkeypatch.chdir(tmp_path)
    there = recipes.plans(shipped[:1], [], sets)
    assert [step.key for step in there[0].steps] == [step.key for step in here[0].steps]
    assert there[0].name == here[0].name
    assert shipment.plan_key(there) == shipment.plan_key(here)


def test_a_world_beside_the_command_means_the_same_there(world, tmp_path, monkeypatch):
    """`./data.jsonl` is rooted when the file is read, also where the file itself is named from its own folder."""
    monkeypatch.chdir(world)
    here = recipes.plans(["rso"], [Path("demo.yaml")], [])
    shipment.check_paths(here)
    shipped = shipment.pack(tmp_path, ["rso"], [Path("demo.yaml")], None)
    monkeypatch.chdir(tmp_path)
    assert shipment.plan_key(recipes.plans(shipped, [], [])) == shipment.plan_key(here)


def test_a_path_of_this_folder_is_refused(world, monkeypatch):
    monkeypatch.chdir(world)
    with pytest.raises(WinnowError, match=r"prompts: prompts\.jsonl is relative to this folder"):
        shipment.check_paths(recipes.plans(["rso"], [Path("demo.yaml")], ["prompts.path=prompts.jsonl"]))


def test_the_code_travels_and_nothing_else(world, tmp_path):
    words = shipment.pack(tmp_path, ["rso", "ipo"], [world / "demo.yaml"], "laptop")
    files = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    assert {file.split("/")[0] for file in files} == {*PACKAGES, "submission", "commit.txt"}
    assert {"jobs/start.sh", "jobs/recipes/_base.yaml", "jobs/queries/status.sql", *words[:2], words[3]} <= files
    assert {Path(file).suffix for file in files} <= shipment.KINDS | {".yml", ".txt"}
    assert words[:3] == ["submission/rso.yaml", "submission/ipo.yaml", "--profile"]
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 5e6


def test_a_shipment_over_the_limit_names_what_is_large(world, tmp_path, monkeypatch):
    monkeypatch.setattr(shipment, "LIMIT", 10_000)
    with pytest.raises(WinnowError, match=r"takes 0\.0 MiB; the largest files: .*only code travels"):
        shipment.pack(tmp_path, ["rso"], [world / "demo.yaml"], None)


def test_two_recipes_of_one_name(world, tmp_path):
    (tmp_path / "rso.yaml").write_text("extends: _base\n")
    (tmp_path / "out").mkdir()
    with pytest.raises(WinnowError, match=r"two recipes are called rso\.yaml"):
        shipment.pack(tmp_path / "out", ["rso", str(tmp_path / "rso.yaml")], [world / "demo.yaml"], None)


# Where to.


@pytest.mark.parametrize(
    "url", ["", "head:8265", "ray://head:10001", "auto", "http://", "http://head:port", "s3://bucket"]
)
def test_what_is_no_url_of_a_dashboard(url):
    with pytest.raises(WinnowError, match=r"--address: .*like http://head:8265"):
        dashboard.resolved(url)


def test_a_variable_of_rays_outranks_the_argument_and_says_so(monkeypatch):
    """As it does in Ray's own client, which would not go where it was told to either."""
    monkeypatch.setenv("RAY_ADDRESS", "http://other:8265/")
    assert dashboard.resolved("http://head:8265") == ("http://other:8265", "RAY_ADDRESS")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://third:8265")
    assert dashboard.resolved("http://head:8265") == ("http://third:8265", "RAY_API_SERVER_ADDRESS")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "auto")
    with pytest.raises(WinnowError, match=r"RAY_API_SERVER_ADDRESS: .* outranks --address: unset it"):
        dashboard.resolved("http://head:8265")


Answer = Callable[[BaseHTTPRequestHandler], object]
OURS: dict[str, object] = {
    "/api/version": {"ray_version": version("ray")},
    "/api/v0/cluster_metadata": {"data": {"pythonVersion": sys.version.split()[0]}},
}


@contextmanager
def answering(answers: Mapping[str, object]) -> Iterator[str]:
    """A dashboard of some cluster: JSON at these paths, or what a function does with the request; 404 elsewhere."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = answers.get(self.path)
            if callable(found):
                found(self)
            else:
                answer(self, 404 if found is None else 200, json.dumps(found))

        def log_message(self, *words: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def answer(request: BaseHTTPRequestHandler, code: int, body: str, **headers: str) -> None:
    request.send_response(code)
    for name, value in headers.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body.encode())


@pytest.mark.parametrize(
    ("ray", "python", "said"),
    [
        ("2.59.0", "3.11.4", "runs Ray 2.59.0, and here is Ray"),
        (version("ray"), "3.12.1", "runs Python 3.12, and here is Python 3.11"),
    ],
)
def test_a_cluster_of_another_version(ray, python, said):
    theirs = {"/api/version": {"ray_version": ray}, "/api/v0/cluster_metadata": {"data": {"pythonVersion": python}}}
    with answering(theirs) as url, pytest.raises(WinnowError) as caught:
        submit.Cluster(url)
    assert said in str(caught.value)


def test_a_server_that_is_no_dashboard_and_none_at_all():
    with answering({}) as url, pytest.raises(WinnowError, match="answers, but not as a Ray dashboard"):
        submit.Cluster(url)
    with pytest.raises(WinnowError, match=r"does not answer \(.*refused.*is the cluster up"):
        submit.Cluster(f"http://127.0.0.1:{free_ports(1)[0]}")


@pytest.mark.parametrize(
    ("code", "body", "said"),
    [
        (
            503,
            "no healthy upstream",
            r"answers 503 Service Unavailable \(no healthy upstream\); if it is just starting",
        ),
        (500, "Traceback ...\nRuntimeError: full\n.\n", r"answers 500 .* \(RuntimeError: full\); if it"),
        (429, "<html>\n<h1>slowly</h1>\n</html>", r"answers 429 Too Many Requests; if it is just starting"),
        (401, "Unauthorized: none", r"\(Unauthorized: none\); .* RAY_AUTH_TOKEN or ~/\.ray/auth_token$"),
    ],
)
def test_a_refusal_is_told_with_its_reason(code, body, said):
    with (
        answering({"/api/version": lambda request: answer(request, code, body)}) as url,
        pytest.raises(WinnowError, match=said),
    ):
        submit.Cluster(url)


def test_a_file_that_goes_before_the_usual_one_is_named(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere")
    with pytest.raises(WinnowError, match="RAY_AUTH_TOKEN or /nowhere, which RAY_AUTH_TOKEN_PATH names instead of ~"):  # noqa: SIM117
        with answering({"/api/version": lambda request: answer(request, 403, "Forbidden")}) as url:
            submit.Cluster(url)


def test_the_token_is_for_this_host_alone(monkeypatch):
    """Also one that a file's last line break came into the variable with."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret\n")
    seen = []

    def note(request: BaseHTTPRequestHandler) -> None:
        seen.append(request.headers["Authorization"])
        answer(request, 200, json.dumps(OURS["/api/version"]))

    with answering({"/there": note}) as other:

        def redirect(request: BaseHTTPRequestHandler) -> None:
            seen.append(request.headers["Authorization"])
            answer(request, 302, "", Location=f"{other}/there")

        with answering(OURS | {"/api/version": redirect}) as url:
            submit.Cluster(url)
    assert seen == ["Bearer secret", None]


def test_a_token_that_is_changed_meanwhile(tmp_path):
    """Ray's own client meets it, which asks once more."""

    def asked(request: BaseHTTPRequestHandler) -> None:
        changed = "requests" in request.headers["User-Agent"]
        answer(request, 403 if changed else 200, json.dumps(OURS["/api/version"]))

    with (
        answering(OURS | {"/api/version": asked, "/api/jobs/": []}) as url,
        pytest.raises(WinnowError, match=r"Authentication failed: .*; this cluster wants a token: put the one"),
    ):
        submit.Cluster(url).submit(tmp_path, [], recipes="rso", plan="0" * 8, store="store", again="")


def test_a_step_that_no_recipe_has_is_refused_before_anything_is_asked(world):
    words = ["submit", "rso", "--config", str(world / "demo.yaml"), "--address", "http://nowhere:1", "--force", "selct"]
    refused = CliRunner().invoke(app, words).exception
    assert "--force selct: no step 'selct' in rso" in str(refused)


# The log.


@given(st.text(), st.lists(st.lists(st.integers(0, 20))))
def test_a_log_that_begins_again_is_written_once(text, streams):
    """Streams of some parts each, all from the start, then the whole of it: each character in its place, once."""
    written: list[str] = []
    log = submit.Transcript(written.append)
    for parts in streams:
        start = 0
        for size in parts:
            log.add(start, text[start : start + size])
            start = min(start + size, len(text))
    log.add(0, text)
    assert "".join(written) == text


class Running:
    """A job on some cluster, whose log streams as one function after the other does; `status` and `log` as they are."""

    def __init__(self, *streams: Callable[["Running", Callable[[str], object]], object]) -> None:
        self.streams = iter(streams)
        self.status, self.log = "RUNNING", ""
        self.gone = threading.Event()
        self.looks = 0
        self.answers = OURS | {
            "/api/jobs/run-1": self._details,
            "/api/jobs/run-1/logs": lambda request: answer(request, 200, json.dumps({"logs": self.log})),
            "/api/jobs/run-1/logs/tail": self._tail,
        }

    def _details(self, request: BaseHTTPRequestHandler) -> None:
        self.looks += 1
        names = ("start_time", "end_time", "message", "driver_exit_code")
        about = {"submission_id": "run-1", "status": self.status, "metadata": {"winnow_plan": "0" * 8}}
        answer(request, 200, json.dumps(dict.fromkeys(names) | about))

    def _tail(self, request: BaseHTTPRequestHandler) -> None:
        """A web socket (RFC 6455) of short frames, which ends without a word of farewell."""
        key = request.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        request.protocol_version = "HTTP/1.1"
        answer(request, 101, "", Upgrade="websocket", Connection="Upgrade", **{"Sec-WebSocket-Accept": accept})
        next(self.streams)(self, lambda text: request.wfile.write(bytes([0x81, len(text)]) + text.encode()))
        request.close_connection = True


def follow(job: Running) -> tuple[str, str]:
    """What was written, and how it ended."""
    written: list[str] = []
    with answering(job.answers) as url:
        try:
            end = submit.Cluster(url).follow("run-1", written.append).status
        except WinnowError as error:
            end = str(error)
        finally:
            job.gone.set()
    return "".join(written), end


def test_a_stream_that_ends_early_is_taken_up_where_it_ended(monkeypatch):
    """As a proxy ends one that is idle; what came since is not lost either."""
    monkeypatch.setattr(submit, "POLL", 0.01)

    def first(job: Running, send: Callable[[str], object]) -> None:
        job.log = "one\ntwo\nthree\n"
        send("one\ntw")

    def second(job: Running, send: Callable[[str], object]) -> None:
        send("one\ntwo\n")
        send("three\nfo")
        job.log, job.status = "one\ntwo\nthree\nfour\n", "SUCCEEDED"

    assert follow(Running(first, second)) == ("one\ntwo\nthree\nfour\n", "SUCCEEDED")


def test_a_stream_that_died_in_silence_is_found_out(monkeypatch):
    """The log goes on without it; a silence of the job's own is none."""
    monkeypatch.setattr(submit, "POLL", 0.01)
    monkeypatch.setattr(submit, "SILENCE", 0.05)

    def first(job: Running, send: Callable[[str], object]) -> None:
        job.log = "one\n"
        send("one\n")
        while job.looks < 3:
            job.gone.wait(0.01)
        job.log = "one\ntwo\n"
        job.gone.wait()

    def second(job: Running, send: Callable[[str], object]) -> None:
        send("one\n")
        job.log, job.status = "one\ntwo\nthree\n", "FAILED"

    assert follow(Running(first, second)) == ("one\ntwo\nthree\n", "FAILED")


def test_a_head_that_loses_its_power_is_given_up(monkeypatch):
    monkeypatch.setattr(submit, "SILENCE", 0.05)
    monkeypatch.setattr(dashboard, "SECONDS", 0.2)

    def first(job: Running, send: Callable[[str], object]) -> None:
        send("one\n")
        job.answers |= {path: lambda request: job.gone.wait() for path in [*job.answers, "/api/jobs/"]}
        job.gone.wait()

    written, end = follow(Running(first))
    assert written == "one\n"
    assert re.search(r"lost while following run-1 \(does not answer \(timed out\).*submitting again goes on", end)


# By which Python.


def test_packages_apart_from_their_interpreter_are_run_by_that_of_the_path(tmp_path):
    """What maps Ray's library from lib/python3/dist-packages has no bin/python3 of its own beside it."""
    library = tmp_path / "usr" / "lib" / "python3" / "dist-packages" / "ray" / "_raylet.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"0")
    for prefix in ("usr", "other"):
        (tmp_path / prefix / "bin").mkdir(parents=True)
    script = f"#!/bin/sh\necho of {tmp_path}/$(basename $(dirname $(dirname $0))): $@\n"
    code = f"import mmap, os, sys; m = mmap.mmap(os.open({str(library)!r}, 0), 0, prot=1); sys.stdin.read()"
    env = os.environ | {"PATH": f"{tmp_path}/other/bin:/usr/bin:/bin"}

    def python(prefix: str) -> str:
        """What starts, once this one is there too."""
        file = tmp_path / prefix / "bin" / "python3"
        file.write_text(script)
        file.chmod(0o755)
        command = ["sh", str(ROOT / "jobs" / "start.sh"), str(process.pid), "run", "rso"]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while str(library) not in maps.read_text():
            assert process.poll() is None
        assert python("other") == f"of {tmp_path}/other: -m jobs run rso\n"
        assert python("usr") == f"of {tmp_path}/usr: -m jobs run rso\n"


# A real head.


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head() as made:
        yield made


def said(done: subprocess.CompletedProcess, code: int) -> str:
    text = done.stdout + done.stderr
    assert done.returncode == code, text
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize(
    ("token", "said_of_it"), [(None, "Unauthorized: Missing authentication token"), ("f" * 32, "Forbidden: Invalid")]
)
def test_a_token_that_is_missing_or_wrong(head, token, said_of_it):
    text = said(head.winnow("submit", *ASKED, "--address", head.url, token=token), 2)
    assert said_of_it in text
    assert "`ray get-auth-token` prints it there" in text


def test_a_port_of_rays_that_is_not_the_dashboards(head):
    assert "not as a Ray dashboard" in said(head.winnow("logs", "any", "--address", f"http://{head.gcs}"), 2)


def test_a_profile_that_needs_more_than_the_cluster_has(head):
    text = said(head.winnow("submit", *ASKED, "--address", head.url, "--profile", "cluster"), 2)
    assert "profile, untrained: 1 worker with 4 CPU, 16.0 GiB each, and the cluster has room for 0" in text


def test_a_run_that_joins_a_cluster_which_is_not_there(head, tmp_path):
    """Ray itself would ask for minutes; and nothing has begun."""
    nowhere = f"127.0.0.1:{free_ports(1)[0]}"
    text = said(head.winnow("run", *ASKED, "--store", tmp_path / "store", "--address", nowhere), 2)
    assert f"--address {nowhere}: does not answer" in text
    assert "running" not in text


def until(word: str, lines: Iterator[str]) -> list[str]:
    """What was said up to a line with the word."""
    seen = []
    for line in lines:
        seen.append(line)
        if word in line:
            return seen
    raise AssertionError("".join(seen))


@pytest.mark.timeout(300)
def test_submit_follow_stop_submit_again_finish(head, tmp_path, monkeypatch):
    """The tables are those of a run in process, byte for byte, and what was finished before the stop is untouched."""
    monkeypatch.chdir(tmp_path)
    there = ["--address", head.url]
    command = ["submit", *ASKED, "--store", "store", "--profile", "laptop", *there]
    with ExitStack() as followers:
        first = followers.enter_context(head.following(*command, "--force", "own_candidates"))
        *where, job = until("job ", first.stdout)
        name = job.split()[1]
        assert where == [f"cluster {head.url} (--address)\n", f"store {tmp_path}/store\n"]
        assert re.fullmatch(r"own_candidates-[0-9a-f]{8}-1", name)
        attached = followers.enter_context(head.following(*command, "--attach"))
        assert f"{name} makes this already" in said(head.winnow(*command), 2)
        until(" made ", first.stdout)
        assert f"{name}: stopped; its finished parts are kept" in said(head.winnow("stop", name, *there), 0)
        for each in (first, attached):
            end = [*each.stdout][-1]
            assert f"{name}: stopped; `winnow submit own_candidates" in end
            assert "--force" not in end
            assert each.wait() == 1
    sent = seen(head, monkeypatch).asked(f"/api/jobs/{name}", dict)
    assert "--force own_candidates" in sent["entrypoint"]
    assert "--force" not in sent["runtime_env"]["env_vars"]["WINNOW_SUBMITTED"]
    second = f"{name[:-1]}2"
    parts = {part: part.stat().st_mtime_ns for part in tmp_path.glob("store/*/*/*.parquet")}
    assert f"`winnow logs {second} --address {head.url}` follows it" in said(head.winnow(*command, "--no-wait"), 0)
    text = said(head.winnow("logs", second, *there), 0)
    assert "cached" in text
    assert f"{second}: succeeded" in text
    assert {part: part.stat().st_mtime_ns for part in parts} == parts
    assert_as_alone(tmp_path)
    listed = said(head.winnow("status", *there), 0)
    assert [word for word in (name, "STOPPED", second, "SUCCEEDED") if word not in listed] == []


def assert_as_alone(folder: Path) -> None:
    """The store has what a run in process makes, byte for byte, under the same run's name."""
    (plan,) = recipes.plans([RECIPE], [WORLD], SETS)
    run(plan, Store(folder / "alone"), LocalExecutor(), Silent())
    for step in plan.steps:
        there, here = (Store(folder / root).folder(step).manifest for root in ("store", "alone"))
        assert there["files"] == here["files"]
    assert [*Store(folder / "store").runs()] == [plan.name]


def seen(head, monkeypatch, kind=submit.Cluster):
    """The head as this process sees it."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    return kind(head.url)


class Overtaken(submit.Cluster):
    """One whose first look at the jobs is from before somebody else's submission."""

    rival: Callable[[], object] = staticmethod(lambda: None)

    def jobs(self) -> list[submit.Job]:
        found = super().jobs()
        rival, self.rival = self.rival, lambda: None
        rival()
        return found


@pytest.fixture
def anything(tmp_path: Path) -> Path:
    """What is shipped to run the words themselves."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "start.sh").write_text('shift\nexec "$@"\n')
    return tmp_path


def test_of_two_who_submit_at_once_one_is_taken(head, anything, monkeypatch):
    """The name is the lock, and which one is next is told by the same look as whether a job is at work."""
    other, late = (seen(head, monkeypatch, kind) for kind in (submit.Cluster, Overtaken))
    about = dict(recipes="привет", plan="0" * 8, store="here", again="")
    late.rival = lambda: other.submit(anything, ["sleep", "60"], **about)
    name, busy = late.submit(anything, ["sleep", "60"], **about)
    assert name == busy.name == "run-00000000-1"
    assert [job.name for job in other.jobs() if job.plan == "0" * 8] == [name]
    assert other.stop(name, print).status == "STOPPED"


def test_a_name_that_is_taken_by_a_job_for_another_store_is_not_waited_for(head, anything, monkeypatch):
    """The next one is free; and what the other died of is told, as its empty log does not."""
    other, late = (seen(head, monkeypatch, kind) for kind in (submit.Cluster, Overtaken))
    about = dict(recipes="rso", plan="1" * 8, again="")
    late.rival = lambda: other.submit(anything, ["sh", "-c", "kill -9 $$"], **about, store="there")
    assert late.submit(anything, ["true"], **about, store="here") == ("rso-11111111-2", None)
    told = CliRunner().invoke(app, shlex.split(f"logs rso-11111111-1 --address {head.url}"))
    assert "rso-11111111-1: failed: killed by signal 9 (out of memory?); submitting the same again" in told.output


def test_what_ray_refuses_is_told_in_its_words(head, anything, monkeypatch):
    """A submission of its name that is none of ours."""
    cluster = seen(head, monkeypatch)
    cluster.client.submit_job(entrypoint="true", submission_id="rso-22222222-1")
    with pytest.raises(WinnowError, match=rf"^{head.url}: ValueError: Job with .* rso-22222222-1 already exists"):
        cluster.submit(anything, ["true"], recipes="rso", plan="2" * 8, store="store", again="")
    with pytest.raises(WinnowError, match="no job 'rso-22222222-1'"):
        cluster.job("rso-22222222-1")


def test_what_is_sealed_needs_no_room_and_a_store_out_of_sight_is_no_reason_to_refuse(tmp_path: Path):
    """Nor is what a forced step needs besides; where the store cannot be read from here, all steps count."""
    with toys():
        plan, store = planned(recipe(tmp_path)), Store(tmp_path / "store")
        assert to_make([plan], None, store) == plan.steps
        run(plan, store, LocalExecutor(), Silent())
        assert to_make([plan], None, store) == []
        assert [each.name for each in to_make([plan], "rate", store)] == ["rate", "keep"]
        manifest = local(store.folder(plan.steps[0]).manifest_path)
        manifest.unlink()
        manifest.mkdir()  # reading it is an OSError, as a missing credential is
        assert to_make([plan], None, store) == plan.steps


def test_a_job_is_named_after_what_it_makes(tmp_path: Path):
    """One step alone is another job than the whole; followed in its place, it would end too soon."""
    with toys():
        plan = planned(recipe(tmp_path))
        keys = [shipment.plan_key(narrowed([plan], only=only)) for only in (None, "draw", "rate")]
    assert len(set(keys)) == 3


@pytest.mark.parametrize("args", [["--gcs-address=10.0.0.1:6379", "--worker=python --gcs-address=10.0.0.2:1"], []])
def test_a_job_joins_the_cluster_of_the_raylet_above_it(tmp_path: Path, args: list[str]):
    """Ray tells a job the address of whichever cluster was started last on that machine, and it would wait for ever."""
    (tmp_path / "python3").write_text('#!/bin/sh\necho "$RAY_ADDRESS: $*"\n')
    (tmp_path / "python3").chmod(0o755)
    script = f"import subprocess; subprocess.run(['sh', '-c', 'sh {ROOT}/jobs/start.sh $$ run rso; true'], check=True)"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RAY_ADDRESS": "10.0.0.9:9"}
    raylet = [sys.executable, "-c", script, *args]
    done = subprocess.run(raylet, env=environment, capture_output=True, text=True, check=True)
    joined = "10.0.0.1:6379" if args else "10.0.0.9:9"
    assert done.stdout == f"{joined}: -m jobs run rso\n"
