"""Runs, kills, `gc` and SQL in a loop, for as long as is wanted: nothing grows, neither memory, files nor processes.

One process lives through all of it, as a notebook or a service would: it plans, runs, asks and collects garbage in
itself. Beside it, each cycle kills a run of its own at a random moment, and the process goes on with that run.
"""

import os
import random
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from multiprocessing.util import get_temp_dir
from pathlib import Path
from statistics import median

import psutil
import pyarrow as pa

from pipeline.config.plan import Plan
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.sql.catalog import open_catalog, query
from pipeline.store.gc import delete_garbage, garbage
from pipeline.store.store import Store
from tests.bench.page import resident
from tests.bench.store.kills import PRELOAD
from tests.bench.store.model import make_policy, pipeline_plan, write_prompts
from tests.bench.store.parts import kill_after, run_in_process
from tests.runs import Silent

PROMPTS, SHARDS, DRAWS = 100, 4, 8
SEEDS = 5  # of sampling: a cycle's run shares nothing but prompts with the one before
LONGEST = 3.0  # seconds until a run is killed
QUERIES = (
    "SELECT count(*), avg(n_tokens), max(logp) FROM candidates",
    "SELECT prompt_id, max(reward) FROM rewards JOIN candidates USING (prompt_id, candidate_id) GROUP BY 1 ORDER BY 1",
)
METHOD = f"""Each cycle kills a run of {PROMPTS} prompts with {DRAWS} draws in {SHARDS} parts (fake engine) after up to
{LONGEST:g} s, goes on with it in the process that is measured, asks {len(QUERIES)} queries, and deletes the run of the
cycle before with all that it alone had. Figures are of that process and its folders after each cycle: the median over
a third of the cycles."""
GROWTH = 0.02  # of memory, from the second third of the time to the last, that counts as none


@dataclass(frozen=True)
class Sample:
    """State after a cycle: seconds from the start, megabytes that are resident, and counts."""

    seconds: float
    megabytes: float
    open_files: int
    threads: int
    processes: int
    store_files: int
    cache_files: int
    scratch_files: int


def plan(folder: Path, cycle: int) -> Plan:
    item = pipeline_plan(folder, "examples", SHARDS, engine="fake", n=DRAWS, max_tokens=32, seed=cycle % SEEDS)
    item.name = f"cycle-{cycle % SEEDS}"
    return item


def run_cycle(folder: Path, store: Path, cycle: int) -> None:
    run(plan(folder, cycle), Store(store), LocalExecutor(), Silent())


def cycle(folder: Path, store: Path, number: int, seconds: float) -> bool:
    """Kill a run, go on with it, ask, and collect the run of the cycle before; return whether it was killed."""
    killed = kill_after(seconds, run_cycle, folder, store, number, preload=PRELOAD)
    run_cycle(folder, store, number)
    name = plan(folder, number).name
    for statement in QUERIES:
        if not query(open_catalog(Store(store), name), statement).num_rows:
            raise RuntimeError(f"cycle {number}: no rows: {statement}")
    old = tuple(run for run in Store(store).runs() if run != name)
    for _ in delete_garbage(Store(store), garbage(Store(store), old), old):
        pass
    return killed


def sample(start: float, store: Path, cache: Path, scratch: Path) -> Sample:
    def files(folder: Path) -> int:
        return sum(path.is_file() for path in folder.rglob("*"))

    process = psutil.Process()
    return Sample(
        time.monotonic() - start,
        resident("VmRSS"),
        process.num_fds(),
        threading.active_count(),
        len(process.children(recursive=True)),
        files(store),
        files(cache),
        files(scratch),
    )


def measure(folder: Path, minutes: float, report: Callable[[str], None]) -> tuple[list[Sample], int]:
    """Return a sample per cycle, and how many runs were killed at work."""
    store, cache, scratch = folder / "store", folder / "cache", folder / "scratch"
    for path in (cache, scratch):
        path.mkdir()
    get_temp_dir()  # that of multiprocessing, which is to be elsewhere
    os.environ |= {"WINNOW_CACHE": str(cache), "TMPDIR": str(scratch)}
    tempfile.tempdir = str(scratch)
    make_policy(folder, 64, 1)
    write_prompts(folder, PROMPTS)
    run_in_process(run_cycle, folder, store, 0, preload=PRELOAD)  # which compiles, and starts what forks the runs
    rng, samples, killed, start = random.Random(0), list[Sample](), 0, time.monotonic()
    while len(samples) < 3 or time.monotonic() - start < 60 * minutes:
        killed += cycle(folder, store, len(samples), rng.uniform(0.05, LONGEST))
        samples.append(sample(start, store, cache, scratch))
        if len(samples) % 20 == 1:
            report(f"{len(samples)} cycles, {killed} killed: {samples[-1]}")
    return samples, killed


def thirds(samples: list[Sample], name: str) -> list[float]:
    """Return the medians of a figure over the three thirds of the cycles."""
    values, size = [float(getattr(item, name)) for item in samples], len(samples) // 3
    return [median(part) for part in (values[:size], values[size : 2 * size], values[-size:])]


def soak_table(samples: list[Sample]) -> pa.Table:
    """Return a row per figure: its medians over the three thirds of the time, and whether it grows."""
    rows = []
    for field in fields(Sample)[1:]:
        first, second, last = thirds(samples, field.name)
        room = GROWTH * second if field.name == "megabytes" else 0.0
        rows.append(
            {
                "figure": field.name.replace("_", " "),
                "first third": f"{first:,.1f}",
                "second third": f"{second:,.1f}",
                "last third": f"{last:,.1f}",
                "most": f"{max(asdict(item)[field.name] for item in samples):,.1f}",
                "grows": "yes" if last > second + room else "no",
            }
        )
    return pa.Table.from_pylist(rows)
