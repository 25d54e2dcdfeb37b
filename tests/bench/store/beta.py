"""A changed beta at the size of a large run: what of it needs no model, against the sampling that is not repeated."""

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
from tests.bench.store.model import DRAWN, Part, Quiet, seal, shares, step
from tests.bench.store.parts import Found, Row, Task, Told, Verdict, apart
from tests.bench.store.sample import rate
from tests.bench.store.select import compile_rule

DRAWS, TOKENS = DRAWN["n"], DRAWN["max_tokens"]
MEASURED = 2  # parts, of which all others take as long
SHARE, ASKED = 0.02, 1_000_000
TITLE = "another beta: what of it needs no model, each step with all of its parts"


@dataclass(frozen=True)
class Run:
    seconds: dict[str, float]  # by step
    gibibytes: float


def tasks(sizes: Sizes, folder: Path) -> Iterator[Task]:
    cost = sizes.prompts / 10_000 * MEASURED / sizes.parts
    yield Task(("beta", "made"), 3 * cost, partial(apart, _make, folder, sizes))
    yield Task(("beta", "run"), 20 * cost, partial(apart, _again, folder, sizes))


def _plan(parts: int) -> Plan:
    """Pairs by the rewards themselves: a ranker's matches would need the ranker, and `reference` the policy."""
    prompts, candidates, rewards = step("prompts", parts), step("sample", parts), _rewards(parts)
    chosen = step("select", parts, inputs={"rewards": rewards}, rule={"name": "rejection_sample", "beta": 0.25})
    pairs = step("pair", parts, inputs={"candidates": candidates, "selections": chosen}, rule="neighbours")
    groups = step("examples", parts, inputs={"prompts": prompts, "candidates": candidates, "pairs": pairs})
    again = [chosen, pairs, groups]
    return Plan("beta", [prompts, candidates, rewards, *again], [groups], again)


def _rewards(parts: int) -> Step:
    return step("reward", parts, by={"name": "brevity", "words": 1})


def _make(folder: Path, sizes: Sizes) -> None:
    prompts, candidates, rewards, *_ = _plan(MEASURED).steps
    counts = list(shares(sizes.prompts * MEASURED // sizes.parts, MEASURED))
    made = [Part(count, DRAWS, n) for n, count in enumerate(counts)]
    seal(Store(folder), prompts, lambda n: {"prompts": made[n].about_prompts()})
    seal(Store(folder), candidates, lambda n: {"candidates": made[n].candidates()})
    seal(Store(folder), rewards, lambda n: {"rewards": made[n].rewards()})


class Clock(Quiet):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def step_finished(self, step: Step, manifest: dict[str, object]) -> None:
        now = time.perf_counter()
        self.seconds[step.name], self.last = now - self.last, now


def _again(folder: Path, sizes: Sizes) -> Run:
    compile_rule(folder)
    clock = Clock()
    run(_plan(MEASURED), Store(folder), LocalExecutor(), clock)
    return Run(clock.seconds, resident("VmHWM") * 1e6 / 2**30)


def told(sizes: Sizes, found: Found) -> Told:
    made: Run = found["beta", "run"]
    whole = {name: seconds * sizes.parts / MEASURED for name, seconds in made.seconds.items()}
    total = sum(whole.values())
    tokens = sizes.prompts * DRAWS * TOKENS
    rows: list[Row] = [{"step": name, "seconds": f"{each:,.0f}"} for name, each in whole.items()]
    rows.append({"step": "all", "seconds": f"{total:,.0f}"})
    tables = {f"{TITLE}, scaled from {MEASURED} of {sizes.parts}; {made.gibibytes:.2f} GiB": rows}
    measured = rate(sizes, found)
    if measured is None:
        return Told([], tables)
    sampling = tokens / measured
    what = (
        f"another beta at {sizes.prompts:,} prompts, in shares of sampling them ({sampling / 3600:,.0f} hours): "
        f"{', '.join(whole)}, scaled from {MEASURED} of {sizes.parts} parts; what needs a model is not in it"
    )
    return Told([Verdict.most(what, total / sampling, SHARE, sizes.prompts == ASKED)], tables)
