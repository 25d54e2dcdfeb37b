"""Ray actors of one step: started as its tasks become ready, each with its own engine, killed when others need room.

Without a GPU, an actor goes on to the next step: its process has the libraries in memory, which takes seconds.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.context import Progress, WarmCache
from pipeline.execution.tasks import StepSpec, Task, TaskResult, execute
from pipeline.processes import end_orphans, end_with
from pipeline.resources import Resources, hide_gpus
from schemas import MachineError

PROGRESS_SECONDS = 0.5  # between two requests for progress
MAX_FAILED_STARTS = 3
# After which an actor that is not up waits for room. Until then it is not killed: Ray 2.60 ignores a kill between the
# moment when a process is given to an actor and the one when that process knows it, and never gives its room back.
SETTLE_SECONDS = 5.0
STALL_SECONDS = 30.0  # that a worker waits for room before users are told
IDLE_SECONDS = 20.0  # that an actor is kept for the next step: its room may be wanted by another job of the cluster


class StageWorker:
    """Process of an actor, with its own engine. Its tasks run in a thread, or in several for a concurrent stage."""

    def __init__(self, spec: StepSpec, resources: Resources) -> None:
        self.spec, self.resources, self.cache = spec, resources, WarmCache()
        # Ray ends the workers of a raylet that has died only where their parent is then process 1.
        end_with(os.getppid())
        end_orphans()
        if resources.gpus == 0:
            hide_gpus()
        self.progress_by_task: dict[Task, Progress] = {}

    def free(self) -> None:
        """Free what is held for the step: it has ended."""
        self.cache.close()

    def serve(self, spec: StepSpec, resources: Resources) -> None:
        """Free what was held for the step before, and go on with the tasks of another one."""
        self.free()
        self.spec, self.resources = spec, resources

    def run_task(self, task: Task) -> None:
        """Run a task to its end."""
        try:
            execute(
                self.spec,
                task,
                self.cache,
                lambda *progress: self.progress_by_task.update({task: Progress(*progress)}),
                self.resources,
            )
        finally:
            self.progress_by_task.pop(task, None)

    def progress(self) -> list[Progress]:
        """Return how far each running task is."""
        return list(self.progress_by_task.values())


@dataclass(eq=False)
class PooledActor:
    """Actor with its tasks by Ray's reference to their end, and the requests that it has not answered yet."""

    handle: Any
    starting: Any  # reference to its first answer; None once it is up
    is_new: bool = True  # and not one that has been up for an earlier step
    exclusive: bool = False
    tasks: dict[Any, Task] = field(default_factory=dict)
    progress_request: Any = None
    progress: list[Progress] = field(default_factory=list)
    created: float = field(default_factory=time.monotonic)

    @property
    def is_settled(self) -> bool:
        """Return whether it can be killed: it is up, has died, or waits for room."""
        import ray

        if self.starting is None or time.monotonic() - self.created > SETTLE_SECONDS:
            return True
        return bool(ray.wait([self.starting], timeout=0)[0])


