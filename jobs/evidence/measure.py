"""Tables of the figures: means over seeds and prompts with 95 % intervals, at equal KL too, and compute per method."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from jobs.evidence.figures import PAIRED, SEEDS, TWO_DRAWS, Basis, Figure, NotDrawnError, Point, plan_over
from jobs.methods import COLUMNS, WINS, Values, difference_interval, interval, values_by_key
from pipeline.config.estimates import finished_manifests, step_costs
from pipeline.config.plan import Plan, Step
from pipeline.config.rounds import split_round
from pipeline.resources import Profile
from pipeline.sql.catalog import Catalog, query
from pipeline.store.store import Json, Store
from schemas import WinnowError
from stages.evaluation.evaluate import bootstrap_interval

RESAMPLES = 2000
KL_VALUES = 5  # at which two methods are compared, between the ends of what both reach
START = ("prompts", "demonstrations", "preferences", "sft", "ranker", "annotator")  # steps that methods begin with
DRAWN_TOKENS = "SELECT key, sum(n_tokens)::BIGINT AS tokens FROM candidates GROUP BY key"
Row = dict[str, Any]


@dataclass
class PlannedPoint:
    """Point of a figure with a plan for each seed."""

    point: Point
    plans: list[Plan]


@dataclass
class PlannedFigure:
    """Figure with its points, and why some lines, or all of it, are not drawn."""

    figure: Figure
    points: list[PlannedPoint]
    left_out: list[str]

    @property
    def plans(self) -> list[Plan]:
        return [plan for planned in self.points for plan in planned.plans]

    def finished(self, catalog: Catalog) -> list[PlannedPoint]:
        """Return the points with the plans whose evaluations are all in the store, without those that have none."""
        keys = {manifest["key"] for manifest in catalog.manifests}
        points = [
            PlannedPoint(item.point, [plan for plan in item.plans if set(ends_of(plan)) <= keys])
            for item in self.points
        ]
        return [item for item in points if item.plans]


# Plans.


def plan_point(basis: Basis, point: Point) -> list[Plan]:
    """Return a plan of the point for each seed: of the draws and of the training. Raise WinnowError for mistakes."""
    plans = []
    overlay = basis.overlay | point.overlay
    others = [name for name in overlay if name.startswith("evaluate_")]
    for seed in range(point.seeds):
        defaults = [f"evaluations=[{', '.join(others)}]", *TWO_DRAWS, *point.method]
        sets = [*defaults, *basis.sets, *point.sets, *(f"{name}={seed}" for name in SEEDS)]
        plan = plan_over(overlay, point.recipe, basis.configs, sets, f"{point.run} seed={seed}")
        plan.tags = {"evidence": ""}
        plans.append(plan)
    return plans


def plan_figure(basis: Basis, figure: Figure) -> PlannedFigure:
    """Return a figure with its plans; a line that the configs cannot support is left out with the reason."""
    planned = PlannedFigure(figure, [], [])
    try:
        points = figure.points(basis)
    except NotDrawnError as reason:
        planned.left_out.append(str(reason))
        return planned
    for point in points:
        try:
            planned.points.append(PlannedPoint(point, plan_point(basis, point)))
        except WinnowError as error:
            planned.left_out.append(f"{point.line} {point.at}".strip() + f": {'; '.join(error.problems)}")
    return planned


def different_plans(figures: Iterable[PlannedFigure]) -> list[Plan]:
    """Return the plans of all figures; those that end in the same steps once, under their first name."""
    plans: dict[tuple[str, ...], Plan] = {}
    for plan in (plan for figure in figures for plan in figure.plans):
        plans.setdefault(ends_of(plan), plan)
    return list(plans.values())


def ends_of(plan: Plan) -> tuple[str, ...]:
    """Return the keys of a plan's evaluations, of all rounds."""
    return tuple(step.key for step in (*plan.targets, *plan.evaluations))


@dataclass(frozen=True)
class FigureCost:
    """Work of a figure beside the figures before it: steps, and seconds of those whose time is known."""

    name: str
    policies: int
    steps: int
    seconds: float
    unknown: list[str]  # stages of which nothing like it has finished in the store
    problems: list[str]  # steps that this machine cannot run, with the reason


