"""What can run now: steps overlap, parts share a worker, what fails is tried again, halved, left out."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.plan import make_plan
from pipeline.config.recipe import Recipe
from pipeline.context import WarmCache
from pipeline.execution.executors import LocalExecutor, RayExecutor
from pipeline.execution.retries import ATTEMPTS, MOST, Retries
from pipeline.execution.run import run
from pipeline.execution.tasks import Task, execute, step_spec
from pipeline.resources import Profile, Resources
from pipeline.store.store import Store
from schemas import WinnowError
from schemas.tables import PROMPTS, REJECTS
from tests.runs import Silent
from tests.toys import notes, plan_of_toys

SHARDS = 4


@pytest.fixture(scope="module", autouse=True)
def _ray_ends():
    yield
    import ray

    ray.shutdown()


def test_a_step_begins_on_finished_parts_while_the_one_before_goes_on(tmp_path: Path):
    """Two workers, one for each step: `second` begins before the last part of `first` has ended, never before its own
    part of `first` has, and both are sealed in order."""
    options = dict(use="slow", folder=str(tmp_path))
    plan = plan_of_toys(
        SHARDS, first=options | dict(name="first", seconds=1.0), second=options | dict(name="second", seconds=0.0)
    )
    profile = Profile(stages={"slow": Resources(cpus=1, max_workers=1, in_flight=1)})
    watcher = Silent()
    run(plan, Store(tmp_path / "store"), RayExecutor(1, profile=profile), watcher)
    told = notes(tmp_path)
    first_ends = [float(at) for name, what, at, _ in told if (name, what) == ("first", "ends")]
    second_begins = [float(at) for name, what, at, _ in told if (name, what) == ("second", "begins")]
    assert len(first_ends) == len(second_begins) == SHARDS
    assert min(second_begins) < max(first_ends)
    assert all(begins > ends for begins, ends in zip(sorted(second_begins), sorted(first_ends), strict=True))
    assert watcher.ran == ["some_prompts", "first", "second"]


def test_parts_of_a_shared_stage_are_at_work_together_in_one_worker(tmp_path: Path):
    plan = plan_of_toys(2, meeting=dict(folder=str(tmp_path)))
    profile = Profile(stages={"meeting": Resources(cpus=1, max_workers=1, in_flight=2)})
    run(plan, Store(tmp_path / "store"), RayExecutor(1, profile=profile), Silent())
    assert len(notes(tmp_path)) == 2
    assert len({pid for _, pid in notes(tmp_path)}) == 1


def test_a_step_for_which_the_cluster_has_no_room_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Once, after a while, instead of a silent wait: here for GPUs that this machine has not; then it is stopped."""

    class Impatient(Silent):
        def waits(self, step, why):
            if step.name == "slow":
                raise KeyboardInterrupt(why)

    monkeypatch.setattr("pipeline.execution.actors.PATIENCE", 0.5)
    plan = plan_of_toys(1, slow=dict(folder=str(tmp_path), name="slow", seconds=0.0))
    greedy = Profile(stages={"slow": Resources(cpus=1, gpus=8)}, autoscaling=True)
    with pytest.raises(KeyboardInterrupt, match=r"may have no room .*num_cpus 1, num_gpus 8"):
        run(plan, Store(tmp_path / "store"), RayExecutor(1, profile=greedy), Impatient())


def test_what_spreads_over_the_cluster_by_itself_finds_it_empty(tmp_path: Path):
    """Another branch is at work when its turn comes: its workers end what they have and go, and come back."""
    waiting = {"use": "slow", "with": dict(folder=str(tmp_path), name="slow", seconds=0.5)}
    steps: dict[str, dict] = {
        "some_prompts": {},
        "slow": waiting | {"from": {"prompts": "some_prompts"}},
        "spreading": {"from": {"prompts": "some_prompts"}},
        "both": {"from": {"prompts": "spreading", "others": "slow"}},
    }
    plan = make_plan(Recipe(name="toys", shards=SHARDS, target="both", steps=steps))
    watcher = Silent()
    profile = Profile(stages={"slow": Resources(cpus=1, max_workers=1, in_flight=1)})
    run(plan, Store(tmp_path / "store"), RayExecutor(1, profile=profile), watcher)
    assert set(watcher.ran) == set(steps)
    assert len([what for _, what, _, _ in notes(tmp_path) if what == "ends"]) == SHARDS


def test_nothing_is_tried_again_on_a_worker_that_failed(tmp_path: Path):
    plan = plan_of_toys(1, broken_once=dict(folder=str(tmp_path)))
    run(plan, Store(tmp_path / "store"), RayExecutor(1), Silent())
    first, second = (pid for _, pid in notes(tmp_path))
    assert first != second


def test_a_worker_that_dies_is_replaced_and_a_prompt_that_kills_them_all_is_left_out(tmp_path: Path):
    """A part that dies twice ends well. One that always does is halved, and of 40 prompts one is left out, by name:
    3 deaths of the part, one for each of at most 4 halvings of its 16 prompts at most, 3 of the prompt alone."""
    store, watcher = Store(tmp_path / "store"), Silent()
    run(plan_of_toys(3, dying=dict(folder=str(tmp_path), deaths=2)), store, RayExecutor(2), watcher)
    assert watcher.lost == []
    plan = plan_of_toys(3, dying=dict(folder=str(tmp_path), deaths=99))
    run(plan, store, RayExecutor(2), watcher)
    folder = store.folder(plan.target)
    assert watcher.lost == [f"{0:020x}"] == folder.read(REJECTS).column("prompt_id").to_pylist()
    assert folder.manifest["rejects"] == {"killed its worker": 1}
    assert sorted(folder.read(PROMPTS).column("prompt_id").to_pylist()) == [f"{n:020x}" for n in range(1, 40)]
    assert len(list(tmp_path.glob("99-*"))) <= 3 + 4 + 3
    assert not (folder.path / "pieces").exists()


