"""Which units of which steps can run now: all that we schedule ourselves.

Units of a later step begin as soon as the parts that they read are finished, if the executor has room. What is missing
is read from the store when a step begins, so a run that died goes on, and another run's parts count.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pipeline.config.plan import Plan, Step
from pipeline.execution.actors import TaskResult, Told
from pipeline.execution.executors import Executor
from pipeline.execution.retries import Retries
from pipeline.execution.tasks import StepSpec, Task, by_prompt, step_spec
from pipeline.stage import signature_of
from pipeline.store.store import Claim, Json, Store
from schemas import WinnowError

POLL_SECONDS = 0.2
Seal = Callable[[Step, StepSpec, float], Json]


class Reporter(Protocol):
    """What a run tells the people who watch it."""

    def cached(self, step: Step) -> None: ...
    def waits(self, step: Step, why: str) -> None: ...
    def begin(self, step: Step, done: int, total: int) -> None: ...
    def part(self, step: Step) -> None: ...
    def tell(self, step: Step, done: float, total: float, unit: str) -> None: ...
    def left_out(self, step: Step, prompt: str, words: str) -> None: ...
    def sealed(self, step: Step, manifest: Json) -> None: ...


@dataclass
class Making:
    """A step on its way: claimed, begun, not yet sealed."""

    step: Step
    store: Store
    claim: Claim
    started: float | None = None  # when its first unit was

    def __post_init__(self) -> None:
        self.work = step_spec(self.step, self.store)
        self.attempts = Retries(self.work)
        self.todo = deque(self.work.units())
        self.out = 0
        parts = 1 if self.work.unsharded else self.work.shards
        self.done = set(range(parts)) - {unit.shard for unit in self.todo}
        self.parts = parts

    @property
    def finished(self) -> bool:
        return not self.todo and not self.out


class Schedule:
    """One plan on its way through one executor."""

    def __init__(self, plan: Plan, store: Store, executor: Executor, reporter: Reporter, seal: Seal) -> None:
        self.store, self.executor, self.reporter, self.seal = store, executor, reporter, seal
        self.waiting = list(plan.wanted)
        self.making: dict[str, Making] = {}
        own = {step.key for step in plan.wanted}
        self.sealed = {source.key for step in plan.wanted for source in step.inputs.values()} - own
        self.told_of: set[str] = set()

    def run(self) -> None:
        self.executor.say = self._say
        try:
            while self.waiting or self.making:
                self._begin()
                self._hand_out()
                self._take_in()
        finally:
            self.executor.close()
            for making in self.making.values():
                making.claim.release()

    def _begin(self) -> None:
        """Look at every step that could have something to do."""
        for step in list(self.waiting):
            if self._may_begin(step) and self._look(step):
                self.waiting.remove(step)

    def _may_begin(self, step: Step) -> bool:
        """All that it needs is sealed, or on its way with the parts that it reads one by one."""
        if step.key in self.making:
            return False
        sources = [source.key for source in step.inputs.values()]
        if all(key in self.sealed for key in sources):
            return True
        return self.executor.overlaps and all(key in self.sealed or key in self.making for key in sources)

    def _look(self, step: Step) -> bool:
        """Is it sealed, or begun by us with this?"""
        if self._is_sealed(step):
            return True
        claim = self.store.folder(step).claim()
        if claim is None:
            self._waits(step, "another run is making it")
            return False
        if self._is_sealed(step):  # while we were getting here
            claim.release()
            return True
        making = self.making[step.key] = Making(step, self.store, claim)
        self.reporter.begin(step, len(making.done), making.parts)
        return True

    def _is_sealed(self, step: Step) -> bool:
        if self.store.folder(step).manifest is None:
            return False
        self.sealed.add(step.key)
        self.reporter.cached(step)
        return True

    def _hand_out(self) -> None:
        """Earlier steps first: what they make is what later ones wait for."""
        for making in self.making.values():
            ready = [unit for unit in making.todo if self._ready(making.step, unit)]
            self.executor.want(making.work, len(ready))
            for unit in ready:
                alone = making.attempts.suspect(unit)
                if self.executor.takes(making.work, alone):
                    making.todo.remove(unit)
                    making.out += 1
                    making.started = making.started or time.perf_counter()
                    self.executor.start(making.work, unit, alone)

    def _ready(self, step: Step, unit: Task) -> bool:
        """Is all there that this unit reads?"""
        return all(self._there(step, wire, unit) for wire in step.inputs)

    def _there(self, step: Step, wire: str, unit: Task) -> bool:
        source = step.inputs[wire]
        if source.key in self.sealed:
            return True
        item = next(item for item in signature_of(step.entry).inputs if item.name == wire)
        making = self.making[source.key]
        if step.shape.unsharded or making.work.unsharded or not by_prompt(item):
            return False
        return unit.shard in making.done

    def _take_in(self) -> None:
        for outcome in self.executor.wait(POLL_SECONDS):
            self._settle(outcome)
        for work, why in self.executor.stuck():
            self._waits(self._of(work).step, why)
        for making in list(self.making.values()):
            if making.finished and all(source.key in self.sealed for source in making.step.inputs.values()):
                self._seal(making)

    def _say(self, work: StepSpec, told: Told) -> None:
        self.reporter.tell(self._of(work).step, *told)

    def _of(self, work: StepSpec) -> Making:
        return self.making[work.out.path.name]

    def _waits(self, step: Step, why: str) -> None:
        """Said once."""
        if step.key not in self.told_of:
            self.told_of.add(step.key)
            self.reporter.waits(step, why)

    def _settle(self, outcome: TaskResult) -> None:
        making = self._of(outcome.work)
        making.out -= 1
        if isinstance(outcome.error, WinnowError):
            raise outcome.error
        known = set(making.attempts.poison)
        if outcome.error is None:
            finished = making.attempts.succeeded(outcome.unit)
        else:
            again, finished = making.attempts.failed(outcome.unit, outcome.error)
            making.todo.extendleft(reversed(again))
        for prompt in set(making.attempts.poison) - known:
            self.reporter.left_out(making.step, prompt, making.attempts.poison[prompt])
        if finished:
            making.done.add(outcome.unit.shard)
            self.reporter.part(making.step)

    def _seal(self, making: Making) -> None:
        self.executor.end(making.work)
        seconds = time.perf_counter() - making.started if making.started else 0.0
        manifest = self.seal(making.step, making.work, seconds)
        self.sealed.add(making.step.key)
        del self.making[making.step.key]
        making.claim.release()
        self.reporter.sealed(making.step, manifest)
