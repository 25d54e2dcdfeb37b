"""Run one function in several processes that train one network together, under Ray Train.

If a process dies, all end and all start again: what they had done is in the checkpoints that they read.
"""

import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.context import ProgressCallback, StageContext
from pipeline.execution.ray_executor import connect
from pipeline.execution.retries import MAX_ATTEMPTS
from pipeline.resources import Resources
from pipeline.store.store import read_json, write_json
from schemas import WinnowError, WinnowWarning

Job = Callable[[ProgressCallback], dict[str, Any]]
POLL_SECONDS = 0.5
# Files in the step's folder by which the first rank talks to this process
OUTCOME = "outcome.json"
PROGRESS = "progress.json"
WARNINGS = "warnings.txt"  # one per line
RAY_TRAIN = "ray_train"  # folder of Ray Train's own records
RESTARTED = "a rank died or was out of memory; all go on from the last checkpoint"


def run_distributed(job: Job, world_size: int, ctx: StageContext) -> dict[str, Any]:
    """Run `job` on `world_size` ranks and return what that of rank 0 returns, which must be plain enough for JSON.

    All ranks must see the folder of `ctx`; its resources are those of one rank. torch.distributed is initialized
    before `job` is called. Raise WinnowError if a rank raises one, or if ranks died as often as a part may fail.
    """
    connect()
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    folder = ctx.folder
    if folder != ctx.mirror.there and sum(node["Alive"] for node in ray.nodes()) > 1:
        raise WinnowError(
            f"world_size: ranks on several nodes write one checkpoint, and the store, {ctx.mirror.there}, is not a "
            "disk that all of them see; use a store on a shared disk, or set world_size to 1"
        )
    resources = resources_per_rank(ctx.resources, world_size, ray.cluster_resources())
    for name in (OUTCOME, WARNINGS):
        (folder / name).unlink(missing_ok=True)
    trainer = TorchTrainer(
        _train_loop(job, folder),
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
    failure: Exception | None = None
    with _forward_reports(folder, ctx.progress):
        try:
            trainer.fit()
        except TrainingFailedError as error:
            failure = error
    outcome: dict[str, Any] = read_json(folder / OUTCOME) or {}
    if refused := outcome.get("refused"):
        raise WinnowError(refused)
    if failure:
        last = str(failure).strip().splitlines()[-1]
        raise WinnowError(
            f"training on {world_size} ranks failed {MAX_ATTEMPTS} times; last error: {last}"
        ) from failure
    shutil.rmtree(folder / RAY_TRAIN, ignore_errors=True)
    (folder / WARNINGS).unlink(missing_ok=True)
    return outcome


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


def _train_loop(job: Job, folder: Path) -> Callable[[], None]:
    """Return the function that each rank runs."""

    def train() -> None:
        import ray.train

        if "refused" in (read_json(folder / OUTCOME) or {}):
            return  # a rank raised a WinnowError, and Ray Train started all again: another attempt would not help
        is_first = ray.train.get_context().get_world_rank() == 0
        written = 0.0

        def report(done: float, total: float, unit: str) -> None:
            nonlocal written
            if is_first and time.monotonic() - written > POLL_SECONDS:
                written = time.monotonic()
                write_json(folder / PROGRESS, {"done": done, "total": total, "unit": unit})

        if is_first:
            _write_warnings(folder / WARNINGS)
        try:
            outcome = job(report)
        except WinnowError as error:
            write_json(folder / OUTCOME, {"refused": str(error)})
            raise  # so that Ray ends the other ranks, which may be waiting for this one
        if is_first:
            write_json(folder / OUTCOME, outcome)

    return train


def _write_warnings(path: Path) -> None:
    """Write this process's WinnowWarnings to a file from now on, the first that this is not the first attempt."""
    attempt = path.read_text().count(RESTARTED) + 2 if path.exists() else 1
    path.touch()
    show_other = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *location: Any, **options: Any) -> None:
        if issubclass(category, WinnowWarning):
            with path.open("a") as file:
                file.write(f"{message}\n")
        else:
            show_other(message, category, *location, **options)

    warnings.showwarning = show
    if attempt > 1:
        show(f"{RESTARTED}, for attempt {attempt} of {MAX_ATTEMPTS}", WinnowWarning)


@contextmanager
def _forward_reports(folder: Path, progress: ProgressCallback) -> Iterator[None]:
    """Forward what the first rank writes, from a thread: Ray Train's own call does not return until the end."""
    over = threading.Event()
    forwarded = 0

    def forward_warnings() -> None:
        nonlocal forwarded
        lines = (folder / WARNINGS).read_text().splitlines() if (folder / WARNINGS).exists() else []
        for line in lines[forwarded:]:
            warnings.warn(line, WinnowWarning, stacklevel=2)
        forwarded = len(lines)

    def forward() -> None:
        while not over.wait(POLL_SECONDS):
            if report := read_json(folder / PROGRESS):
                progress(report["done"], report["total"], report["unit"])
            forward_warnings()

    thread = threading.Thread(target=forward, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        forward_warnings()  # those that came after the thread's last look
