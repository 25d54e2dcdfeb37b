"""A changed beta at the size of a large run: its steps without a model, against the sampling that is not repeated."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.config.plan import Plan, Step
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.store.store import Store
from tests.bench.page import resident
from tests.bench.store import Sizes
from tests.bench.store.model import SAMPLING, Part, make_step, seal_step, split_evenly
from tests.bench.store.parts import Results, Row, Summary, Task, Verdict, run_in_process
from tests.bench.store.sample import stage_rate
from tests.bench.store.select import compile_rule
from tests.runs import Silent

DRAWS, TOKENS = SAMPLING["n"], SAMPLING["max_tokens"]
MEASURED = 2  # parts; each of the others takes as long
MAX_SHARE, FULL_SIZE = 0.02, 1_000_000
TITLE = "another beta: what of it needs no model, each step with all of its parts"


@dataclass(frozen=True)
class BetaRun:
    seconds: dict[str, float]  # by step
    gibibytes: float


def tasks(sizes: Sizes, folder: Path) -> Iterator[Task]:
    cost = sizes.prompts / 10_000 * MEASURED / sizes.parts
    yield Task(("beta", "made"), 3 * cost, partial(run_in_process, _write_inputs, folder, sizes))
    yield Task(("beta", "run"), 20 * cost, partial(run_in_process, _measure_beta, folder))


def _plan() -> Plan:
    """Return a plan whose pairs come from the rewards: matches would need the ranker, and `reference` the policy."""
    prompts, candidates = make_step("prompts", MEASURED), make_step("sample", MEASURED)
    rewards = make_step("reward", MEASURED, by={"name": "brevity", "words": 1})
    rule = {"name": "rejection_sample", "beta": 0.25}
    selections = make_step("select", MEASURED, inputs={"rewards": rewards}, rule=rule)
    inputs = {"candidates": candidates, "selections": selections}
    pairs = make_step("pair", MEASURED, inputs=inputs, rule="neighbours")
    inputs = {"prompts": prompts, "candidates": candidates, "pairs": pairs}
    examples = make_step("examples", MEASURED, inputs=inputs)
    computed = [selections, pairs, examples]
    return Plan("beta", [prompts, candidates, rewards, *computed], [examples], computed)


def _write_inputs(folder: Path, sizes: Sizes) -> None:
    prompts, candidates, rewards, *_ = _plan().steps
    counts = list(split_evenly(sizes.prompts * MEASURED // sizes.parts, MEASURED))
    parts = [Part(count, DRAWS, n) for n, count in enumerate(counts)]
    seal_step(Store(folder), prompts, lambda n: {"prompts": parts[n].prompt_table()})
    seal_step(Store(folder), candidates, lambda n: {"candidates": parts[n].candidates()})
    seal_step(Store(folder), rewards, lambda n: {"rewards": parts[n].rewards()})


class StepTimer(Silent):
    """Reporter that measures the seconds of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def step_finished(self, step: Step, manifest: dict[str, object]) -> None:
        now = time.perf_counter()
        self.seconds[step.name], self.last = now - self.last, now


def _measure_beta(folder: Path) -> BetaRun:
    compile_rule(folder)
    timer = StepTimer()
    run(_plan(), Store(folder), LocalExecutor(), timer)
    return BetaRun(timer.seconds, resident("VmHWM") * 1e6 / 2**30)


def summarize(sizes: Sizes, results: Results) -> Summary:
    measured: BetaRun = results["beta", "run"]
    scaled = {name: seconds * sizes.parts / MEASURED for name, seconds in measured.seconds.items()}
    total = sum(scaled.values())
    rows: list[Row] = [{"step": name, "seconds": f"{seconds:,.0f}"} for name, seconds in scaled.items()]
    rows.append({"step": "all", "seconds": f"{total:,.0f}"})
    tables = {f"{TITLE}, scaled from {MEASURED} of {sizes.parts}; {measured.gibibytes:.2f} GiB": rows}
    rate = stage_rate(sizes, results)
    if rate is None:
        return Summary([], tables)
    sampling = sizes.prompts * DRAWS * TOKENS / rate
    what = (
        f"another beta at {sizes.prompts:,} prompts, in shares of sampling them ({sampling / 3600:,.0f} hours): "
        f"{', '.join(scaled)}, scaled from {MEASURED} of {sizes.parts} parts; what needs a model is not in it"
    )
    return Summary([Verdict.at_most(what, total / sampling, MAX_SHARE, sizes.prompts == FULL_SIZE)], tables)
