"""Garbage is what no run reaches: it is listed and, on request, deleted; what a run reaches stays, whatever happens."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config.plan import Plan, reads_files
from pipeline.stage import stages
from pipeline.store.gc import STALE_SECONDS, GarbageReport, delete_garbage, garbage
from pipeline.store.store import Store
from schemas import WinnowError
from tests.chain import Luck, Raced, make, planned, recipe, step, toys
from tests.runs import local

UNLINKED = "0123456789abcdef"  # key of a step that no run links to


@pytest.fixture
def luck() -> Iterator[Luck]:
    with toys() as luck:
        yield luck


@pytest.fixture
def plan(tmp_path: Path, luck: Luck) -> Plan:
    return planned(recipe(tmp_path))


@pytest.fixture
def store(tmp_path: Path, plan: Plan) -> Store:
    """A store with the run `toy`."""
    store = Store(tmp_path / "store")
    make(plan, store)
    return store


@pytest.fixture
def other(tmp_path: Path, luck: Luck) -> Plan:
    """A plan that shares draw and rate with `plan`."""
    return planned(recipe(tmp_path, "other", keep="with: {above: 3.0}"))


def paths(report: GarbageReport) -> list[str]:
    return [item.path for item in report.garbage]


def path_of(plan: Plan, name: str) -> str:
    return f"toy_{name}/{step(plan, name).key}"


def old_file(path: Path) -> Path:
    """Write a file whose last write is more than an hour ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    moment = time.time() - STALE_SECONDS - 60
    os.utime(path, (moment, moment))
    return path


def contents(store: Store, plan: Plan) -> dict[str, bytes]:
    folders = [local(store.folder(step).path) for step in plan.steps]
    return {str(file): file.read_bytes() for folder in folders for file in folder.rglob("*") if file.is_file()}


def test_a_store_without_garbage(store: Store):
    assert paths(garbage(store)) == []
    assert list(delete_garbage(store, garbage(store))) == []


def test_a_forgotten_run_leaves_only_what_no_other_run_reaches(store: Store, plan: Plan, other: Plan):
    """draw and rate are shared: they stay, to the byte."""
    make(other, store)
    before = contents(store, plan)
    report = garbage(store, ("other",))
    assert paths(report) == [path_of(other, "keep")]
    only_other = contents(store, other).keys() - before.keys()
    assert report.garbage[0].bytes == sum(len(contents(store, other)[name]) for name in only_other)
    assert set(store.runs()) == {"toy", "other"}, "listing deletes nothing"
    assert [item.path for item in delete_garbage(store, report, ("other",))] == paths(report)
    assert set(store.runs()) == {"toy"}
    assert contents(store, plan) == before
    assert make(plan, store) == []


def test_a_step_is_deleted_before_those_it_was_made_from(store: Store, plan: Plan):
    """Whenever the deletion stops, no finished step has lost its inputs."""
    assert paths(garbage(store, ("toy",))) == [path_of(plan, name) for name in ("keep", "rate", "draw")]


def test_parts_of_an_unfinished_step_are_garbage_unless_a_run_links_to_it(store: Store, other: Plan, luck: Luck):
    luck.fail = RuntimeError("power cut")
    with pytest.raises(RuntimeError):
        make(other, store)
    old_file(local(store.folder(step(other, "keep")).path) / "checkpoint" / "step-1" / "weights")
    assert paths(garbage(store)) == []
    assert paths(garbage(store, ("other",))) == [path_of(other, "keep")]


def test_a_locked_step_stays_and_so_does_all_that_it_may_read(store: Store, other: Plan):
    """If no run links to it any more, nothing says what it reads."""
    make(other, store)
    lock = store.at("toy_keep", UNLINKED).try_lock()
    assert lock
    report = garbage(store, ("other",))
    assert (paths(report), report.busy) == ([], [UNLINKED])
    lock.release()
    report = garbage(store, ("other",))
    assert paths(report) == [path_of(other, "keep")]
    lock = store.folder(step(other, "keep")).try_lock()
    assert lock
    assert list(delete_garbage(store, report, ("other",))) == [], "locked since it was listed"
    lock.release()


