"""Run one function in several processes that train one network together, under Ray Train.

If a process dies, all end and all start again: what they had done is in the checkpoints that they read.
"""

import os
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.context import Progress, ProgressCallback, StageContext
from pipeline.execution.health import CHECK_SECONDS, ClusterHealth, LostClusterError
from pipeline.execution.ray_executor import cluster_health, connect, end_own_cluster
from pipeline.execution.retries import MAX_ATTEMPTS, failure, may_pass
from pipeline.processes import end_with
from pipeline.resources import Resources, hide_gpus, working_with
from pipeline.store.storage import replace
from schemas import MachineError, WinnowError, WinnowWarning

if TYPE_CHECKING:
    from ray.util.queue import Queue

Job = Callable[[ProgressCallback], dict[str, Any]]
REPORT_SECONDS = 0.5  # between two reports of progress
# In the step's folder; scratch files of pipeline.store.store
REFUSAL = "refusal.txt"  # message of the WinnowError that a rank raised
RAY_TRAIN = "ray_train"  # folder of Ray Train's own records
STARTED = "started"  # report of the first rank at the beginning of each attempt
RESTARTED = "a rank died or was out of memory; all go on from the last checkpoint"


def run_distributed(job: Job, world_size: int, ctx: StageContext) -> dict[str, Any]:
    """Run `job` on `world_size` ranks and return what that of rank 0 returns.

    All ranks must see the folder of `ctx`; its resources are those of one rank. torch.distributed is initialized
    before `job` is called. Raise WinnowError if a rank raises one, or if ranks died as often as a part may fail.
    """
    nodes = connect()
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    folder = ctx.folder
    if folder != ctx.mirror.there and len(nodes) > 1:
        raise WinnowError(
            f"world_size: ranks on several nodes write one checkpoint, and the store, {ctx.mirror.there}, is not a "
            "disk that all of them see; use a store on a shared disk, or set world_size to 1"
        )
    resources = resources_per_rank(ctx.resources, world_size, ray.cluster_resources())
    refusal = folder / REFUSAL
    refusal.unlink(missing_ok=True)
    # On this node: one that dies with a rank takes no reports with it
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    of_rank = ctx.resources.model_copy(update={"cpus": resources["CPU"], "gpus": resources["GPU"]})
    # Ray's types are those of its older API: no results
    train: Any = partial(_train_on_rank, job, refusal, queue, of_rank)
    trainer = TorchTrainer(
        train,
        torch_config=TorchConfig(backend="nccl" if resources["GPU"] else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=world_size,
            use_gpu=resources["GPU"] > 0,
            resources_per_worker=resources,
            accelerator_type=ctx.resources.accelerator_type,
        ),
        run_config=RunConfig(
            storage_path=str((folder / RAY_TRAIN).resolve()),
            failure_config=FailureConfig(max_failures=MAX_ATTEMPTS - 1),
        ),
    )
    result: Any = None
    ended: Exception | None = None

    def fit() -> None:
        nonlocal result, ended
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            ended = error
        finally:
            queue.put(None)

    # In a thread: in the main one, Ray Train would take Ctrl-C over, and end this process with exit code 0.
    threading.Thread(target=fit, daemon=True).start()
    try:
        _forward_reports(queue, ctx.progress, cluster_health())
    except LostClusterError:
        end_own_cluster()
        raise
    except BaseException:
        queue.shutdown(force=True)
        raise
    queue.shutdown(force=True)
    if refusal.exists():
        raise WinnowError(refusal.read_text())
    if ended:
        message = f"training on {world_size} ranks failed {MAX_ATTEMPTS} times; last error: "
        causes = [*getattr(ended, "worker_failures", {}).values(), MachineError()]
        cause = next((cause for cause in causes if not may_pass(cause)), causes[-1])
        raise failure(message + str(ended).strip().splitlines()[-1], cause) from ended
    return result.return_value


def resources_per_rank(resources: Resources, world_size: int, cluster: dict[str, float]) -> dict[str, float]:
    """Return Ray's resources of one rank: where not set, a GPU if the cluster has any, and its share of the cores.

    Raise WinnowError if the cluster does not have that for all ranks.
    """
    needs = {
        "CPU": max(1, int(cluster.get("CPU", 1)) // world_size) if resources.cpus is None else resources.cpus,
        "GPU": min(1, int(cluster.get("GPU", 0))) if resources.gpus is None else resources.gpus,
    }
    if resources.memory:
        needs["memory"] = resources.memory * 2**30
    for kind, amount in needs.items():
        room = int(cluster.get(kind, 0) / amount) if amount else world_size
        if world_size > room:
            raise WinnowError(
                f"optimize.world_size: {world_size} ranks need {amount:g} {kind} each, and the cluster has "
                f"{cluster.get(kind, 0):g}; set world_size to {room} or less, or give a rank less in the profile"
            )
    return needs


def _train_on_rank(job: Job, refusal: Path, queue: "Queue", resources: Resources) -> dict[str, Any] | None:
    """Run the job on this rank. The first rank puts its attempts, progress and warnings into the queue."""
    import ray.train

    end_with(os.getppid())
    if resources.gpus == 0:
        hide_gpus()
    if refusal.exists():
        return None  # a rank raised a WinnowError, and Ray Train started all again: another attempt would not help
    is_first = ray.train.get_context().get_world_rank() == 0
    reported = 0.0
    show_other = warnings.showwarning

    def report_progress(*progress: Any) -> None:
        nonlocal reported
        if is_first and time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            queue.put(Progress(*progress))

    def show_warning(message: Warning | str, category: type[Warning], *location: Any, **options: Any) -> None:
        if issubclass(category, WinnowWarning):
            queue.put(str(message))
        else:
            show_other(message, category, *location, **options)

    if is_first:
        queue.put(STARTED)
        warnings.showwarning = show_warning
    try:
        with working_with(resources):
            return job(report_progress)
    except WinnowError as error:
        replace(refusal, str(error).encode())
        raise  # so that Ray ends the other ranks, which may be waiting for this one


def _forward_reports(queue: "Queue", progress: ProgressCallback, health: ClusterHealth) -> None:
    """Forward what the first rank puts into the queue, until None; raise LostClusterError if no more can come."""
    import ray

    attempts = 0
    actor: Any = queue.actor  # its type is that of the class, whose methods have no `remote`
    while True:
        health.check()
        reference = actor.get.remote()
        while not ray.wait([reference], timeout=CHECK_SECONDS)[0]:
            health.check()
        try:
            report = ray.get(reference)
        except ray.exceptions.RayError as error:
            deadline = time.monotonic() + health.patience + 2 * CHECK_SECONDS
            while time.monotonic() < deadline:  # the queue is a process, too: it may have died with the others
                health.check()
                time.sleep(CHECK_SECONDS)
            raise MachineError(f"training: the process for reports of its ranks has ended: {error}") from error
        if report is None:
            return
        if isinstance(report, Progress):
            progress(*report)
            continue
        if report == STARTED:
            attempts += 1
            report = f"{RESTARTED}, for attempt {attempts} of {MAX_ATTEMPTS}" if attempts > 1 else None
        if report:
            warnings.warn(report, WinnowWarning, stacklevel=2)
