"""Trainings watched while they run: by SQL, by `status`, on the console, and by trackers."""

import io
import shutil
import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest

from jobs import queries
from jobs.commands.app import with_trackers
from jobs.console import ProgressReporter, VisibleConsole, figures_line
from jobs.recipes import plans
from pipeline.context import Progress
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.sql.catalog import open_catalog, query
from pipeline.store.store import METRICS_NOW, PROGRESS, Store
from schemas import WinnowWarning
from stages.training.checks import check_optimize
from stages.training.trackers import tracker
from tests.material import bound, cache, interrupt_at, random_rows, run_optimize, train
from tests.runs import Silent, plan_of

TRAINED = ("optimize.learning_rate=2.0e-3", "optimize.batch_size=2", "optimize.epochs=1", "optimize.checkpoint_every=2",
           "target=optimize")  # fmt: skip


class Watch(Silent):
    """Reporter that asks the store at one report of a training's progress, as another process would."""

    def __init__(self, store, at, stop=False):
        super().__init__()
        self.store, self.at, self.stop, self.reports = store, at, stop, []

    def progress(self, step, done, total, unit, figures):
        if step.entry.name != "optimize":
            return
        self.reports.append(done)
        if done != self.at:
            return
        catalog = open_catalog(self.store, "run")
        rows = query(catalog, "SELECT step, metric, value FROM metrics_now ORDER BY ALL").to_pylist()
        status = query(catalog, queries.text("status")).to_pylist()
        now = query(catalog, queries.text("now")).to_pylist()
        self.seen = rows, next(row for row in status if row["step"] == "optimize"), now, figures
        if self.stop:
            raise KeyboardInterrupt


@pytest.fixture
def store(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "store")
    return Store(tmp_path / "store")


def test_a_training_is_watched_by_sql_while_it_runs(store, data_dir, monkeypatch):
    """Steps done so far have rows in `metrics_now`, `status` says that it runs; when it is finished, neither does."""
    monkeypatch.setattr("pipeline.execution.progress.WRITE_SECONDS", 0.0)
    watch = Watch(store, at=3)
    run(plan_of(data_dir, *TRAINED), store, LocalExecutor(), watch)
    rows, status, now, figures = watch.seen
    assert watch.reports == list(range(1, len(watch.reports) + 1))
    assert {row["step"] for row in rows} == {1, 2, 3}
    assert {"loss", "accuracy", "margin", "grad_norm", "tokens_per_second"} <= {row["metric"] for row in rows}
    assert (status["state"], status["done"].split()[1:]) == ("running", ["of", f"{len(watch.reports)}", "steps"])
    assert (now[0]["step"], now[0]["done_steps"], now[0]["loss"]) == ("optimize", 3, figures["loss"])
    catalog = open_catalog(store, "run")
    assert query(catalog, "SELECT count(*) AS n FROM metrics_now")["n"][0].as_py() == 0
    assert query(catalog, "SELECT count(*) AS n FROM running")["n"][0].as_py() == 0
    finished = query(catalog, "SELECT step, metric, value FROM metrics WHERE stage = 'optimize'").to_pylist()
    kept = [row for row in rows if row["metric"] in {row["metric"] for row in finished}]
    assert [row for row in kept if row not in finished] == []  # the same numbers
    assert [path for name in (METRICS_NOW, PROGRESS) for path in store.root.rglob(name)] == []


def test_a_resumed_training_shows_no_step_twice(store, data_dir):
    """Killed after step 5, with a checkpoint of step 4: step 5 is computed again, and its first row is gone."""
    plan = plan_of(data_dir, *TRAINED)
    with pytest.raises(KeyboardInterrupt):
        run(plan, store, LocalExecutor(), Watch(store, at=5, stop=True))
    left = query(open_catalog(store, "run"), "SELECT max(step) AS last FROM metrics_now")["last"][0].as_py()
    assert left == 5  # what an interrupted training has measured stays readable
    assert query(open_catalog(store, "run"), queries.text("status")).to_pylist()[-1]["state"] == "not finished"
    watch = Watch(store, at=5)
    run(plan, store, LocalExecutor(), watch)
    assert watch.reports[0] == 5
    assert sorted(row["step"] for row in watch.seen[0] if row["metric"] == "loss") == [1, 2, 3, 4, 5]