def figure_costs(figures: Iterable[PlannedFigure], store: Store) -> list[FigureCost]:
    """Return what each figure will run, each step with the first figure that needs it.

    Steps with a network are estimated as `plan` does it, others by the median of finished ones of their stage.
    """
    manifests = finished_manifests(store)
    seen = {manifest["key"] for manifest in manifests}
    seconds: dict[str, list[float]] = {}
    for manifest in manifests:
        seconds.setdefault(manifest["stage"], []).append(manifest["seconds"])
    costs = []
    for planned in figures:
        steps, total, unknown, problems = 0, 0.0, dict[str, None](), list[str]()
        for plan in planned.plans:
            if {step.key for step in plan.steps} <= seen:
                continue
            for cost in step_costs(plan, None, Profile(), local=True, manifests=manifests):
                if cost.step.key in seen:
                    continue
                seen.add(cost.step.key)
                steps += 1
                problems += [cost.problem] if cost.problem else []
                estimate = cost.seconds.value
                if estimate is None and cost.step.stage not in seconds:
                    unknown[cost.step.stage] = None
                else:
                    total += median(seconds[cost.step.stage]) if estimate is None else estimate
        costs.append(FigureCost(planned.figure.name, len(planned.plans), steps, total, list(unknown), problems))
    return costs


# Tables.


def table_of_figure(planned: PlannedFigure, catalog: Catalog) -> list[Row]:
    """Return a row per point, and per round of it, that is finished: with intervals over seeds and prompts."""
    points = planned.finished(catalog)
    if not points:
        return []
    if planned.figure.name == "equal-kl":
        return equal_kl_rows(planned.points, catalog)
    rows = []
    seconds = compute_seconds(points, catalog) if planned.figure.name == "compute" else {}
    for item in points:
        for number in range(len(item.plans[0].targets)):
            keys = [plan.targets[number].key for plan in item.plans]
            _, round = split_round(item.plans[0].targets[number].name)
            row = point_row(item, keys, catalog)
            if len(item.plans[0].targets) > 1:
                row["round"] = number + 1
            if seconds:
                row["compute_seconds"] = float(np.mean([seconds[key] for key in keys]))
            evaluations = [step for plan in item.plans for step in plan.evaluations]
            if others := [step.key for step in evaluations if split_round(step.name)[1] == round]:
                of_others = point_row(item, others, catalog)
                row |= {f"other_{name}": of_others[name] for name in of_others if name.startswith((*WINS, "prompts"))}
            rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


def point_row(item: PlannedPoint, keys: list[str], catalog: Catalog) -> Row:
    """Return a point's means with the ends of their intervals: over seeds and prompts, of one seed over prompts."""
    values = values_by_key(catalog, keys)
    row: Row = {"line": item.point.line, "at": item.point.at, "x": item.point.x, "seeds": len(keys)}
    for metric, column in COLUMNS.items():
        table = np.stack([values[key][metric] for key in keys])
        if np.isnan(table).all(axis=1).any():
            continue
        row["prompts"] = max(row.get("prompts", 0), int((~np.isnan(table).all(axis=0)).sum()))
        mean, low, high = mean_and_interval(table)
        if metric in WINS:  # shares
            low, high = max(low, 0.0), min(high, 1.0)
        row |= {column: mean, f"{column}_low": low, f"{column}_high": high}
    if "kl_nats" in row:
        row["sqrt_kl"] = float(np.sqrt(max(0.0, row["kl_nats"])))
    return row


def mean_and_interval(table: Values) -> tuple[float, float, float]:
    if len(table) > 1:
        return interval(table)
    values = table[0][~np.isnan(table[0])]
    return float(values.mean()), *bootstrap_interval(values, RESAMPLES, np.random.default_rng(0))


# Equal KL.


def equal_kl_rows(points: list[PlannedPoint], catalog: Catalog) -> list[Row]:
    """Return the difference of two methods in gold at equal KL, at several KLs and in the mean over them.

    Each seed has a curve through its points, ordered by KL; between two neighbours every prompt's value is interpolated
    linearly in the root of KL. The KLs lie between the ends of what all curves of both methods reach.
    """
    rows: list[Row] = []
    for first, second in PAIRED:
        of_first, of_second = (
            list(curves_by_seed([item for item in points if item.point.line == line], catalog).values())
            for line in (first, second)
        )
        if not of_first or not of_second:
            continue
        low = max(curve.distances[0] for curve in (*of_first, *of_second))
        high = min(curve.distances[-1] for curve in (*of_first, *of_second))
        row: Row = {"line": f"{first} - {second}", "seeds": min(len(of_first), len(of_second))}
        if low >= high:
            rows.append(row | {"at": "no KL that all curves reach"})
            continue
        both = of_first[0].values.keys() & of_second[0].values.keys()
        metrics = [name for name in COLUMNS if name in both and name not in ("kl", "n_tokens")]
        grid = np.linspace(low, high, KL_VALUES)
        for distances in [*([distance] for distance in grid.tolist()), grid.tolist()]:
            at = f"KL={distances[0] ** 2:.2f}" if len(distances) == 1 else f"KL {low**2:.2f} to {high**2:.2f}"
            compared = row | {"at": at, "x": distances[0] if len(distances) == 1 else None}
            for metric in metrics:
                a, b = (
                    np.stack([np.mean([curve.at(metric, distance) for distance in distances], axis=0) for curve in of])
                    for of in (of_first, of_second)
                )  # [seeds, prompts]
                ends = difference_interval(a, b) if row["seeds"] > 1 else mean_and_interval(a[:1] - b[:1])
                name = COLUMNS[metric]
                compared |= {f"first_{name}": float(np.nanmean(a)), f"second_{name}": float(np.nanmean(b))}
                compared |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
            rows.append(compared)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


