"""Which tasks can run now: steps overlap, parts share a worker, a task that fails is retried, bisected, rejected."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from pipeline.config.plan import Plan, make_plan
from pipeline.config.recipe import Recipe
from pipeline.context import WarmCache
from pipeline.execution.actors import ActorPool
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.ray_executor import RayExecutor, connect
from pipeline.execution.retries import MAX_ATTEMPTS, MAX_POISON_PROMPTS, Retries
from pipeline.execution.run import run
from pipeline.execution.tasks import StepSpec, Task, execute, step_spec
from pipeline.resources import Profile, Resources
from pipeline.store.store import Store
from schemas import MachineError, WinnowError
from schemas.tables import PROMPTS, REJECTS
from tests.runs import ROOT, Silent
from tests.toys import notes, plan_of_toys

SHARDS = 4


@pytest.fixture(scope="module", autouse=True)
def _end_ray():
    """End the Ray of this file and those before it, so that no process that a later test forks has lost its threads."""
    yield
    ray.shutdown()


def run_on_ray(plan: Plan, folder: Path, reporter: Silent, stage: str = "", **resources: Any) -> Store:
    """Run a plan on the local Ray, but for its prompts; `resources` are those of one stage, which has one worker."""
    store = Store(folder / "store")
    run(Plan("prompts", plan.steps[:1], plan.steps[:1]), store, LocalExecutor(), reporter)
    profile = Profile(stages={stage: Resources(cpus=1, max_workers=1, **resources)} if stage else {})
    run(plan, store, RayExecutor(2, profile=profile), reporter)
    return store


def test_a_step_starts_on_finished_parts_while_the_one_before_goes_on(tmp_path: Path):
    """Two workers, one for each step: `second` starts before the last part of `first` has ended, never before its own
    part of `first` has, and both are finished in order."""
    plan = plan_of_toys(
        SHARDS,
        first=dict(use="followed", folder=str(tmp_path), name="first", parts=SHARDS, by="second"),
        second=dict(use="slow", folder=str(tmp_path), name="second", seconds=0.0),
    )
    reporter = Silent()
    run_on_ray(plan, tmp_path, reporter, "followed", in_flight=1)
    lines = notes(tmp_path)
    first_ends = [float(time) for name, event, time, _ in lines if (name, event) == ("first", "ends")]
    second_begins = [float(time) for name, event, time, _ in lines if (name, event) == ("second", "begins")]
    assert len(first_ends) == len(second_begins) == SHARDS
    assert min(second_begins) < max(first_ends)
    assert all(begins > ends for begins, ends in zip(sorted(second_begins), sorted(first_ends), strict=True))
    assert reporter.ran == ["some_prompts", "first", "second"]


def test_parts_of_a_concurrent_stage_run_together_in_one_worker(tmp_path: Path):
    run_on_ray(plan_of_toys(2, meeting=dict(folder=str(tmp_path))), tmp_path, Silent(), "meeting", in_flight=2)
    assert len(notes(tmp_path)) == 2
    assert len({pid for _, pid in notes(tmp_path)}) == 1


def test_a_step_for_which_the_cluster_has_no_room_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Once, after a while, instead of a silent wait: here for GPUs that this machine lacks; then the run is stopped."""

    class Impatient(Silent):
        def step_waiting(self, step, why):
            if step.name == "slow":
                raise KeyboardInterrupt(why)

    monkeypatch.setattr("pipeline.execution.actors.STALL_SECONDS", 0.5)
    monkeypatch.setattr("pipeline.execution.actors.SETTLE_SECONDS", 0.5)
    plan = plan_of_toys(1, slow=dict(folder=str(tmp_path), name="slow", seconds=0.0))
    with pytest.raises(KeyboardInterrupt, match=r"no room .*num_cpus 1, num_gpus 8"):
        run_on_ray(plan, tmp_path, Impatient(), "slow", gpus=8)


