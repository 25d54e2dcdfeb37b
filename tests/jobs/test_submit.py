"""winnow submit, logs, stop: shipped files have the keys of the originals, and a real head with a token runs them."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from ray.job_submission import JobDetails

from jobs import bundle, ray_jobs, recipes
from jobs.commands.cluster import unfinished_steps
from jobs.ray_jobs import RayJobs, dashboard_url
from jobs.sweeps import plan_sweep
from pipeline.config.partial import Part, narrowed
from pipeline.config.yaml import dump, parse
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import PACKAGES, run
from pipeline.store.store import Store
from schemas import WinnowError
from tests.chain import planned, recipe, toys
from tests.heads import ROOT, Head, free_ports, ray_head
from tests.runs import Silent, local

RECIPE, CONFIG = "own_candidates", ROOT / "tests" / "data" / "untrained.yaml"
SETS = ["target=own_candidates", "shards=2"]
WORDS = [RECIPE, "--config", CONFIG, *(word for item in SETS for word in ("--set", item))]


@pytest.fixture(autouse=True)
def _no_ray_variables(monkeypatch, tmp_path):
    """Unset Ray's variables and token file, which may be those of the machine that runs the tests."""
    for name in (*ray_jobs.OVERRIDES, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


# The bundle


values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
contents = st.recursive(values, lambda item: st.lists(item) | st.dictionaries(st.text(), item), max_leaves=8)


@given(contents)
@example(
    {"a": "5e-7", "b": 5e-7, "c": ".inf", "d": float("inf"), "e": "1.", "f": "yes", "g": "a: b", "h": "\x85\ud7ff"}
)
def test_yaml_that_is_written_is_read_unchanged(content):
    """By our reader too, which takes more for a number than plain PyYAML does."""
    assert parse(dump(content), "here") == content


def test_a_shipped_plan_has_the_keys_and_the_name_of_the_original(data_dir, tmp_path, monkeypatch):
    """One file, without what the recipe extends and without its config, is the same recipe."""
    configs = [data_dir / "demo.yaml"]
    for n, (name, *sets) in enumerate([
        ("rso", "select.rule.beta=0.05", "shards=2"), ("ipo", "about='a/b [c] 5e-7'"), ("rest",),
        ("rso", "optimize.learning_rate=5e-7"),
        ("raft", "optimize@2.learning_rate=5e-7"), ("spin", "rounds=3"), ("alright",), ("cvx_rerank",),
    ]):  # fmt: skip
        folder = tmp_path / str(n)
        (original,) = recipes.plans([name], configs, sets)
        words = bundle.pack_submission(folder, [name], configs, "laptop")
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            (shipped,) = recipes.plans(words[:1], [], sets)
        assert [step.key for step in shipped.steps] == [step.key for step in original.steps], name
        assert shipped.name == original.name
        assert bundle.plan_key([shipped]) == bundle.plan_key([original])


def test_relative_paths(data_dir, tmp_path, monkeypatch):
    """`./data.jsonl` in a file is relative to that file, wherever it is named from; that of --set is refused."""
    monkeypatch.chdir(data_dir)
    original = recipes.plans(["rso"], [Path("demo.yaml")], [])
    bundle.check_paths(original)
    words = bundle.pack_submission(tmp_path, ["rso"], [Path("demo.yaml")], None)
    with pytest.raises(WinnowError, match=r"prompts: prompts\.jsonl is relative to this folder"):
        bundle.check_paths(recipes.plans(["rso"], [Path("demo.yaml")], ["prompts.path=prompts.jsonl"]))
    monkeypatch.chdir(tmp_path)
    assert bundle.plan_key(recipes.plans(words, [], [])) == bundle.plan_key(original)


def test_plugins_are_shipped(data_dir, tmp_path, monkeypatch):
    """A plugin that the recipe or a config lists is found beside the shipped recipe, with the same keys."""
    from pipeline.plugins import unload_plugins

    (tmp_path / "rules.py").write_text(
        "from stages.selection.pair import pair_rule\n\n\n"
        "@pair_rule(reads='comparisons')\ndef shipped_rule(group):\n    return []\n"
    )
    (tmp_path / "mine.yaml").write_text("extends: rso\nplugins: [./rules.py]\npair: {with: {rule: shipped_rule}}\n")
    name, configs, folder = str(tmp_path / "mine.yaml"), [data_dir / "demo.yaml"], tmp_path / "bundle"
    try:
        original = recipes.plans([name], configs, [])
        words = bundle.pack_submission(folder, [name], configs, None)
        (tmp_path / "rules.py").unlink()
        monkeypatch.chdir(folder)
        assert bundle.plan_key(recipes.plans(words, [], [])) == bundle.plan_key(original)
    finally:
        unload_plugins()


def test_a_plugin_that_only_the_command_names_is_shipped(data_dir, tmp_path, monkeypatch):
    """With the keys of here. The file of a function that an option names is named as it is here, too."""
    from pipeline.plugins import running_only, unload_plugins

    rules, rewards = tmp_path / "rules.py", tmp_path / "rewards.py"
    rules.write_text(
        "from stages.selection.pair import pair_rule\n\n\n"
        "@pair_rule(reads='comparisons')\ndef shipped_rule(group):\n    return []\n"
    )
    rewards.write_text("def right(prompt, response):\n    return 1.0\n")
    gold = f"evaluate.gold={{name: python, file: {rewards}, function: right}}"
    configs, sets, folder = [data_dir / "demo.yaml"], ["pair.rule=shipped_rule", gold], tmp_path / "bundle"
    try:
        with running_only([rules, rewards]):
            original = recipes.plans(["rso"], configs, sets)
            words = bundle.pack_submission(folder, ["rso"], configs, None)
            named = bundle.plugin_words(folder, [rules, rewards], original)
        rules.unlink()
        assert str(rules) not in named
        assert str(rewards) in named
        unload_plugins()
        monkeypatch.chdir(folder)
        with running_only(Path(word) for word in named[1::2]):
            assert bundle.plan_key(recipes.plans(words, [], sets)) == bundle.plan_key(original)
    finally:
        unload_plugins()


def test_code_is_shipped_and_nothing_else(data_dir, tmp_path, monkeypatch):
    """Neither tests nor benchmarks nor data; a bundle above Ray's limit names its largest files."""
    words = bundle.pack_submission(tmp_path / "out", ["rso", "ipo"], [data_dir / "demo.yaml"], "laptop")
    paths = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    files = {file.relative_to(tmp_path / "out").as_posix() for file in paths}
    assert {file.split("/")[0] for file in files} == {*PACKAGES, "submission", "commit.txt"}
    assert {"jobs/start.sh", "jobs/recipes/_base.yaml", "jobs/queries/status.sql", *words[:2], words[3]} <= files
    assert {Path(file).suffix for file in files} <= bundle.SUFFIXES | {".yml", ".txt", recipes.ALONE}
    assert words[:3] == ["submission/rso.yaml", "submission/ipo.yaml", "--profile"]
    assert sum(file.stat().st_size for file in paths) < 5e6
    (tmp_path / "rso.yaml").write_text("extends: _base\n")
    with pytest.raises(WinnowError, match=r"two recipes are named rso\.yaml"):
        bundle.pack_submission(tmp_path / "two", ["rso", str(tmp_path / "rso.yaml")], [data_dir / "demo.yaml"], None)
    monkeypatch.setattr(bundle, "LIMIT", 10_000)
    with pytest.raises(WinnowError, match=r"accepts 9\.8 KiB; the largest files: .*only code is sent"):
        bundle.pack_submission(tmp_path / "large", ["rso"], [data_dir / "demo.yaml"], None)


def test_a_job_is_named_after_the_steps_that_it_runs(tmp_path):
    """One step alone is another job than the whole run; followed in its place, it would end too soon."""
    with toys():
        plan = planned(recipe(tmp_path))
        keys = [bundle.plan_key(narrowed([plan], Part(only=only))) for only in (None, "draw", "rate")]
    assert len(set(keys)) == 3


def test_finished_steps_need_no_resources(tmp_path):
    """But forced ones do, and all steps if the store cannot be read from here."""
    with toys():
        plan, store = planned(recipe(tmp_path)), Store(tmp_path / "store")
        assert unfinished_steps([plan], None, store) == plan.steps
        run(plan, store, LocalExecutor(), Silent())
        assert unfinished_steps([plan], None, store) == []
        assert [step.name for step in unfinished_steps([plan], "rate", store)] == ["rate", "keep"]
        manifest = local(store.folder(plan.steps[0]).manifest_path)
        manifest.unlink()
        manifest.mkdir()  # reading it is an OSError, as a missing credential is
        assert unfinished_steps([plan], None, store) == plan.steps


# The client, against the answers of a fake dashboard


def test_the_address(monkeypatch):
    """A variable of Ray's outranks --address, as in Ray's own client, and the message says so."""
    for url in ("", "head:8265", "ray://head:10001", "auto", "http://", "http://head:port", "s3://bucket"):
        with pytest.raises(WinnowError, match=r"--address: .*like http://head:8265"):
            dashboard_url(url)
    monkeypatch.setenv("RAY_ADDRESS", "http://other:8265/")
    assert dashboard_url("http://head:8265") == ("http://other:8265", "RAY_ADDRESS")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://third:8265")
    assert dashboard_url("http://head:8265") == ("http://third:8265", "RAY_API_SERVER_ADDRESS")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "auto")
    with pytest.raises(WinnowError, match=r"RAY_API_SERVER_ADDRESS: .* outranks --address: unset it"):
        dashboard_url("http://head:8265")


