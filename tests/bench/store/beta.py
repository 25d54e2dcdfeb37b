"""A changed beta at the size of a large run: its steps without a model, each beside bare DuckDB on the same files.

Bare DuckDB reads the columns that the step reads, of the same files, and writes the step's own result as Parquet. What
the step takes above that is its join, its rule and its checks.
"""

import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from pipeline.config.plan import Plan, Step
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.stage import signature_of
from pipeline.store.storage import delete
from pipeline.store.store import Store, table_of
from schemas import table_name
from tests.bench.page import resident, spread
from tests.bench.store import Sizes
from tests.bench.store.model import SAMPLING, Part, make_step, seal_step, split_evenly
from tests.bench.store.parts import Results, Row, Summary, Task, Verdict, run_in_process
from tests.bench.store.sample import stage_rate
from tests.bench.store.select import compile_rule
from tests.runs import Silent

DRAWS, TOKENS = SAMPLING["n"], SAMPLING["max_tokens"]
STEPS = ("select", "pair", "examples")
MAX_SHARE, MAX_SECONDS, MAX_TIMES_BARE, MAX_SELECT_SECONDS, MAX_GIBIBYTES = 0.02, 60.0, 3.0, 8.0, 1.0
FULL_SIZE = 1_000_000
TITLE = "another beta: what of it needs no model, from sealed Parquet to sealed Parquet"


@dataclass(frozen=True)
class StepRun:
    """Seconds of a step or of bare DuckDB, of the clock and of all cores; highest memory; rows read and written."""

    seconds: float
    cpu_seconds: float
    gibibytes: float
    rows_read: int = 0
    rows_written: int = 0


def tasks(sizes: Sizes, folder: Path) -> Iterator[Task]:
    cost = sizes.prompts / 10_000
    yield Task(("beta", "made"), 3 * cost, partial(run_in_process, _write_inputs, folder, sizes))
    for step in STEPS:
        for repeat in range(sizes.repeats):
            measure = partial(run_in_process, _measure_step, folder, sizes.parts, step)
            yield Task(("beta", step, str(repeat)), 5 + 0.4 * cost, measure)
            bare = partial(run_in_process, _measure_bare, folder, sizes.parts, step)
            yield Task(("beta", step, str(repeat), "bare"), 0.2 * cost, bare)


def plan(parts: int) -> Plan:
    """Return a plan whose pairs come from the rewards: matches would need the ranker, and `reference` the policy."""
    prompts, candidates = make_step("prompts", parts), make_step("sample", parts)
    rewards = make_step("reward", parts, by={"name": "brevity", "words": 1})
    rule = {"name": "rejection_sample", "beta": 0.25}
    selections = make_step("select", parts, inputs={"rewards": rewards}, rule=rule)
    inputs = {"candidates": candidates, "selections": selections}
    pairs = make_step("pair", parts, inputs=inputs, rule="neighbours")
    inputs = {"prompts": prompts, "candidates": candidates, "pairs": pairs}
    examples = make_step("examples", parts, inputs=inputs)
    computed = [selections, pairs, examples]
    return Plan("beta", [prompts, candidates, rewards, *computed], [examples], computed)


def _step(parts: int, name: str) -> Step:
    return next(step for step in plan(parts).steps if step.name == name)


def _write_inputs(folder: Path, sizes: Sizes) -> None:
    prompts, candidates, rewards, *_ = plan(sizes.parts).steps
    counts = list(split_evenly(sizes.prompts, sizes.parts))
    parts = [Part(count, DRAWS, n) for n, count in enumerate(counts)]
    seal_step(Store(folder), prompts, lambda n: {"prompts": parts[n].prompt_table()})
    seal_step(Store(folder), candidates, lambda n: {"candidates": parts[n].candidates()})
    seal_step(Store(folder), rewards, lambda n: {"rewards": parts[n].rewards()})


def _measured(call: Callable[[], Any], executor: LocalExecutor | None = None) -> StepRun:
    start, cpu = time.perf_counter(), time.process_time() + _cpu_seconds_of_children()
    call()
    seconds = time.perf_counter() - start
    cpu_seconds = time.process_time() + _cpu_seconds_of_children() - cpu
    bytes_held = resident("VmHWM") * 1e6
    if executor and any(executor.is_divided.values()):  # at most: each that computes parts, as much as the largest
        bytes_held += resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 * executor.processes
    return StepRun(seconds, cpu_seconds, bytes_held / 2**30)


def _cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _measure_step(folder: Path, parts: int, name: str) -> StepRun:
    """Run one step anew. What is compiled is so already, which happens once per machine."""
    step, store = _step(parts, name), Store(folder)
    delete(store.folder(step).path)
    compile_rules(folder / name)
    executor = LocalExecutor()
    measured = _measured(lambda: run(Plan("beta", [step], [step], [step]), store, executor, Silent()), executor)
    read = max(
        _rows(store, step.inputs[item.name], item.kind)
        for item in signature_of(step.entry).inputs
        if item.name in step.inputs
    )
    written = _rows(store, step, table_name(signature_of(step.entry).outputs[0]))
    return StepRun(measured.seconds, measured.cpu_seconds, measured.gibibytes, read, written)


