"""`sample` beside a bare vLLM `generate` on the same engine and prompts."""

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
from tests.bench.store.model import DRAWN, Quiet, corridor, make_policy, write_prompts
from tests.bench.store.parts import Found, Row, Task, Told, Verdict, apart

PARTS = 2  # of the run: the engine drains after each
SHARE = 0.95
WARM = 16  # prompts that an engine answers before the clock: more draws than it runs at once
LAYERS = 4
ASKED = 96  # prompts from which on start and end of a run count for little
SIDES = ("a bare generate", "the stage", "a bare generate without seeds and log-probs")
SAME: dict[str, Any] = {"seed": 0, "logprobs": 0, "flat_logprobs": True}  # what the stage asks of each draw
Paced = tuple[int, float]  # tokens, and the seconds that they took


def tasks(sizes: Sizes, folder: Path) -> Iterator[Task]:
    yield Task(("sample", "data_dir"), 10, partial(apart, prepare, folder, sizes, PARTS))
    for repeat in range(sizes.repeats):
        call = partial(apart, _sides, folder, repeat)
        yield Task(("sample", "sides", str(repeat)), 10 + len(order(repeat)) * cost(sizes), call)


def cost(sizes: Sizes) -> float:
    """Seconds that all draws take on all cores, about."""
    return float(sizes.sampled * DRAWN["n"] * DRAWN["max_tokens"] / 6000)


def prepare(folder: Path, sizes: Sizes, parts: int) -> None:
    """A model, prompts, and a store in which what comes before `sample` is sealed, in so many parts."""
    make_policy(folder, sizes.hidden, LAYERS)
    write_prompts(folder, sizes.sampled)
    run(planned(folder, "prompts", parts), Store(folder / "store"), LocalExecutor(), Quiet())


def planned(folder: Path, target: str, parts: int, engine: str = "vllm") -> Plan:
    import jobs.recipes  # noqa: F401 - registers every stage

    return corridor(folder, target, parts, engine=engine, **DRAWN)


class Selection(LocalExecutor):
    """Keeps its engine from run to run, until it is let go: opening it is not what is measured."""

    def end(self, work: StepSpec) -> None: ...

    def close(self) -> None:
        self.next.clear()


def _sides(folder: Path, repeat: int) -> dict[str, float]:
    """Tokens a second of each, on one engine; the stage's with its whole run around."""
    executor = Selection()
    plan = planned(folder, "sample", PARTS)
    engine, asked = _opened(plan, folder, executor), _asked(folder)
    calls: dict[str, Callable[[], Paced]] = {
        SIDES[0]: lambda: _bare(engine.llm, asked, **SAME),
        SIDES[1]: lambda: _stage(plan, folder, executor),
        SIDES[2]: lambda: _bare(engine.llm, asked),
    }
    _bare(engine.llm, asked[:WARM], **SAME)
    made = _rates(order(repeat), calls, engine.llm.reset_prefix_cache)
    executor.warm.close()
    return made


def order(repeat: int) -> list[str]:
    """There and back: an engine may slow as it runs, and the mean place of all is the same.

    The ends are of the side without a promise, the others take turns to be the outer one.
    """
    there = [SIDES[2], *SIDES[:2][:: 1 if repeat % 2 == 0 else -1]]
    return there + there[::-1]


def _rates(sides: list[str], calls: Mapping[str, Callable[[], Paced]], before: Callable[[], Any]) -> dict[str, float]:
    """All tokens over all seconds of each, called in this order."""
    passes = dict[str, list[Paced]]()
    for side in sides:
        before()
        passes.setdefault(side, []).append(calls[side]())
    sums = {side: np.sum(each, axis=0) for side, each in passes.items()}
    return {side: float(tokens / seconds) for side, (tokens, seconds) in sums.items()}


def _opened(plan: Plan, folder: Path, executor: LocalExecutor) -> Any:
    """The engine that the stage will ask for."""
    made = next(step for step in plan.steps if step.name == "policy")
    options, policy = plan.target.options, Store(folder / "store").folder(made).model()
    given = options["engine"], policy.folder, options["dtype"], Resources().tensor_parallel
    return executor.warm.open_once(open_engine, *given)


def _asked(folder: Path) -> list[dict[str, list[int]]]:
    """The prompts as vLLM takes them."""
    prompts = Store(folder / "store").folder(planned(folder, "prompts", PARTS).target).read(PROMPTS)
    return [{"prompt_token_ids": ids} for ids in prompts["token_ids"].to_pylist()]


def _bare(llm: Any, asked: list[dict[str, list[int]]], **given: Any) -> Paced:
    """As one writes it: all prompts in one call, n draws each."""
    from vllm import SamplingParams

    params = SamplingParams(detokenize=False, stop_token_ids=[1], skip_clone=True, **DRAWN, **given)
    start = time.perf_counter()
    answers = llm.generate(asked, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    return sum(len(output.token_ids) for answer in answers for output in answer.outputs), seconds


def _stage(plan: Plan, folder: Path, executor: LocalExecutor) -> Paced:
    """From sealed prompts to sealed candidates, Parquet and all; leaves nothing of it."""
    out = Store(folder / "store").folder(plan.target)
    start = time.perf_counter()
    run(plan, Store(folder / "store"), executor, Quiet())
    seconds = time.perf_counter() - start
    tokens: int = (out.manifest or {})["counters"]["tokens"]
    delete(out.path)
    return tokens, seconds


def rate(sizes: Sizes, found: Found) -> float | None:
    """Tokens a second of the stage, if they were measured."""
    sides = _repeats(sizes, found)
    return float(np.median([side[SIDES[1]] for side in sides])) if sides else None


def told(sizes: Sizes, found: Found) -> Told:
    """Nothing if it was not measured, because something failed before."""
    sides = _repeats(sizes, found)
    if not sides:
        return Told()
    shares = {side: [each[side] / each[SIDES[0]] for each in sides] for side in SIDES}
    what = f"sample: tokens a second against {SIDES[0]} with the same settings"
    drawn = f"{sizes.sampled} prompts x {DRAWN['n']} draws of {DRAWN['max_tokens']} tokens"
    title = f"{drawn} in {PARTS} parts, one engine, opened before; Parquet included"
    rows = [_side(side, [each[side] for each in sides], shares[side]) for side in SIDES]
    share = float(np.median(shares[SIDES[1]]))
    return Told([Verdict.least(what, share, SHARE, sizes.sampled >= ASKED)], {title: rows})


def _repeats(sizes: Sizes, found: Found) -> list[dict[str, float]]:
    return [found[key] for repeat in range(sizes.repeats) if (key := ("sample", "sides", str(repeat))) in found]


def _side(side: str, rates: list[float], shares: list[float]) -> Row:
    return {"side": side, "tokens a second": spread(rates, 0), "beside the first": spread(shares)}