def test_a_run_that_starts_during_the_deletion_keeps_what_it_reaches(store: Store, plan: Plan, other: Plan):
    """The links are read again before each deletion."""
    make(other, store)
    report = garbage(store, ("other", "toy"))
    assert len(report.garbage) == 4
    deleting = delete_garbage(store, report, ("other", "toy"))
    deleted = [next(deleting).path]
    store.link_run("again", plan.steps)
    deleted += [item.path for item in deleting]
    assert {path_of(plan, "draw"), path_of(plan, "rate")}.isdisjoint(deleted)
    assert store.folder(step(plan, "draw")).manifest


@pytest.mark.parametrize(("nth", "found"), [(1, True), (2, False)])
def test_a_run_that_starts_between_the_check_and_the_deletion(store: Store, plan: Plan, nth: int, found: bool):
    """A step that it found finished stays; if it comes too late for that, it finds nothing and makes the step."""
    items = [item for item in garbage(store, ("toy",)).garbage if item.path == path_of(plan, "draw")]
    before = contents(store, plan)
    (local(store.root) / "runs" / "toy.json").unlink()
    raced = Raced(store.root, plan, nth)
    deleted = list(delete_garbage(raced, GarbageReport(items, [])))
    assert raced.found is found
    assert bool(deleted) is not found
    assert make(plan, store) == ([] if found else ["draw"])
    assert not found or contents(store, plan) == before


def test_unlisted_files_stale_locks_and_scratch_files_are_garbage(store: Store, plan: Plan):
    """A part that lost a race, old pieces; locks and scratch files only after an hour; never a file of others."""
    before = contents(store, plan)
    root, key = local(store.root), step(plan, "rate").key
    folder = root / "toy_rate" / key
    (folder / "rewards-00001.0123456789ab.parquet").write_text("lost")
    (folder / "pieces" / "00001-of-00003.0-3").mkdir(parents=True)
    (folder / "pieces" / "00001-of-00003.0-3" / "part-00001-of-00003.json").write_text("{}")
    (folder / ".part-00001-of-00003.json.12.34").write_text("recent")
    for name in (f"toy_rate/{key}/.manifest.json.12.34", "runs/.toy.json.12.34", f"locks/{UNLINKED}"):
        old_file(root / name)
    others = [old_file(root / "report.html"), old_file(root / "mine" / "notes" / "thoughts.txt")]
    expected = {
        f"toy_rate/{key}/rewards-00001.0123456789ab.parquet",
        f"toy_rate/{key}/pieces",
        f"toy_rate/{key}/.manifest.json.12.34",
        "runs/.toy.json.12.34",
        f"locks/{UNLINKED}",
    }
    assert set(paths(garbage(store))) == expected
    assert {item.path for item in delete_garbage(store, garbage(store))} == expected
    (folder / ".part-00001-of-00003.json.12.34").unlink()
    assert contents(store, plan) == before
    assert all(file.exists() for file in others)
    assert paths(garbage(store)) == []


def test_a_held_lock_is_never_stale(store: Store, plan: Plan):
    folder = store.folder(step(plan, "draw"))
    old_file(local(store.root) / "locks" / folder.path.name)
    lock = folder.try_lock()
    assert lock
    assert paths(garbage(store)) == []
    lock.release()
    assert not list((local(store.root) / "locks").iterdir()), "it is deleted with the claim"
    old_file(local(store.root) / "locks" / folder.path.name)
    assert paths(garbage(store)) == [f"locks/{folder.path.name}"]


def test_what_cannot_be_known_is_refused(store: Store, other: Plan):
    """A damaged link may reach any step; a name may be mistyped; and without runs all of the store would be garbage."""
    make(other, store)
    with pytest.raises(WinnowError, match=r"--forget toi: no such run; did you mean 'toy'\?"):
        garbage(store, ("toi",))
    link = local(store.root) / "runs" / "toy.json"
    for text in ("{", "[]", '{"draw": 3}', '{"draw": {"stage": "toy_draw"}}'):
        link.write_text(text)
        with pytest.raises(WinnowError, match=r"toy.*verify --repair"):
            garbage(store, ("other",))
    for file in link.parent.iterdir():
        file.unlink()
    with pytest.raises(WinnowError, match="no runs here"):
        garbage(store)


