"""`sample` against a bare vLLM `generate` on the same engine and prompts."""

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.plan import Plan
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.execution.tasks import StepSpec
from pipeline.resources import Resources
from pipeline.store.storage import delete
from pipeline.store.store import Store
from schemas.tables import PROMPTS
from stages.sampling.engines import open_engine
from tests.bench.page import spread
from tests.bench.store import Sizes
from tests.bench.store.model import SAMPLING, make_policy, pipeline_plan, write_prompts
from tests.bench.store.parts import Results, Row, Summary, Task, Verdict, run_in_process
from tests.runs import Silent

PARTS = 2  # of the run: the engine drains after each
MIN_SHARE = 0.95
WARM_UP = 16  # prompts that an engine answers before the clock starts: more draws than it runs at once
LAYERS = 4
FULL_SIZE = 96  # prompts from which on start and end of a run count for little
SIDES = ("a bare generate", "the stage", "a bare generate without seeds and log-probs")
BARE, STAGE, BARE_FASTER = SIDES
STAGE_SETTINGS: dict[str, Any] = {"seed": 0, "logprobs": 0, "flat_logprobs": True}  # that the stage sets for each draw
Pass = tuple[int, float]  # tokens, and the seconds that they took


def tasks(sizes: Sizes, folder: Path) -> Iterator[Task]:
    yield Task(("sample", "data_dir"), 10, partial(run_in_process, prepare, folder, sizes, PARTS))
    for repeat in range(sizes.repeats):
        call = partial(run_in_process, _measure_sides, folder, repeat)
        yield Task(("sample", "sides", str(repeat)), 10 + len(order(repeat)) * sampling_seconds(sizes), call)


def sampling_seconds(sizes: Sizes) -> float:
    """Estimate the seconds that all draws take on all cores."""
    return float(sizes.sampled * SAMPLING["n"] * SAMPLING["max_tokens"] / 6000)


def prepare(folder: Path, sizes: Sizes, parts: int) -> None:
    """Write a model, prompts, and a store in which the steps before `sample` are sealed in `parts` parts."""
    make_policy(folder, sizes.hidden, LAYERS)
    write_prompts(folder, sizes.sampled)
    run(plan_to(folder, "prompts", parts), Store(folder / "store"), LocalExecutor(), Silent())


def plan_to(folder: Path, target: str, parts: int, engine: str = "vllm") -> Plan:
    return pipeline_plan(folder, target, parts, engine=engine, **SAMPLING)


class WarmExecutor(LocalExecutor):
    """Executor that keeps its engine from run to run, until it is closed by hand: opening it is not measured."""

    def end(self, spec: StepSpec) -> None: ...

    def close(self) -> None:
        self.next.clear()


def _measure_sides(folder: Path, repeat: int) -> dict[str, float]:
    """Return tokens per second of each side, all on one engine; the stage's include its whole run."""
    executor, plan = WarmExecutor(), plan_to(folder, "sample", PARTS)
    engine = open_stage_engine(plan, folder, executor)
    table = Store(folder / "store").folder(plan_to(folder, "prompts", PARTS).target).read(PROMPTS)
    prompts = [{"prompt_token_ids": ids} for ids in table["token_ids"].to_pylist()]
    calls: dict[str, Callable[[], Pass]] = {
        BARE: lambda: _run_bare(engine.llm, prompts, **STAGE_SETTINGS),
        STAGE: lambda: run_stage(plan, folder, executor),
        BARE_FASTER: lambda: _run_bare(engine.llm, prompts),
    }
    _run_bare(engine.llm, prompts[:WARM_UP], **STAGE_SETTINGS)
    rates = pass_rates(order(repeat), calls, engine.llm.reset_prefix_cache)
    executor.warm.close()
    return rates


def order(repeat: int) -> list[str]:
    """Return the sides there and back: an engine may slow as it runs, and so all have the same mean position.

    The ends are of the side without a target; the others take turns to be the outer one.
    """
    there = [BARE_FASTER, *SIDES[:2][:: 1 if repeat % 2 == 0 else -1]]
    return there + there[::-1]


def pass_rates(
    sides: list[str], calls: Mapping[str, Callable[[], Pass]], before: Callable[[], Any]
) -> dict[str, float]:
    """Call the sides in this order, and return all tokens over all seconds of each."""
    passes = dict[str, list[Pass]]()
    for side in sides:
        before()
        passes.setdefault(side, []).append(calls[side]())
    sums = {side: np.sum(results, axis=0) for side, results in passes.items()}
    return {side: float(tokens / seconds) for side, (tokens, seconds) in sums.items()}


def open_stage_engine(plan: Plan, folder: Path, executor: LocalExecutor) -> Any:
    """Open the engine that the stage will use, in the executor's cache."""
    step = next(step for step in plan.steps if step.name == "policy")
    options, policy = plan.target.options, Store(folder / "store").folder(step).model()
    arguments = options["engine"], policy.folder, options["dtype"], Resources().tensor_parallel
    return executor.warm.open_once(open_engine, *arguments)


def _run_bare(llm: Any, prompts: list[dict[str, list[int]]], **settings: Any) -> Pass:
    """Sample as a script would: all prompts in one call, n draws each."""
    from vllm import SamplingParams

    params = SamplingParams(detokenize=False, stop_token_ids=[1], skip_clone=True, **SAMPLING, **settings)
    start = time.perf_counter()
    answers = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    return sum(len(output.token_ids) for answer in answers for output in answer.outputs), seconds


def run_stage(plan: Plan, folder: Path, executor: LocalExecutor) -> Pass:
    """Run the stage from sealed prompts to sealed candidates, Parquet included, and delete its result."""
    output = Store(folder / "store").folder(plan.target)
    start = time.perf_counter()
    run(plan, Store(folder / "store"), executor, Silent())
    seconds = time.perf_counter() - start
    tokens: int = (output.manifest or {})["counters"]["tokens"]
    delete(output.path)
    return tokens, seconds


def stage_rate(sizes: Sizes, results: Results) -> float | None:
    """Return the stage's tokens per second, None if they were not measured."""
    rates = _rates_by_repeat(sizes, results)
    return float(np.median([by_side[STAGE] for by_side in rates])) if rates else None


def summarize(sizes: Sizes, results: Results) -> Summary:
    """Return an empty summary if nothing was measured, because something failed before."""
    rates = _rates_by_repeat(sizes, results)
    if not rates:
        return Summary()
    shares = {side: [by_side[side] / by_side[BARE] for by_side in rates] for side in SIDES}
    what = f"sample: tokens a second against {BARE} with the same settings"
    draws = f"{sizes.sampled} prompts x {SAMPLING['n']} draws of {SAMPLING['max_tokens']} tokens"
    title = f"{draws} in {PARTS} parts, one engine, opened before; Parquet included"
    rows: list[Row] = []
    for side in SIDES:
        tokens_per_second = spread([by_side[side] for by_side in rates], 0)
        rows.append({"side": side, "tokens a second": tokens_per_second, "beside the first": spread(shares[side])})
    share = float(np.median(shares[STAGE]))
    return Summary([Verdict.at_least(what, share, MIN_SHARE, sizes.sampled >= FULL_SIZE)], {title: rows})


def _rates_by_repeat(sizes: Sizes, results: Results) -> list[dict[str, float]]:
    keys = [("sample", "sides", str(repeat)) for repeat in range(sizes.repeats)]
    return [results[key] for key in keys if key in results]
