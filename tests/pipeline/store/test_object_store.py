"""A store in an object store (moto's S3 server): the same bytes as in a folder, and two runs at once do no harm."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import ray

from pipeline.execution.executor import LocalExecutor
from pipeline.execution.ray_executor import RayExecutor
from pipeline.execution.run import run
from pipeline.resources import Profile, Resources
from pipeline.store.storage import create, parse_location, replace, sizes
from pipeline.store.store import Store
from schemas import WinnowError
from schemas.tables import EVALUATIONS
from tests.pipeline.store.sizes import SMALL
from tests.pipeline.store.test_store import Trouble, make, plan_of_one
from tests.runs import Silent, local, plan_of
from tests.toys import notes, plan_of_toys

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "visible-id",
    "AWS_SECRET_ACCESS_KEY": "hidden-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An S3 server with a bucket: in its own process, because vLLM fails where Flask, which moto uses, is imported."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        try:
            wait_for_port(port)
            for name, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}).items():
                patch.setenv(name, value)
            parse_location("s3://bucket/x").fs.mkdir("bucket")
            yield "s3://bucket"
            parse_location("s3://bucket/x").fs.clear_instance_cache()
        finally:
            server.terminate()


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of this machine."""
    monkeypatch.setenv("WINNOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def in_folder(tmp_path: Path, trouble: Trouble) -> Store:
    """A finished run of the toy stages in a folder."""
    store = Store(tmp_path / "store")
    make(store)
    return store


def files(store: Store) -> dict[str, list]:
    """Names and digests of all files of every finished step, except the measured speeds."""
    return {
        manifest["key"]: [
            (file["file"], file["sha256"]) for file in manifest["files"] if not file["file"].startswith("speeds-")
        ]
        + [manifest["model"]]
        for manifest in store.sealed()
    }


def test_of_two_writers_the_first_one_wins(bucket: str, tmp_path: Path):
    for path in (parse_location(f"{bucket}/two/file.json"), tmp_path / "two" / "file.json"):
        assert create(path, b"first")
        assert not create(path, b"second")
        assert path.read_bytes() == b"first"
        replace(path, b"third")
        assert sizes(path.parent) == {"file.json": 5}
    assert sizes(parse_location(f"{bucket}/nothing")) == {}


def test_a_run_writes_the_same_bytes_to_a_bucket_and_no_credential(bucket: str, cache: Path, in_folder: Store):
    store = Store(f"{bucket}/toy")
    assert make(store) == ["source", "grade"]
    assert files(store) == files(in_folder)
    assert make(store) == []
    assert store.runs() == in_folder.runs()
    stored = store.root.fs.cat(store.root.fs.find(store.root.path))
    assert len(stored) > 10
    assert not [name for name, content in stored.items() if b"hidden-secret" in content or b"visible-id" in content]


def test_a_failed_run_continues_from_its_parts(bucket: str, cache: Path, trouble: Trouble):
    store = Store(f"{bucket}/failed")
    trouble.fail_at = 3
    with pytest.raises(RuntimeError, match="power cut"):
        make(store)
    assert make(store) == ["grade"]
    assert trouble.calls == 3 + 1


def test_a_model_is_downloaded_once(bucket: str, cache: Path, trouble: Trouble):
    to_make, store = plan_of_one("toy_model", size=7), Store(f"{bucket}/models")
    make(store, to_make)
    model = store.folder(to_make.target).model()
    weights = model.folder / "model.safetensors"
    assert weights.read_bytes() == b"x" * 7
    assert model.folder == cache / "models" / model.digest
    before = weights.stat().st_mtime_ns
    assert store.folder(to_make.target).model() == model
    assert weights.stat().st_mtime_ns == before
    assert list(cache.iterdir()) == [cache / "models"], "nothing else stays on this machine"


def test_two_runs_at_once_agree_on_every_part(bucket: str, cache: Path, in_folder: Store):
    """There are no locks there: both may make a part, the first one's counts, and both end with one manifest."""
    url = f"{bucket}/at-once"
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: make(Store(url)), range(2)))
    assert files(Store(url)) == files(in_folder)


