"""Cost of a step of each mix, against the same steps of one objective alone, in one alternating run."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.recipes import plan_named
from pipeline.config.plan import Plan
from pipeline.context import StageContext, WarmCache
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.execution.schedule import Reporter
from pipeline.store.store import Store
from schemas.tables import EXAMPLES
from stages.training.mixing import mix
from stages.training.optimize import optimize
from tests.bench.page import spread

ALONE = ("joint 1", "joint 0")
MIXES = (*ALONE, "joint 0.5", "sequence 0.5", "alright 0.5", "maxright 0.5")
OPTIMA = ("preference_optimum", "imitation_optimum")
TERM_TABLES = ("examples", "demonstrations")


def measure(
    store: Store, configs: list[Path], reporter: Reporter, groups: int, repeats: int, report: Callable[[str], None]
) -> pa.Table:
    """Return seconds per step of every mix over the first `groups` groups of each side: medians and spreads."""
    # Run the steps before maxright's `optimize`, and nothing more.
    plan = plan_named("maxright", configs, [])
    step = next(step for step in plan.steps if step.name == "optimize")
    needed = {step.inputs[name] for name in (*TERM_TABLES, "init")}
    for other in reversed(plan.steps):  # inputs come first in a plan
        if other in needed:
            needed.update(other.inputs.values())
    upstream = [other for other in plan.steps if other in needed]
    run(Plan("bench mixes", upstream), store, LocalExecutor(), reporter)
    folders = {name: store.folder(step.inputs[name]) for name in (*TERM_TABLES, "init")}
    inputs: dict[str, Any] = {
        name: folders[name].read(EXAMPLES).sort_by("prompt_id").slice(0, groups) for name in TERM_TABLES
    }
    inputs["init"] = folders["init"].model()

    times: dict[str, list[list[float]]] = {name: [] for name in MIXES}
    turns: dict[str, tuple[int, int]] = {}  # steps that took preferences, demonstrations
    metrics_of: dict[str, pa.Table] = {}  # the first repeat trains on each objective alone first
    for repeat in range(repeats):
        for n, name in enumerate(MIXES[:: 1 if repeat % 2 == 0 else -1]):
            optima = dict(zip(OPTIMA, map(metrics_of.get, ALONE), strict=True)) if name.startswith("maxright") else {}
            seconds, turns[name], metrics = _train(inputs | optima, step.options, name)
            metrics_of.setdefault(name, metrics)
            report(f"  {repeat * len(MIXES) + n + 1} of {repeats * len(MIXES)}: {name}, {sum(seconds):.1f} s")
            times[name].append(seconds)

    # `against_alone`: seconds over those of the same number of steps of each objective alone. A step is the same in
    # every repeat, so each counts with its fastest: other load of the machine drops out, the mix's own cost stays.
    rows = []
    fastest = {name: np.min(seconds, axis=0) for name, seconds in times.items()}
    for name in MIXES:
        alone = sum(fastest[other][:count].sum() for other, count in zip(ALONE, turns[name], strict=True))
        rows.append({
            "mix": name,
            "preference_steps": turns[name][0],
            "imitation_steps": turns[name][1],
            "seconds_a_step": spread([float(np.mean(seconds)) for seconds in times[name]], 3),
            "against_alone": round(float(fastest[name].sum() / alone), 3),
        })  # fmt: skip
    return pa.Table.from_pylist(rows)


def _train(inputs: dict[str, Any], options: dict[str, Any], name: str) -> tuple[list[float], tuple[int, int], pa.Table]:
    """Return the seconds of each step but the first, how many took preferences and demonstrations, and the metrics."""
    ticks: list[float] = []
    kind, _, weight = name.partition(" ")
    options = options | {"mix": mix.bind({"name": kind, "weight": float(weight)}), "epochs": 1}
    with tempfile.TemporaryDirectory() as folder:
        ctx = StageContext(Path(folder), WarmCache(), lambda done, total, unit: ticks.append(time.perf_counter()))
        _, _, metrics, _ = optimize(ctx=ctx, **inputs, **options)
    weights = [row["value"] for row in metrics.to_pylist() if row["metric"] == "preference_weight"][1:]
    turns = sum(weight > 0 for weight in weights), sum(weight < 1 for weight in weights)
    return list(np.diff(ticks)), turns, metrics
