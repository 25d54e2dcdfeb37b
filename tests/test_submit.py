"""winnow submit, logs, stop: what is shipped has the keys of what is here, and a real head with a token runs it."""

import json
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jobs import recipes, shipment, submit
from pipeline.executors import InProcess
from pipeline.run import run
from pipeline.store import Store
from pipeline.syntax import parse, written
from schemas import WinnowError
from tests.heads import ROOT, Head, free_ports, ray_head
from tests.runs import Silent

RECIPE, WORLD = "own_candidates", ROOT / "tests" / "data" / "untrained.yaml"
SETS = ["target=own_candidates", "shards=2"]
ASKED = [RECIPE, "--on", WORLD, *(word for item in SETS for word in ("--set", item))]


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
        ("raft", ["optimize@2.lr=5e-7"]),
        ("spin", ["rounds=3"]),
        ("alright", []),
        ("cvx_rerank", []),
    ],
)
def test_a_plan_there_has_the_keys_and_the_name_of_the_plan_here(world, tmp_path, monkeypatch, recipe, sets):
    """The recipe in one file, without what it extends and without its world, is the same recipe."""
    worlds = [world / "world.yaml"]
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
    here = recipes.plans(["rso"], [Path("world.yaml")], [])
    shipment.check_paths(here)
    shipped = shipment.pack(tmp_path, ["rso"], [Path("world.yaml")], None)
    monkeypatch.chdir(tmp_path)
    assert shipment.plan_key(recipes.plans(shipped, [], [])) == shipment.plan_key(here)


def test_a_path_of_this_folder_is_refused(world, monkeypatch):
    monkeypatch.chdir(world)
    with pytest.raises(WinnowError, match=r"prompts: prompts\.jsonl is relative to this folder"):
        shipment.check_paths(recipes.plans(["rso"], [Path("world.yaml")], ["prompts.path=prompts.jsonl"]))


def test_the_code_travels_and_nothing_else(world, tmp_path):
    words = shipment.pack(tmp_path, ["rso", "ipo"], [world / "world.yaml"], "laptop")
    files = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    assert {file.split("/")[0] for file in files} == {*shipment.PACKAGES, "submission", "commit.txt"}
    assert {"jobs/start.sh", "jobs/recipes/_base.yaml", "jobs/queries/status.sql", *words[:2], words[3]} <= files
    assert {Path(file).suffix for file in files} <= shipment.KINDS | {".yml", ".txt"}
    assert words[:3] == ["submission/rso.yaml", "submission/ipo.yaml", "--profile"]
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 5e6


def test_a_shipment_over_the_limit_names_what_is_large(world, tmp_path, monkeypatch):
    monkeypatch.setattr(shipment, "LIMIT", 10_000)
    with pytest.raises(WinnowError, match=r"takes 0\.0 MiB; the largest files: .*only code travels"):
        shipment.pack(tmp_path, ["rso"], [world / "world.yaml"], None)


def test_two_recipes_of_one_name(world, tmp_path):
    (tmp_path / "rso.yaml").write_text("extends: _base\n")
    (tmp_path / "out").mkdir()
    with pytest.raises(WinnowError, match=r"two recipes are called rso\.yaml"):
        shipment.pack(tmp_path / "out", ["rso", str(tmp_path / "rso.yaml")], [world / "world.yaml"], None)


# Where to.


@pytest.mark.parametrize(
    "url", ["", "head:8265", "ray://head:10001", "auto", "http://", "http://head:port", "s3://bucket"]
)
def test_what_is_no_url_of_a_dashboard(url, monkeypatch):
    for name in submit.OVERRIDES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(WinnowError, match=r"--address: .*like http://head:8265"):
        submit.resolved(url)


def test_a_variable_of_rays_outranks_the_argument_and_says_so(monkeypatch):
    """As it does in Ray's own client, which would not go where it was told to either."""
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "http://other:8265/")
    assert submit.resolved("http://head:8265") == ("http://other:8265", "RAY_ADDRESS")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://third:8265")
    assert submit.resolved("http://head:8265") == ("http://third:8265", "RAY_API_SERVER_ADDRESS")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "auto")
    with pytest.raises(WinnowError, match=r"RAY_API_SERVER_ADDRESS: .* outranks --address: unset it"):
        submit.resolved("http://head:8265")


@contextmanager
def answering(answers: dict[str, object]) -> Iterator[str]:
    """A dashboard of some cluster: JSON at these paths, 404 elsewhere."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = answers.get(self.path)
            self.send_response(404 if found is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps(found).encode())

        def log_message(self, *words: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("ray", "python", "said"),
    [
        ("2.59.0", "3.11.4", "runs Ray 2.59.0, and here is Ray"),
        (None, "3.12.1", "runs Python 3.12, and here is Python 3.11"),
    ],
)
def test_a_cluster_of_another_version(monkeypatch, ray, python, said):
    import ray as ours

    for name in submit.OVERRIDES:
        monkeypatch.delenv(name, raising=False)
    version = {"ray_version": ray or ours.__version__}
    with (
        answering({"/api/version": version, "/api/v0/cluster_metadata": {"data": {"pythonVersion": python}}}) as url,
        pytest.raises(WinnowError) as caught,
    ):
        submit.Cluster(url)
    assert said in str(caught.value)


def test_a_server_that_is_no_dashboard_and_none_at_all(monkeypatch):
    for name in submit.OVERRIDES:
        monkeypatch.delenv(name, raising=False)
    with answering({}) as url, pytest.raises(WinnowError, match="answers, but not as a Ray dashboard"):
        submit.Cluster(url)
    with pytest.raises(WinnowError, match=r"does not answer \(.*refused.*is the cluster up"):
        submit.Cluster(f"http://127.0.0.1:{free_ports(1)[0]}")


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
        first = followers.enter_context(head.following(*command))
        cluster, job = until("job ", first.stdout)
        name = job.split()[1]
        assert cluster == f"cluster {head.url} (--address)\n"
        assert re.fullmatch(r"own_candidates-[0-9a-f]{8}-1", name)
        attached = followers.enter_context(head.following(*command, "--attach"))
        assert f"{name} makes this already" in said(head.winnow(*command), 2)
        until(" made ", first.stdout)
        assert f"{name}: stopped; its finished parts are kept" in said(head.winnow("stop", name, *there), 0)
        for each in (first, attached):
            assert f"{name}: stopped; `winnow submit own_candidates" in [*each.stdout][-1]
            assert each.wait() == 1
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
    run(plan, Store(folder / "alone"), InProcess(), Silent())
    for step in plan.steps:
        there, here = (Store(folder / root).folder(step).manifest for root in ("store", "alone"))
        assert there["files"] == here["files"]
    assert [*Store(folder / "store").runs()] == [plan.name]
