"""What no run reaches is listed and, told so, deleted; what a run reaches stays, whatever happens meanwhile."""

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
from pipeline.store.gc import STALE_SECONDS, Found, garbage, sweep
from pipeline.store.store import Store
from schemas import WinnowError
from tests.chain import Luck, Raced, make, planned, recipe, step, toys
from tests.runs import local


@pytest.fixture
def luck() -> Iterator[Luck]:
    with toys() as luck:
        yield luck


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def plan(tmp_path: Path, luck: Luck) -> Plan:
    return planned(recipe(tmp_path))


def other(tmp_path: Path, above: float = 3.0) -> Plan:
    """Shares draw and rate with the plan."""
    return planned(recipe(tmp_path, "other", keep=f"with: {{above: {above}}}"))


def paths(found: Found) -> list[str]:
    return [item.path for item in found.garbage]


def place(plan: Plan, name: str) -> str:
    return f"toy_{name}/{step(plan, name).key}"


def old(path: Path, text: str = "x") -> Path:
    """A file that nobody wrote to for more than an hour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    moment = time.time() - STALE_SECONDS - 60
    os.utime(path, (moment, moment))
    return path


def snapshot(store: Store, plan: Plan) -> dict[str, bytes]:
    folders = [local(store.folder(each).path) for each in plan.steps]
    return {str(file): file.read_bytes() for folder in folders for file in folder.rglob("*") if file.is_file()}


def test_a_store_without_garbage_has_none(tmp_path: Path, store: Store, plan: Plan):
    make(plan, store)
    assert paths(garbage(store)) == []
    assert list(sweep(store, garbage(store))) == []


def test_a_forgotten_run_leaves_what_only_it_reached(tmp_path: Path, store: Store, plan: Plan):
    """draw and rate are shared: they stay, to the byte."""
    make(plan, store)
    make(other(tmp_path), store)
    before, size = snapshot(store, plan), sum(len(file) for file in snapshot(store, other(tmp_path)).values())
    found = garbage(store, ("other",))
    assert paths(found) == [place(other(tmp_path), "keep")]
    assert found.garbage[0].bytes == size - sum(len(f) for n, f in before.items() if "toy_keep" not in n)
    assert set(store.runs()) == {"toy", "other"}, "to list is not to delete"
    assert [item.path for item in sweep(store, found, ("other",))] == paths(found)
    assert set(store.runs()) == {"toy"}
    assert snapshot(store, plan) == before
    assert make(plan, store) == []


def test_followers_go_before_what_they_were_made_of(store: Store, plan: Plan):
    """Whenever it is cut short, no sealed step stands on what is gone."""
    make(plan, store)
    assert paths(garbage(store, ("toy",))) == [place(plan, name) for name in ("keep", "rate", "draw")]


def test_parts_that_nobody_finishes_are_garbage_and_those_of_a_run_are_not(
    tmp_path: Path, store: Store, plan: Plan, luck: Luck
):
    make(plan, store)
    luck.fail = RuntimeError("power cut")
    with pytest.raises(RuntimeError):
        make(other(tmp_path), store)
    path = local(store.folder(step(other(tmp_path), "keep")).path)
    old(path / "checkpoint" / "step-1" / "weights")
    assert paths(garbage(store)) == [], "its run reaches it, on its way"
    assert paths(garbage(store, ("other",))) == [place(other(tmp_path), "keep")]


def test_what_is_being_made_stays_and_so_does_all_that_it_may_read(tmp_path: Path, store: Store, plan: Plan):
    """A run whose name now means something else is still at work: nothing says what it reads."""
    make(plan, store)
    loose = other(tmp_path)
    make(loose, store)
    claim = store.at("toy_keep", "0123456789abcdef").claim()
    assert claim
    found = garbage(store, ("other",))
    assert (paths(found), found.busy) == ([], ["0123456789abcdef"])
    claim.release()
    found = garbage(store, ("other",))
    assert paths(found) == [place(loose, "keep")]
    claim = store.folder(step(loose, "keep")).claim()
    assert claim
    assert list(sweep(store, found, ("other",))) == [], "claimed since it was listed"
    claim.release()


def test_a_run_that_comes_meanwhile_keeps_what_it_reaches(tmp_path: Path, store: Store, plan: Plan):
    """Listed, then reached again before its turn: the links are read again before each deletion."""
    make(plan, store)
    make(other(tmp_path), store)
    found = garbage(store, ("other", "toy"))
    assert len(found.garbage) == 4
    deleting = sweep(store, found, ("other", "toy"))
    gone = [next(deleting).path]
    store.link_run("again", plan.steps)
    gone += [item.path for item in deleting]
    assert place(plan, "draw") not in gone
    assert place(plan, "rate") not in gone
    assert store.folder(step(plan, "draw")).manifest


@pytest.mark.parametrize(("nth", "found"), [(1, True), (2, False)])
def test_a_run_that_comes_between_the_look_and_the_deletion(store: Store, plan: Plan, nth: int, found: bool):
    """What it found sealed stays; where it comes later still it finds nothing, and will make the step itself."""
    make(plan, store)
    listed = garbage(store, ("toy",))
    before = snapshot(store, plan)
    draw = Found([item for item in listed.garbage if item.path == place(plan, "draw")], [])
    (local(store.root) / "runs" / "toy.json").unlink()
    raced = Raced(store.root, plan, nth)
    gone = list(sweep(raced, draw))
    assert raced.found is found
    assert bool(gone) is not found
    assert make(plan, store) == ([] if found else ["draw"])
    if found:
        assert snapshot(store, plan) == before


def test_files_that_a_sealed_step_does_not_list_locks_and_scratch(store: Store, plan: Plan):
    """A lost race, a checkpoint of before; of locks and files never renamed only those older than an hour."""
    make(plan, store)
    before = snapshot(store, plan)
    home, root = local(store.folder(step(plan, "rate")).path), local(store.root)
    (home / "rewards-00001.0123456789ab.parquet").write_text("lost")
    (home / "pieces" / "00001.0-3").mkdir(parents=True)
    (home / "pieces" / "00001.0-3" / "part-00001.json").write_text("{}")
    old(home / ".manifest.json.12.34")
    old(root / "runs" / ".toy.json.12.34")
    old(root / "locks" / "0123456789abcdef")
    old(root / "report.html")
    old(root / "mine" / "notes" / "thoughts.txt")
    (home / ".part-00001.json.12.34").write_text("now")
    key = step(plan, "rate").key
    expected = {
        f"toy_rate/{key}/rewards-00001.0123456789ab.parquet",
        f"toy_rate/{key}/pieces",
        f"toy_rate/{key}/.manifest.json.12.34",
        "runs/.toy.json.12.34",
        "locks/0123456789abcdef",
    }
    assert set(paths(garbage(store))) == expected
    assert {item.path for item in sweep(store, garbage(store))} == expected
    (home / ".part-00001.json.12.34").unlink()
    assert snapshot(store, plan) == before
    assert (root / "report.html").exists()
    assert (root / "mine" / "notes" / "thoughts.txt").exists()
    assert paths(garbage(store)) == []


def test_a_held_lock_is_not_stale_however_old(store: Store, plan: Plan):
    make(plan, store)
    folder = store.folder(step(plan, "draw"))
    old(local(store.root) / "locks" / folder.path.name)
    claim = folder.claim()
    assert claim
    assert paths(garbage(store)) == []
    claim.release()
    assert paths(garbage(store)) == [f"locks/{folder.path.name}"]


def test_without_any_run_nothing_is_deleted(store: Store, plan: Plan):
    """A store copied without its runs, or a wrong folder: else all of it would be garbage."""
    make(plan, store)
    (local(store.root) / "runs" / "toy.json").unlink()
    with pytest.raises(WinnowError, match="no runs here"):
        garbage(store)


@pytest.mark.parametrize("text", ["{", "[]", '{"draw": 3}', '{"draw": {"stage": "toy_draw"}}'])
def test_a_link_that_cannot_be_read_stops_everything(tmp_path: Path, store: Store, plan: Plan, text: str):
    """It may reach anything."""
    make(plan, store)
    make(other(tmp_path), store)
    (local(store.root) / "runs" / "toy.json").write_text(text)
    with pytest.raises(WinnowError, match=r"toy.*delete it"):
        garbage(store, ("other",))


def test_unknown_runs_are_named(store: Store, plan: Plan):
    make(plan, store)
    with pytest.raises(WinnowError, match=r"--forget toi: no such run; did you mean 'toy'\?"):
        garbage(store, ("toi",))


@given(forget=st.sets(st.sampled_from(["a", "b", "c"])), lost=st.sets(st.integers(0, 8)))
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_forgotten_or_lost_a_sweep_keeps_all_that_runs_reach(
    tmp_path_factory: pytest.TempPathFactory, forget: set[str], lost: set[int]
):
    """Law: after a sweep every file of a step that a run links to is as before, a sweep is all there is to do, and
    what remains below the stages is reached."""
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
        manifests = sorted(local(store.root).glob("*/*/manifest.json"))
        for number in lost:
            if number < len(manifests):
                manifests[number].unlink()
        kept = [plan for name, plan in plans.items() if name not in forget]
        before = [snapshot(store, plan) for plan in kept]
        list(sweep(store, garbage(store, tuple(forget)), tuple(forget)))
        assert [snapshot(store, plan) for plan in kept] == before
        reached = {each.key for plan in kept for each in plan.steps}
        assert {path.name for path in local(store.root).glob("toy_*/*")} <= reached
        if kept:
            assert paths(garbage(store)) == []


def test_gc_in_an_object_store(tmp_path: Path, store: Store, plan: Plan, monkeypatch: pytest.MonkeyPatch):
    """No claims there: what was written within the hour may be somebody's work, and keeps sealed steps too."""
    make(plan, store)
    there = Store("memory://bucket/store")
    for file in local(store.root).rglob("*"):
        if file.is_file():
            there.root.fs.pipe_file((there.root / file.relative_to(local(store.root))).path, file.read_bytes())
    begun = there.root / "toy_keep" / "0123456789abcdef" / "part-00000.json"
    there.root.fs.pipe_file(begun.path, json.dumps({"inputs": {}}).encode())
    found = garbage(there, ("toy",))
    assert (paths(found), found.busy) == ([], ["0123456789abcdef"])
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + STALE_SECONDS + 60)
    assert paths(garbage(there))[0] == "toy_keep/0123456789abcdef"
    gone = list(sweep(there, garbage(there)))
    assert gone[0].path == "toy_keep/0123456789abcdef"
    assert {manifest["stage"] for manifest in there.sealed()} == {"toy_draw", "toy_rate", "toy_keep"}
    there.link_run("toy[keep.above=3.0]", plan.steps)
    list(sweep(there, garbage(there, ("toy[keep.above=3.0]",)), ("toy[keep.above=3.0]",)))
    assert list(there.runs()) == ["toy"], "brackets are no pattern"
    list(sweep(there, garbage(there, ("toy",)), ("toy",)))
    assert there.root.fs.find(there.root.path) == []