@given(forget=st.sets(st.sampled_from(["a", "b", "c"])), lost=st.sets(st.integers(0, 8)))
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_sweep_keeps_exactly_what_runs_reach(
    tmp_path_factory: pytest.TempPathFactory, forget: set[str], lost: set[int]
):
    """For any runs forgotten and any manifests lost: every file of a step that a run links to is as before, every
    step that remains is linked, and a second sweep finds nothing."""
    folder = tmp_path_factory.mktemp("gc")
    with toys():
        store = Store(folder / "store")
        plans = {
            "a": planned(recipe(folder, "a")),
            "b": planned(recipe(folder, "b", rate="with: {scale: 2.0}")),
            "c": planned(recipe(folder, "c", rate="with: {scale: 2.0}", keep="with: {above: 5.0}")),
        }
        for plan in plans.values():
            make(plan, store)
        for number, manifest in enumerate(sorted(local(store.root).glob("*/*/manifest.json"))):
            if number in lost:
                manifest.unlink()
        remaining = [plan for name, plan in plans.items() if name not in forget]
        before = [contents(store, plan) for plan in remaining]
        list(delete_garbage(store, garbage(store, tuple(forget)), tuple(forget)))
        assert [contents(store, plan) for plan in remaining] == before
        linked = {step.key for plan in remaining for step in plan.steps}
        assert {path.name for path in local(store.root).glob("toy_*/*")} <= linked
        assert not remaining or paths(garbage(store)) == []


def test_garbage_in_an_object_store(store: Store, plan: Plan, monkeypatch: pytest.MonkeyPatch):
    """There are no locks there: a step written to within the hour may be in work, and keeps finished steps too."""
    bucket = Store("memory://bucket/store")
    for file in local(store.root).rglob("*"):
        if file.is_file():
            bucket.root.fs.pipe_file((bucket.root / file.relative_to(local(store.root))).path, file.read_bytes())
    sidecar = bucket.root / "toy_keep" / UNLINKED / "part-00000-of-00003.json"
    bucket.root.fs.pipe_file(sidecar.path, json.dumps({"inputs": {}}).encode())
    report = garbage(bucket, ("toy",))
    assert (paths(report), report.busy) == ([], [UNLINKED])
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + STALE_SECONDS + 60)
    deleted = [item.path for item in delete_garbage(bucket, garbage(bucket))]
    assert deleted[0] == f"toy_keep/{UNLINKED}"
    assert {manifest["stage"] for manifest in bucket.sealed()} == {"toy_draw", "toy_rate", "toy_keep"}
    bucket.link_run("toy[keep.above=3.0]", plan.steps)
    list(delete_garbage(bucket, garbage(bucket, ("toy[keep.above=3.0]",)), ("toy[keep.above=3.0]",)))
    assert list(bucket.runs()) == ["toy"], "brackets are not a pattern"
    list(delete_garbage(bucket, garbage(bucket, ("toy",)), ("toy",)))
    assert bucket.root.fs.find(bucket.root.path) == []


def test_the_command_lists_first_and_prints_the_command_that_deletes(winnow, tmp_path: Path, luck: Luck):
    for file in (recipe(tmp_path), recipe(tmp_path, "other one", keep="with: {above: 3.0}")):
        assert winnow("run", file)[0] == 0
    assert "toy_" not in winnow("gc")[1]
    code, output = winnow("gc", "--forget", "other one")
    assert code == 0
    assert "toy_keep/" in output
    assert "winnow gc --yes --store store --forget 'other one'" in output
    assert len(Store("store").runs()) == 2
    assert "toy_keep/" in winnow("gc", "--forget", "other one", "--yes")[1]
    assert list(Store("store").runs()) == ["toy"]


def test_no_run_takes_a_name_from_finished_results(winnow, tmp_path: Path, luck: Luck):
    """Neither with other options nor on other data: nothing finished becomes garbage by another run of the recipe."""
    for changes in ({}, {}, {"keep": "with: {above: 3.0}"}, {"draw": "with: {rows: 9}"}):
        assert winnow("run", recipe(tmp_path, **changes))[0] == 0
    assert sorted(Store("store").runs()) == ["toy", "toy-2", "toy-3"]
    assert "nothing" in winnow("gc")[1]
    Path("store/runs/toy.json").write_text("[")
    assert winnow("run", recipe(tmp_path))[0] == 0, "a damaged link is written again"