def test_a_killed_run_does_not_count_as_running(store, data_dir, monkeypatch):
    """It leaves its progress and no lock."""
    monkeypatch.setattr("pipeline.execution.progress.ProgressFile.delete", lambda self: None)
    with pytest.raises(KeyboardInterrupt):
        run(plan_of(data_dir, *TRAINED), store, LocalExecutor(), Watch(store, at=2, stop=True))
    assert list(store.root.rglob(PROGRESS))
    assert query(open_catalog(store), "FROM running").num_rows == 0


def test_the_console_shows_metrics_in_a_fixed_order():
    figures = {"margin": 1.5, "grad_norm": 0.25, "loss": 0.69314, "learning_rate": 1.0, "accuracy": 0.5, "kl": 0.125}
    assert figures_line(figures) == "loss 0.6931, accuracy 0.5, margin 1.5, gradient norm 0.25, KL 0.125"
    assert figures_line({"token_accuracy": 0.5, "loss": 2.0}) == "loss 2, token accuracy 0.5"
    assert figures_line({}) == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_has_the_metrics_with_and_without_a_terminal(store, data_dir, monkeypatch, terminal):
    """A log gets lines, a terminal 80 columns wide a line below the bar."""
    monkeypatch.setattr("jobs.console.QUIET_SECONDS", -1.0)
    out = io.StringIO()
    reporter = ProgressReporter(VisibleConsole(file=out, force_terminal=terminal, width=80, soft_wrap=True))
    show = reporter.progress

    def progress(*words):
        show(*words)
        reporter.bar.refresh()

    monkeypatch.setattr(reporter, "progress", progress)
    run(plan_of(data_dir, *TRAINED), store, LocalExecutor(), reporter)
    reporter.close()
    line = next(line for line in out.getvalue().splitlines() if "gradient norm" in line)
    assert line.index("loss") < line.index("accuracy") < line.index("margin") < line.index("gradient norm")
    assert terminal or "steps" in line


# Trackers


@pytest.fixture(scope="module")
def rows(tiny):
    return cache(tiny, random_rows())


def options(**named):
    return dict(epochs=4, checkpoint_every=2, reference="init") | named


def tracked(tiny, rows, folder, *trackers, **named):
    """Train with these trackers, in the folder of a step of a store."""
    return train(tiny, rows, folder / "store" / "optimize" / "0123456789abcdef", track=[*trackers], **options(**named))


def fake_library(monkeypatch, name, log):
    """Put a module in place of a library that is not installed: what its `init` returns records calls in `log`."""
    library = ModuleType(name)

    def init(**arguments):
        log.append(("init", arguments))
        return SimpleNamespace(
            log=lambda metrics, step: log.append((step, metrics)), finish=lambda **end: log.append(("finish", end))
        )

    setattr(library, "init", init)  # noqa: B010 - modules have no such attribute for mypy
    monkeypatch.setitem(sys.modules, name, library)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_each_step_once_and_what_is_measured_at_the_end(tiny, rows, tmp_path, monkeypatch, name):
    log: list = []
    fake_library(monkeypatch, name, log)
    _, metrics, _ = tracked(tiny, rows, tmp_path, bound(tracker, name, project="mine"))
    (_, arguments), *entries, (end, _) = log
    assert (arguments["project"], arguments["resume"], end) == ("mine", "allow", "finish")
    assert arguments["name"].endswith("01234567")
    assert arguments["config"]["learning_rate"] == 1e-3
    assert "sigmoid_norm" in arguments["config"]["objective"]
    logged = {(step, metric): value for step, values in entries for metric, value in values.items()}
    assert logged.items() >= metrics.items()
    losses = [step for step, values in entries if "loss" in values]
    assert losses == list(range(1, max(losses) + 1))