def test_the_command_lists_first_and_says_how_to_delete(winnow, tmp_path: Path, luck: Luck):
    for file in (recipe(tmp_path), recipe(tmp_path, "other one", keep="with: {above: 3.0}")):
        assert winnow("run", file)[0] == 0
    assert "nothing to delete" in winnow("gc")[1]
    code, said = winnow("gc", "--forget", "other one")
    assert code == 0
    assert "toy_keep/" in said
    assert "1 to delete" in said
    assert "winnow gc --yes --store store --forget 'other one'" in said
    assert len(Store("store").runs()) == 2
    assert "deleted 1" in winnow("gc", "--forget", "other one", "--yes")[1]
    assert list(Store("store").runs()) == ["toy"]


def test_a_run_that_takes_its_name_from_other_data_says_so(winnow, tmp_path: Path, luck: Luck):
    """What it was made of before is another run's no more; a change further down is what runs are for."""
    assert "before" not in winnow("run", recipe(tmp_path))[1]
    assert "before" not in winnow("run", recipe(tmp_path))[1]
    assert "before" not in winnow("run", recipe(tmp_path, keep="with: {above: 3.0}"))[1]
    said = winnow("run", recipe(tmp_path, draw="with: {rows: 9}"))[1]
    assert "toy was of another draw before" in said
    assert "`winnow gc` lists it" in said
    Path("store/runs/toy.json").write_text("[")
    assert winnow("run", recipe(tmp_path))[0] == 0, "a link that cannot be read is written anew"


