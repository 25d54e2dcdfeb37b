"""`select` from Parquet to Parquet, against Algorithm 1 of the RSO paper in Python."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config.plan import Plan
from pipeline.context import WarmCache
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.execution.tasks import Task as PartTask
from pipeline.execution.tasks import execute, step_spec
from pipeline.store.storage import delete
from pipeline.store.store import Store
from schemas.tables import SELECTIONS
from stages.selection import kernels
from stages.selection.groups import RewardGroups
from tests.bench.page import resident, spread
from tests.bench.store import Sizes
from tests.bench.store.model import Part, make_step, seal_step, split_evenly
from tests.bench.store.parts import Results, Row, Summary, Task, Verdict, run_in_process
from tests.runs import Silent

DRAWS, SELECTED, BETA = 64, 8, 0.5
RULE = {"name": "rejection_sample", "k": SELECTED, "beta": BETA}
FULL_SIZE = 1_000_000  # prompts that the targets are for
PYTHON_PROMPTS, COMPILED_PROMPTS = 2000, 100_000  # that the kernels are measured on, at most; figures are scaled
MAX_SECONDS, MAX_GIBIBYTES, MIN_SPEEDUP = 60.0, 2.0, 100.0
TITLE = "select in process, from sealed Parquet to sealed Parquet, in parts of one size"
KERNEL_TITLE = f"the law alone, on arrays in memory: microseconds a prompt of {DRAWS} rewards"
KERNELS = {
    "python": "Algorithm 1 in Python",
    "compiled": "Algorithm 1 compiled, on all cores",
    "rule": "the rule around it, with each prompt's acceptance and effective sample size",
}
PYTHON_COLUMN = "Algorithm 1 in Python, no file read or written, takes"


@dataclass(frozen=True)
class SelectRun:
    seconds: float
    gibibytes: float
    rows: int


@dataclass(frozen=True)
class KernelSeconds:
    """Seconds per prompt."""

    python: float
    compiled: float
    rule: float


def tasks(sizes: Sizes, folder: Path) -> Iterator[Task]:
    for prompts, parts in _parts_by_prompts(sizes).items():
        subfolder, cost = folder / str(prompts), prompts / 10_000
        write = partial(run_in_process, _write_rewards, subfolder, prompts, parts)
        yield Task(("select", f"{prompts:,} prompts", "made"), cost, write)
        for repeat in range(sizes.repeats):
            measure = partial(run_in_process, _measure_select, subfolder, parts)
            yield Task(("select", str(prompts), str(repeat)), 5 + 0.4 * cost, measure)
    python, compiled = min(PYTHON_PROMPTS, sizes.prompts), min(COMPILED_PROMPTS, sizes.prompts)
    for repeat in range(sizes.repeats):
        yield Task(("select", "law", str(repeat)), 10, partial(run_in_process, _measure_kernels, python, compiled))


def _parts_by_prompts(sizes: Sizes) -> dict[int, int]:
    """Return the parts for all, a tenth and a hundredth of the prompts: parts of one size, as a recipe would choose."""
    largest = sizes.prompts
    return {
        prompts: max(1, round(sizes.parts * prompts / largest))
        for prompts in (max(1, largest // 100), max(1, largest // 10), largest)
    }


def _plan(parts: int) -> Plan:
    rewards = make_step("reward", parts, by={"name": "brevity", "words": 1})
    selections = make_step("select", parts, inputs={"rewards": rewards}, rule=RULE)
    return Plan("select", [rewards, selections], [selections], [selections])


def _write_rewards(folder: Path, prompts: int, parts: int) -> None:
    counts = list(split_evenly(prompts, parts))
    rewards = _plan(parts).steps[0]
    seal_step(Store(folder), rewards, lambda n: {"rewards": Part(counts[n], DRAWS, n).rewards()})


def _measure_select(folder: Path, parts: int) -> SelectRun:
    """Run the one step and delete its result. Compilation is not counted: it happens once per machine."""
    plan, store = _plan(parts), Store(folder)
    compile_rule(folder)
    start = time.perf_counter()
    run(plan, store, LocalExecutor(), Silent())
    seconds = time.perf_counter() - start
    output = store.folder(plan.target)
    rows = (output.manifest or {})["rows"]["selections"]
    delete(output.path)
    return SelectRun(seconds, resident("VmHWM") * 1e6 / 2**30, rows)


def compile_rule(folder: Path) -> None:
    """Compile the rule in this process, by a small run in a store of its own."""
    plan, store = _plan(1), Store(folder / "warm")
    seal_step(store, plan.steps[0], lambda n: {"rewards": Part(2, DRAWS, n).rewards()})
    execute(step_spec(plan.target, store), PartTask(0), WarmCache(), lambda *report: None)
    assert store.folder(plan.target).read(SELECTIONS, 0).num_rows == 2 * SELECTED


def _measure_kernels(python_prompts: int, compiled_prompts: int) -> KernelSeconds:
    from stages.selection.rules import selection_rule

    rewards = np.random.default_rng(0).normal(size=(compiled_prompts, DRAWS))
    prompts = [{f"{g}-{n}": float(r) for n, r in enumerate(row)} for g, row in enumerate(rewards[:python_prompts])]
    groups, rule = _groups(rewards), selection_rule.bind(RULE)
    betas = np.full(compiled_prompts, BETA)
    rule(_groups(rewards[:1]))  # compiles
    calls: dict[str, tuple[Callable[[], Any], int]] = {
        "python": (lambda: [algorithm_1(candidates, SELECTED, BETA) for candidates in prompts], python_prompts),
        "compiled": (
            lambda: kernels.algorithm_1_batch(groups.values, groups.starts, groups.seeds, SELECTED, betas),
            compiled_prompts,
        ),
        "rule": (lambda: rule(groups), compiled_prompts),
    }
    seconds = {}
    for name, (call, count) in calls.items():
        start = time.perf_counter()
        call()
        seconds[name] = (time.perf_counter() - start) / count
    return KernelSeconds(**seconds)


def _groups(rewards: NDArray[np.float64]) -> RewardGroups:
    starts = np.arange(len(rewards) + 1) * DRAWS
    return RewardGroups(rewards.ravel(), starts, np.arange(len(rewards), dtype=np.uint64))


def algorithm_1(candidates: dict[str, float], k: int, beta: float) -> list[str]:
    """Run statistical rejection sampling with the means of the appendix of arXiv:2309.06657, in our words.

    A dictionary of the remaining candidates; in each pass numpy's uniform and exp for each of them, and the accepted
    ones removed after it.
    """
    remaining = dict(candidates)
    accepted: list[str] = []
    while remaining and len(accepted) < k:
        max_reward = max(remaining.values())
        accepted_now = []
        for name, reward in remaining.items():
            if np.random.uniform() < np.exp((reward - max_reward) / beta):
                accepted_now.append(name)
                if len(accepted) + len(accepted_now) == k:
                    break
        accepted += accepted_now
        for name in accepted_now:
            del remaining[name]
    return accepted


def summarize(sizes: Sizes, results: Results) -> Summary:
    repeats = range(sizes.repeats)
    kernel_runs = [results["select", "law", str(repeat)] for repeat in repeats]
    python = float(np.median([run.python for run in kernel_runs]))

    # The stage, with its files, by number of prompts
    rows: list[Row] = []
    for prompts, parts in _parts_by_prompts(sizes).items():
        runs: list[SelectRun] = [results["select", str(prompts), str(repeat)] for repeat in repeats]
        seconds = float(np.median([run.seconds for run in runs]))
        row = {
            "prompts": f"{prompts:,}",
            "parts": parts,
            "seconds": spread([run.seconds for run in runs]),
            "microseconds a prompt": f"{1e6 * seconds / prompts:.1f}",
            "GiB": spread([run.gibibytes for run in runs]),
            "rows kept": f"{runs[0].rows:,}",
            PYTHON_COLUMN: f"{prompts * python / seconds:.1f}x",
        }
        rows.append(row)

    # Verdicts on the largest size, which comes last
    full_size, what = sizes.prompts == FULL_SIZE, f"select, {sizes.prompts:,} prompts x {DRAWS}"
    gibibytes = max(run.gibibytes for run in runs)
    speedup = f"{what}: Parquet to Parquet, times as fast as Algorithm 1 in Python"
    verdicts = [
        Verdict.at_most(f"{what}: seconds", seconds, MAX_SECONDS, full_size),
        Verdict.at_most(f"{what}: GiB", gibibytes, MAX_GIBIBYTES, full_size),
        Verdict.at_least(speedup, sizes.prompts * python / seconds, MIN_SPEEDUP, full_size),
    ]

    # The kernels alone: they show what compilation is worth, and nothing about the stage, for they read no file.
    kernel_rows: list[Row] = []
    for name, label in KERNELS.items():
        microseconds = [1e6 * getattr(run, name) for run in kernel_runs]
        factors = [run.python / getattr(run, name) for run in kernel_runs]
        row = {"law": label, "microseconds": spread(microseconds), "times as fast as in Python": spread(factors, 0)}
        kernel_rows.append(row)
    return Summary(verdicts, {TITLE: rows, KERNEL_TITLE: kernel_rows})
