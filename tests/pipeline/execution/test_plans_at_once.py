"""Several plans at once, as a sweep on a cluster: side by side, each step once, and one that fails stops no other."""

import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from pipeline.config.plan import Plan
from pipeline.execution import actors
from pipeline.execution.actors import ActorPool, PooledActor
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.ray_executor import RayExecutor, actor_options
from pipeline.execution.run import groups_at_once, run, run_at_once
from pipeline.execution.tasks import TaskResult, step_spec
from pipeline.resources import Profile, Resources
from pipeline.store.store import Store
from schemas import WinnowError
from schemas.tables import CANDIDATES
from tests.runs import Silent, plan_of
from tests.toys import notes, plan_of_toys


@pytest.fixture(scope="module", autouse=True)
def _end_ray():
    """End the Ray of this file and those before it, so that no process that a later test forks has lost its threads."""
    yield
    ray.shutdown()


class Overlapping(LocalExecutor):
    """Runs the tasks of all plans in this process, in turn."""

    overlaps = True


class Failing(Overlapping):
    """Returns a user's error as the result of its task, as a worker of Ray does."""

    def wait(self, seconds):
        task = self.next[0] if self.next else None
        try:
            return super().wait(seconds)
        except WinnowError as error:
            assert task is not None
            return [TaskResult(*task, error)]


class Attentive(Silent):
    """Reporter that also remembers which steps failed, and which ended with them."""

    def __init__(self):
        super().__init__()
        self.failed, self.ended = [], []

    def step_failed(self, step, error):
        self.failed.append(step.name)

    def step_ended(self, step):
        self.ended.append(step.name)


def toys(name: str, shards: int = 1, **steps: dict) -> Plan:
    return replace(plan_of_toys(shards, **steps), name=name)


def test_steps_of_two_plans_run_side_by_side_and_what_they_share_once(tmp_path: Path):
    """Each ends once the other has begun; run one after the other, the first would wait for a minute."""
    folder, reporter = str(tmp_path), Silent()
    plans = [
        toys("one", begins_with=dict(use="followed", folder=folder, name="one", parts=1, by="other")),
        toys("two", begins_with=dict(use="followed", folder=folder, name="other", parts=1, by="one")),
    ]
    store = Store(tmp_path / "store")
    profile = Profile(stages={"followed": Resources(cpus=1, max_workers=1)})
    run_at_once(plans, store, RayExecutor(2, profile=profile), reporter)
    times = {(name, event): float(time) for name, event, time, _ in notes(tmp_path)}
    assert times["other", "begins"] < times["one", "ends"] < times["one", "begins"] + 50
    assert reporter.ran == ["some_prompts", "begins_with", "begins_with"]
    assert {name: set(links) for name, links in store.runs().items()} == {
        name: {"some_prompts", "begins_with"} for name in ("one", "two")
    }


def test_a_worker_without_a_gpu_goes_on_to_the_next_step(tmp_path: Path):
    """Stay in the process that has loaded the libraries for a step of the same resources, and leave it for others."""
    folder = str(tmp_path)
    plan = toys(
        "on",
        first=dict(use="slow", folder=folder, name="first", seconds=0.0),
        second=dict(use="slow", folder=folder, name="second", seconds=0.0),
        third=dict(use="followed", folder=folder, name="third", parts=1, by="third"),
    )
    profile = Profile(default=Resources(cpus=1), stages={"followed": Resources(cpus=2)})
    run(plan, Store(tmp_path / "store"), RayExecutor(1, profile=profile), Silent())
    first, second, third = (pid for _, event, _, pid in notes(tmp_path) if event == "begins")
    assert first == second != third