def metadata(ray: str = version("ray"), python: str = sys.version.split()[0]) -> dict[str, object]:
    """Return the answers of a dashboard about its versions."""
    return {
        "/api/version": {"ray_version": ray},
        "/api/v0/cluster_metadata": {"data": {"rayVersion": ray, "pythonVersion": python}},
    }


@contextmanager
def dashboard(answers: Mapping[str, object]) -> Iterator[str]:
    """Yield the URL of a server: JSON at these paths, or what a function does with the request; 404 elsewhere."""

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


def test_clusters_that_are_refused(monkeypatch):
    """Another version of Ray or Python, another server, no server, and every refusal with its reason and cure."""
    cases: list[tuple[Mapping[str, object], str]] = [
        (metadata(ray="2.59.0"), r"runs Ray 2\.59\.0, and this environment has Ray"),
        (metadata(python="3.12.1"), r"runs Python 3\.12, and this environment has Python 3\.11"),
        ({}, "answers, but not as a Ray dashboard"),
    ]
    for code, body, match in [
        (
            503,
            "no healthy upstream",
            r"answers 503 Service Unavailable \(no healthy upstream\); if it is just starting",
        ),
        (500, "Traceback ...\nRuntimeError: full\n.\n", r"answers 500 .* \(RuntimeError: full\)"),
        (429, "<html>\n<h1>slowly</h1>\n</html>", r"answers 429 Too Many Requests; if it is just starting"),
        (401, "Unauthorized: none", r"Unauthorized: none; .* RAY_AUTH_TOKEN or ~/\.ray/auth_token$"),
    ]:
        cases.append(({"/api/version": lambda request, code=code, body=body: answer(request, code, body)}, match))
    for answers, match in cases:
        with dashboard(answers) as url, pytest.raises(WinnowError, match=match):
            RayJobs(url)
    with pytest.raises(WinnowError, match=r"does not answer \(.*refused.*is the cluster up"):
        RayJobs(f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere")
    with (
        dashboard({"/api/version": lambda request: answer(request, 403, "Forbidden")}) as url,
        pytest.raises(WinnowError, match="RAY_AUTH_TOKEN or /nowhere, which RAY_AUTH_TOKEN_PATH names instead of ~"),
    ):
        RayJobs(url)


def test_the_token_is_sent_to_this_host_alone(monkeypatch, tmp_path):
    """From the variable, without the line break of a file, or from the file; not to the target of a redirect."""
    tokens = []

    def note(request: BaseHTTPRequestHandler) -> None:
        tokens.append(request.headers["Authorization"])
        answer(request, 200, json.dumps(metadata()["/api/version"]))

    with dashboard({"/there": note}) as other:

        def redirect(request: BaseHTTPRequestHandler) -> None:
            tokens.append(request.headers["Authorization"])
            answer(request, 302, "", Location=f"{other}/there")

        with dashboard(metadata() | {"/api/version": redirect}) as url:
            monkeypatch.setenv("RAY_AUTH_TOKEN", "secret\n")
            RayJobs(url)
            assert set(tokens[::2]) == {"Bearer secret"}
            assert set(tokens[1::2]) == {None}
            monkeypatch.delenv("RAY_AUTH_TOKEN")
            (tmp_path / "home" / ".ray").mkdir(parents=True)
            (tmp_path / "home" / ".ray" / "auth_token").write_text("from file\n")
            RayJobs(url)
            assert tokens[-2:] == ["Bearer from file", None]


def test_an_unknown_step_is_refused_before_the_cluster_is_asked(winnow, data_dir):
    words = ("submit", "rso", "--config", data_dir / "demo.yaml", "--address", "http://nowhere:1", "--force", "selct")
    code, text = winnow(*words)
    assert code == 2
    assert "--force selct: no step 'selct' in rso" in text


def test_a_sweep_is_submitted_as_a_sweep(winnow, data_dir, tmp_path, monkeypatch):
    """The words of the job, in the folder that is sent, make the runs of the sweep here, with their keys."""
    over = ["select.rule.beta=0.1,2", "optimize.seed=0,1"]
    here = plan_sweep(["rso"], [data_dir / "demo.yaml"], [], over).plans
    submitted: list[Any] = []

    class Cluster:
        url = source = "fake"

        def __init__(self, address: str | None) -> None: ...

        def nodes(self) -> list:
            return []

        def submit(self, folder: Path, words: list[str], **about: str) -> tuple[str, None]:
            with monkeypatch.context() as patch:
                patch.chdir(folder)
                values = [words[n + 1] for n, word in enumerate(words) if word == "--over"]
                submitted.extend([words[0], plan_sweep([words[1]], [], [], values).plans, about["plan"]])
            return "sweep-1", None

    monkeypatch.setattr(ray_jobs, "RayJobs", Cluster)
    monkeypatch.setattr("jobs.commands.cluster.check_fits", lambda *facts: None)
    words = ["submit", "rso", "--config", data_dir / "demo.yaml", "--address", "http://head:8265", "--no-wait"]
    words += ["--store", tmp_path / "store", "--over", over[0], "--over", over[1]]
    code, text = winnow(*words)
    assert code == 0, text
    command, plans, key = submitted
    assert (command, key) == ("sweep", bundle.plan_key(here))
    assert [plan.name for plan in plans] == [plan.name for plan in here]
    assert [[step.key for step in plan.steps] for plan in plans] == [[step.key for step in plan.steps] for plan in here]
    code, text = winnow(*words, "--name", "x")
    assert (code, "--name x" in text) == (2, True)


class FakeJob:
    """Job on a fake dashboard: at each request for the job its log is the next one, or no answer; then it has ended."""

    def __init__(self, *logs: str | None, end: str = "SUCCEEDED") -> None:
        self.logs, self.end = list(logs), end
        self.log: str | None = None
        self.over = threading.Event()
        self.answers = metadata() | {"/api/jobs/run-1": self._details, "/api/jobs/run-1/logs": self._log}

    def _details(self, request: BaseHTTPRequestHandler) -> None:
        self.log = self.logs.pop(0)
        if self.log is None:
            return answer(request, 503, "no healthy upstream")
        job = {"type": "SUBMISSION", "submission_id": "run-1", "entrypoint": "", "metadata": {"winnow_plan": "0" * 8}}
        return answer(request, 200, json.dumps(job | {"status": "RUNNING" if self.logs else self.end}))

    def _log(self, request: BaseHTTPRequestHandler) -> None:
        if self.log == "lost":
            answer(request, 500, "the node is dead")
        else:
            answer(request, 200, json.dumps({"logs": self.log}))

    def follow(self, monkeypatch) -> tuple[str, str]:
        """Return what was written, and the status or the error."""
        monkeypatch.setattr(ray_jobs, "POLL", 0.01)
        texts: list[str] = []
        with dashboard(self.answers) as url:
            try:
                end = str(RayJobs(url).follow("run-1", texts.append).status)
            except WinnowError as error:
                end = str(error)
            finally:
                self.over.set()
        return "".join(texts), end


def test_a_log_is_followed_across_lost_connections(monkeypatch):
    """Each character is written once, in its place, and none is lost; a log may be lost with its node."""
    log = "one\ntwo\nthree\n"
    job = FakeJob("", log[:6], None, None, log[:6], log[:9], "lost", None, log, end="FAILED")
    assert job.follow(monkeypatch) == (log, "FAILED")
    assert FakeJob(log, "lost").follow(monkeypatch) == (log, "SUCCEEDED")


def test_a_head_that_loses_its_power_is_given_up(monkeypatch):
    monkeypatch.setattr(ray_jobs, "TIMEOUT", 0.2)
    job = FakeJob("one\n", end="")

    def details(request: BaseHTTPRequestHandler) -> None:
        job.logs.append("")  # it never ends
        job._details(request)
        job.answers |= {path: lambda request: job.over.wait() for path in ("/api/jobs/run-1", "/api/jobs/")}

    job.answers["/api/jobs/run-1"] = details
    text, end = job.follow(monkeypatch)
    assert text == "one\n"
    assert re.search(r"lost while following run-1 \(does not answer \(timed out\).*submitting again continues", end)


# jobs/start.sh: which Python runs a job, in which cluster


def test_packages_apart_from_their_interpreter_are_run_by_the_python_of_the_path(tmp_path):
    """A process that maps Ray's library from lib/python3/dist-packages may have no bin/python3 beside it."""
    library = tmp_path / "usr" / "lib" / "python3" / "dist-packages" / "ray" / "_raylet.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"0")
    for prefix in ("usr", "other"):
        (tmp_path / prefix / "bin").mkdir(parents=True)
    script = f"#!/bin/sh\necho of {tmp_path}/$(basename $(dirname $(dirname $0))): $@\n"
    code = f"import mmap, os, sys; m = mmap.mmap(os.open({str(library)!r}, 0), 0, prot=1); sys.stdin.read()"
    env = os.environ | {"PATH": f"{tmp_path}/other/bin:/usr/bin:/bin"}

    def output_with_python_in(prefix: str) -> str:
        file = tmp_path / prefix / "bin" / "python3"
        file.write_text(script)
        file.chmod(0o755)
        command = ["sh", str(ROOT / "jobs" / "start.sh"), str(process.pid), "run", "rso"]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while str(library) not in maps.read_text():
            assert process.poll() is None
        assert output_with_python_in("other") == f"of {tmp_path}/other: -m jobs run rso\n"
        assert output_with_python_in("usr") == f"of {tmp_path}/usr: -m jobs run rso\n"


@pytest.mark.parametrize("args", [["--gcs-address=10.0.0.1:6379", "--worker=python --gcs-address=10.0.0.2:1"], []])
def test_a_job_joins_the_cluster_of_the_raylet_above_it(tmp_path: Path, args: list[str]):
    """Ray tells a job the address of the cluster that was started last on that machine, and it would wait forever."""
    (tmp_path / "python3").write_text('#!/bin/sh\necho "$RAY_ADDRESS: $*"\n')
    (tmp_path / "python3").chmod(0o755)
    script = f"import subprocess; subprocess.run(['sh', '-c', 'sh {ROOT}/jobs/start.sh $$ run rso; true'], check=True)"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RAY_ADDRESS": "10.0.0.9:9"}
    raylet = [sys.executable, "-c", script, *args]
    done = subprocess.run(raylet, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{'10.0.0.1:6379' if args else '10.0.0.9:9'}: -m jobs run rso\n"


# A real head


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head() as running:
        yield running


@pytest.fixture
def token(head, monkeypatch) -> None:
    """This process has the head's token."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)


@pytest.mark.filterwarnings("ignore:.*path. 1 of the first 120 responses of .* will be rejected")  # by the plan
def test_refusals_of_a_real_head(head, winnow, monkeypatch):
    """A token that is missing or wrong, a port of Ray that is not the dashboard's, a profile that does not fit."""
    # In a process of its own: Ray keeps the token of a cluster that another test has started in this one.
    missing = head.winnow("submit", *WORDS, "--address", head.url, token=None)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 32)
    invalid = winnow("submit", *WORDS, "--address", head.url)
    for code, text, match in (
        (missing.returncode, missing.stdout + missing.stderr, "Unauthorized: Missing authentication token"),
        (*invalid, "Forbidden: Invalid"),
    ):
        assert code == 2
        assert match in text
        assert "`ray get-auth-token` prints it there" in text
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    code, text = winnow("logs", "any", "--address", f"http://{head.gcs}")
    assert (code, "not as a Ray dashboard" in text) == (2, True), text
    code, text = winnow("submit", *WORDS, "--address", head.url, "--profile", "cluster")
    assert code == 2
    assert "profile, untrained: 1 worker with 4 CPU, 16.0 GiB each, and the cluster has room for 0" in text


def lines_until(word: str, lines: Iterator[str]) -> list[str]:
    """Return the lines up to the first with the word."""
    seen = []
    for line in lines:
        seen.append(line)
        if word in line:
            return seen
    raise AssertionError("".join(seen))


@pytest.fixture
def words(unmarked, tmp_path) -> list[str | Path]:
    """Recipe, a config with an SFT policy that is there already, and two parts."""
    config = tmp_path / "copied.yaml"
    config.write_text(
        f"sft: {{use: model, with: {{path: {unmarked.folder}}}}}\n"
        f"own_candidates: {{with: {{path: {CONFIG.with_name('candidates.jsonl')}, probability: p, max_tokens: 512}}}}\n"
    )
    return [RECIPE, "--config", config, *(word for item in SETS for word in ("--set", item))]


def check_tables_of_a_run_in_process(words: list[str | Path], folder: Path) -> None:
    """Check that the job's store in `folder` has the bytes of a run in this process, under the plan's name."""
    (plan,) = recipes.plans([RECIPE], [Path(words[2])], SETS)
    run(plan, Store(folder / "alone"), LocalExecutor(), Silent())
    for step in plan.steps:
        there, here = (Store(folder / root).folder(step).manifest for root in ("store", "alone"))
        assert there["files"] == here["files"]
    assert [*Store(folder / "store").runs()] == [plan.name]


@pytest.mark.filterwarnings("ignore:.*path. 1 of the first 120 responses of .* will be rejected")  # by the plan
def test_a_submitted_job_has_the_bytes_of_a_run_in_process(head, token, winnow, words, tmp_path):
    """`submit` prints how to follow it, and `logs` follows it to its end."""
    address = ["--address", head.url]
    code, text = winnow("submit", *words, "--store", "store", "--profile", "laptop", *address, "--no-wait")
    assert code == 0, text
    name = re.search(r"`winnow logs (own_candidates-[0-9a-f]{8}-1) --address", text)[1]
    code, text = winnow("logs", name, *address)
    assert (code, " finished " in text, f"{name}: succeeded" in text) == (0, True, True), text
    assert [line for line in winnow("status", *address)[1].splitlines() if name in line and "SUCCEEDED" in line]
    check_tables_of_a_run_in_process(words, tmp_path)


@pytest.mark.bench  # two more jobs and two clients: 40 seconds
@pytest.mark.timeout(300)
def test_submit_follow_stop_submit_again_finish(head, token, winnow, words, tmp_path):
    """The tables are those of a run in this process, byte for byte; what was finished before the stop is untouched."""
    address = ["--address", head.url]
    command = ["submit", *words, "--store", "store", "--profile", "laptop", *address]
    with ExitStack() as followers:
        first = followers.enter_context(head.start(*command, "--force", "own_candidates"))
        *intro, job = lines_until("job ", first.stdout)
        name = job.split()[1]
        assert intro == [f"cluster {head.url} (--address)\n", f"store {tmp_path}/store\n"]
        assert re.fullmatch(r"own_candidates-[0-9a-f]{8}-1", name)
        attached = followers.enter_context(head.start(*command, "--attach"))
        code, text = winnow(*command)
        assert code == 2
        assert f"{name} computes this already" in text
        lines_until(" finished ", first.stdout)
        assert f"{name}: stopped; its finished parts are kept" in winnow("stop", name, *address)[1]
        for process in (first, attached):
            last = [*process.stdout][-1]
            assert re.search(f"^{name}: stopped; `.* submit own_candidates", last)
            assert "--force" not in last
            assert process.wait() == 1
    details = RayJobs(head.url).job(name)
    assert "--force own_candidates" in details.entrypoint
    assert "--force" not in details.runtime_env["env_vars"]["WINNOW_SUBMITTED"]

    second = f"{name[:-1]}2"
    parts = {part: part.stat().st_mtime_ns for part in tmp_path.glob("store/*/*/*.parquet")}
    code, text = winnow(*command, "--no-wait")
    assert (code, f"`winnow logs {second} --address {head.url}` follows it" in text) == (0, True), text
    code, text = winnow("logs", second, *address)
    assert (code, "cached" in text, f"{second}: succeeded" in text) == (0, True, True), text
    assert {part: part.stat().st_mtime_ns for part in parts} == parts
    check_tables_of_a_run_in_process(words, tmp_path)
    listing = winnow("status", *address)[1]
    assert [word for word in (name, "STOPPED", second, "SUCCEEDED") if word not in listing] == []


class Overtaken(RayJobs):
    """Client whose first list of jobs is from before the submission of somebody else."""

    rival: Callable[[], object] = staticmethod(lambda: None)

    def jobs(self) -> list[JobDetails]:
        jobs = super().jobs()
        rival, self.rival = self.rival, lambda: None
        rival()
        return jobs


def test_two_users_who_submit_at_once(head, token, winnow, tmp_path):
    """The name is the lock: one job of one plan in one store; another store gets the next name, and does not wait.

    What a job died of is printed, because its empty log does not say it; what Ray refuses is printed in its words.
    """
    (tmp_path / "code" / "jobs").mkdir(parents=True)
    (tmp_path / "code" / "jobs" / "start.sh").write_text('shift\nexec "$@"\n')  # runs the words themselves
    folder, other, late = tmp_path / "code", RayJobs(head.url), Overtaken(head.url)
    options = dict(recipes="привет", plan="0" * 8, store="here", resume="")
    late.rival = lambda: other.submit(folder, ["sleep", "60"], **options)
    name, running = late.submit(folder, ["sleep", "60"], **options)
    assert name == running.submission_id == "run-00000000-1"
    assert [job.submission_id for job in other.jobs() if job.metadata["winnow_plan"] == "0" * 8] == [name]
    text = winnow("stop", name, "--address", head.url)[1]
    assert f"{name}: stopped; its finished parts are kept" in text
    assert other.job(name).status == "STOPPED"

    options = dict(recipes="rso", plan="1" * 8, resume="")
    late.rival = lambda: other.submit(folder, ["sh", "-c", "kill -9 $$"], **options, store="there")
    assert late.submit(folder, ["true"], **options, store="here") == ("rso-11111111-2", None)
    text = winnow("logs", "rso-11111111-1", "--address", head.url)[1]
    assert "rso-11111111-1: failed: killed by signal 9 (out of memory?); submitting the same again" in text

    other.submit_job(entrypoint="true", submission_id="rso-22222222-1")
    with pytest.raises(WinnowError, match=rf"^{head.url}: .*ValueError: Job with .* rso-22222222-1 already exists"):
        other.submit(folder, ["true"], recipes="rso", plan="2" * 8, store="store", resume="")
    with pytest.raises(WinnowError, match="no job 'rso-22222222-1'"):
        other.job("rso-22222222-1")
