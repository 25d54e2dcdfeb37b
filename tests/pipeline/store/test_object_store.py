"""A store in an object store (moto's S3 server): the same bytes as in a folder, and two runs at once without harm."""

import json
import multiprocessing
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from pipeline.config.plan import Plan
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.ray_executor import RayExecutor
from pipeline.execution.run import run
from pipeline.store.storage import create, parse_location, replace, sizes
from pipeline.store.store import Store
from schemas import WinnowError
from schemas.tables import EVALUATIONS
from tests.pipeline.execution.test_run import digests
from tests.pipeline.store.test_store import Log, Trouble, plan, toy_stages
from tests.runs import Silent, local, plan_of

KEYS = {"AWS_ACCESS_KEY_ID": "who", "AWS_SECRET_ACCESS_KEY": "hidden-secret", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (KEYS | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}).items():
            patch.setenv(name, value)
        parse_location("s3://bucket/x").fs.mkdir("bucket")
        yield "s3://bucket"
        parse_location("s3://bucket/x").fs.clear_instance_cache()
    server.stop()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of this machine."""
    monkeypatch.setenv("WINNOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def trouble() -> Iterator[Trouble]:
    with toy_stages() as trouble:
        yield trouble


def make(store: Store, made: Plan | None = None) -> Log:
    log = Log()
    run(made or plan(), store, LocalExecutor(), log)
    return log


def contents(store: Store) -> dict[str, list]:
    return {manifest["key"]: [(f["file"], f["sha256"]) for f in manifest["files"]] for manifest in store.sealed()}


def test_of_two_writers_the_first_one_wins(bucket: str, tmp_path: Path):
    for place in (parse_location(f"{bucket}/two/file.json"), tmp_path / "two" / "file.json"):
        assert create(place, b"first")
        assert not create(place, b"second")
        assert place.read_bytes() == b"first"
        replace(place, b"third")
        assert sizes(place.parent) == {"file.json": 5}
    assert sizes(parse_location(f"{bucket}/nothing")) == {}


def test_a_run_in_a_bucket_makes_the_bytes_of_one_in_a_folder(
    bucket: str, home: Path, tmp_path: Path, trouble: Trouble
):
    here, there = Store(tmp_path), Store(f"{bucket}/toy")
    make(here)
    log = make(there)
    assert contents(there) == contents(here)
    assert [event for event, _ in log.events][-1] == "sealed"
    assert {event for event, _ in make(there).events} == {"cached"}
    assert there.runs() == here.runs()


def test_no_credential_stands_in_a_store(bucket: str, home: Path, trouble: Trouble):
    store = Store(f"{bucket}/secrets")
    make(store)
    everything = store.root.fs.cat(store.root.fs.find(store.root.path))
    assert len(everything) > 10
    assert not [name for name, content in everything.items() if b"hidden-secret" in content or b"who" in content]


def test_a_run_that_failed_goes_on_from_its_parts(bucket: str, home: Path, trouble: Trouble):
    store = Store(f"{bucket}/failed")
    trouble.fail_at = 3
    with pytest.raises(RuntimeError, match="power cut"):
        make(store)
    assert ("begin", ("grade", 2, 3)) in make(store).events
    assert trouble.calls == 4


def test_a_model_is_fetched_once_and_is_what_was_made(bucket: str, home: Path, trouble: Trouble):
    from pipeline.config.plan import make_plan
    from pipeline.config.recipe import Recipe

    made = make_plan(Recipe("m", shards=1, target="m", steps={"m": {"use": "toy_model", "with": {"size": 7}}}))
    store = Store(f"{bucket}/models")
    make(store, made)
    model = store.folder(made.target).model()
    assert (model.folder / "model.safetensors").read_bytes() == b"x" * 7
    assert model.folder == home / "models" / model.digest
    before = (model.folder / "model.safetensors").stat().st_mtime_ns
    assert (store.folder(made.target).model().folder / "model.safetensors").stat().st_mtime_ns == before
    assert list(home.iterdir()) == [home / "models"], "nothing else is left on this machine"


def _at_once(url: str, cache: str, folder: str, results: multiprocessing.Queue) -> None:
    os.environ["WINNOW_CACHE"] = cache
    with toy_stages() as trouble:
        make(Store(url))
        results.put(trouble.calls)


def test_two_runs_at_once_agree_on_every_part(bucket: str, home: Path, tmp_path: Path, trouble: Trouble):
    """There are no locks there: both may make a part, the first one's counts, and both end with one manifest."""
    make(Store(tmp_path / "alone"))
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue = context.Queue()
    both = [
        context.Process(target=_at_once, args=(f"{bucket}/at-once", str(home / str(n)), "", results)) for n in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert contents(Store(f"{bucket}/at-once")) == contents(Store(tmp_path / "alone"))


def test_a_place_without_permission_is_refused_before_any_work(bucket: str, trouble: Trouble, tmp_path: Path):
    with pytest.raises(WinnowError, match=r"--store s3://no-such-bucket/x: cannot be written .*credentials"):
        make(Store("s3://no-such-bucket/x"))
    (tmp_path / "file").write_text("")
    with pytest.raises(WinnowError, match="cannot be written"):
        make(Store(tmp_path / "file"))
    assert trouble.calls == 0


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s3://key:secret@bucket/x", r"^s3://\.\.\.: no credentials in a URL"),
        ("gs://bucket/x", "gcsfs"),
        ("nosuch://bucket/x", "nosuch"),
    ],
)
def test_a_url_that_cannot_be_read_is_refused(url: str, told: str):
    with pytest.raises(WinnowError, match=told) as refused:
        Store(url)
    assert "secret" not in str(refused.value)


def test_a_whole_small_run_from_prompts_to_the_leaderboard(bucket: str, home: Path, world: Path, finished: Path):
    """On Ray from `reward` on, given the candidates of a run in a folder: the same bytes in every table and model."""
    made, there, here = plan_of(world), Store(f"{bucket}/whole"), Store(finished)
    given = {"sft", "ranker", "prompts", "sample"}
    for step in made.steps:
        if given & {step.name} or step.name.startswith("eval"):
            _copy(local(here.folder(step).path), there.folder(step).path)
    watcher = Silent()
    run(made, there, RayExecutor(2), watcher)
    assert {"reward", "select", "compare", "pair", "reference", "examples", "optimize", "judge"} <= set(watcher.ran)
    assert digests(made, there) == digests(made, here)
    assert there.folder(made.target).read(EVALUATIONS).num_rows >= 5


def _copy(here: Path, there) -> None:
    digest = (json.loads((here / "manifest.json").read_text())["model"] or "")[:16]
    for file in sorted(file for file in here.rglob("*") if file.is_file()):
        name = str(file.relative_to(here)).replace("model/", f"model-{digest}/", 1)
        replace(there / name, file.read_bytes())


class _Expired(BaseHTTPRequestHandler):
    """Answers as S3 does to a token whose time is over."""

    def do_PUT(self) -> None:
        body = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
        self.send_response(400)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None: ...


def test_an_expired_credential_is_said_with_its_cure(trouble: Trouble, monkeypatch: pytest.MonkeyPatch):
    server = HTTPServer(("127.0.0.1", 0), _Expired)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in (KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}).items():
        monkeypatch.setenv(name, value)
    parse_location("s3://expired/x").fs.clear_instance_cache()
    with pytest.raises(WinnowError, match=r"cannot be written .*expired.* check that .*credentials in the environment"):
        make(Store("s3://expired/x"))
    parse_location("s3://expired/x").fs.clear_instance_cache()
    server.shutdown()
    server.server_close()
    assert trouble.calls == 0