TWICE = """
import sys, tests.toys
from pathlib import Path
from pipeline.execution.executors import LocalExecutor
from pipeline.execution.run import run
from pipeline.store.store import Store
from tests.runs import Silent
folder = sys.argv[1]
plan = tests.toys.plan_of_toys(4, slow=dict(folder=folder, name="slow", seconds=0.3))
run(plan, Store(folder + "/store"), LocalExecutor(), Silent())
"""


def test_two_runs_at_once_do_the_work_once(tmp_path: Path):
    """On a disk, the second waits for the step that the first one makes, and goes on from there."""
    root = Path(__file__).parents[3]
    both = [subprocess.Popen([sys.executable, "-c", TWICE, str(tmp_path)], cwd=root) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert len([what for _, what, _, _ in notes(tmp_path) if what == "begins"]) == 4


class DeadError(Exception):
    """What Ray says of a worker that was killed."""


def attempts_of(folder: Path, count: int, poison: set[int], shards: int = 1):
    """Run units in this process as an executor would that loses a worker over each poisonous prompt; count losses."""
    plan = plan_of_toys(shards, slow=dict(folder=str(folder), name="slow", seconds=0.0))
    plan.steps[0].options["count"] = count
    store = Store(folder / "store")
    run(type(plan)("first", plan.steps[:1], plan.steps[:1]), store, LocalExecutor(), Silent())
    work = step_spec(plan.target, store)
    attempts, todo, lost = Retries(work), [Task(shard) for shard in range(shards)], 0
    while todo:
        unit = todo.pop(0)
        first, last = unit.span or (0, None)
        prompts = [int(prompt, 16) for prompt in work.prompts(unit.shard)[first:last]]
        if poison & set(prompts):
            lost += 1
            again, _ = attempts.failed(unit, DeadError("killed"))
            todo = again + todo
        else:
            execute(work, unit, WarmCache(), lambda *told: None)
            attempts.succeeded(unit)
    return work, attempts, lost


@pytest.mark.parametrize("poison", [{0}, {31}, {5, 6}, {0, 13, 31}])
def test_halving_finds_the_prompts_that_kill(tmp_path: Path, poison: set[int]):
    """Of 32 prompts: a bad one costs its three attempts and at most log2(32) = 5 halvings, beside the part's three."""
    work, attempts, lost = attempts_of(tmp_path, 32, poison)
    assert {int(prompt, 16) for prompt in attempts.poison} == poison
    assert lost <= ATTEMPTS + len(poison) * (5 + ATTEMPTS)
    kept = work.out.read(PROMPTS, 0).column("prompt_id").to_pylist()
    assert kept == [f"{n:020x}" for n in range(32) if n not in poison]
    assert {int(prompt, 16) for prompt in work.out.read(REJECTS, 0).column("prompt_id").to_pylist()} == poison
    assert work.out.missing(1) == []


def test_the_pieces_of_a_part_make_the_bytes_of_the_whole(tmp_path: Path):
    """A part that was halved, though nothing in it is bad, is the part that one call makes."""
    work, _, _ = attempts_of(tmp_path / "whole", 32, set())
    halved, attempts, _ = attempts_of(tmp_path / "pieces", 32, set())
    halved.out.path.joinpath("part-00000.json").unlink()
    attempts = Retries(halved)
    todo, _ = [Task(0)], [attempts.failed(Task(0), DeadError("killed")) for _ in range(ATTEMPTS - 1)]
    todo, _ = attempts.failed(Task(0), DeadError("killed"))
    assert [unit.span for unit in todo] == [(0, 16), (16, 32)]
    for unit in todo:
        execute(halved, unit, WarmCache(), lambda *told: None)
    assert [attempts.succeeded(unit) for unit in todo] == [False, True]
    assert [f["sha256"] for f in halved.out.sidecar(0)["files"]] == [f["sha256"] for f in work.out.sidecar(0)["files"]]


def test_where_nothing_ever_worked_it_is_not_the_prompts(tmp_path: Path):
    with pytest.raises(WinnowError, match="2 prompts each killed its worker 3 times, and nothing of this step ever"):
        attempts_of(tmp_path, 32, set(range(32)))
    with pytest.raises(WinnowError, match="nothing of this step ever worked"):
        attempts_of(tmp_path / "one", 1, {0})


def test_a_step_loses_only_so_many_prompts(tmp_path: Path):
    with pytest.raises(WinnowError, match=f"{MOST + 1} prompts each killed its worker"):
        attempts_of(tmp_path, 64, set(range(0, 64, 2)))


def test_a_disk_that_fails_is_no_prompts_fault(tmp_path: Path):
    work, _, _ = attempts_of(tmp_path, 8, set())
    attempts = Retries(work)
    for _ in range(ATTEMPTS - 1):
        assert attempts.failed(Task(0), OSError(28, "No space left on device")) == ([Task(0)], False)
    with pytest.raises(WinnowError, match=r"part 0 failed 3 times; .*No space left"):
        attempts.failed(Task(0), OSError(28, "No space left on device"))
