"""What a step cost: the time of its workers, dealt among the parts that shared them, times what a worker holds."""

import time
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Thread

import pytest

from pipeline.context import Clock
from pipeline.execution.executors import LocalExecutor, shares
from pipeline.execution.run import run
from pipeline.execution.tasks import ResourceTime, step_spec
from pipeline.resources import Profile, Resources
from pipeline.store.store import Store
from tests.chain import SHARDS, planned, recipe, step, toys
from tests.runs import Silent

SERVER = {"CPU": 64.0, "GPU": 8.0}


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_at_work_at_once_share_their_worker(parts: int):
    """Law: the shares of all parts add up to the time in which any was at work, however they overlap."""
    clock, together, had = Clock(), Barrier(parts), []

    def work(number: int) -> None:
        with clock.share() as seconds:
            together.wait()
            time.sleep(0.01 * (number + 1))
            had.append(seconds())

    began = time.perf_counter()
    threads = [Thread(target=work, args=(number,)) for number in range(parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.01 * parts <= sum(had) <= time.perf_counter() - began


def test_time_without_a_part_is_nobodys():
    clock = Clock()
    time.sleep(0.02)
    began = time.perf_counter()
    with clock.share() as seconds:
        assert seconds() <= time.perf_counter() - began


@pytest.mark.parametrize(
    ("resources", "gpus", "cpus"),
    [
        (Resources(), 0, 1),
        (Resources(cpus=3), 0, 3),
        (Resources(cpus=8, gpus=2), 2, 8),
        (Resources(cpus=0, gpus=0.5), 0.5, 0),
    ],
)
def test_cost_is_seconds_times_what_a_worker_has(tmp_path: Path, resources: Resources, gpus: float, cpus: float):
    with toys():
        work = step_spec(step(planned(recipe(tmp_path)), "rate"), Store(tmp_path / "store"))
    assert ResourceTime.of(work, resources, 10.0) == ResourceTime(10.0, 10.0 * gpus, 10.0 * cpus)
    ranked = replace(work, options=work.options | {"world_size": 4})
    assert ResourceTime.of(ranked, resources, 10.0) == ResourceTime(10.0, 40.0 * gpus, 40.0 * cpus)


def test_a_manifest_has_what_its_parts_cost(tmp_path: Path):
    with toys():
        plan, store = planned(recipe(tmp_path)), Store(tmp_path / "store")
        run(plan, store, LocalExecutor(Profile(Resources(cpus=3))), Silent())
    folder = store.folder(step(plan, "rate"))
    manifest, parts = folder.manifest or {}, [folder.sidecar(shard) or {} for shard in range(SHARDS)]
    assert manifest["cpu_seconds"] == pytest.approx(sum(part["cpu_seconds"] for part in parts))
    assert all(part["cpu_seconds"] == pytest.approx(3 * part["seconds"], abs=0.002) for part in parts)


def test_a_worker_that_reads_no_model_is_given_no_gpu():
    """Else a selection would keep eight GPUs from the sampler beside it; a profile may say otherwise."""
    given = {reads: shares(Resources(), [SERVER], 4, reads)[0] for reads in (True, False)}
    assert (given[True]["num_gpus"], given[False]["num_gpus"]) == (2, 0)
    assert shares(Resources(gpus=1), [SERVER], 4, False)[0]["num_gpus"] == 1


def test_the_workers_that_a_profile_wants_at_least_are_not_capped_by_the_command():
    assert shares(Resources(cpus=1, min_workers=4), [SERVER], 2, True)[1] == 4
    assert shares(Resources(cpus=1, min_workers=4, max_workers=6), [SERVER], 2, True)[1] == 6