def test_an_idle_worker_makes_room_for_a_step_that_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The step of plan `two` asks for both CPUs, and waits while that of `one` has one of them; not long enough for a
    message that the cluster has no room."""

    class Impatient(Silent):
        def step_waiting(self, step, why):
            raise AssertionError(why)

    monkeypatch.setattr(actors, "SETTLE_SECONDS", 0.5)
    monkeypatch.setattr("pipeline.execution.ray_executor.IDLE_SECONDS", 60.0)
    folder, reporter = str(tmp_path), Impatient()
    plans = [
        toys("one", quick=dict(use="slow", folder=folder, name="one", seconds=2.0)),
        toys("two", other=dict(use="followed", folder=folder, name="two", parts=1, by="two")),
    ]
    profile = Profile(default=Resources(cpus=1), stages={"followed": Resources(cpus=2)})
    run_at_once(plans, Store(tmp_path / "store"), RayExecutor(1, profile=profile), reporter)
    assert reporter.ran == ["some_prompts", "quick", "other"]


def test_of_several_plans_steps_that_wait_are_reported_once_all_wait():
    """While one begins with the worker of a step that has ended, no task runs, and the cluster is not full for ever."""
    reported: list[Any] = []

    def pool(name: str, reason: str | None) -> Any:
        return SimpleNamespace(spec=name, actors=[None], stall_reason=lambda: reason)

    for plans, reason in [(2, "no room"), (2, None), (1, None)]:
        executor = RayExecutor()
        executor.plans = plans
        executor.on_stall = lambda spec, reason: reported.append(spec)
        pools: Any = {1: pool("one", "no room"), 2: pool("two", reason)}
        executor.pools = pools
        executor._report_stalls()
        reported.append(";")
    assert reported == ["one", "two", ";", ";", "one", ";"]


def test_an_idle_worker_holds_no_engine(tmp_path: Path):
    """The step of plan `two` ends once the engine of the other is closed, or in vain after a minute."""
    folder = str(tmp_path)
    plans = [
        toys("one", first=dict(use="followed", folder=folder, name="one", parts=1, by="two", engine=True)),
        toys("two", other=dict(use="followed", folder=folder, name="two", parts=1, by="closed")),
    ]
    profile = Profile(default=Resources(cpus=1))
    run_at_once(plans, Store(tmp_path / "store"), RayExecutor(1, profile=profile), Silent())
    assert "closed" in [words[0] for words in notes(tmp_path)]


def test_workers_that_do_not_start_end_their_step_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return the error as the result of a task, so that the command goes on; not for idle ones that died with their
    node."""
    plan = toys("one", quick=dict(use="slow", folder=str(tmp_path), name="one", seconds=0.0))
    monkeypatch.setattr(actors, "_error_of", lambda reference: RuntimeError("the node is gone"))
    monkeypatch.setattr(ray, "kill", lambda handle: None)
    pool = ActorPool(step_spec(plan.target, Store(tmp_path / "store")), Resources(), {"num_cpus": 1}, 3)
    reference = object()
    pool.actors = [PooledActor(None, reference, is_new=False) for _ in range(3)]
    assert (pool.collect({reference}), pool.actors) == ([], [])
    pool.actors = [PooledActor(None, reference) for _ in range(3)]
    (result,) = pool.collect({reference})
    assert str(result.error) == "quick: 3 workers one after the other did not start: the node is gone"


def test_a_worker_whose_step_ends_goes_to_the_step_that_has_waited_longest(tmp_path: Path, monkeypatch):
    """In place of the last that is not up yet: the first may have been given room a moment ago, which Ray would lose.

    What it replaces is killed when that is safe, a worker of another kind at once.
    """
    plan = toys("one", quick=dict(use="slow", folder=str(tmp_path), name="one", seconds=0.0))
    killed: list[Any] = []
    monkeypatch.setattr(ray, "kill", killed.append)
    spec = step_spec(plan.target, Store(tmp_path / "store"))
    ended, early, late, other = (ActorPool(spec, Resources(), {"num_cpus": cpus}, 3) for cpus in (1, 1, 1, 2))
    now = time.monotonic()
    early.actors = [PooledActor(name, starting=object(), created=now - 3 + n) for n, name in enumerate("ab")]
    late.actors = [PooledActor("c", starting=object(), created=now)]
    other.actors = [PooledActor("d", starting=object(), created=now - 9)]
    served: list[Any] = []
    up = SimpleNamespace(serve=SimpleNamespace(remote=lambda *arguments: served.append(arguments)))
    ended.actors = [PooledActor(up, None)]
    assert [actor.handle for actor in ended.close([late, other, early])] == ["b"]
    assert (killed, served, [actor.handle for actor in early.actors]) == ([], [(spec, Resources())], ["a", up])
    assert early.new == early.actors[:1]  # the process behind the other is there
    ended.actors = [PooledActor(up, None)]
    assert (ended.close([other]), killed, other.actors[0].handle) == ([], [up], "d")


def test_a_step_that_fails_ends_the_plans_that_need_it_and_no_other(tmp_path: Path):
    """End what only these need too, though it is running, free its claim, and raise the error at the end."""
    folder, reporter = str(tmp_path), Attentive()
    broken = dict(use="lacking_a_row")
    plans = [
        toys("bad", 2, broken=dict(broken), after=dict(use="slow", folder=folder, name="after", seconds=0.0)),
        toys("good", 2, quick=dict(use="slow", folder=folder, name="good", seconds=0.0)),
    ]
    store = Store(tmp_path / "store")
    with pytest.raises(WinnowError, match=r"^broken: no row has the id a-7"):
        run_at_once(plans, store, Failing(), reporter)
    assert (reporter.ran, reporter.failed, reporter.ended) == (["some_prompts", "quick"], ["broken"], ["after"])
    after = store.folder(plans[0].target).try_lock()
    assert after is not None
    after.release()


