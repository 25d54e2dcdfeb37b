"""Trackers: programs for looking at trainings, beside the store: TensorBoard, MLflow, Weights & Biases, Trackio.

Each is written to through its own library, which is imported when a training starts. An option of how a step runs, not
of what it computes: no key contains it.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Protocol

from pipeline import Bound, Registry
from pipeline.store.storage import Location
from schemas import WinnowError
from stages.extras import install_command
from stages.training.config import PROXY_WIN

EXTRAS = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb", "trackio": "trackio"}  # by library
PROJECT = "winnow"  # of MLflow, Weights & Biases and Trackio, unless the option or their environment names another
FLUSH_SECONDS = 10  # after which a killed training has its metrics in TensorBoard's file

Setting = str | float | int | bool | None


@dataclass(frozen=True)
class TrackedTraining:
    """Training as its trackers name it.

    `options` are those of `optimize`; metrics up to `last_step` were logged by the process that this one continues.
    """

    title: str
    key: str
    store: Location
    options: Mapping[str, Setting]
    last_step: int = 0

    @property
    def name(self) -> str:
        """Return a name that people read and that no other training of any store has: `rso optimize 1a2b3c4d`."""
        return f"{self.title} {self.key[:8]}".strip()

    def folder(self, tracker: str) -> Path:
        """Return the folder of a tracker's own files in a store on a disk; raise WinnowError for another store."""
        if not isinstance(self.store, Path):
            raise WinnowError(f"the store is no folder on this machine; say where {tracker} writes")
        return self.store / tracker


class TrackerRun(Protocol):
    """Run that is open in a tracker."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...
    def finish(self, complete: bool) -> None: ...


@dataclass
class StartedRun:
    """Run of Weights & Biases, or of a library with its calls."""

    run: Any
    has_exit_code: bool = False

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log(metrics, step=step)  # of a step that it has already, Weights & Biases keeps the first value

    def finish(self, complete: bool) -> None:
        self.run.finish(**({"exit_code": 0 if complete else 1} if self.has_exit_code else {}))


tracker = Registry("tracker", "training", library=str)
Trackers = list[Annotated[Bound, tracker]]


def tracker_problems(trackers: list[Bound]) -> list[str]:
    """Return a line for each tracker whose library is not installed here, with the command that installs it."""
    libraries = {bound.metadata["library"] for bound in trackers}
    return [
        f"track: {library} is not installed; `{install_command(EXTRAS[library], library)}` installs it"
        if library in EXTRAS
        else f"track: {library} is not installed"
        for library in sorted(libraries)
        if find_spec(library) is None
    ]


@tracker(library="tensorboard")
def tensorboard(training: TrackedTraining, *, folder: str | None = None) -> TrackerRun:
    """Write event files for `tensorboard --logdir FOLDER`: a subfolder per training.

    `folder` is an absolute path; without it, the folder `tensorboard` of the store.
    """
    from torch.utils.tensorboard import SummaryWriter

    class Run:
        def __init__(self) -> None:
            path = Path(folder or training.folder("tensorboard")) / training.name.replace("/", "_").replace(" ", "_")
            # What an earlier process logged after its last checkpoint is purged: it is computed again.
            self.writer: Any = SummaryWriter(str(path), purge_step=training.last_step + 1, flush_secs=FLUSH_SECONDS)
            if training.last_step == 0:
                rows = "\n".join(f"| {name} | {value} |" for name, value in training.options.items())
                self.writer.add_text("options", f"| option | value |\n| --- | --- |\n{rows}", 0)

        def log(self, metrics: dict[str, float], step: int) -> None:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)

        def finish(self, complete: bool) -> None:
            self.writer.close()

    return Run()


@tracker(library="mlflow")
def mlflow(training: TrackedTraining, *, uri: str | None = None, experiment: str | None = None) -> TrackerRun:
    """Write to MLflow: a run per training.

    `uri` is that of a tracking server or of a database; without it, MLFLOW_TRACKING_URI, or the file `mlflow.db` in the
    folder `mlflow` of the store. `experiment`: by default MLFLOW_EXPERIMENT_NAME, or winnow.
    """
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    class Run:
        def __init__(self) -> None:
            address = uri or os.environ.get("MLFLOW_TRACKING_URI")
            artifacts = None
            if not address:
                home = training.folder("mlflow")
                home.mkdir(parents=True, exist_ok=True)
                address, artifacts = f"sqlite:///{home}/mlflow.db", (home / "artifacts").as_uri()
            self.client = MlflowClient(tracking_uri=address)
            title = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
            existing = self.client.get_experiment_by_name(title)
            number = existing.experiment_id if existing else self.client.create_experiment(title, artifacts)
            runs = self.client.search_runs([number], f"tags.`winnow.key` = '{training.key}'", max_results=1)
            self.logged = 0
            if runs and training.last_step:
                self.run_id = runs[0].info.run_id
                self.client.update_run(self.run_id, status="RUNNING")
                history = self.client.get_metric_history(self.run_id, "grad_norm")  # a metric of every step
                self.logged = max((metric.step for metric in history), default=0)
            else:
                run = self.client.create_run(number, run_name=training.name, tags={"winnow.key": training.key})
                self.run_id = run.info.run_id
                params = [Param(name, str(value)[:6000]) for name, value in training.options.items()]
                self.client.log_batch(self.run_id, params=params)

        def log(self, metrics: dict[str, float], step: int) -> None:
            if ("grad_norm" in metrics or PROXY_WIN in metrics) and step <= self.logged:
                return  # MLflow keeps both values of a step that is logged twice
            now = int(time.time() * 1000)
            self.client.log_batch(self.run_id, [Metric(name, value, now, step) for name, value in metrics.items()])

        def finish(self, complete: bool) -> None:
            self.client.set_terminated(self.run_id, "FINISHED" if complete else "KILLED")

    return Run()


@tracker(library="wandb")
def wandb(training: TrackedTraining, *, project: str | None = None) -> TrackerRun:
    """Write to Weights & Biases: a run per training, its id the step's key. WANDB_MODE=offline writes to a folder.

    `project`: by default WANDB_PROJECT, or winnow.
    """
    import wandb

    options, name = dict(training.options), project or os.environ.get("WANDB_PROJECT") or PROJECT
    run = wandb.init(project=name, id=training.key, name=training.name, config=options, resume="allow")
    return StartedRun(run, has_exit_code=True)


@tracker(library="trackio")
def trackio(training: TrackedTraining, *, project: str | None = None) -> TrackerRun:
    """Write to Trackio: a run per training, in its folder on this machine or the Space that its environment names.

    `project`: by default TRACKIO_PROJECT, or winnow.
    """
    import trackio

    options, name = dict(training.options), project or os.environ.get("TRACKIO_PROJECT") or PROJECT
    return StartedRun(trackio.init(project=name, name=training.name, config=options, resume="allow"))
