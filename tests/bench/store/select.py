"""`select` from Parquet to Parquet, beside the paper's Algorithm 1 in its own Python."""

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
from tests.bench.store.model import Part, Quiet, seal, shares, step
from tests.bench.store.parts import Found, Row, Task, Told, Verdict, apart

DRAWS, KEPT, BETA = 64, 8, 0.5
RULE = {"name": "rejection_sample", "k": KEPT, "beta": BETA}
LARGEST = 1_000_000
PYTHON, COMPILED = 2000, 100_000  # prompts that the law is measured on, at most; the figures are scaled from these
SECONDS, GIBIBYTES, FASTER = 60.0, 2.0, 100.0


TITLE = "select in process, from sealed Parquet to sealed Parquet, in parts of one size"
LAWS = f"the law alone, on arrays in memory: microseconds a prompt of {DRAWS} rewards"
LAW = {
    "python": "Algorithm 1 in Python",
    "compiled": "Algorithm 1 compiled, on all cores",
    "rule": "the rule around it, with each prompt's acceptance and effective sample size",
}
AGAINST = "Algorithm 1 in Python, no file read or written, takes"


@dataclass(frozen=True)
class Run:
    seconds: float
    gibibytes: float
    rows: int


@dataclass(frozen=True)
class Seconds:
    """A prompt."""

    python: float
    compiled: float
    rule: float


def tasks(sizes: Sizes, folder: Path) -> Iterator[Task]:
    for prompts, parts in _sizes(sizes).items():
        place, cost = folder / str(prompts), prompts / 10_000
        yield Task(("select", f"{prompts:,} prompts", "made"), cost, partial(apart, _make, place, prompts, parts))
        for repeat in range(sizes.repeats):
            yield Task(("select", str(prompts), str(repeat)), 5 + 0.4 * cost, partial(apart, _select, place, parts))
    python, ours = min(PYTHON, sizes.prompts), min(COMPILED, sizes.prompts)
    for repeat in range(sizes.repeats):
        yield Task(("select", "law", str(repeat)), 10, partial(apart, _laws, python, ours))


