"""`sample` beside a bare vLLM `generate` on the same engine and prompts, and two workers beside one."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jobs.bench.page import spread
from jobs.bench.store import Sizes
from jobs.bench.store.parts import Found, Row, Task, Told, Verdict, apart
from jobs.bench.store.world import DRAWN, Quiet, corridor, make_policy, write_prompts
from pipeline.executors import Executor, InProcess, OnRay
from pipeline.places import delete
from pipeline.plan import Plan
from pipeline.resources import Profile, Resources
from pipeline.run import run
from pipeline.store import Store
from pipeline.work import Work
from schemas.tables import PROMPTS
from stages.engines import open_engine

LARGE, SMALL = 2, 16  # parts of the run in process, where the engine drains after each, and of those on Ray
SHARE = 0.95
LAYERS = 4
ASKED = 96  # prompts from which on start and end of a run count for little
SIDES = ("a bare generate", "the stage")
CREWS = {"one worker on one core": (1, 1), "two workers on two cores": (2, 2)}  # workers, cores


def tasks(sizes: Sizes, folder: Path) -> Iterator[Task]:
    cost = sizes.sampled * DRAWN["n"] * DRAWN["max_tokens"] / 6000
    yield Task(("sample", "world"), 10, partial(apart, _world, folder, sizes))
    for repeat in range(sizes.repeats):
        yield Task(("sample", "sides", str(repeat)), 10 + 2 * cost, partial(apart, _sides, folder, repeat))
    for repeat in range(sizes.repeats):
        for name in list(CREWS)[:: 1 if repeat % 2 == 0 else -1]:
            call = partial(apart, _crew, folder, *CREWS[name])
            yield Task(("sample", name, str(repeat)), 25 + 2 * cost, call)


def _world(folder: Path, sizes: Sizes) -> None:
    """A model, prompts, and a store in which what comes before `sample` is sealed, in parts of either size."""
    make_policy(folder, sizes.hidden, LAYERS)
    write_prompts(folder, sizes.sampled)
    for parts in (LARGE, SMALL):
        run(_plan(folder, "prompts", parts), Store(folder / "store"), InProcess(), Quiet())


def _plan(folder: Path, target: str, parts: int, engine: str = "vllm") -> Plan:
    import jobs.recipes  # noqa: F401 - registers every stage

    return corridor(folder, target, parts, engine=engine, **DRAWN)


class Kept(InProcess):
    """Keeps its engine from run to run, until it is let go: opening it is not what is measured."""

    def end(self, work: Work) -> None: ...

    def close(self) -> None:
        self.next.clear()


def _sides(folder: Path, repeat: int) -> dict[str, float]:
    """Tokens a second of each, on one engine, in an order that alternates; the stage's with its whole run around."""
    executor = Kept()
    plan = _plan(folder, "sample", LARGE)
    engine = _opened(plan, folder, executor)
    calls = {SIDES[0]: lambda: _bare(engine.llm, folder), SIDES[1]: lambda: _stage(plan, folder, executor)}
    _bare(engine.llm, folder, 1)
    made = {}
    for side in SIDES[:: 1 if repeat % 2 == 0 else -1]:
        engine.llm.reset_prefix_cache()
        start = time.perf_counter()
        tokens = calls[side]()
        made[side] = tokens / (time.perf_counter() - start)
    executor.warm.close()
    return made


def _opened(plan: Plan, folder: Path, executor: InProcess) -> Any:
    """The engine that the stage will ask for."""
    made = next(step for step in plan.steps if step.name == "policy")
    options, policy = plan.target.options, Store(folder / "store").folder(made).model()
    given = options["engine"], policy.folder, options["dtype"], Resources().tensor_parallel
    return executor.warm.hold(open_engine, *given)


def _bare(llm: Any, folder: Path, least: int | None = None) -> int:
    """As one writes it: all prompts in one call, n draws each."""
    from vllm import SamplingParams

    plan = _plan(folder, "prompts", LARGE)
    prompts = Store(folder / "store").folder(plan.target).read(PROMPTS).column("token_ids").to_pylist()[:least]
    given = SamplingParams(seed=0, logprobs=0, detokenize=False, stop_token_ids=[1], **DRAWN)
    answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], given, use_tqdm=False)
    return sum(len(output.token_ids) for answer in answers for output in answer.outputs)


def _stage(plan: Plan, folder: Path, executor: Executor) -> int:
    """From sealed prompts to sealed candidates, Parquet and all."""
    out = Store(folder / "store").folder(plan.target)
    run(plan, Store(folder / "store"), executor, Quiet())
    tokens: int = (out.manifest or {})["counters"]["tokens"]
    delete(out.path)
    return tokens


@dataclass(frozen=True)
class Crew:
    """parts: when each was finished, and the tokens that it has."""

    parts: list[tuple[float, int]]
    seconds: float  # from start to end, engines opened and all

    @property
    def rate(self) -> float:
        """Tokens a second between the first and the last part finished: the slope of the line by least squares."""
        moments, tokens = np.array(sorted(self.parts)).T
        return float(np.polyfit(moments - moments[0], np.cumsum(tokens), 1)[0])


def _crew(folder: Path, workers: int, cores: int) -> Crew:
    """On Ray, of which a worker has one core and one thread."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    os.environ["OMP_NUM_THREADS"] = "1"
    executor = OnRay(workers, profile=Profile(Resources(cpus=1.0, max_workers=workers)))
    plan, store = _plan(folder, "sample", SMALL), Store(folder / "store")
    start = time.perf_counter()
    run(plan, store, executor, Quiet())
    seconds = time.perf_counter() - start
    out = store.folder(plan.target)
    sidecars = ((out.path / f"part-{shard:05d}.json", out.sidecar(shard) or {}) for shard in range(SMALL))
    made = Crew([(file.stat().st_mtime, part["counters"].get("tokens", 0)) for file, part in sidecars], seconds)
    delete(out.path)
    return made


def rate(sizes: Sizes, found: Found) -> float:
    """Tokens a second of the stage."""
    return float(np.median([found["sample", "sides", str(repeat)][SIDES[1]] for repeat in range(sizes.repeats)]))


def told(sizes: Sizes, found: Found) -> Told:
    sides = [found["sample", "sides", str(repeat)] for repeat in range(sizes.repeats)]
    crews = {name: [found["sample", name, str(repeat)] for repeat in range(sizes.repeats)] for name in CREWS}
    one, two = (float(np.median([crew.rate for crew in each])) for each in crews.values())
    share = float(np.median([side[SIDES[1]] / side[SIDES[0]] for side in sides]))
    asked = sizes.sampled >= ASKED
    verdicts = [
        Verdict.least("sample: tokens a second against a bare generate", share, SHARE, asked),
        Verdict.least("sample: two workers against twice one", two / (2 * one), SHARE, asked),
    ]
    rows: list[Row] = [{"side": side, "tokens a second": spread([each[side] for each in sides], 0)} for side in SIDES]
    drawn = f"{DRAWN['n']} draws of {DRAWN['max_tokens']} tokens"
    tables = {
        f"{sizes.sampled} prompts x {drawn}, one engine, opened before; Parquet included": rows,
        "the same on Ray, in steady state": [_row(name, each) for name, each in crews.items()],
    }
    return Told(verdicts, tables)


def _row(name: str, crews: list[Crew]) -> Row:
    return {
        "crew": name,
        "tokens a second": spread([crew.rate for crew in crews], 0),
        "seconds, start and end included": spread([crew.seconds for crew in crews], 1),
    }
