"""What a step costs: the time of its workers, shared by the parts that run on them, times what a worker holds."""

import time
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Thread

import pytest

from pipeline.context import WorkerClock
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.ray_executor import actor_options
from pipeline.execution.run import run
from pipeline.execution.tasks import step_spec
from pipeline.resources import CPU_WORKERS, Profile, Resources
from pipeline.store.store import Store
from tests.chain import SHARDS, planned, recipe, step, toys
from tests.runs import Silent

SERVER = {"CPU": 64.0, "GPU": 8.0}


@pytest.mark.parametrize("parts", [1, 5])
def test_parts_that_run_at_once_share_the_time_of_their_worker(parts: int):
    """The shares of all parts add up to the time in which any ran, however they overlap; idle time is nobody's."""
    clock, barrier, shares = WorkerClock(), Barrier(parts), []
    time.sleep(0.02)

    def run_part(number: int) -> None:
        with clock.share() as seconds:
            barrier.wait()
            time.sleep(0.01 * (number + 1))
            shares.append(seconds())

    start = time.perf_counter()
    threads = [Thread(target=run_part, args=(number,)) for number in range(parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.01 * parts <= sum(shares) <= time.perf_counter() - start


def test_cost_is_seconds_times_what_a_worker_has(tmp_path: Path):
    """Of distributed training, times the number of ranks; a worker of unknown size counts as one CPU."""
    with toys():
        spec = step_spec(step(planned(recipe(tmp_path)), "rate"), Store(tmp_path / "store"))
    distributed = replace(spec, options=spec.options | {"world_size": 4})
    for resources, gpus, cpus in [
        (Resources(), 0, 1),
        (Resources(cpus=8, gpus=2), 2, 8),
        (Resources(cpus=0, gpus=0.5), 0.5, 0),
    ]:
        assert list(spec.cost(resources, 10.0).values()) == [10.0, 10.0 * gpus, 10.0 * cpus]
        assert list(distributed.cost(resources, 10.0).values()) == [10.0, 40.0 * gpus, 40.0 * cpus]


def test_a_manifest_has_the_cost_of_all_its_parts(tmp_path: Path):
    with toys():
        plan, store = planned(recipe(tmp_path)), Store(tmp_path / "store")
        run(plan, store, LocalExecutor(Profile(default=Resources(cpus=3))), Silent())
    folder = store.folder(step(plan, "rate"))
    manifest, parts = folder.manifest or {}, [folder.sidecar(shard) or {} for shard in range(SHARDS)]
    assert manifest["cpu_seconds"] == pytest.approx(sum(part["cpu_seconds"] for part in parts))
    assert all(part["cpu_seconds"] == pytest.approx(3 * part["seconds"], abs=0.002) for part in parts)


def test_what_a_profile_does_not_set_is_a_share_of_the_cluster():
    """No GPU for a stage without a model, which would hold GPUs that another step needs, unless the profile sets one.
    As many workers as the profile's minimum, whatever the command's number, and never more than its maximum."""
    options = {reads: actor_options(Resources(), [SERVER], 4, 64, reads)[0] for reads in (True, False)}
    assert (options[True]["num_gpus"], options[False]["num_gpus"]) == (1, 0)
    assert actor_options(Resources(gpus=1), [SERVER], 4, 64, False)[0]["num_gpus"] == 1
    assert actor_options(Resources(cpus=1, min_workers=4), [SERVER], 2, 64, True)[1] == 4
    assert actor_options(Resources(cpus=1, min_workers=4, max_workers=6), [SERVER], 2, 64, True)[1] == 6


@pytest.mark.parametrize(
    ("resources", "workers", "parts", "expected"),
    [
        (Resources(), None, 64, 8),
        (Resources(), None, 3, 3),
        (Resources(), 4, 64, 4),
        (Resources(gpus=4, tensor_parallel=4), None, 64, 2),
        (Resources(gpus=0.5), None, 64, 16),
        (Resources(gpus=0), None, 64, CPU_WORKERS),
    ],
)
def test_there_are_as_many_workers_as_gpus_for_them(resources: Resources, workers: int, parts: int, expected: int):
    """8 GPUs were 2 workers with 4 each, of which an engine without tensor_parallel used one."""
    options, size = actor_options(resources, [SERVER], workers, parts, True)
    assert size == expected
    assert options["num_gpus"] == (1 if resources.gpus is None else resources.gpus)