def test_what_reads_data_with_a_tokenizer_is_data_too():
    """The recipes' prompts read a model, for its tokenizer: they are what tells one world from another."""
    names = {name for name, entry in stages.entries.items() if reads_files(entry)}
    assert {"prompts", "preferences", "own_candidates", "model"} <= names
    assert names.isdisjoint({"sample", "reward", "select", "optimize", "evaluate"})


def test_ls_lists_runs_and_steps(winnow, tmp_path: Path, luck: Luck):
    assert winnow("run", recipe(tmp_path))[0] == 0
    luck.fail = WinnowError("no")
    assert winnow("run", recipe(tmp_path, "other", keep="with: {above: 3.0}"))[0] == 2
    code, said = winnow("ls")
    assert code == 0
    lines = {line.split("│")[1].strip(): line for line in said.splitlines() if "steps" in line}
    assert "3 of 3 steps" in lines["toy"]
    assert "2 of 3 steps" in lines["other"]
    _, said = winnow("ls", "other")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if "toy_" in line]
    assert [row[0] for row in rows][:2] == ["draw", "rate"]
    assert [row[3] for row in rows] == ["sealed", "sealed", "not made"]
    assert [row[4] for row in rows] == ["24", "12", ""]
    code, said = winnow("ls", "othr")
    assert (code, "did you mean 'other'" in said) == (2, True)


def test_bad_stores_are_told(winnow, tmp_path: Path, luck: Luck):
    """A file for a store, a manifest of a later winnow, a link cut short: a message, 2, and nothing touched."""
    Path("file").write_text("x")
    assert winnow("run", recipe(tmp_path))[0] == 0
    manifest = next(Path("store/toy_keep").glob("*/manifest.json"))
    for words in (["run", recipe(tmp_path)], ["ls"], ["gc"], ["why", "a", "b"]):
        code, said = winnow(*words, "--store", "file")
        assert (code, "is a file" in said) == (2, True), said
    text = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(text) | {"format": 99}))
    for words in (["run", recipe(tmp_path)], ["ls"], ["gc", "--yes", "--forget", "toy"], ["why", "toy", "toy"]):
        code, said = winnow(*words)
        assert (code, "of format 99, and this winnow reads up to" in said) == (2, True), (words, said)
    manifest.write_text(text)
    Path("store/runs/toy.json").write_text("{")
    for words in (["ls"], ["gc", "--yes"], ["why", "toy", "toy"]):
        code, said = winnow(*words)
        assert (code, "toy.json: " in said, "delete it" in said) == (2, True, True), said
    assert manifest.exists()
