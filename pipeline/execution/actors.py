"""The Ray actors that work on one step: hired as units come, each with a warm engine, let go when others wait."""

import time
from dataclasses import dataclass, field
from typing import Any

from pipeline.context import ProgressCallback, WarmCache
from pipeline.execution.tasks import StepSpec, Task, execute
from pipeline.resources import Resources
from pipeline.stage import signature_of
from schemas import WinnowError

Told = tuple[float, float, str]
TELL_SECONDS = 0.5
STARTS = 3
PATIENCE = 30.0  # seconds that a worker waits for room before people hear of it


@dataclass(frozen=True)
class TaskResult:
    """How a unit ended."""

    work: StepSpec
    unit: Task
    error: Exception | None = None


class StageWorker:
    """In an actor: a process with its own warm engine. Units run in a thread, or, of a shared stage, in several."""

    def __init__(self, work: StepSpec, resources: Resources) -> None:
        self.work, self.resources, self.warm = work, resources, WarmCache()
        self.at_work: dict[Task, Told] = {}

    def up(self) -> None:
        """Answered once the actor has its place."""

    def unit(self, unit: Task) -> None:
        try:
            execute(self.work, unit, self.warm, self._teller(unit), self.resources)
        finally:
            self.at_work.pop(unit, None)

    def _teller(self, unit: Task) -> ProgressCallback:
        def tell(done: float, total: float, label: str) -> None:
            self.at_work[unit] = (done, total, label)

        return tell

    def told(self) -> list[Told]:
        return list(self.at_work.values())


@dataclass(eq=False)
class PooledActor:
    """One actor, the units that are with it, and what we asked it."""

    actor: Any
    up: Any
    placed: bool = False
    alone: bool = False
    units: dict[Any, Task] = field(default_factory=dict)
    asked: Any = None
    told: list[Told] = field(default_factory=list)
    hired: float = field(default_factory=time.monotonic)


class ActorPool:
    """Of one step. `given` are Ray's options for an actor, `most` how many there may be."""

    def __init__(self, ray: Any, work: StepSpec, resources: Resources, given: dict[str, Any], most: int) -> None:
        self.ray, self.work, self.resources, self.given, self.most = ray, work, resources, given, most
        shared = signature_of(work.entry).concurrent
        groups = {"units": resources.in_flight if shared else 1}
        self.kind = ray.remote(max_restarts=0, concurrency_groups=groups, **given)(StageWorker)
        self.members: list[PooledActor] = []
        self.asked = time.monotonic()
        self.failed_starts = 0

    @property
    def running(self) -> int:
        return sum(len(member.units) for member in self.members)

    @property
    def waits(self) -> bool:
        """Has an actor no place yet?"""
        return not all(member.placed for member in self.members)

    @property
    def stuck(self) -> str | None:
        """What all its actors wait for in vain, if they do."""
        late = [member for member in self.members if time.monotonic() - member.hired > PATIENCE]
        if not late or any(member.placed for member in self.members):
            return None
        asked = ", ".join(f"{name} {value:g}" for name, value in self.given.items() if isinstance(value, int | float))
        return f"none of its workers is up yet; the cluster may have no room for one ({asked})"

    def want(self, units: int) -> None:
        while len(self.members) < min(self.most, units + self.running):
            actor = self.kind.remote(self.work, self.resources)
            self.members.append(PooledActor(actor, actor.up.remote()))

    def let_go(self, keep: int) -> None:
        """Of those with nothing to do, the ones without a place first."""
        idle = sorted((each for each in self.members if not each.units), key=lambda each: each.placed)
        for member in idle[: max(0, len(self.members) - keep)]:
            self._dismiss(member)

    def takes(self, alone: bool) -> PooledActor | None:
        """The member with the least to do that has room for one more."""
        room = 1 if alone else self.resources.in_flight
        free = [each for each in self.members if each.placed and not each.alone and len(each.units) < room]
        return min(free, key=lambda each: len(each.units), default=None)

    def start(self, unit: Task, alone: bool) -> None:
        member = self.takes(alone)
        assert member, "asked before"
        member.alone = alone
        member.units[member.actor.unit.options(concurrency_group="units").remote(unit)] = unit

    def watched(self) -> list[Any]:
        """What Ray is to be waited for."""
        places = [member.up for member in self.members if not member.placed]
        return places + [reference for member in self.members for reference in member.units]

    def take_in(self, ready: set[Any]) -> list[TaskResult]:
        return [outcome for member in list(self.members) for outcome in self._from(member, ready)]

    def _from(self, member: PooledActor, ready: set[Any]) -> list[TaskResult]:
        if not member.placed and member.up in ready:
            self._placed(member)
        ended = [reference for reference in member.units if reference in ready]
        made = [TaskResult(self.work, member.units.pop(reference), self._get(reference)) for reference in ended]
        member.alone = member.alone and bool(member.units)
        return made + self._lost(member) if any(outcome.error for outcome in made) else made

    def _placed(self, member: PooledActor) -> None:
        """Raises WinnowError where no worker ever starts: it is not for want of room."""
        error = self._get(member.up)
        member.placed = error is None
        if error is None:
            self.failed_starts = 0
            return
        self._dismiss(member)
        self.failed_starts += 1
        if self.failed_starts == STARTS:
            raise WinnowError(f"{self.work.name}: {STARTS} workers one after the other did not start: {error}")

    def _lost(self, member: PooledActor) -> list[TaskResult]:
        """Nothing is tried again on a worker where something failed: its engine may be dead."""
        died = RuntimeError("its worker died of another part")
        with_it = [TaskResult(self.work, unit, died) for unit in member.units.values()]
        self._dismiss(member)
        return with_it

    def _dismiss(self, member: PooledActor) -> None:
        self.ray.kill(member.actor)
        self.members.remove(member)

    def _get(self, reference: Any) -> Exception | None:
        try:
            self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            return cause if isinstance(cause, Exception) else error
        return None

    def told(self) -> Told | None:
        """The sum over the units at work, each as its share, or as it was told if there is one."""
        self._ask()
        told = [each for member in self.members for each in member.told]
        if len(told) < 2:
            return told[0] if told else None
        return sum(done / total for done, total, _ in told if total), 1.0, "parts"

    def _ask(self) -> None:
        if time.monotonic() - self.asked < TELL_SECONDS:
            return
        self.asked = time.monotonic()
        for member in self.members:
            if member.asked is not None and self.ray.wait([member.asked], timeout=0)[0]:
                try:
                    member.told = self.ray.get(member.asked)
                except self.ray.exceptions.RayError:
                    member.told = []
                member.asked = None
            if member.asked is None and member.units:
                member.asked = member.actor.told.remote()

    def close(self) -> None:
        for member in list(self.members):
            self._dismiss(member)