def compile_rules(folder: Path) -> None:
    """Compile all that the steps call, in this process, by small runs in a store of their own."""
    small, store = plan(1), Store(folder / "small")
    compile_rule(folder)
    _write_inputs(folder / "small", Sizes(prompts=2, parts=1))
    run(small, store, LocalExecutor(), Silent())


def _measure_bare(folder: Path, parts: int, name: str) -> StepRun:
    """Read with DuckDB, on all cores of this process, and write the step's own table again, part by part."""
    step, store = _step(parts, name), Store(folder)
    reads = []
    for item in signature_of(step.entry).inputs:
        if item.name in step.inputs and item.schema is not None:
            columns = ", ".join(item.schema_read(step.options).names)
            reads += [f"SELECT {columns} FROM '{file}'" for file in _files(store, step.inputs[item.name], item.kind)]
    output = table_name(signature_of(step.entry).outputs[0])
    scratch = folder / "bare.parquet"
    options = "FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 8192"

    def read_and_write() -> None:
        for query in reads:
            connection.sql(query).to_arrow_table()
        for file in _files(store, step, output):
            connection.execute(f"COPY (FROM '{file}') TO '{scratch}' ({options})")

    with duckdb.connect() as connection:
        connection.execute(f"SET threads = {len(os.sched_getaffinity(0))}")
        measured = _measured(read_and_write)
    scratch.unlink()
    return measured


def _rows(store: Store, step: Step, table: str) -> int:
    rows: int = (store.folder(step).manifest or {})["rows"][table]
    return rows


def _files(store: Store, step: Step, table: str) -> list[Path]:
    folder = store.folder(step)
    return [
        Path(str(folder.path / file["file"])) for file in (folder.manifest or {})["files"] if table_of(file) == table
    ]


def summarize(sizes: Sizes, results: Results) -> Summary:
    rows: list[Row] = []
    totals = np.zeros((2, sizes.repeats))  # seconds of the steps and of bare DuckDB
    for name in STEPS:
        runs: list[StepRun] = [results["beta", name, str(repeat)] for repeat in range(sizes.repeats)]
        bare: list[StepRun] = [results["beta", name, str(repeat), "bare"] for repeat in range(sizes.repeats)]
        totals += [[run.seconds for run in side] for side in (runs, bare)]
        row = {
            "step": name,
            "rows read": f"{runs[0].rows_read:,}",
            "rows written": f"{runs[0].rows_written:,}",
            "seconds": spread([run.seconds for run in runs]),
            "CPU-seconds": spread([run.cpu_seconds for run in runs]),
            "rows read per second": f"{runs[0].rows_read / np.median([run.seconds for run in runs]):,.0f}",
            "bare: seconds": spread([run.seconds for run in bare]),
            "bare: CPU-seconds": spread([run.cpu_seconds for run in bare]),
            "times bare": spread([mine.seconds / its.seconds for mine, its in zip(runs, bare, strict=True)]),
            "times bare, of CPU-seconds": spread(
                [mine.cpu_seconds / its.cpu_seconds for mine, its in zip(runs, bare, strict=True)]
            ),
            "GiB": spread([run.gibibytes for run in runs]),
        }
        rows.append(row)
    seconds, bare_seconds = np.median(totals, axis=1)
    rows.append({"step": "all", "seconds": f"{seconds:,.2f}", "bare: seconds": f"{bare_seconds:,.2f}",
                 "times bare": f"{seconds / bare_seconds:.2f}"})  # fmt: skip
    full_size, size = sizes.prompts == FULL_SIZE, f"{sizes.prompts:,} prompts x {DRAWS}"
    select = np.median([results["beta", "select", str(repeat)].seconds for repeat in range(sizes.repeats)])
    memory = max(results["beta", name, str(repeat)].gibibytes for name in STEPS for repeat in range(sizes.repeats))
    verdicts = [
        Verdict.at_most(f"another beta, {size}: seconds", seconds, MAX_SECONDS, full_size),
        Verdict.at_most(f"another beta, {size}: times bare", seconds / bare_seconds, MAX_TIMES_BARE, full_size),
        Verdict.at_most(f"another beta, {size}: seconds of select", float(select), MAX_SELECT_SECONDS, full_size),
        Verdict.at_most(f"another beta, {size}: GiB of the largest step", memory, MAX_GIBIBYTES, full_size),
    ]
    if rate := stage_rate(sizes, results):
        sampling = sizes.prompts * DRAWS * TOKENS / rate
        what = f"another beta, {size}, in shares of sampling them ({sampling / 3600:,.0f} hours)"
        verdicts.append(Verdict.at_most(what, seconds / sampling, MAX_SHARE, full_size))
    return Summary(verdicts, {TITLE: rows})
