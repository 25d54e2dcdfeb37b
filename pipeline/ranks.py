"""One function in several processes that train one network together, under Ray Train.

A death ends all of them, and all start again: what they had done is in the checkpoints that they read.
"""

import shutil
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline.attempts import ATTEMPTS
from pipeline.executors import POLL_SECONDS, relay, start, teller
from pipeline.store import read_json, write_json
from pipeline.workspace import Tell
from schemas import WinnowError

Job = Callable[[Tell], dict[str, Any]]
OUTCOME = "outcome.json"


def on_ranks(job: Job, ranks: int, folder: Path, tell: Tell) -> dict[str, Any]:
    """What the first rank's `job` returns, plain enough for JSON. `folder` must be one that all ranks see.

    Each rank has one GPU if the cluster has any, and torch.distributed is joined before `job` begins. Raises
    WinnowError where a rank does, or where ranks died as often as a part may.
    """
    ray = start()
    torch: Any = import_module("ray.train.torch")
    train: Any = import_module("ray.train")
    has = ray.cluster_resources()
    cpus, gpus = int(has.get("CPU", 1)), int(has.get("GPU", 0))
    if ranks > (most := min(cpus, gpus or cpus)):
        kind = "GPUs" if gpus else "CPUs"
        raise WinnowError(f"ranks: {ranks}, and the cluster has {most} {kind}; set `ranks` to {most} or fewer")
    (folder / OUTCOME).unlink(missing_ok=True)
    trainer = torch.TorchTrainer(
        _rank(job, folder),
        torch_config=torch.TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=ranks,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus // ranks, "GPU": min(1, gpus)},
        ),
        run_config=train.RunConfig(
            storage_path=str((folder / "ranks").resolve()),
            failure_config=train.FailureConfig(max_failures=ATTEMPTS - 1),
        ),
    )
    with _Relayed(folder, tell):
        try:
            trainer.fit()
        except train.v2.api.exceptions.TrainingFailedError as error:
            _raise_if_refused(folder)
            lines = str(error).strip().splitlines()
            raise WinnowError(
                f"training on {ranks} ranks failed {ATTEMPTS} times; the last time: {lines[-1]}"
            ) from error
    _raise_if_refused(folder)
    shutil.rmtree(folder / "ranks", ignore_errors=True)  # Ray Train's own records
    outcome: dict[str, Any] = read_json(folder / OUTCOME) or {}
    return outcome


def _raise_if_refused(folder: Path) -> None:
    if refused := (read_json(folder / OUTCOME) or {}).get("refused"):
        raise WinnowError(refused)


def _rank(job: Job, folder: Path) -> Callable[[], None]:
    def run() -> None:
        if "refused" in (read_json(folder / OUTCOME) or {}):
            return  # one of us did, before all were started again
        train: Any = import_module("ray.train")
        first = train.get_context().get_world_rank() == 0
        try:
            outcome = job(teller(folder) if first else lambda *_: None)
        except WinnowError as error:
            write_json(folder / OUTCOME, {"refused": str(error)})
            raise  # the others may be waiting for this one
        if first:
            write_json(folder / OUTCOME, outcome)

    return run


class _Relayed:
    """Passes on what the first rank tells, from another thread: Ray Train's own call does not return until the end."""

    def __init__(self, folder: Path, tell: Tell) -> None:
        self.folder, self.tell, self.over = folder, tell, threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self.over.wait(POLL_SECONDS):
            relay(self.folder, self.tell)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()
