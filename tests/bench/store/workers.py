"""`sample` on Ray: two workers on two cores against one that is pinned to a core."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Thread

import numpy as np
import psutil

from pipeline.execution.ray_executor import RayExecutor
from pipeline.execution.run import run
from pipeline.resources import Profile, Resources
from pipeline.store.storage import delete
from pipeline.store.store import Store
from tests.bench.page import spread
from tests.bench.store import Sizes
from tests.bench.store.model import SAMPLING
from tests.bench.store.parts import Results, Row, Summary, Task, Verdict, run_in_process
from tests.bench.store.sample import MIN_SHARE, plan_to, prepare, sampling_seconds
from tests.runs import Silent

PARTS = 32  # enough for a slope, and two workers always have two each to do
RUNS = 2  # of each setup per repeat: a machine's speed varies by more than the difference looked for
FULL_SIZE = 192  # prompts from which on two engines have as many draws as they run at once, and as many again
WORKERS = {"one worker, pinned to one core": 1, "two workers on all cores": 2}  # by setup


def tasks(sizes: Sizes, folder: Path) -> Iterator[Task]:
    yield Task(("workers", "data_dir"), 10, partial(run_in_process, prepare, folder, sizes, PARTS))
    for turn in range(RUNS * sizes.repeats):
        for setup in list(WORKERS)[:: 1 if turn % 2 == 0 else -1]:
            call = partial(run_in_process, measure_workers, folder, WORKERS[setup])
            yield Task(("workers", setup, str(turn)), 20 + 1.5 * sampling_seconds(sizes) / WORKERS[setup], call)


@dataclass(frozen=True)
class WorkersRun:
    """Run of the stage; `parts` has, for each part, the time at which it was finished and its tokens."""

    parts: list[tuple[float, int]]
    seconds: float  # from start to end, engines opened included

    @property
    def rate(self) -> float:
        """Return tokens per second between the first and the last part: the slope of the least-squares line."""
        times, tokens = np.array(sorted(self.parts)).T
        return float(np.polyfit(times - times[0], np.cumsum(tokens), 1)[0])


def measure_workers(folder: Path, workers: int, engine: str = "vllm") -> WorkersRun:
    """Run the stage on Ray with one core and one thread per worker; a single worker is pinned to its core."""
    os.environ["OMP_NUM_THREADS"] = "1"
    executor = RayExecutor(workers, profile=Profile(default=Resources(cpus=1.0, max_workers=workers)))
    plan, store = plan_to(folder, "sample", PARTS, engine), Store(folder / "store")
    start = time.perf_counter()
    with pinned(max(os.sched_getaffinity(0))) if workers == 1 else nullcontext():
        run(plan, store, executor, Silent())
    seconds = time.perf_counter() - start
    output = store.folder(plan.target)
    names = (f"part-{shard:05d}-of-{PARTS:05d}.json" for shard in range(PARTS))
    sidecars = ((output.path / name, output.sidecar(shard) or {}) for shard, name in enumerate(names))
    parts = [(file.stat().st_mtime, sidecar["counters"].get("tokens", 0)) for file, sidecar in sidecars]
    delete(output.path)
    return WorkersRun(parts, seconds)


@contextmanager
def pinned(core: int) -> Iterator[set[int]]:
    """Pin this process's Ray actors to one core as soon as they have started; everything else stays free.

    Yields their process ids, to which new ones are added. Raises AssertionError if there was no actor.
    """
    stop, pinned_ids = Event(), set[int]()

    def pin_actors() -> None:
        # Affinity belongs to a thread and is inherited: all threads are pinned again and again, for new ones may start.
        while not stop.wait(1.0):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess, ProcessLookupError):
                    if " ".join(process.cmdline()).startswith("ray::StageWorker"):
                        pinned_ids.add(process.pid)
                        for thread in process.threads():
                            os.sched_setaffinity(thread.id, {core})

    watch = Thread(target=pin_actors)
    watch.start()
    try:
        yield pinned_ids
    finally:
        stop.set()
        watch.join()
    assert pinned_ids, "no actor was found that could be pinned"


def summarize(sizes: Sizes, results: Results) -> Summary:
    """Return an empty summary if a setup was not measured, because something failed before."""
    runs: dict[str, list[WorkersRun]] = {}
    for setup in WORKERS:
        keys = [("workers", setup, str(turn)) for turn in range(RUNS * sizes.repeats)]
        runs[setup] = [results[key] for key in keys if key in results]
    if not all(runs.values()):
        return Summary()

    # Each run against what as many single workers would have reached in the same turn
    single, *_ = runs.values()
    rows: list[Row] = []
    for setup, workers in WORKERS.items():
        shares = [run.rate / (workers * one.rate) for run, one in zip(runs[setup], single, strict=False)]
        row = {
            "setup": setup,
            "tokens a second": spread([run.rate for run in runs[setup]], 0),
            "a worker, beside the one alone": spread(shares),
            "seconds, start and end included": spread([run.seconds for run in runs[setup]], 1),
        }
        rows.append(row)
    share, full_size = float(np.median(shares)), sizes.sampled >= FULL_SIZE
    draws = f"{sizes.sampled} prompts x {SAMPLING['n']} draws of {SAMPLING['max_tokens']} tokens"
    title = f"{draws} in {PARTS} parts on Ray, in steady state"
    verdict = Verdict.at_least("sample: two workers against twice one", share, MIN_SHARE, full_size)
    return Summary([verdict], {title: rows})
