"""Executors: where tasks run. This one runs them on this machine, RayExecutor (ray_executor.py) in Ray actors too.

schedule.py decides which tasks can run. Writing a part twice has no effect, so an executor has no state to lose.
"""

import os
import signal
import time
import warnings
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future
from concurrent.futures import wait as wait_for
from functools import cached_property
from typing import TYPE_CHECKING

from pipeline.context import Progress, WarmCache
from pipeline.execution.tasks import StepSpec, Task, TaskResult, execute, input_bytes
from pipeline.processes import DeadProcessError, end_with
from pipeline.registry import bound_entries
from pipeline.resources import Profile, Resources
from schemas import MachineError, WinnowWarning

if TYPE_CHECKING:
    from joblib.externals.loky import ProcessPoolExecutor

# A part that takes longer, or whose inputs are larger, is worth the start of processes: some 2 s of a core for each.
LONG_PART = 1.0  # seconds
LARGE_PART = 64 << 20  # bytes in memory
WarningTexts = list[str]


class LocalExecutor:
    """Runs tasks on this machine. A task that raises ends the run with that exception.

    They run in this process, one after the other. Only the parts of a step that computes rows from rows, if they are
    long, are computed by as many processes as this one may use cores, each with a piece of its part in memory
    (`piece_memory`): engines and networks use all cores by themselves. `processes` is their number.

    `overlaps` says if several steps can be running at once, those of several plans too: `plans` is the number of those
    that are not finished. `wait` calls `on_progress` with the progress of running tasks, and `on_stall` with the reason
    why none of a step's tasks is started though workers were requested.
    """

    overlaps = False

    def __init__(self, profile: Profile = Profile(), processes: int | None = None) -> None:  # noqa: B008 - frozen
        self.profile = profile
        self.plans = 1
        if processes:
            self.processes = processes
        self.on_progress: Callable[[StepSpec, Progress], None] = lambda spec, progress: None
        self.on_stall: Callable[[StepSpec, str], None] = lambda spec, reason: None
        self.next: list[tuple[StepSpec, Task]] = []  # at most one task: `wait` runs it
        self.warm = WarmCache()
        self.is_divided: dict[str, bool] = {}  # by key of a step: whether its parts go to the processes
        self.running: dict[Future[WarningTexts], tuple[StepSpec, Task]] = {}  # in them
        self._pool: ProcessPoolExecutor | None = None
        self._pool_size = 0

    @cached_property
    def processes(self) -> int:
        """Return how many cores this process may use: what `taskset` and a container's quota leave of the machine's."""
        from joblib.externals.loky import cpu_count

        return int(cpu_count())

    def request_workers(self, spec: StepSpec, ready: int) -> None:
        """Adapt the step's workers to the number of its tasks that could run now: here, whether processes run them."""
        if ready > 1 and spec.key not in self.is_divided:
            self.is_divided[spec.key] = (
                _is_of_rows(spec) and input_bytes(spec, shard=0) >= LARGE_PART and self.processes > 1
            )

    def submit(self, spec: StepSpec, task: Task, exclusive: bool) -> bool:
        """Start a task and return True, or False if no worker has room; an `exclusive` one has a worker for itself."""
        if self.is_divided.get(spec.key):
            size = min(self.processes, spec.shards)
            if self.next or len(self.running) >= size:
                return False
            resources = self.profile.of(spec.entry.name)
            self.running[self._open_pool(size).submit(_execute_apart, spec, task, resources)] = spec, task
            return True
        if self.next or self.running:
            return False
        self.next.append((spec, task))
        return True

    def wait(self, seconds: float) -> list[TaskResult]:
        """Return the tasks that ended, as soon as there is one, or nothing after so many seconds."""
        if self.running:
            ended, _ = wait_for(self.running, timeout=seconds, return_when=FIRST_COMPLETED)
            results = []
            for future in ended:
                spec, task = self.running.pop(future)
                try:
                    for text in future.result():
                        warnings.warn(text, WinnowWarning, stacklevel=2)
                except BrokenExecutor as error:
                    raise MachineError(
                        f"{spec.name}: a process that computed part {task.shard} or another one died; there may be too "
                        f"little memory for {self.processes} of them: set `piece_memory` of the profile lower, or give "
                        "this command fewer cores, as `taskset -c 0` does"
                    ) from error
                results.append(TaskResult(spec, task))
            return results
        if not self.next:
            time.sleep(seconds)
            return []
        spec, task = self.next.pop()
        resources = self.profile.of(spec.entry.name)
        start = time.monotonic()
        try:
            execute(spec, task, self.warm, lambda *progress: self.on_progress(spec, Progress(*progress)), resources)
        except DeadProcessError as error:
            raise MachineError(f"{spec.name}: {error}") from error
        if time.monotonic() - start >= LONG_PART and _is_of_rows(spec) and self.processes > 1:
            self.is_divided[spec.key] = True
        return [TaskResult(spec, task)]

    def _open_pool(self, size: int) -> "ProcessPoolExecutor":
        """Return so many processes: new ones, because a fork of this one would inherit the state of its threads."""
        from joblib.externals.loky import ProcessPoolExecutor

        if self._pool_size < size and not self.running:
            self._close_pool()
        if self._pool is None:
            one_thread = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
            self._pool = ProcessPoolExecutor(size, env=one_thread, initializer=_begin_process, initargs=(os.getpid(),))
            self._pool_size = size
        return self._pool

    def _close_pool(self) -> None:
        if self._pool:
            self._pool.shutdown(kill_workers=True)
        self._pool, self._pool_size = None, 0

    def end(self, spec: StepSpec) -> None:
        """Free what the step's workers hold, and forget its task that has not begun: it is finished, or given up."""
        self.next = [(other, task) for other, task in self.next if other is not spec]
        self.warm.close()

    def close(self) -> None:
        """Free everything: the run is over. Parts that processes have not finished are lost."""
        self.next.clear()
        self.running.clear()
        self.warm.close()
        self._close_pool()


def _is_of_rows(spec: StepSpec) -> bool:
    """Return whether a step computes rows from rows: it opens no network or engine, and asks no server.

    Several processes would send as many times the requests that its function's option `concurrency` allows.
    """
    inputs = [item for item in spec.signature.inputs if item.name in spec.sources]
    asks_server = any("concurrency" in entry.options.model_fields for entry in bound_entries(spec.options))
    return not (spec.signature.unsharded or asks_server or any(item.schema is None for item in inputs))


_warm = WarmCache()  # of a process of the pool, for the one step after the other whose parts it computes
_warm_key = ""


def _execute_apart(spec: StepSpec, task: Task, resources: Resources) -> WarningTexts:
    """Run a task in a process of the pool; return the texts of its warnings, which are shown by the other one."""
    global _warm_key
    if _warm_key != spec.key:
        _warm.close()
        _warm_key = spec.key
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", WinnowWarning)
        execute(spec, task, _warm, lambda *progress: None, resources)
    return list(dict.fromkeys(str(item.message) for item in caught if issubclass(item.category, WinnowWarning)))


def _begin_process(parent: int) -> None:
    """Leave Ctrl-C, which the terminal sends to all processes, to the parent, and end with it if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(parent)
