"""Ray actors of one step: started as its tasks become ready, each with its own engine, killed when others need room."""

import os
import time
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
    """Actors of one step. `options` are Ray's for an actor, `max_size` is how many there may be."""

    def __init__(self, spec: StepSpec, resources: Resources, options: dict[str, Any], max_size: int) -> None:
        import ray

        self.spec, self.resources, self.options, self.max_size = spec, resources, options, max_size
        # Tasks have their own threads, so that `progress` is answered while they run. Ray never restarts
        # an actor or retries a task: a prompt that kills its worker would kill one after the other, without end.
        groups = {"tasks": resources.in_flight if spec.signature.concurrent else 1}
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
            handle = self.actor_class.remote(self.spec, self.resources)
            self.actors.append(PooledActor(handle, handle.__ray_ready__.remote()))

    def shrink(self, size: int) -> None:
        """Kill idle actors until there are `size`, those that are not up yet first; one that is just starting, later.

        Later is at the next call, if it is still idle then.
        """
        idle = sorted((actor for actor in self.actors if not actor.tasks), key=lambda actor: actor.starting is None)
        for actor in idle[: max(0, len(self.actors) - size)]:
            if actor.is_settled:
                self._kill(actor)

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
        """Return the tasks whose references are ready; raise MachineError if workers never start."""
        results = []
        for actor in list(self.actors):
            if actor.starting in ready:
                error = _error_of(actor.starting)
                actor.starting = None
                self.failed_starts = self.failed_starts + 1 if error else 0
                if error:
                    self._kill(actor)
                if self.failed_starts == MAX_FAILED_STARTS:  # not for lack of room: those would still be waiting
                    raise MachineError(
                        f"{self.spec.name}: {MAX_FAILED_STARTS} workers one after the other did not start: {error}"
                    )
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

    def close(self) -> list[PooledActor]:
        """Kill all actors; return those that are just starting, to be killed when they are settled."""
        for actor in list(self.actors):
            if actor.is_settled:
                self._kill(actor)
        return self.actors

    def _kill(self, actor: PooledActor) -> None:
        import ray

        ray.kill(actor.handle)
        self.actors.remove(actor)


def _error_of(reference: Any) -> Exception | None:
    """Return the exception that the task behind a reference raised, or Ray's own if its actor died."""
    import ray

    try:
        ray.get(reference)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        return cause if isinstance(cause, Exception) else error
    return None