class ActorPool:
    """Actors of one step. `options` are Ray's for an actor, `max_size` is how many there may be.

    `idle` are actors of steps that have ended, by the `kind` of their pool: one of its own kind is taken before a new
    one is started, which those of other kinds make room for.
    """

    def __init__(
        self,
        spec: StepSpec,
        resources: Resources,
        options: dict[str, Any],
        max_size: int,
        idle: "IdleActors | None" = None,
    ) -> None:
        import ray

        self.spec, self.resources, self.options, self.max_size = spec, resources, options, max_size
        self.idle = IdleActors() if idle is None else idle
        # Tasks have their own threads, so that `progress` is answered while they run. Ray never restarts
        # an actor or retries a task: a prompt that kills its worker would kill one after the other, without end.
        groups = {"tasks": resources.in_flight if spec.signature.concurrent else 1}
        self.kind = repr((sorted(options.items()), groups))
        remote: Any = ray.remote  # its types lack concurrency groups
        self.actor_class = remote(max_restarts=0, concurrency_groups=groups, **options)(StageWorker)
        self.actors: list[PooledActor] = []
        self.failed_starts = 0
        self.progress_requested = time.monotonic()

    @property
    def running(self) -> int:
        """Return the number of tasks that are with an actor."""
        return sum(len(actor.tasks) for actor in self.actors)

    def grow(self, ready: int) -> None:
        """Start actors for tasks that could run now."""
        while len(self.actors) < min(self.max_size, ready + self.running):
            if handle := self.idle.take(self.kind):
                self._take(handle)
                continue
            self.idle.kill()
            handle = self.actor_class.remote(self.spec, self.resources)
            self.actors.append(PooledActor(handle, handle.__ray_ready__.remote()))

    def shrink(self, size: int, others: Sequence["ActorPool"] = ()) -> list[PooledActor]:
        """Give up idle actors until there are `size`, those that are not up yet first.

        One goes to a pool of `others` that waits for one of its kind, or is killed. One that is just starting is given
        up at the next call, if it is still idle then. Return those in whose place others were taken, to be killed.
        """
        idle = sorted((actor for actor in self.actors if not actor.tasks), key=lambda actor: actor.starting is None)
        replaced: list[PooledActor] = []
        for actor in idle[: max(0, len(self.actors) - size)]:
            if actor.starting is None and (other := self._replaced_by(actor, others)):
                self.actors.remove(actor)
                replaced.append(other)
            elif actor.is_settled:
                self._kill(actor)
        return replaced

    def submit(self, task: Task, exclusive: bool) -> bool:
        """Give a task to the actor with the fewest; return False if none has room."""
        room = 1 if exclusive else self.resources.in_flight
        free = [actor for actor in self.actors
                if actor.starting is None and not actor.exclusive and len(actor.tasks) < room]  # fmt: skip
        if not free:
            return False
        actor = min(free, key=lambda actor: len(actor.tasks))
        actor.exclusive = exclusive
        actor.tasks[actor.handle.run_task.options(concurrency_group="tasks").remote(task)] = task
        return True

    def collect(self, ready: set[Any]) -> list[TaskResult]:
        """Return the tasks whose references are ready; if workers never start, an error that ends the step."""
        results: list[TaskResult] = []
        for actor in list(self.actors):
            if actor.starting in ready:
                error = _error_of(actor.starting)
                actor.starting = None
                if error:
                    self._kill(actor)
                if not actor.is_new:  # of idle ones, several may have died with their node
                    continue
                self.failed_starts = self.failed_starts + 1 if error else 0
                if self.failed_starts == MAX_FAILED_STARTS:  # not for lack of room: those would still be waiting
                    problem = f"{MAX_FAILED_STARTS} workers one after the other did not start: {error}"
                    # As the end of any task, so that plans that do not need this step go on
                    results.append(TaskResult(self.spec, Task(0), MachineError(f"{self.spec.name}: {problem}")))
            ended = [reference for reference in actor.tasks if reference in ready]
            outcomes = [TaskResult(self.spec, actor.tasks.pop(ref), _error_of(ref)) for ref in ended]
            actor.exclusive = actor.exclusive and bool(actor.tasks)
            results += outcomes
            if any(outcome.error for outcome in outcomes):
                # Nothing is retried on a worker where a task failed: its engine may be dead
                died = RuntimeError("its worker died of another part")
                results += [TaskResult(self.spec, task, died) for task in actor.tasks.values()]
                self._kill(actor)
        return results

    def progress(self) -> Progress | None:
        """Return the sum of the running tasks' progress in parts; of a single task, its own."""
        import ray

        if time.monotonic() - self.progress_requested >= PROGRESS_SECONDS:
            self.progress_requested = time.monotonic()
            for actor in self.actors:
                if actor.progress_request is not None and ray.wait([actor.progress_request], timeout=0)[0]:
                    try:
                        actor.progress = ray.get(actor.progress_request)
                    except ray.exceptions.RayError:
                        actor.progress = []
                    actor.progress_request = None
                if actor.progress_request is None and actor.tasks:
                    actor.progress_request = actor.handle.progress.remote()
        reports = [progress for actor in self.actors for progress in actor.progress]
        if len(reports) < 2:
            return reports[0] if reports else None
        return Progress(sum(report.done / report.total for report in reports if report.total), 1.0, "parts")

    def stall_reason(self) -> str | None:
        """Return why no task runs, if all actors have waited long for room and none is up."""
        late = [actor for actor in self.actors if time.monotonic() - actor.created > STALL_SECONDS]
        if not late or any(actor.starting is None for actor in self.actors):
            return None
        amounts = {name: value for name, value in self.options.items() if isinstance(value, int | float)}
        needs = ", ".join(f"{name} {value:g}" for name, value in amounts.items())
        return f"none of its workers is up yet; the cluster may have no room for one ({needs})"

    @property
    def starting(self) -> list[PooledActor]:
        """Return the actors that are not up yet."""
        return [actor for actor in self.actors if actor.starting]

    @property
    def new(self) -> list[PooledActor]:
        """Return the actors whose process has not started yet, as far as is known."""
        return [actor for actor in self.starting if actor.is_new]

    def close(self, others: Sequence["ActorPool"] = ()) -> list[PooledActor]:
        """Give up all actors: those without work and without a GPU stay for a later step, the rest are killed.

        If `others` wait for room, one goes to a pool of its kind, or is killed to make that room. Return those to be
        killed when they are settled: just starting ones, and those in whose place others were taken.
        """
        replaced: list[PooledActor] = []
        for actor in list(self.actors):
            if actor.starting or actor.tasks or self.options.get("num_gpus"):
                if actor.is_settled:
                    self._kill(actor)
                continue
            if other := self._replaced_by(actor, others):
                replaced.append(other)
            elif any(other.starting for other in others):
                self._kill(actor)
                continue
            else:
                self.idle.add(self.kind, actor.handle)
            self.actors.remove(actor)
        return self.actors + replaced

    def _replaced_by(self, actor: PooledActor, others: Sequence["ActorPool"]) -> PooledActor | None:
        """Give an actor to the pool of its kind that has waited longest; return the one that it replaces there."""
        waiting = [other for other in others if other.kind == self.kind and other.new]
        if not waiting or self.options.get("num_gpus"):
            return None
        return min(waiting, key=lambda other: other.new[0].created).replace_new(actor)

    def replace_new(self, actor: PooledActor) -> PooledActor:
        """Take an actor of the same kind in place of a new one, not up yet; return that one, which is to be killed.

        Its process would take seconds to start, if there is room for it at all.
        """
        replaced = self.new[-1]  # room that has just become free goes to the first, and a kill would lose it
        self.actors.remove(replaced)
        self._take(actor.handle)
        return replaced

    def _take(self, handle: Any) -> None:
        self.actors.append(PooledActor(handle, handle.serve.remote(self.spec, self.resources), is_new=False))

    def _kill(self, actor: PooledActor) -> None:
        import ray

        ray.kill(actor.handle)
        self.actors.remove(actor)


class IdleActors:
    """Actors whose step has ended, by the kind of their pool: they hold their CPUs until they are taken or killed.

    They hold no engine: other steps may need its memory.
    """

    def __init__(self) -> None:
        self._actors: list[tuple[str, Any, float]] = []

    def add(self, kind: str, handle: Any) -> None:
        handle.free.remote()
        self._actors.append((kind, handle, time.monotonic()))

    def take(self, kind: str) -> Any:
        """Return an actor of a kind, None if there is none."""
        for index, (other, handle, _) in enumerate(self._actors):
            if other == kind:
                del self._actors[index]
                return handle
        return None

    def kill(self, seconds: float = 0.0) -> None:
        """Kill those that have been idle for so long, so that their room is free."""
        if not self._actors:
            return
        import ray

        since = time.monotonic() - seconds
        for _, handle, begin in self._actors:
            if begin <= since:
                ray.kill(handle)
        self._actors = [actor for actor in self._actors if actor[2] > since]


def _error_of(reference: Any) -> Exception | None:
    """Return the exception that the task behind a reference raised, or Ray's own if its actor died."""
    import ray

    try:
        ray.get(reference)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        return cause if isinstance(cause, Exception) else error
    return None
