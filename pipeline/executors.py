"""Two ways to run the units of a step: in this process, or in Ray actors. The stage code is the same.

Nothing else knows Ray. Parts are idempotent, so the only state is which are missing.
"""

import os
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from pipeline.stage import shape_of
from pipeline.store import read_json, write_json
from pipeline.work import Work, execute
from pipeline.workspace import Tell, Warm
from schemas import WinnowError

OnUnit = Callable[[int], None]
ATTEMPTS = 3
POLL_SECONDS = 0.5


class Executor(Protocol):
    """Runs units of one step, calling `done(rows)` after each and `tell` in between."""

    def run(self, work: Work, units: list[int], done: OnUnit, tell: Tell) -> None: ...


class InProcess:
    """A for loop with one warm worker: this process."""

    def run(self, work: Work, units: list[int], done: OnUnit, tell: Tell) -> None:
        warm = Warm()
        try:
            for unit in units:
                done(execute(work, unit, warm, tell))
        finally:
            warm.close()


class OnRay:
    """Actors that each keep their engine warm and take the next missing part.

    A part has three attempts, each after a death on a fresh actor. What a stage itself refuses
    (WinnowError) is not tried again. Actors end with the step, and their memory with them.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def run(self, work: Work, units: list[int], done: OnUnit, tell: Tell) -> None:
        if work.options.get("ranks", 1) > 1:  # it spreads over Ray by itself, and an actor would hold what it needs
            return InProcess().run(work, units, done, tell)
        ray: Any = import_module("ray")  # untyped, and not needed to run in process
        start(ray)
        has = ray.cluster_resources()
        cpus, gpus = int(has.get("CPU", 1)), int(has.get("GPU", 0))
        count = min(self.workers, len(units), gpus or cpus)
        worker = ray.remote(num_cpus=max(1, cpus // count), num_gpus=gpus // count, max_restarts=0)(_Worker)
        Dispatch(ray, lambda: worker.remote(work), work, done, tell).run(units, count)


class Dispatch:
    """Which unit is with which actor, and how often it was tried: all the state there is."""

    def __init__(self, ray: Any, hire: Callable[[], Any], work: Work, done: OnUnit, tell: Tell) -> None:
        self.ray, self.hire, self.work, self.done, self.tell = ray, hire, work, done, tell
        self.tries: dict[int, int] = {}
        self.running: dict[Any, tuple[int, Any]] = {}
        self.waiting: list[int] = []

    def run(self, units: list[int], workers: int) -> None:
        self.waiting = list(reversed(units))
        actors = [self.hire() for _ in range(workers)]
        for actor in actors:
            self._give(actor)
        try:
            while self.running:
                ready, _ = self.ray.wait(list(self.running), timeout=POLL_SECONDS)
                for reference in ready:
                    self._finish(reference)
                if shape_of(self.work.entry).whole:  # parts tell for themselves
                    relay(self.work.out.path, self.tell)
        finally:
            for _, actor in self.running.values():
                self.ray.kill(actor)

    def _give(self, actor: Any) -> None:
        if not self.waiting:
            self.ray.kill(actor)
            return
        unit = self.waiting.pop()
        self.tries[unit] = self.tries.get(unit, 0) + 1
        self.running[actor.unit.remote(unit)] = (unit, actor)

    def _finish(self, reference: Any) -> None:
        unit, actor = self.running.pop(reference)
        try:
            self.done(self.ray.get(reference))
        except self.ray.exceptions.RayError as error:
            self._failed(unit, error)
            self.ray.kill(actor)
            actor = self.hire()
        self._give(actor)

    def _failed(self, unit: int, error: Exception) -> None:
        cause = getattr(error, "cause", None)
        if isinstance(cause, WinnowError):
            raise cause
        if self.tries[unit] >= ATTEMPTS:
            lines = str(error).strip().splitlines()
            raise WinnowError(
                f"{self.work.name}: part {unit} failed {ATTEMPTS} times; the last time: {lines[-1] if lines else error}"
            ) from error
        self.waiting.append(unit)


class _Worker:
    """One Ray actor: a process with its own warm engine."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.warm = Warm()

    def unit(self, unit: int) -> int:
        return execute(self.work, unit, self.warm, teller(self.work.out.path))


def teller(folder: Path) -> Tell:
    """Progress from a worker: a small file in the step's folder, at most two a second."""
    last = 0.0

    def tell(done: float, total: float, unit: str) -> None:
        nonlocal last
        if time.monotonic() - last > POLL_SECONDS:
            last = time.monotonic()
            write_json(folder / "progress.json", {"done": done, "total": total, "unit": unit})

    return tell


def relay(folder: Path, tell: Tell) -> None:
    if told := read_json(folder / "progress.json"):
        tell(told["done"], told["total"], told["unit"])


def start(ray: Any) -> None:
    """A local cluster, started once a process, which ends with it."""
    if not ray.is_initialized():
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # a local Ray stays on the loopback address
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