def test_a_run_that_takes_an_unfinished_runs_name_from_other_data_is_reported(winnow, tmp_path: Path, luck: Luck):
    """The steps that the name linked to before may be garbage now."""
    assert winnow("run", recipe(tmp_path), "--until", "rate")[0] == 0
    output = winnow("run", recipe(tmp_path, draw="with: {rows: 9}"))[1]
    assert "toy used another draw before" in output
    assert "`winnow gc`" in output


def test_stages_that_read_data_with_a_tokenizer_count_as_data():
    """The recipes' prompts read a model, for its tokenizer: they distinguish the data of two runs."""
    names = {name for name, entry in stages.entries.items() if reads_files(entry)}
    assert {"prompts", "preferences", "own_candidates", "model"} <= names
    assert names.isdisjoint({"sample", "reward", "select", "optimize", "evaluate"})


def test_ls_lists_runs_and_steps(winnow, tmp_path: Path, luck: Luck):
    assert winnow("run", recipe(tmp_path))[0] == 0
    luck.fail = WinnowError("no")
    assert winnow("run", recipe(tmp_path, "other", keep="with: {above: 3.0}"))[0] == 2
    code, output = winnow("ls")
    assert code == 0
    lines = {line.split("│")[1].strip(): line for line in output.splitlines() if "steps" in line}
    assert "3 of 3 steps" in lines["toy"]
    assert "2 of 3 steps" in lines["other"]
    table = [line.split("│")[1:-1] for line in winnow("ls", "other")[1].splitlines() if "toy_" in line]
    rows = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in table}
    assert rows["draw"][2] == rows["rate"][2] != rows["keep"][2], "finished, finished, not finished"
    assert [rows[name][3] for name in ("draw", "rate", "keep")] == ["24", "12", ""]
    code, output = winnow("ls", "othr")
    assert (code, "did you mean 'other'" in output) == (2, True)


def test_bad_stores_are_reported_by_every_command(winnow, tmp_path: Path, luck: Luck):
    """A file as the store, a manifest of a later version, a damaged link: a message, exit code 2, nothing deleted."""
    Path("file").write_text("x")
    assert winnow("run", recipe(tmp_path))[0] == 0
    manifest, link = next(Path("store/toy_keep").glob("*/manifest.json")), Path("store/runs/toy.json")
    for words in (["run", recipe(tmp_path)], ["ls"], ["gc"], ["why", "a", "b"]):
        code, output = winnow(*words, "--store", "file")
        assert (code, "is a file" in output) == (2, True), output
    text = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(text) | {"format": 99}))
    for words in (["run", recipe(tmp_path)], ["ls"], ["gc", "--yes", "--forget", "toy"], ["why", "toy", "toy"]):
        code, output = winnow(*words)
        assert (code, "format 99" in output, "reads up to" in output) == (2, True, True), (words, output)
    manifest.write_text(text)
    link.write_text("{")
    for words in (["ls"], ["gc", "--yes"], ["why", "toy", "toy"]):
        code, output = winnow(*words)
        assert (code, "toy.json: " in output, "verify --repair" in output) == (2, True, True), output
    assert manifest.exists()


def test_a_round_is_not_forgotten_alone(winnow, store: Store, plan: Plan):
    """Nor is anything else deleted: with --yes, a run that is not there counts as one that was forgotten before."""
    store.link_run("raft", plan.steps)
    for words in ((), ("--yes",)):
        code, text = winnow("gc", "--forget", "raft@2", *words, "--store", str(store.root))
        assert (code, "--forget raft@2: a round" in text, "--forget raft is of" in text) == (2, True, True)


def test_forgetting_a_run_can_be_repeated(winnow, store: Store, plan: Plan, monkeypatch: pytest.MonkeyPatch):
    """Also where it was cut off after the run's name was gone: what it alone used is deleted, and no other word is."""
    words = ("gc", "--forget", "toy", "--yes", "--store", str(store.root))
    report = garbage(store, ("toy",))
    next(delete_garbage(store, report, ("toy",)))  # cut off after the first step
    assert store.runs() == {}
    code, output = winnow(*words)
    assert code == 0, output
    assert not list(local(store.root).glob("toy_*/*"))
    code, output = winnow(*words)
    assert (code, "toy: no such run" in output) == (0, True), output
    assert winnow(*words[:3], *words[4:])[0] == 2, "a mistyped name is refused before anything is deleted"
