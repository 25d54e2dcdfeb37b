"""The same bytes whatever happens: any executor, any number of workers, a kill in the middle."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config.plan import Plan
from pipeline.execution.executors import LocalExecutor, RayExecutor
from pipeline.execution.run import run
from pipeline.resources import Profile, Resources
from pipeline.store.store import Store
from schemas.tables import CANDIDATES, SELECTIONS
from tests.runs import RECIPES, Silent, local, plan_of


def digests(plan: Plan, store: Store, steps=None) -> dict[str, list[tuple[str, str]]]:
    """Content of every row table of the steps, by its manifest."""
    return {
        step.name: [
            (file["file"], file["sha256"])
            for file in store.folder(step).manifest["files"]
            if not file["file"].startswith("speeds-")  # the one table that is not the same twice
        ]
        for step in plan.steps
        if steps is None or step.name in steps
    }


def without(finished: Path, plan: Plan, first: str, root: Path) -> Store:
    """A copy of the finished store that lacks step `first` and all that follows from it."""
    shutil.copytree(finished, root, symlinks=True)
    store, gone = Store(root), {first}
    for step in plan.steps:
        if step.name in gone or gone & {source.name for source in step.inputs.values()}:
            gone.add(step.name)
            shutil.rmtree(local(store.folder(step).path))
    return store


def test_a_second_run_makes_nothing(world, finished):
    watcher = Silent()
    run(plan_of(world), Store(finished), LocalExecutor(), watcher)
    assert watcher.ran == []


def test_another_beta_runs_select_and_what_follows_but_neither_sample_nor_reward(world, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "store")
    watcher = Silent()
    run(plan_of(world, "select.rule.beta=0.05"), Store(tmp_path / "store"), LocalExecutor(), watcher)
    assert watcher.ran[0] == "select"
    assert {"compare", "pair", "reference", "examples", "optimize", "evaluate"} <= set(watcher.ran)
    assert not {"sample", "reward", "sft", "ranker", "eval_baseline"} & set(watcher.ran)


def test_ranker_calls_are_those_of_table_7(world, finished):
    """n - 1 for the reward of n candidates, k / 2 for first-round ranking of k (Table 7 of arXiv:2309.06657)."""
    steps = {step.name: Store(finished).folder(step) for step in plan_of(world).steps}
    sampled = steps["sample"].read(CANDIDATES).column("prompt_id").value_counts().to_pylist()
    kept = steps["select"].read(SELECTIONS).column("prompt_id").value_counts().to_pylist()
    calls = {name: steps[name].manifest["counters"]["ranker_calls"] for name in ("reward", "compare")}
    assert calls["reward"] == sum(group["counts"] - 1 for group in sampled)
    assert calls["compare"] == sum(group["counts"] // 2 for group in kept)


@pytest.mark.parametrize("workers", [1, 3])
def test_ray_writes_the_bytes_of_the_run_in_process(world, finished, tmp_path, workers):
    """Given the same candidates, under any number of workers."""
    plan = plan_of(world, "target=examples")
    store = without(finished, plan, "reward", tmp_path / "store")
    watcher = Silent()
    run(plan, store, RayExecutor(workers), watcher)
    assert watcher.ran[0] == "reward"
    assert digests(plan, store) == digests(plan, Store(finished))


def test_two_parts_in_one_vllm_at_once_draw_what_each_would_alone(world, finished, tmp_path):
    """Real vLLM in a Ray actor with two parts in flight: their requests share batches, and on one machine every draw
    is that of the run in process, part after part."""
    plan = plan_of(world, "target=sample")
    store = without(finished, plan, "sample", tmp_path / "store")
    together = Profile(stages={"sample": Resources(cpus=1, max_workers=1, in_flight=2)})
    run(plan, store, RayExecutor(1, profile=together), Silent())
    assert digests(plan, store) == digests(plan, Store(finished))


@pytest.mark.parametrize("victim", ["sample", "reward", "optimize"])
def test_kill_9_loses_only_parts_in_flight(world, finished, tmp_path, victim):
    """Killed after its first part (or checkpoint), run again: finished parts untouched, the same bytes."""
    plan = plan_of(world)
    store = without(finished, plan, victim, tmp_path / "store")
    folder = local(store.folder(next(step for step in plan.steps if step.name == victim)).path)
    kill_when_begun(folder, world, store)
    assert not (folder / "manifest.json").exists()
    done = [json.loads(part.read_text())["files"] for part in folder.glob("part-*.json")]
    before = {path: path.stat().st_mtime_ns for files in done for path in (folder / file["file"] for file in files)}
    run(plan, store, LocalExecutor(), Silent())
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert digests(plan, store) == digests(plan, Store(finished))


def kill_when_begun(folder: Path, world: Path, store: Store) -> None:
    """Start the command in a process of its own and kill it as soon as the step has something to lose."""
    command = [sys.executable, "-m", "jobs", "run", str(RECIPES / "rso.yaml"), "--config", str(world / "demo.yaml")]
    command += ["--store", str(store.root)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        deadline = time.monotonic() + 120
        while not any(folder.glob("part-*.json")) and not any(folder.glob("checkpoint/step-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)


def test_the_manifest_says_how_the_step_was_made(world, finished):
    plan = plan_of(world)
    manifest = Store(finished).folder(plan.target).manifest
    assert manifest["identity"]["stage"] == "evaluate"
    assert manifest["libraries"]["torch"]
    assert manifest["rows"]["evaluations"] >= 5
    assert str(finished) not in json.dumps(manifest)
