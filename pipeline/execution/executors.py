"""Two ways to run units: in this process, or in Ray actors. The stage code is the same.

Ray places, restarts and scales; schedule.py says what can run now. Besides distributed.py and jobs/submit.py,
 nothing else knows Ray. Parts are idempotent, so an executor has no state to lose.
"""

import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from pipeline.config.plan import Step
from pipeline.context import ProgressCallback, WarmCache
from pipeline.execution.actors import ActorPool, TaskResult, Told
from pipeline.execution.tasks import StepSpec, Task, execute
from pipeline.resources import Profile, Resources
from pipeline.store.store import StepFolder, read_json, write_json
from schemas import WinnowError

Say = Callable[[StepSpec, Told], None]
POLL_SECONDS = 0.5


class Executor(Protocol):
    """Runs units; `overlaps` where several steps can be at work at once. `say` is told how far those at work are."""

    overlaps: bool
    say: Say

    def want(self, work: StepSpec, units: int) -> None:
        """So many units of this step could run now."""

    def takes(self, work: StepSpec, alone: bool) -> bool:
        """Is there a worker for one of them, with nothing else on it if it must be alone?"""

    def start(self, work: StepSpec, unit: Task, alone: bool) -> None: ...

    def wait(self, seconds: float) -> list[TaskResult]:
        """What ended, as soon as anything did."""

    def stuck(self) -> list[tuple[StepSpec, str]]:
        """Steps for which nothing is done though it could be, and why."""

    def end(self, work: StepSpec) -> None:
        """The step is over, and what its workers hold is free."""

    def close(self) -> None: ...


class LocalExecutor:
    """A for loop with one warm worker: this process. A part that raises ends the run with that exception."""

    overlaps = False

    def __init__(self, profile: Profile = Profile()) -> None:  # noqa: B008 - frozen
        self.profile = profile
        self.say: Say = lambda work, told: None
        self.next: list[tuple[StepSpec, Task]] = []
        self.warm = WarmCache()

    def want(self, work: StepSpec, units: int) -> None: ...

    def takes(self, work: StepSpec, alone: bool) -> bool:
        return not self.next

    def start(self, work: StepSpec, unit: Task, alone: bool) -> None:
        self.next.append((work, unit))

    def wait(self, seconds: float) -> list[TaskResult]:
        if not self.next:
            time.sleep(seconds)
            return []
        work, unit = self.next.pop()
        execute(work, unit, self.warm, lambda *told: self.say(work, told), self.profile.of(work.entry.name))
        return [TaskResult(work, unit)]

    def stuck(self) -> list[tuple[StepSpec, str]]:
        return []

    def end(self, work: StepSpec) -> None:
        self.warm.close()

    def close(self) -> None:
        self.next.clear()
        self.warm.close()


class RayExecutor:
    """A crew of actors for each step at work; they end with it, and their memory with them.

    `address` is a cluster's, "auto" for the one that this process belongs to, or None for a local one that ends with
    this process. `workers` is how many a step gets where its profile does not say.
    """

    overlaps = True

    def __init__(self, workers: int, address: str | None = None, profile: Profile = Profile()) -> None:  # noqa: B008
        self.workers, self.address, self.profile = workers, address, profile
        self.say: Say = lambda work, told: None
        self.here = LocalExecutor(profile)
        self.crews: dict[StepFolder, ActorPool] = {}

    def check(self, steps: list[Step]) -> None:
        """Raises WinnowError for a cluster that cannot be joined, and for every stage that needs more than it has."""
        if self.address or self.profile != Profile():
            check_fits(self.profile, steps, _nodes(start(self.address)))

    def want(self, work: StepSpec, units: int) -> None:
        if self.here.next or _spreads_itself(work) or (not units and work.out not in self.crews):
            return
        own = self._crew(work)
        own.want(units)
        if not units and any(crew.waits for crew in self.crews.values() if crew is not own):
            busy = any(crew.running for crew in self.crews.values())
            own.let_go(self.profile.of(work.entry.name).min_workers if busy else 0)

    def _crew(self, work: StepSpec) -> ActorPool:
        if work.out not in self.crews:
            ray = start(self.address)
            resources, parts = self.profile.of(work.entry.name), 1 if work.unsharded else work.shards
            resources = replace(resources, min_workers=min(resources.min_workers, parts))
            given, most = shares(resources, _nodes(ray), min(self.workers, parts), work.reads_model)
            has = replace(resources, cpus=given["num_cpus"], gpus=given["num_gpus"])
            self.crews[work.out] = ActorPool(ray, work, has, given, most)
        return self.crews[work.out]

    def takes(self, work: StepSpec, alone: bool) -> bool:
        if self.here.next or _spreads_itself(work):
            return not self.here.next
        return self.crews[work.out].takes(alone) is not None

    def start(self, work: StepSpec, unit: Task, alone: bool) -> None:
        if _spreads_itself(work):
            self.here.start(work, unit, alone)
        else:
            self.crews[work.out].start(unit, alone)

    def wait(self, seconds: float) -> list[TaskResult]:
        if self.here.next and not any(crew.running for crew in self.crews.values()):
            for crew in self.crews.values():  # its ranks need the room of all that is idle
                crew.let_go(0)
            self.here.say = self.say
            return self.here.wait(0)
        watched = [reference for crew in self.crews.values() for reference in crew.watched()]
        if not watched:
            time.sleep(seconds)
            return []
        ray = start(self.address)
        ready = set(ray.wait(watched, num_returns=1, timeout=seconds)[0])
        ready |= set(ray.wait(watched, num_returns=len(watched), timeout=0)[0])
        for crew in self.crews.values():
            if told := crew.told():
                self.say(crew.work, told)
        return [outcome for crew in self.crews.values() for outcome in crew.take_in(ready)]

    def stuck(self) -> list[tuple[StepSpec, str]]:
        return [(crew.work, why) for crew in self.crews.values() if (why := crew.stuck)]

    def end(self, work: StepSpec) -> None:
        if crew := self.crews.pop(work.out, None):
            crew.close()
        self.here.end(work)

    def close(self) -> None:
        for crew in self.crews.values():
            crew.close()
        self.crews.clear()
        self.here.close()