def test_a_plan_whose_part_reads_a_step_of_another_part_ends_with_that_step(tmp_path: Path):
    """The part of `reads` leaves out the step that the part of `makes` computes; it would wait for it without end."""

    class Impatient(Failing):
        loops = 0

        def wait(self, seconds):
            self.loops += 1
            assert self.loops < 20, "a step waits for one that has been given up"
            return super().wait(0)

    broken = dict(use="lacking_a_row")
    makes = toys("makes", broken=dict(broken))
    reads = toys("reads", judged=dict(broken), after=dict(use="slow", folder=str(tmp_path), name="r", seconds=0.0))
    plans = [
        makes,
        replace(reads, part=reads.steps[-1:]),
        toys("other", quick=dict(use="slow", folder=str(tmp_path), name="o", seconds=0.0)),
    ]
    reporter = Attentive()
    with pytest.raises(WinnowError, match=r"^broken: no row has the id a-7"):
        run_at_once(plans, Store(tmp_path / "store"), Impatient(), reporter)
    assert (reporter.ran, reporter.failed, reporter.ended) == (["some_prompts", "quick"], ["broken"], ["after"])


def test_cpus_are_divided_among_the_plans_that_are_not_finished(tmp_path: Path):
    """A sweep that goes on with its last run gives it what all of them had."""

    class Counting(Overlapping):
        def submit(self, spec, task, exclusive):
            counts.append(self.plans)
            return super().submit(spec, task, exclusive)

    plans = [
        toys(name, quick=dict(use="slow", folder=str(tmp_path), name=name, seconds=0.0)) for name in ("one", "two")
    ]
    store = Store(tmp_path / "store")
    run(plans[0], store, Overlapping(), Silent())
    counts: list[int] = []
    run_at_once(plans, store, Counting(), Silent())
    assert counts == [1]


def test_no_plans_are_no_group():
    """As those of a figure of evidence of which every line is left out."""
    assert groups_at_once([], Overlapping()) == []


def test_if_all_plans_fail_each_error_is_told_once(tmp_path: Path):
    plans = [
        toys("one", broken=dict(use="lacking_a_row")),
        toys("two", judged=dict(use="lacking_a_row"), after=dict(use="lacking_a_row")),
        toys("three", first=dict(use="without_engine")),
    ]
    with pytest.raises(WinnowError) as caught:
        run_at_once(plans[:2], Store(tmp_path / "store"), Failing(), Silent())
    assert len(caught.value.problems) == 1  # one step, which both plans have
    # Not itself: what follows causes to the first one would have no end
    assert str(caught.value.__cause__).startswith("no row has the id a-7")
    with pytest.raises(WinnowError) as caught:
        run_at_once([plans[0], plans[2]], Store(tmp_path / "store"), Failing(), Silent())
    assert [text.partition(":")[0] for text in caught.value.problems] == ["broken", "first"]


def test_draws_that_two_plans_have_in_common_are_made_once(data_dir, finished, tmp_path: Path):
    """The second `sample` begins when the first has ended, and takes its draws."""
    plans = [
        replace(plan_of(data_dir, "target=sample", f"sample.n={n}", "sample.seed=9"), name=f"n={n}") for n in (2, 3)
    ]
    store = Store(shutil.copytree(finished, tmp_path / "store"))
    run_at_once(plans, store, Overlapping(), Silent())
    fewer, more = (store.folder(plan.target) for plan in plans)
    assert more.manifest["counters"]["draws_of_earlier_steps"] == fewer.read(CANDIDATES).num_rows > 0


def test_cpus_are_divided_among_the_trainings_that_run_at_once_on_gpus():
    """On 8 GPUs with 128 CPUs one has all CPUs, twelve have a GPU and an eighth of them each. Without GPUs each has
    all, as in one process: with another number of threads, the trained weights would be others."""
    node = {"CPU": 128.0, "GPU": 8.0}
    alone, _ = actor_options(Resources(), [node], None, 1, True)
    swept, _ = actor_options(Resources(), [node], None, 1, True, plans=12)
    without_gpus, _ = actor_options(Resources(), [{"CPU": 128.0}], None, 1, True, plans=12)
    assert (alone["num_cpus"], alone["num_gpus"]) == (128, 1)
    assert (swept["num_cpus"], swept["num_gpus"]) == (16, 1)
    assert without_gpus["num_cpus"] == 128
