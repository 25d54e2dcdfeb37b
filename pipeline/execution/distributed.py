"""One function in several processes that train one network together, under Ray Train.

A death ends all of them, and all start again: what they had done is in the checkpoints that they read.
"""

import shutil
import threading
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline.context import ProgressCallback, StageContext
from pipeline.execution.executors import POLL_SECONDS, relay, start, teller
from pipeline.execution.retries import ATTEMPTS
from pipeline.resources import Resources
from pipeline.store.store import read_json, write_json
from schemas import WinnowError, WinnowWarning

Job = Callable[[ProgressCallback], dict[str, Any]]
OUTCOME = "outcome.json"
SAID = "said.txt"  # what the first rank warns of, a line each
AGAIN = "a rank died or was out of memory; all go on from the last checkpoint"


def run_distributed(job: Job, ranks: int, ctx: StageContext) -> dict[str, Any]:
    """What the first rank's `job` returns, plain enough for JSON. All ranks must see the workspace's folder.

    Its resources are those of one rank; where they do not say, it has one GPU if the cluster has any, and its share of
    the cores. torch.distributed is joined before `job` begins. Raises WinnowError where a rank does, or where ranks
    died as often as a part may.
    """
    ray, folder, resources = start(), ctx.folder, ctx.resources
    _refuse_apart(ray, ctx)
    torch: Any = import_module("ray.train.torch")
    train: Any = import_module("ray.train")
    each = _each(resources, ranks, ray.cluster_resources())
    for name in (OUTCOME, SAID):
        (folder / name).unlink(missing_ok=True)
    trainer = torch.TorchTrainer(
        _rank(job, folder),
        torch_config=torch.TorchConfig(backend="nccl" if each["GPU"] else "gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=ranks,
            use_gpu=each["GPU"] > 0,
            resources_per_worker=each,
            accelerator_type=resources.accelerator_type,
        ),
        run_config=train.RunConfig(
            storage_path=str((folder / "world_size").resolve()),
            failure_config=train.FailureConfig(max_failures=ATTEMPTS - 1),
        ),
    )
    with _Relayed(folder, ctx.progress):
        try:
            trainer.fit()
        except train.v2.api.exceptions.TrainingFailedError as error:
            _raise_if_refused(folder)
            lines = str(error).strip().splitlines()
            raise WinnowError(
                f"training on {ranks} ranks failed {ATTEMPTS} times; the last time: {lines[-1]}"
            ) from error
    _raise_if_refused(folder)
    shutil.rmtree(folder / "world_size", ignore_errors=True)  # Ray Train's own records
    (folder / SAID).unlink(missing_ok=True)
    outcome: dict[str, Any] = read_json(folder / OUTCOME) or {}
    return outcome


def _refuse_apart(ray: Any, ctx: StageContext) -> None:
    """Raises WinnowError where ranks would not see each other's files."""
    if ctx.folder != ctx.keep.there and sum(node["Alive"] for node in ray.nodes()) > 1:
        raise WinnowError(
            f"world_size: those of several nodes write one checkpoint, and the store, {ctx.keep.there}, is no disk "
            "that all see; use a store on a shared disk, or one rank"
        )


def _each(resources: Resources, ranks: int, has: dict[str, float]) -> dict[str, float]:
    """What one rank is given; raises WinnowError where the cluster has not that for all of them."""
    given = {
        "CPU": max(1, int(has.get("CPU", 1)) // ranks) if resources.cpus is None else resources.cpus,
        "GPU": min(1, int(has.get("GPU", 0))) if resources.gpus is None else resources.gpus,
    }
    if resources.memory:
        given["memory"] = resources.memory * 2**30
    for kind, amount in given.items():
        if amount and ranks > (most := int(has.get(kind, 0) / amount)):
            raise WinnowError(
                f"optimize.world_size: {ranks} of {amount:g} {kind} each, and the cluster has {has.get(kind, 0):g}; "
                f"set ranks to {most} or fewer, or ask for less a rank in the profile"
            )
    return given


def _raise_if_refused(folder: Path) -> None:
    if refused := (read_json(folder / OUTCOME) or {}).get("refused"):
        raise WinnowError(refused)


def _rank(job: Job, folder: Path) -> Callable[[], None]:
    def run() -> None:
        if "refused" in (read_json(folder / OUTCOME) or {}):
            return  # one of us did, before all were started again
        train: Any = import_module("ray.train")
        first = train.get_context().get_world_rank() == 0
        if first:
            _write_warnings(folder / SAID)
        try:
            outcome = job(teller(folder) if first else lambda *_: None)
        except WinnowError as error:
            write_json(folder / OUTCOME, {"refused": str(error)})
            raise  # the others may be waiting for this one
        if first:
            write_json(folder / OUTCOME, outcome)

    return run


def _write_warnings(said: Path) -> None:
    """From now on, what this process warns people of goes to a file, as does that it is not the first to write it."""
    attempt = said.read_text().count(AGAIN) + 2 if said.exists() else 1
    said.touch()
    show = warnings.showwarning

    def write(text: str) -> None:
        with said.open("a") as file:
            file.write(f"{text}\n")

    def relayed(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, WinnowWarning):
            write(str(message))
        else:
            show(message, category, *where, **more)

    warnings.showwarning = relayed
    if attempt > 1:
        write(f"{AGAIN}, for attempt {attempt} of {ATTEMPTS}")


class _Relayed:
    """Passes on what the first rank says, from another thread: Ray Train's own call does not return until the end."""

    def __init__(self, folder: Path, tell: ProgressCallback) -> None:
        self.folder, self.tell, self.over, self.heard = folder, tell, threading.Event(), 0
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self.over.wait(POLL_SECONDS):
            relay(self.folder, self.tell)
            self._hear()

    def _hear(self) -> None:
        said = self.folder / SAID
        lines = said.read_text().splitlines() if said.exists() else []
        for line in lines[self.heard :]:
            warnings.warn(line, WinnowWarning, stacklevel=2)
        self.heard = len(lines)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()
        self._hear()