def _sizes(sizes: Sizes) -> dict[int, int]:
    """Parts by prompts, for the most, a tenth and a hundredth of them: parts of one size, as a recipe would choose."""
    largest = sizes.prompts
    return {
        prompts: max(1, round(sizes.parts * prompts / largest))
        for prompts in (max(1, largest // 100), max(1, largest // 10), largest)
    }


def _plan(parts: int) -> Plan:
    rewards = step("reward", parts, by={"name": "brevity", "words": 1})
    chosen = step("select", parts, inputs={"rewards": rewards}, rule=RULE)
    return Plan("select", [rewards, chosen], [chosen], [chosen])


def _make(folder: Path, prompts: int, parts: int) -> None:
    counts = list(shares(prompts, parts))
    rewards = _plan(parts).steps[0]
    seal(Store(folder), rewards, lambda n: {"rewards": Part(counts[n], DRAWS, n).rewards()})


def _select(folder: Path, parts: int) -> Run:
    """The whole run of the one step, but the compiler's seconds: a machine compiles once. Leaves nothing of it."""
    plan, store = _plan(parts), Store(folder)
    compile_rule(folder)
    start = time.perf_counter()
    run(plan, store, LocalExecutor(), Quiet())
    seconds = time.perf_counter() - start
    out = store.folder(plan.target)
    rows = (out.manifest or {})["rows"]["selections"]
    delete(out.path)
    return Run(seconds, resident("VmHWM") * 1e6 / 2**30, rows)


def compile_rule(folder: Path) -> None:
    """In this process, by a run of its own."""
    plan, store = _plan(1), Store(folder / "warm")
    seal(store, plan.steps[0], lambda n: {"rewards": Part(2, DRAWS, n).rewards()})
    execute(step_spec(plan.target, store), PartTask(0), WarmCache(), lambda *told: None)
    assert store.folder(plan.target).read(SELECTIONS, 0).num_rows == 2 * KEPT


def _laws(python: int, ours: int) -> Seconds:
    from stages.selection.rules import selection_rule

    rewards = np.random.default_rng(0).normal(size=(ours, DRAWS))
    named = [{f"{g}-{n}": float(r) for n, r in enumerate(row)} for g, row in enumerate(rewards[:python])]
    groups, rule = _groups(rewards), selection_rule.bind(RULE)
    betas = np.full(ours, BETA)
    rule(_groups(rewards[:1]))  # compiles
    return Seconds(
        _seconds(lambda: [algorithm_1(each, KEPT, BETA) for each in named]) / python,
        _seconds(lambda: kernels.algorithm_1_batch(groups.values, groups.starts, groups.seeds, KEPT, betas)) / ours,
        _seconds(lambda: rule(groups)) / ours,
    )


def _groups(rewards: NDArray[np.float64]) -> RewardGroups:
    starts = np.arange(len(rewards) + 1) * DRAWS
    return RewardGroups(rewards.ravel(), starts, np.arange(len(rewards), dtype=np.uint64))


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def algorithm_1(candidates: dict[str, float], k: int, beta: float) -> list[str]:
    """Statistical rejection sampling with what the appendix of arXiv:2309.06657 uses, in our words: a dictionary of
    what is left, in each pass numpy's uniform and exp for each of them, and the accepted removed after it."""
    left = dict(candidates)
    accepted: list[str] = []
    while left and len(accepted) < k:
        top = max(left.values())
        taken = []
        for name, reward in left.items():
            if np.random.uniform() < np.exp((reward - top) / beta):
                taken.append(name)
                if len(accepted) + len(taken) == k:
                    break
        accepted += taken
        for name in taken:
            del left[name]
    return accepted


def told(sizes: Sizes, found: Found) -> Told:
    repeats = range(sizes.repeats)
    runs = {prompts: [found["select", str(prompts), str(repeat)] for repeat in repeats] for prompts in _sizes(sizes)}
    laws = [found["select", "law", str(repeat)] for repeat in repeats]
    python = float(np.median([law.python for law in laws]))
    rows = [_row(prompts, parts, runs[prompts], python) for prompts, parts in _sizes(sizes).items()]
    return Told(_verdicts(sizes, runs[sizes.prompts], python), {TITLE: rows, LAWS: list(_laws_told(laws))})


def _verdicts(sizes: Sizes, largest: list[Run], python: float) -> list[Verdict]:
    asked, what = sizes.prompts == LARGEST, f"select, {sizes.prompts:,} prompts x {DRAWS}"
    seconds, gibibytes = _seconds_of(largest), max(run.gibibytes for run in largest)
    against = f"{what}: Parquet to Parquet, times as fast as Algorithm 1 in Python"
    return [
        Verdict.most(f"{what}: seconds", seconds, SECONDS, asked),
        Verdict.most(f"{what}: GiB", gibibytes, GIBIBYTES, asked),
        Verdict.least(against, sizes.prompts * python / seconds, FASTER, asked),
    ]


def _seconds_of(runs: list[Run]) -> float:
    return float(np.median([run.seconds for run in runs]))


def _row(prompts: int, parts: int, runs: list[Run], python: float) -> Row:
    seconds = _seconds_of(runs)
    return {
        "prompts": f"{prompts:,}",
        "parts": parts,
        "seconds": spread([run.seconds for run in runs]),
        "microseconds a prompt": f"{1e6 * seconds / prompts:.1f}",
        "GiB": spread([run.gibibytes for run in runs]),
        "rows kept": f"{runs[0].rows:,}",
        AGAINST: f"{prompts * python / seconds:.1f}x",
    }


def _laws_told(laws: list[Seconds]) -> Iterator[Row]:
    """No file is in these figures: they say what the compiler is worth, and nothing of the stage."""
    for name, what in LAW.items():
        microseconds = [1e6 * getattr(law, name) for law in laws]
        times = [law.python / getattr(law, name) for law in laws]
        yield {"law": what, "microseconds": spread(microseconds), "times as fast as in Python": spread(times, 0)}