def test_tensorboard_has_each_step_once_after_a_resumed_run(tiny, rows, tmp_path):
    """Interrupted after step 5, checkpoint of step 4: what was logged of step 5 is purged, and logged again."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = bound(tracker, "tensorboard")
    with pytest.raises(KeyboardInterrupt):
        tracked(tiny, rows, tmp_path, writer, report_progress=interrupt_at(5))
    _, metrics, _ = tracked(tiny, rows, tmp_path, writer)
    (folder,) = (tmp_path / "store" / "tensorboard").iterdir()
    assert " " not in folder.name  # which shells and TensorBoard's own filters would split
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    losses = {(point.step, "loss"): point.value for point in events.Scalars("loss")}
    assert len(losses) == len(events.Scalars("loss"))
    assert losses == pytest.approx({key: value for key, value in metrics.items() if key[1] == "loss"})
    assert "tokens_per_second" in events.Tags()["scalars"]


def test_mlflow_has_one_run_with_each_step_once_after_a_resumed_run(tiny, rows, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("GIT_PYTHON_REFRESH", "quiet")
    writer = bound(tracker, "mlflow", experiment="mine")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library about itself
        warnings.simplefilter("error", WinnowWarning)
        with pytest.raises(KeyboardInterrupt):
            tracked(tiny, rows, tmp_path, writer, report_progress=interrupt_at(5))
        _, metrics, _ = tracked(tiny, rows, tmp_path, writer)
        client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/store/mlflow/mlflow.db")
        experiment = client.get_experiment_by_name("mine")
        (of_key,) = client.search_runs([experiment.experiment_id])
        losses = [(point.step, point.value) for point in client.get_metric_history(of_key.info.run_id, "loss")]
    assert of_key.info.status == "FINISHED"
    assert of_key.data.params["learning_rate"] == "0.001"
    assert len(dict(losses)) == len(losses)
    assert dict(losses) == pytest.approx({step: value for (step, name), value in metrics.items() if name == "loss"})


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_warned_of_once_and_changes_nothing(tiny, rows, tmp_path, monkeypatch, broken):
    def fail(*_, **__):
        raise ConnectionError("no route to host")

    library = ModuleType("wandb")
    calls = {name: fail if name == broken else lambda *_, **__: None for name in ("log", "finish")}
    start = fail if broken == "init" else lambda **_: SimpleNamespace(**calls)
    setattr(library, "init", start)  # noqa: B010
    monkeypatch.setitem(sys.modules, "wandb", library)
    with pytest.warns(WinnowWarning, match="wandb.*no route to host") as caught:
        _, metrics, _ = tracked(tiny, rows, tmp_path / "a", bound(tracker, "wandb"))
    assert len(caught) == 1
    assert metrics == tracked(tiny, rows, tmp_path / "b")[1]


def test_a_tracker_that_is_not_installed_is_refused_with_what_to_install(data_dir, monkeypatch):
    """When the plan is made; and it is no part of the key."""
    plan = plan_of(data_dir)
    step = plan.steps[[item.name for item in plan.steps].index("optimize")]
    monkeypatch.setattr("stages.training.trackers.find_spec", lambda name: None)
    (problem,) = check_optimize(step.options | {"track": [bound(tracker, "wandb")]}, {})
    assert " -m pip install 'wandb>=" in problem  # a name that an index has
    monkeypatch.setattr("stages.training.trackers.find_spec", lambda name: True)
    tracked_plan = plan_of(data_dir, "optimize.track=[wandb, {name: mlflow, experiment: mine}]")
    assert [item.key for item in tracked_plan.steps] == [item.key for item in plan.steps]


def test_one_line_of_config_or_of_the_command_tracks_every_training(data_dir, monkeypatch):
    """All steps whose stage trains, unless a step says otherwise; the run keeps its name."""
    monkeypatch.setattr("stages.training.trackers.find_spec", lambda name: True)
    config = data_dir / "track.yaml"
    config.write_text("track: [tensorboard]\noptimize: {with: {track: [wandb]}}\n")
    (plan,) = plans(["rso"], [data_dir / "demo.yaml", config], [])
    named = {
        step.name: [str(item.name) for item in step.options["track"]] for step in plan.steps if "track" in step.options
    }
    assert named.pop("optimize") == ["wandb"]
    assert set(map(tuple, named.values())) == {("tensorboard",)}
    sets = with_trackers(["select.rule.beta=0.1"], ["mlflow", "trackio"])
    (plan,) = plans(["rso"], [data_dir / "demo.yaml"], sets)
    step = next(step for step in plan.steps if step.name == "optimize")
    assert [item.name for item in step.options["track"]] == ["mlflow", "trackio"]
    assert plan.name == "rso[rule.beta=0.1]"


def test_progress_carries_the_metrics_of_the_step(tiny, rows, tmp_path):
    reports = []
    _, _, metrics, _ = run_optimize(
        tiny, rows, tmp_path, reference="init", report_progress=lambda *report: reports.append(Progress(*report))
    )
    first = {row["metric"]: row["value"] for row in metrics.to_pylist() if row["step"] == 1}
    assert reports[0].figures["loss"] == first["loss"]
    assert reports[0].figures["grad_norm"] == first["grad_norm"]
