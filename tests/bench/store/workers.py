"""`sample` on Ray: two workers on two cores beside one that is pinned to a core."""

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
from tests.bench.store.model import DRAWN, Quiet
from tests.bench.store.parts import Found, Row, Task, Told, Verdict, apart
from tests.bench.store.sample import SHARE, cost, planned, prepare

PARTS = 32  # enough for a slope, and each of two workers has always two at hand
RUNS = 2  # of each crew a repeat: a machine's pace moves by more than what is looked for
ASKED = 192  # prompts from which on two engines have as many draws as they run at once, and as many again
CREWS = {"one worker, pinned to one core": 1, "two workers on all cores": 2}


def tasks(sizes: Sizes, folder: Path) -> Iterator[Task]:
    yield Task(("workers", "data_dir"), 10, partial(apart, prepare, folder, sizes, PARTS))
    for turn in range(RUNS * sizes.repeats):
        for name in list(CREWS)[:: 1 if turn % 2 == 0 else -1]:
            call = partial(apart, _crew, folder, CREWS[name])
            yield Task(("workers", name, str(turn)), 20 + 1.5 * cost(sizes) / CREWS[name], call)


@dataclass(frozen=True)
class ActorPool:
    """parts: when each was finished, and the tokens that it has."""

    parts: list[tuple[float, int]]
    seconds: float  # from start to end, engines opened and all

    @property
    def rate(self) -> float:
        """Tokens a second between the first and the last part finished: the slope of the line by least squares."""
        moments, tokens = np.array(sorted(self.parts)).T
        return float(np.polyfit(moments - moments[0], np.cumsum(tokens), 1)[0])


def _crew(folder: Path, workers: int, engine: str = "vllm") -> ActorPool:
    """On Ray, of which a worker has one core and one thread; one that is alone is pinned to its core."""
    os.environ["OMP_NUM_THREADS"] = "1"
    executor = RayExecutor(workers, profile=Profile(default=Resources(cpus=1.0, max_workers=workers)))
    plan, store = planned(folder, "sample", PARTS, engine), Store(folder / "store")
    start = time.perf_counter()
    with pinned(max(os.sched_getaffinity(0))) if workers == 1 else nullcontext():
        run(plan, store, executor, Quiet())
    seconds = time.perf_counter() - start
    out = store.folder(plan.target)
    sidecars = ((out.path / f"part-{shard:05d}.json", out.sidecar(shard) or {}) for shard in range(PARTS))
    made = ActorPool([(file.stat().st_mtime, part["counters"].get("tokens", 0)) for file, part in sidecars], seconds)
    delete(out.path)
    return made


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Keeps the actors that this process has on Ray to one core, as soon as they are up; all else stays free.

    Raises AssertionError where there was none.
    """
    over, seen = Event(), set[int]()
    watch = Thread(target=_pin, args=(core, over, seen))
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join()
    assert seen, "no actor was found that could be pinned"


def _pin(core: int, over: Event, seen: set[int]) -> None:
    """Each thread has an affinity of its own: those there are, again and again, and with them those that they start."""
    while not over.wait(1.0):
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                if " ".join(process.cmdline()).startswith("ray::StageWorker"):
                    seen.add(process.pid)
                    for thread in process.threads():
                        os.sched_setaffinity(thread.id, {core})


def told(sizes: Sizes, found: Found) -> Told:
    """Nothing if it was not measured, because something failed before."""
    crews = [_turns(sizes, found, name) for name in CREWS]
    if not all(crews):
        return Told()
    shares = [_shares(each, crews[0], workers) for each, workers in zip(crews, CREWS.values(), strict=True)]
    drawn = f"{sizes.sampled} prompts x {DRAWN['n']} draws of {DRAWN['max_tokens']} tokens"
    title = f"{drawn} in {PARTS} parts on Ray, in steady state"
    rows = [_row(*each) for each in zip(CREWS, crews, shares, strict=True)]
    share, asked = float(np.median(shares[-1])), sizes.sampled >= ASKED
    return Told([Verdict.least("sample: two workers against twice one", share, SHARE, asked)], {title: rows})


def _turns(sizes: Sizes, found: Found, name: str) -> list[ActorPool]:
    keys = (("workers", name, str(turn)) for turn in range(RUNS * sizes.repeats))
    return [found[key] for key in keys if key in found]


def _shares(crews: list[ActorPool], alone: list[ActorPool], workers: int) -> list[float]:
    """Of what so many that were alone would have made in the same turn."""
    return [crew.rate / (workers * one.rate) for crew, one in zip(crews, alone, strict=False)]


def _row(name: str, crews: list[ActorPool], shares: list[float]) -> Row:
    return {
        "crew": name,
        "tokens a second": spread([crew.rate for crew in crews], 0),
        "a worker, beside the one alone": spread(shares),
        "seconds, start and end included": spread([crew.seconds for crew in crews], 1),
    }
