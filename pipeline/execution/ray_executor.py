"""Run tasks in Ray actors: join a cluster, check that a profile fits it, and share its resources among steps.

Besides this file, actors.py, distributed.py and jobs/ray_jobs.py, nothing knows Ray.
"""

import logging
import os
import signal
import socket
import threading
import time
from contextlib import nullcontext
from typing import Any

from pipeline.config.plan import Step
from pipeline.execution.actors import IDLE_SECONDS, ActorPool, IdleActors, PooledActor
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.health import JOINED_SECONDS, OWN_SECONDS, ClusterHealth, LostClusterError
from pipeline.execution.tasks import StepSpec, Task, TaskResult
from pipeline.processes import Guard
from pipeline.resources import CPU_WORKERS, Profile, Resources
from pipeline.store.store import StepFolder
from schemas import COMMAND, MachineError, WinnowError

ENDING_SECONDS = 0.1  # between two looks at actors that are just starting when all has ended
Nodes = list[dict[str, float]]  # what each node has: CPU, GPU, memory in bytes, accelerator_type:H100


class RayExecutor(LocalExecutor):
    """Runs each step in a pool of actors, which ends with the step, and with it the memory of its engines.

    Actors without a GPU wait for a step that needs the same, until others need their room.

    Distributed training goes to Ray by itself (distributed.py): its one task runs in this process, as those of
    LocalExecutor do, because an actor would hold what its ranks need.

    `address` is a cluster's, "auto" for the one that this process belongs to, or None for a local one that ends with
    this process. `workers` is the most workers of a step whose profile does not say; None: as many as there are GPUs
    for, and CPU_WORKERS where it has none.
    """

    overlaps = True

    def __init__(
        self,
        workers: int | None = None,
        address: str | None = None,
        profile: Profile = Profile(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(profile)
        self.workers, self.address = workers, address
        self.pools: dict[StepFolder, ActorPool] = {}
        self.ending: list[PooledActor] = []  # of steps that have ended; killed when they are settled
        self.idle = IdleActors()
        self.health: ClusterHealth | None = None  # of the cluster, once it is joined

    def check(self, steps: list[Step]) -> None:
        """Raise WinnowError if the cluster cannot be joined, and for every stage that needs more than it has."""
        if self.address or self.profile != Profile():
            check_fits(self.profile, steps, connect(self.address))

    def request_workers(self, spec: StepSpec, ready: int) -> None:
        """Start workers for the tasks that are ready; without any, free what another step waits for."""
        if self.next or spec.world_size > 1 or (not ready and spec.out not in self.pools):
            return
        resources = self.profile.of(spec.entry.name)
        if spec.out not in self.pools:
            nodes = connect(self.address)
            self.health = self.health or cluster_health()
            parts = 1 if spec.signature.unsharded else spec.shards
            resources = resources.model_copy(update={"min_workers": min(resources.min_workers, parts)})
            reads_model = any(item.schema is None and item.name in spec.sources for item in spec.signature.inputs)
            options, max_size = actor_options(resources, nodes, self.workers, parts, reads_model, self.plans)
            has = resources.model_copy(update={"cpus": options["num_cpus"], "gpus": options["num_gpus"]})
            self.pools[spec.out] = ActorPool(spec, has, options, max_size, self.idle)
        pool = self.pools[spec.out]
        others = [other for other in self.pools.values() if other is not pool]
        # An actor of another step that is not up yet may be waiting for room: it comes before a second one of this
        others_wait = any(actor.starting for other in others for actor in other.actors)
        if not (others_wait and pool.actors):
            pool.grow(ready)
        if not ready and others_wait:
            busy = any(other.running for other in self.pools.values())
            self.ending += pool.shrink(resources.min_workers if busy else 0, others)

    def submit(self, spec: StepSpec, task: Task, exclusive: bool) -> bool:
        """Give a task to an actor; nothing is started while distributed training waits for the cluster to empty."""
        if self.next:
            return False
        if spec.world_size > 1:
            return super().submit(spec, task, exclusive)
        return self.pools[spec.out].submit(task, exclusive)

    def wait(self, seconds: float) -> list[TaskResult]:
        if self.health:
            try:
                self.health.check()
            except LostClusterError:
                self.pools.clear()  # which only Ray could end
                self.ending.clear()
                self.idle = IdleActors()
                end_own_cluster()
                raise
        self._kill_settled()
        self.idle.kill(IDLE_SECONDS)
        if self.next and not any(pool.running for pool in self.pools.values()):
            for pool in self.pools.values():  # the ranks need the room of all that is idle
                pool.shrink(0)
            self.idle.kill()
            if not self.ending and not any(pool.actors for pool in self.pools.values()):
                spec, task = self.next[0]
                try:
                    return super().wait(0)
                except LostClusterError:
                    raise
                except WinnowError as error:  # perhaps of one plan of several
                    return [TaskResult(spec, task, error)]
            time.sleep(seconds)
            return []
        actors = [actor for pool in self.pools.values() for actor in pool.actors]
        # What can happen next: an actor is up, or a task ends
        references = [actor.starting for actor in actors if actor.starting]
        references += [reference for actor in actors for reference in actor.tasks]
        if not references:
            time.sleep(seconds)
            return []
        import ray

        ready = set(ray.wait(references, num_returns=1, timeout=seconds)[0])
        ready |= set(ray.wait(references, num_returns=len(references), timeout=0)[0])
        for pool in self.pools.values():
            if progress := pool.progress():
                self.on_progress(pool.spec, progress)
        results = [result for pool in self.pools.values() for result in pool.collect(ready)]
        self._report_stalls()
        return results

    def end(self, spec: StepSpec) -> None:
        if pool := self.pools.pop(spec.out, None):
            self.ending += pool.close(list(self.pools.values()))
        super().end(spec)

    def close(self) -> None:
        """Kill all actors, those that are just starting when they are up: a cluster that goes on gets all room back."""
        for pool in self.pools.values():
            self.ending += pool.close()
        self.pools.clear()
        self.idle.kill()
        while self.ending:
            time.sleep(ENDING_SECONDS)
            self._kill_settled()
        super().close()

    def _report_stalls(self) -> None:
        """Report the steps that have long waited for room; of several plans, if all do that are to have workers.

        Some always wait while others are at work, or begin with a worker of a step that has just ended.
        """
        pools = [pool for pool in self.pools.values() if pool.actors]
        reasons = [(pool.spec, pool.stall_reason()) for pool in pools]
        if self.plans == 1 or all(reason for _, reason in reasons):
            for spec, reason in reasons:
                if reason:
                    self.on_stall(spec, reason)

    def _kill_settled(self) -> None:
        if not self.ending:
            return
        import ray

        for actor in [actor for actor in self.ending if actor.is_settled]:
            ray.kill(actor.handle)
            self.ending.remove(actor)


def actor_options(
    resources: Resources, nodes: Nodes, workers: int | None, parts: int, reads_model: bool, plans: int = 1
) -> tuple[dict[str, Any], int]:
    """Return Ray's options for an actor, and how many actors there may be, at most one per part.

    Where `resources` do not say, a stage that reads a model has one worker per GPU, with that GPU (or per as many as
    one of its workers reserves); one that reads none has no use for a GPU. CPUs are divided equally among the step's
    workers; on GPUs, also among those of the same step of other `plans`, as many as there is room for. A training on
    CPUs has all of them, as in one process: with another number of threads its sums are rounded otherwise.
    """
    cpus = int(sum(node.get("CPU", 0) for node in nodes))
    gpus = int(sum(node.get("GPU", 0) for node in nodes)) if reads_model else 0
    per_worker = 1 if resources.gpus is None else resources.gpus
    slots = int(gpus / per_worker) if gpus and per_worker else cpus
    requested = workers or (slots if gpus and per_worker else CPU_WORKERS)
    max_size = resources.max_workers or max(1, resources.min_workers, min(requested, slots, parts))
    at_work = max(max_size, min(plans * max_size, requested, slots)) if gpus and per_worker else max_size
    # At least one CPU, and never more than a single node has: an actor cannot span nodes
    share = min(cpus // at_work, int(max(node.get("CPU", 0) for node in nodes)))
    options = {
        "num_cpus": max(1, share) if resources.cpus is None else resources.cpus,
        "num_gpus": min(1, gpus) if resources.gpus is None else resources.gpus,
        "memory": None if resources.memory is None else int(resources.memory * 2**30),
        "accelerator_type": resources.accelerator_type,
        "scheduling_strategy": "SPREAD",
    }
    return {name: value for name, value in options.items() if value is not None}, max_size


def check_fits(profile: Profile, steps: list[Step], nodes: Nodes) -> None:
    """Raise WinnowError for every stage whose fewest workers do not fit these nodes, unless the cluster may grow."""
    if profile.autoscaling:
        return
    workers: dict[str, int] = {}
    for step in steps:
        name, ranks = step.entry.name, step.options.get("world_size", 1)
        workers[name] = max(workers.get(name, 1), ranks, profile.of(name).min_workers)
    problems = []
    for name, count in workers.items():
        resources = profile.of(name)
        needs = {"CPU": resources.cpus or 0, "GPU": resources.gpus or 0, "memory": (resources.memory or 0) * 2**30}
        if resources.accelerator_type:
            needs[f"accelerator_type:{resources.accelerator_type}"] = 0.001
        needs = {kind: amount for kind, amount in needs.items() if amount}
        # A worker cannot span nodes: those that fit each node are counted
        room = sum(
            min((int(node.get(kind, 0) / amount) for kind, amount in needs.items()), default=1_000_000)
            for node in nodes
        )
        if room < count:
            has = "; ".join(", ".join(_amount(kind, node.get(kind, 0)) for kind in needs) for node in nodes)
            problems.append(
                f"profile, {name}: {count} worker{'s' * (count > 1)} with "
                f"{', '.join(_amount(kind, amount) for kind, amount in needs.items())} each, and the cluster has room "
                f"for {room} (its nodes: {has}); ask for less, add nodes, or set `autoscaling: true` if it grows by "
                "itself"
            )
    if problems:
        raise WinnowError(*problems)


def _amount(kind: str, amount: float) -> str:
    if kind == "memory":
        return f"{amount / 2**30:,.1f} GiB"
    if kind.startswith("accelerator_type:"):
        return f"{kind.partition(':')[2]}: {'yes' if amount else 'no'}"
    return f"{amount:g} {kind}"


# Kills what Ray has started with a cluster of this process, which otherwise stays for a minute or for ever: its agents
# wait for a GCS that has died, and its daemons for each other.
_own_cluster: Guard | None = None


def cluster_health() -> ClusterHealth:
    """Return the check of the cluster that `connect` has joined or started."""
    import ray

    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    node = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    raylet = node["NodeManagerAddress"], int(node["NodeManagerPort"])
    ports = {"GCS of the head": (host.strip("[]"), int(port)), "raylet of this machine": raylet}
    return ClusterHealth(ports, OWN_SECONDS if _own_cluster else JOINED_SECONDS)


def end_own_cluster() -> None:
    """Kill the processes of the cluster that ends with this process, if it has one; the next `connect` starts another.

    Ray itself would wait for those that have died.
    """
    global _own_cluster
    if _own_cluster:
        _own_cluster.end()
        _own_cluster = None


def connect(address: str | None = None) -> Nodes:
    """Join Ray, once per process, and return what each living node has.

    That is the cluster at `address`, or a local one, which ends with this process. Raise WinnowError if it cannot be
    joined. Call this before any `import ray`, which reads its settings from the environment.
    """
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # a local Ray stays on the loopback address
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a thread of Ray Train would start another for one that died
    if address is None:
        os.environ.setdefault("RAY_enable_metrics_collection", "0")  # nobody reads them, and they slow each process
        # ray.init waits for the workers that a raylet starts ahead, and for ever for one that dies meanwhile (Ray 2.60)
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        # One that dies before it has said who it is, Ray takes for one that starts, for a minute if nothing is set
        os.environ.setdefault("RAY_worker_register_timeout_seconds", "30")
    import ray

    global _own_cluster
    is_new = not ray.is_initialized()
    if is_new and address not in (None, "auto"):
        # Where nothing answers, Ray itself would try again for minutes
        host, _, port = str(address).rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, ValueError) as error:
            raise WinnowError(
                f"--address {address}: does not answer ({error}); give what `ray start` printed on the head, like "
                f"head:6379, or auto on a machine of the cluster; `{COMMAND} submit` is what takes the dashboard's URL"
            ) from None
    options: dict[str, Any] = {} if address else {"include_dashboard": False}
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        if is_new:
            end_own_cluster()  # what `ray.shutdown` of somebody else has left of an earlier one
            guard = None if address else Guard()
            with guard.marking() if guard else nullcontext():
                try:
                    ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
                except BaseException as error:
                    if guard:
                        guard.end()
                    if guard and type(error) is Exception:  # as Ray says that a daemon has died or is too slow
                        raise RuntimeError(str(error)) from error
                    raise
            if guard:
                _own_cluster = guard
                # Of what has died on this machine, errors of tasks and ClusterHealth say what matters, without a log
                ray._private.worker.print_to_stdstream = lambda *message, **options: None
            if threading.current_thread() is threading.main_thread():  # Ray's own handler would end the process at once
                signal.signal(signal.SIGTERM, on_terminate)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        option = f"--address {address}" if address else "--executor ray"
        lines = " ".join(str(error).strip().splitlines()[:3])
        if address is None:
            raise MachineError(f"{option}: Ray did not start on this machine: {lines}") from None
        raise WinnowError(
            f"{option}: {lines} (is the cluster up, and of this Ray and Python? one with a token needs "
            "RAY_AUTH_MODE=token in the environment)"
        ) from None
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