def test_an_actor_that_is_just_starting_is_killed_when_it_is_up(tmp_path: Path):
    """Ray ignores a kill at the wrong moment of a start, and what then waits for that room waits for ever."""
    nodes = connect()
    import ray

    plan = plan_of_toys(1, slow=dict(folder=str(tmp_path), name="slow", seconds=0.0))
    pool = ActorPool(step_spec(plan.target, Store(tmp_path / "store")), Resources(), {"num_cpus": 1}, 2)
    pool.grow(1)
    pool.shrink(0)
    (actor,) = pool.close()
    assert not actor.is_settled
    ray.get(actor.starting)
    assert pool.close() == []
    deadline = time.monotonic() + 20
    while ray.available_resources()["CPU"] < nodes[0]["CPU"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_no_second_worker_is_started_while_another_step_waits_for_room(tmp_path: Path):
    """It would be killed as soon as it is idle, and started again for the next part, many times."""
    plan = plan_of_toys(SHARDS, slow=dict(folder=str(tmp_path), name="slow", seconds=0.0))
    spec, executor = step_spec(plan.target, Store(tmp_path / "store")), RayExecutor(2)
    executor.request_workers(spec, 1)
    pool, others = executor.pools[spec.out], executor.pools
    other: Any = SimpleNamespace(actors=[SimpleNamespace(starting="for room", tasks={})])
    executor.pools = others | {Store(tmp_path / "other").folder(plan.steps[0]): other}
    executor.request_workers(spec, 2)
    assert len(pool.actors) == 1
    executor.pools = others
    executor.request_workers(spec, 2)
    assert len(pool.actors) == 2
    executor.close()


def test_distributed_training_finds_the_cluster_empty(tmp_path: Path):
    """Another branch is running when its turn comes: its workers end their parts and go, and come back afterwards."""
    slow = {"use": "slow", "with": dict(folder=str(tmp_path), name="slow", seconds=0.3)}
    steps: dict[str, dict] = {
        "some_prompts": {},
        "slow": slow | {"from": {"prompts": "some_prompts"}},
        "spreading": {"from": {"prompts": "some_prompts"}},
        "both": {"from": {"prompts": "spreading", "others": "slow"}},
    }
    plan = make_plan(Recipe(name="toys", shards=SHARDS, target="both", steps=steps))
    reporter = Silent()
    run_on_ray(plan, tmp_path, reporter, "slow", in_flight=1)
    assert set(reporter.ran) == set(steps)
    assert len([event for _, event, _, _ in notes(tmp_path) if event == "ends"]) == SHARDS


def test_nothing_is_retried_on_a_worker_that_failed(tmp_path: Path):
    run_on_ray(plan_of_toys(1, broken_once=dict(folder=str(tmp_path))), tmp_path, Silent())
    first, second = (pid for _, pid in notes(tmp_path))
    assert first != second


def test_a_worker_that_dies_is_replaced_and_a_prompt_that_kills_them_all_is_rejected(tmp_path: Path):
    """The part of prompt 1 dies twice, and ends well. That of prompts 0 and 3 always does, is halved, and prompt 0 is
    rejected, by name: after 3 deaths of the part and 3 of the prompt alone."""
    plan, reporter = plan_of_toys(3, dying=dict(folder=str(tmp_path), deaths=[99, 2])), Silent()
    plan.steps[0].options["count"] = 12
    folder = run_on_ray(plan, tmp_path, reporter, "dying").folder(plan.target)
    assert reporter.rejected == [f"{0:020x}"] == folder.read(REJECTS).column("prompt_id").to_pylist()
    assert folder.manifest["rejects"] == {"killed its worker": 1}
    assert sorted(folder.read(PROMPTS).column("prompt_id").to_pylist()) == [f"{n:020x}" for n in range(1, 12)]
    assert [len(list(tmp_path.glob(f"death-of-{n}-*"))) for n in range(2)] == [3 + 3, 2]
    assert not (folder.path / "pieces").exists()


def test_an_engine_that_dies_in_this_process_ends_the_run_as_a_failure_of_the_machine(tmp_path: Path):
    """With the step's name and the cause, and no traceback: the same command goes on."""
    plan = plan_of_toys(1, without_engine={})
    with pytest.raises(MachineError, match="without_engine: the engine's process has ended"):
        run(plan, Store(tmp_path / "store"), LocalExecutor(), Silent())


TWICE = """
import sys, tests.toys
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.store.store import Store
from tests.runs import Silent
folder = sys.argv[1]
plan = tests.toys.plan_of_toys(4, slow=dict(folder=folder, name="slow", seconds=0.3))
run(plan, Store(folder + "/store"), LocalExecutor(), Silent())
"""


def test_an_error_of_a_stage_names_its_step_and_what_to_set(tmp_path: Path):
    """A stage does not know which of several steps it computes."""
    plan = plan_of_toys(2, judged={"use": "lacking_a_row"})
    with pytest.raises(WinnowError, match=r"^judged: no row has the id a-7, .* set each under `from`"):
        run(plan, Store(tmp_path / "store"), LocalExecutor(), Silent())


def test_two_runs_at_once_do_the_work_once(tmp_path: Path):
    """On a disk, the second waits for the step that the first one runs, and goes on from there."""
    both = [subprocess.Popen([sys.executable, "-c", TWICE, str(tmp_path)], cwd=ROOT) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert len([event for _, event, _, _ in notes(tmp_path) if event == "begins"]) == 4


class DeadError(Exception):
    """Stands for Ray's error of a worker that was killed."""


def run_with_poison(folder: Path, count: int, poison: set[int]) -> tuple[StepSpec, Retries, int]:
    """Run the tasks of one part of `count` prompts in this process as if each poisonous prompt killed its worker.

    Return the step, its retries and the number of workers lost.
    """
    plan = plan_of_toys(1, slow=dict(folder=str(folder), name="slow", seconds=0.0))
    plan.steps[0].options["count"] = count
    store = Store(folder / "store")
    run(Plan("first", plan.steps[:1], plan.steps[:1]), store, LocalExecutor(), Silent())
    spec = step_spec(plan.target, store)
    retries, todo, lost = Retries(spec), [Task(0)], 0
    while todo:
        task = todo.pop(0)
        first, last = task.span or (0, None)
        if poison & {int(prompt, 16) for prompt in spec.prompts(0)[first:last]}:
            lost += 1
            todo = retries.failed(task, DeadError("killed"))[0] + todo
        else:
            execute(spec, task, WarmCache(), lambda *progress: None)
            retries.succeeded(task)
    return spec, retries, lost


@pytest.mark.parametrize("poison", [{0}, {5, 6}, {0, 13, 31}])
def test_bisection_finds_the_prompts_that_kill(tmp_path: Path, poison: set[int]):
    """Of 32 prompts: a bad one costs its three attempts and at most log2(32) = 5 halvings, beside the part's three."""
    spec, retries, lost = run_with_poison(tmp_path, 32, poison)
    assert {int(prompt, 16) for prompt in retries.poison} == poison
    assert lost <= MAX_ATTEMPTS + len(poison) * (5 + MAX_ATTEMPTS)
    accepted = spec.out.read(PROMPTS, 0).column("prompt_id").to_pylist()
    assert accepted == [f"{n:020x}" for n in range(32) if n not in poison]
    assert {int(prompt, 16) for prompt in spec.out.read(REJECTS, 0).column("prompt_id").to_pylist()} == poison
    assert spec.out.missing() == []


def test_the_pieces_of_a_part_are_joined_to_the_bytes_of_the_whole(tmp_path: Path):
    """A part that was halved, though nothing in it is bad, is the part that one call writes."""
    whole, _, _ = run_with_poison(tmp_path / "whole", 32, set())
    halved, _, _ = run_with_poison(tmp_path / "pieces", 32, set())
    halved.out.path.joinpath("part-00000-of-00001.json").unlink()
    retries = Retries(halved)
    for _ in range(MAX_ATTEMPTS):
        halves, _ = retries.failed(Task(0), DeadError("killed"))
    assert [task.span for task in halves] == [(0, 16), (16, 32)]
    for task in halves:
        execute(halved, task, WarmCache(), lambda *progress: None)
    assert [retries.succeeded(task) for task in halves] == [False, True]
    digests = [[file["sha256"] for file in spec.out.sidecar(0)["files"]] for spec in (whole, halved)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("count", "poison", "match"),
    [
        (32, set(range(32)), "2 prompts each killed its worker 3 times, and no task of this step ever succeeded"),
        (1, {0}, "no task of this step ever succeeded"),
        (64, set(range(0, 64, 2)), f"{MAX_POISON_PROMPTS + 1} prompts each killed its worker"),
    ],
    ids=["all", "the only one", "too many"],
)
def test_a_step_fails_where_the_prompts_cannot_be_the_cause(tmp_path: Path, count, poison, match):
    """If nothing ever succeeded, or more prompts fail than a step may lose."""
    with pytest.raises(WinnowError, match=match):
        run_with_poison(tmp_path, count, poison)


def test_a_disk_that_fails_is_not_blamed_on_prompts(tmp_path: Path):
    retries = Retries(run_with_poison(tmp_path, 8, set())[0])
    full = OSError(28, "No space left on device")
    for _ in range(MAX_ATTEMPTS - 1):
        assert retries.failed(Task(0), full) == ([Task(0)], False)
    with pytest.raises(WinnowError, match=r"part 0 failed 3 times; .*No space left"):
        retries.failed(Task(0), full)