@dataclass
class Curve:
    """Points of one seed in the order of their root of KL, and per metric the values [points, prompts]."""

    distances: list[float]
    values: dict[str, Values]

    def at(self, metric: str, distance: float) -> Values:
        """Return the values of each prompt at a distance within the curve."""
        index = int(np.clip(np.searchsorted(self.distances, distance), 1, len(self.distances) - 1))
        low, high = self.distances[index - 1], self.distances[index]
        share = 0.0 if high == low else (distance - low) / (high - low)
        below, above = self.values[metric][index - 1], self.values[metric][index]
        return np.asarray((1 - share) * below + share * above, dtype=np.float64)


def curves_by_seed(points: list[PlannedPoint], catalog: Catalog) -> dict[int, Curve]:
    """Return a curve for each seed of which two points or more are finished and have a KL."""
    finished = {manifest["key"] for manifest in catalog.manifests}
    keys: dict[int, list[str]] = {}
    for item in points:
        for seed, plan in enumerate(item.plans):
            if plan.target.key in finished:
                keys.setdefault(seed, []).append(plan.target.key)
    keys = {seed: of_seed for seed, of_seed in sorted(keys.items()) if len(of_seed) > 1}
    values = values_by_key(catalog, [key for of_seed in keys.values() for key in of_seed]) if keys else {}
    curves = {}
    for seed, of_seed in keys.items():
        kl = {key: values[key]["kl"] for key in of_seed}
        if any(np.isnan(column).all() for column in kl.values()):
            continue
        distance = {key: max(0.0, float(np.nanmean(kl[key]))) ** 0.5 for key in of_seed}
        order = sorted(of_seed, key=lambda key: distance[key])
        tables: dict[str, Values] = {}
        for metric in COLUMNS:
            table = np.stack([values[key][metric] for key in order])
            if not np.isnan(table).all(axis=1).any():
                tables[metric] = table
        curves[seed] = Curve([distance[key] for key in order], tables)
    return curves


# Compute.


def compute_seconds(points: list[PlannedPoint], catalog: Catalog) -> dict[str, float]:
    """Return key of evaluate -> seconds of sampling, ranking and training up to its round, at the store's rates."""
    manifests = {manifest["key"]: manifest for manifest in catalog.manifests}
    sampled = {row["key"]: row["tokens"] for row in query(catalog, DRAWN_TOKENS).to_pylist()}
    units, seconds = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for manifest in manifests.values():
        if (name := _unit(manifest)) and "draws_of_earlier_steps" not in manifest["counters"]:
            units[manifest["stage"], name] += manifest["counters"][name]
            seconds[manifest["stage"], name] += manifest["seconds"]

    def priced(step: Step) -> float:
        manifest = manifests[step.key]
        name = "tokens" if step.stage == "sample" else _unit(manifest)
        if name is None or not units[step.stage, name]:
            return float(manifest["seconds"])
        count = sampled.get(step.key, 0) if step.stage == "sample" else manifest["counters"][name]
        return float(count * seconds[step.stage, name] / units[step.stage, name])

    result = {}
    for plan in (plan for item in points for plan in item.plans):
        for target in plan.targets:
            steps = training_steps(plan, split_round(target.name)[1])
            result[target.key] = sum(priced(step) for step in steps if step.key in manifests)
    return result


def training_steps(plan: Plan, round: int | None) -> list[Step]:
    """Return the steps behind the policy of a round, without those that all methods begin with, and what is behind."""
    policy = next(step for step in plan.steps if split_round(step.name) == ("optimize", round))
    start = [step for step in plan.steps if split_round(step.name)[0] in START]
    shared = {step.key for step in _behind(start)}
    return [step for step in _behind([policy]) if step.key not in shared]


def _behind(steps: Iterable[Step]) -> list[Step]:
    """Return steps and all that they were computed from, each once."""
    seen: dict[str, Step] = {}
    queue = list(steps)
    while queue:
        step = queue.pop()
        if step.key not in seen:
            seen[step.key] = step
            queue += step.inputs.values()
    return list(seen.values())


def _unit(manifest: Mapping[str, Any] | Json) -> str | None:
    return next((name for name in ("tokens", "ranker_calls") if manifest["counters"].get(name)), None)
