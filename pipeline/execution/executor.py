"""Executors: where tasks run. This one runs them in this process, RayExecutor (ray_executor.py) in Ray actors too.

schedule.py decides which tasks can run. Writing a part twice has no effect, so an executor has no state to lose.
"""

import time
from collections.abc import Callable

from pipeline.context import Progress, WarmCache
from pipeline.execution.tasks import StepSpec, Task, TaskResult, execute
from pipeline.processes import DeadProcessError
from pipeline.resources import Profile
from schemas import MachineError


class LocalExecutor:
    """Runs tasks one after the other in this process. A task that raises ends the run with that exception.

    `overlaps` says if several steps can be running at once. `wait` calls `on_progress` with the progress of running
    tasks, and `on_stall` with the reason why none of a step's tasks is started though workers were requested.
    """

    overlaps = False

    def __init__(self, profile: Profile = Profile()) -> None:  # noqa: B008 - frozen
        self.profile = profile
        self.on_progress: Callable[[StepSpec, Progress], None] = lambda spec, progress: None
        self.on_stall: Callable[[StepSpec, str], None] = lambda spec, reason: None
        self.next: list[tuple[StepSpec, Task]] = []  # at most one task: `wait` runs it
        self.warm = WarmCache()

    def request_workers(self, spec: StepSpec, ready: int) -> None:
        """Adapt the step's workers to the number of its tasks that could run now: here there are none to adapt."""

    def submit(self, spec: StepSpec, task: Task, exclusive: bool) -> bool:
        """Start a task and return True, or False if no worker has room; an `exclusive` one has a worker for itself."""
        if self.next:
            return False
        self.next.append((spec, task))
        return True

    def wait(self, seconds: float) -> list[TaskResult]:
        """Return the tasks that ended, as soon as there is one, or nothing after so many seconds."""
        if not self.next:
            time.sleep(seconds)
            return []
        spec, task = self.next.pop()
        resources = self.profile.of(spec.entry.name)
        try:
            execute(spec, task, self.warm, lambda *progress: self.on_progress(spec, Progress(*progress)), resources)
        except DeadProcessError as error:
            raise MachineError(f"{spec.name}: {error}") from error
        return [TaskResult(spec, task)]

    def end(self, spec: StepSpec) -> None:
        """Free what the step's workers hold: the step is finished."""
        self.warm.close()

    def close(self) -> None:
        """Free everything: the run is over."""
        self.next.clear()
        self.warm.close()