def test_a_store_that_cannot_be_written_is_refused_before_any_work(bucket: str, trouble: Trouble, tmp_path: Path):
    with pytest.raises(WinnowError, match=r"--store s3://no-such-bucket/x: cannot be written .*credentials"):
        make(Store("s3://no-such-bucket/x"))
    (tmp_path / "file").write_text("")
    with pytest.raises(WinnowError, match="is a file"):
        make(Store(tmp_path / "file"))
    assert trouble.calls == 0


def test_a_url_that_cannot_be_read_is_refused():
    for url, message in (
        ("s3://key:secret@bucket/x", r"^s3://\.\.\.: remove the credentials"),
        ("gs://bucket/x", "gcsfs"),
        ("nosuch://bucket/x", "nosuch"),
    ):
        with pytest.raises(WinnowError, match=message) as refused:
            Store(url)
        assert "secret" not in str(refused.value)


@pytest.fixture(scope="module")
def ray_with_credentials(bucket: str) -> None:
    """Leave no Ray of another test: workers have the environment in which Ray started."""
    ray.shutdown()


@pytest.mark.parametrize("small_table", [SMALL], indirect=True, ids=["small"])  # as `finished` has it
@pytest.mark.parametrize(
    "to_make", [{"sample"}, pytest.param({"sample", "reward", "optimize"}, marks=pytest.mark.bench)], ids=len
)
def test_ray_workers_write_the_bytes_of_the_run_in_process_to_a_bucket(
    bucket: str, cache: Path, ray_with_credentials: None, data_dir: Path, finished: Path, to_make: set[str]
):
    """Given the other steps of a run, each with workers of its own.

    `sample` has one worker, in which the requests of two parts share batches; `reward` has two; `optimize` makes a
    model. Every table and the model are the same. That `reward` in another process has the same bytes is also a claim
    of test_run.py; that workers write models, of the test below.
    """
    plan, store, reference = plan_of(data_dir), Store(f"{bucket}/ray{len(to_make)}"), Store(finished)
    for step in plan.steps:
        if step.name in to_make:
            continue
        folder = local(reference.folder(step).path)
        digest = json.loads((folder / "manifest.json").read_text())["model"] or ""
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            name = str(file.relative_to(folder)).replace("model/", f"model-{digest[:16]}/", 1)
            replace(store.folder(step).path / name, file.read_bytes())
    reporter = Silent()
    one_engine = Profile(stages={"sample": Resources(cpus=1, max_workers=1)})
    run(plan, store, RayExecutor(2, profile=one_engine), reporter)
    assert set(reporter.ran) == to_make
    assert files(store) == files(reference)
    assert store.folder(plan.target).read(EVALUATIONS).num_rows >= 5


@pytest.mark.parametrize("small_table", [SMALL], indirect=True, ids=["small"])  # as workers have it
def test_two_ray_workers_write_parts_and_one_a_model_to_a_bucket(
    bucket: str, cache: Path, ray_with_credentials: None, tmp_path: Path
):
    """The same bytes as in this process, in a folder."""
    plan = plan_of_toys(4, together=dict(folder=str(tmp_path)), weights={})
    stores = Store(f"{bucket}/workers"), Store(tmp_path / "store")
    for store, executor in zip(stores, (RayExecutor(2), LocalExecutor()), strict=True):
        run(plan, store, executor, Silent())
        if store is stores[0]:
            assert len({pid for _, pid in notes(tmp_path)}) == 2
    assert files(stores[0]) == files(stores[1])
    assert (stores[0].folder(plan.target).model().folder / "model.safetensors").read_bytes() == b"40"


class ExpiredToken(BaseHTTPRequestHandler):
    """Answers every write as S3 does when the token has expired."""

    def do_PUT(self) -> None:
        body = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
        self.send_response(400)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None: ...


def test_an_expired_credential_is_reported_with_its_cure(trouble: Trouble, monkeypatch: pytest.MonkeyPatch):
    server = HTTPServer(("127.0.0.1", 0), ExpiredToken)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}).items():
        monkeypatch.setenv(name, value)
    parse_location("s3://expired/x").fs.clear_instance_cache()
    with pytest.raises(WinnowError, match=r"cannot be written .*expired.* check that .*credentials in the environment"):
        make(Store("s3://expired/x"))
    parse_location("s3://expired/x").fs.clear_instance_cache()
    server.shutdown()
    server.server_close()
    assert trouble.calls == 0
