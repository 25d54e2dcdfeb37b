"""What a step of each mix costs, against the same steps of one objective alone, in one alternating run."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.recipes import plan_named
from pipeline.config.plan import Plan, Step
from pipeline.context import StageContext, WarmCache
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.execution.schedule import Reporter
from pipeline.registry import Bound
from pipeline.store.store import Store
from schemas.tables import EXAMPLES
from stages.training.mixing import mix
from stages.training.optimize import optimize

Say = Callable[[str], None]
ALONE = ("joint 1", "joint 0")
MIXES = (*ALONE, "joint 0.5", "sequence 0.5", "alright 0.5", "maxright 0.5")
OPTIMA = ("preference_optimum", "imitation_optimum")
TERM_TABLES = {"examples": "preference_examples", "demonstrations": "demonstration_examples"}


def measure(store: Store, worlds: list[Path], reporter: Reporter, groups: int, repeats: int, say: Say) -> pa.Table:
    """Seconds a step of every mix over the first `groups` groups of each side: medians over repeats, and spreads."""
    step = _optimize_step(store, worlds, reporter)
    tables = {name: _rows(store, step.inputs[name], groups) for name in TERM_TABLES}
    init = store.folder(step.inputs["init"]).model()
    times: dict[str, list[list[float]]] = {name: [] for name in MIXES}
    turns: dict[str, tuple[int, int]] = {}
    optima: dict[str, pa.Table] = {}  # the first repeat measures each objective alone first
    for repeat in range(repeats):
        for n, name in enumerate(MIXES[:: 1 if repeat % 2 == 0 else -1]):
            known = dict(zip(OPTIMA, map(optima.get, ALONE), strict=True)) if name.startswith("maxright") else {}
            seconds, turns[name], metrics = _train(init, tables | known, step.options, name)
            optima.setdefault(name, metrics)
            say(f"  {repeat * len(MIXES) + n + 1} of {repeats * len(MIXES)}: {name}, {sum(seconds):.1f} s")
            times[name].append(seconds)
    return pa.Table.from_pylist([_row(name, times, turns[name]) for name in MIXES])


def _optimize_step(store: Store, worlds: list[Path], reporter: Reporter) -> Step:
    """Makes what maxright's training reads, and nothing more; its `optimize` step, not run."""
    whole = plan_named("maxright", worlds, [])
    step = next(each for each in whole.steps if each.name == "optimize")
    needed = {step.inputs[name] for name in (*TERM_TABLES, "init")}
    upstream = [each for each in whole.steps if each in needed or any(_reads(wanted, each) for wanted in needed)]
    run(Plan("bench mixes", upstream), store, LocalExecutor(), reporter)
    return step


def _reads(step: Step, source: Step) -> bool:
    return any(each is source or _reads(each, source) for each in step.inputs.values())


def _rows(store: Store, step: Step, groups: int) -> pa.Table:
    return store.folder(step).read(EXAMPLES).sort_by("prompt_id").slice(0, groups)


def _train(init: Any, tables: dict[str, Any], options: dict[str, Any], name: str) -> tuple[list[float], Any, pa.Table]:
    """Seconds of each step, how many steps took preferences and demonstrations, and the metrics."""
    ticks: list[float] = []
    kind, _, weight = name.partition(" ")
    entry = mix.find(kind)
    bound = Bound(entry, entry.validate({"weight": float(weight)}, name))
    with tempfile.TemporaryDirectory() as folder:
        space = StageContext(Path(folder), WarmCache(), lambda done, total, unit: ticks.append(time.perf_counter()))
        given = options | {"mix": bound, "epochs": 1}
        _, _, metrics, _ = optimize(init, ctx=space, **tables, **given)
    shares = [row["value"] for row in metrics.to_pylist() if row["metric"] == "preference_weight"][1:]
    return list(np.diff(ticks)), (sum(share > 0 for share in shares), sum(share < 1 for share in shares)), metrics


def _row(name: str, times: dict[str, list[list[float]]], turns: tuple[int, int]) -> dict[str, Any]:
    """`against_alone`: this run's seconds over those of the same number of steps of each objective alone.

    A step does the same work in every repeat, so each counts with its fastest: what else the machine did drops
    out, what the mix itself costs stays.
    """
    own, preference, imitation = (np.min(times[each], axis=0) for each in (name, *ALONE))
    return {
        "mix": name,
        "preference_steps": turns[0],
        "imitation_steps": turns[1],
        "seconds_a_step": _spread([np.mean(repeat) for repeat in times[name]]),
        "against_alone": round(float(own.sum() / (preference[: turns[0]].sum() + imitation[: turns[1]].sum())), 3),
    }


def _spread(values: list[Any]) -> str:
    return f"{np.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"