def _spreads_itself(work: StepSpec) -> bool:
    """It goes to Ray by itself (pipeline/execution/distributed.py), and an actor would hold what its ranks need."""
    return bool(work.options.get("world_size", 1) > 1)


Nodes = list[dict[str, float]]


def _nodes(ray: Any) -> Nodes:
    """What each living node has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def shares(resources: Resources, nodes: Nodes, workers: int, network: bool) -> tuple[dict[str, Any], int]:
    """Ray's options for an actor, and how many there may be: as said, or a share of all that there is.

    Without a network to run, a worker has no use for a GPU.
    """
    cpus = int(sum(node.get("CPU", 0) for node in nodes))
    gpus = int(sum(node.get("GPU", 0) for node in nodes)) if network else 0
    most = resources.max_workers or max(1, resources.min_workers, min(workers, gpus or cpus))
    share = {kind: min(max(total // most, min(total, 1)), int(max(node.get(kind, 0) for node in nodes)))
              for kind, total in (("CPU", cpus), ("GPU", gpus))}  # fmt: skip
    given = {
        "num_cpus": max(1, share["CPU"]) if resources.cpus is None else resources.cpus,
        "num_gpus": share["GPU"] if resources.gpus is None else resources.gpus,
        "memory": None if resources.memory is None else int(resources.memory * 2**30),
        "accelerator_type": resources.accelerator_type,
        "scheduling_strategy": "SPREAD",
    }
    return {name: value for name, value in given.items() if value is not None}, most


def check_fits(profile: Profile, steps: list[Step], nodes: Nodes) -> None:
    """Raises WinnowError for every stage that needs more than these nodes have, unless there may be more of them."""
    least: dict[str, int] = {}
    for step in steps:
        name, ranks = step.entry.name, step.options.get("world_size", 1)
        least[name] = max(least.get(name, 1), ranks, profile.of(name).min_workers)
    problems = [problem for name, count in least.items() for problem in _too_much(name, profile.of(name), count, nodes)]
    if problems and not profile.autoscaling:
        raise WinnowError(*problems)


def _too_much(stage: str, resources: Resources, least: int, nodes: Nodes) -> list[str]:
    """What no node has, or not all together for as many workers as there must be at least."""
    wanted = {"CPU": resources.cpus or 0, "GPU": resources.gpus or 0, "memory": (resources.memory or 0) * 2**30}
    if resources.accelerator_type:
        wanted[f"accelerator_type:{resources.accelerator_type}"] = 0.001
    wanted = {kind: amount for kind, amount in wanted.items() if amount}
    fits = [
        min((int(node.get(kind, 0) / amount) for kind, amount in wanted.items()), default=1_000_000) for node in nodes
    ]
    if sum(fits) >= least:
        return []
    asked = ", ".join(f"{_amount(kind, amount)}" for kind, amount in wanted.items())
    has = "; ".join(", ".join(_amount(kind, node.get(kind, 0)) for kind in wanted) for node in nodes)
    return [
        f"profile, {stage}: {least} worker{'s' * (least > 1)} with {asked} each, and the cluster has room for "
        f"{sum(fits)} (its nodes: {has}); ask for less, add nodes, or set `autoscaling: true` if it grows by itself"
    ]


def _amount(kind: str, amount: float) -> str:
    if kind == "memory":
        return f"{amount / 2**30:,.1f} GiB"
    if kind.startswith("accelerator_type:"):
        return f"{kind.partition(':')[2]}: {'yes' if amount else 'no'}"
    return f"{amount:g} {kind}"


def start(address: str | None = None) -> Any:
    """Ray, joined once a process: the cluster at `address`, or a local one, which ends with the process."""
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # a local Ray stays on the loopback address
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        os.environ.setdefault("RAY_enable_metrics_collection", "0")  # nobody asks for them, and each process pays
    ray: Any = import_module("ray")  # untyped, and not needed to run in process; reads its settings as it is imported
    if not ray.is_initialized():
        own = dict(include_dashboard=False) if address is None else {}
        if address not in (None, "auto"):
            _reach(str(address))
        try:
            ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **own)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            lines = str(error).strip().splitlines()
            raise WinnowError(
                f"--address {address}: {' '.join(lines[:3])} (is it a cluster of this Ray and Python, "
                "and up? one with a token wants RAY_AUTH_MODE=token in the environment)"
            ) from None
    return ray


def _reach(address: str) -> None:
    """Raises WinnowError where nothing answers: Ray itself goes on asking for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise WinnowError(
            f"--address {address}: does not answer ({error}); give what `ray start` printed on the head, like "
            "head:6379, or auto on a machine of the cluster; `winnow submit` is what takes the dashboard's URL"
        ) from None


def teller(folder: Path) -> ProgressCallback:
    """Progress from another process: a small file, at most two a second."""
    last = 0.0

    def tell(done: float, total: float, unit: str) -> None:
        nonlocal last
        if time.monotonic() - last > POLL_SECONDS:
            last = time.monotonic()
            write_json(folder / "progress.json", {"done": done, "total": total, "unit": unit})

    return tell


def relay(folder: Path, tell: ProgressCallback) -> None:
    if told := read_json(folder / "progress.json"):
        tell(told["done"], told["total"], told["unit"])
