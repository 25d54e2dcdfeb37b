"""Sweeps: a run for each value of an option, and for each combination of several; what runs share is computed once."""

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from itertools import product
from typing import Any

import pyarrow as pa

from jobs import recipes
from pipeline.config.plan import Plan, merged_warnings
from pipeline.config.recipe import Override, as_file_name, option_label
from pipeline.config.yaml import parse, parse_items
from pipeline.sql.replicates import drawn_from, method_keys
from pipeline.store.store import Store
from schemas import WinnowError

LABEL_BYTES = 60  # of the values in a run's name; a longer one is cut, and made unique by a hash


@dataclass(frozen=True)
class Axis:
    """Option of a sweep, and its values as they are written."""

    option: str
    texts: list[str]

    @classmethod
    def parse(cls, text: str) -> "Axis":
        """Read `step.option=value,value,...`: the values are those of a YAML list without its brackets."""
        option, equals, values = text.partition("=")
        if not equals or not option.strip() or not values.strip():
            raise WinnowError(f"--over {text}: must be step.option=value,value,...")
        axis = cls(option.strip(), parse_items(values, f"--over {text}"))
        counts = Counter(json.dumps(parse(value, f"--over {text}"), sort_keys=True) for value in axis.texts)
        if twice := [value for value, count in counts.items() if count > 1]:
            raise WinnowError(f"--over {text}: {twice[0]} is listed twice; list each value once")
        return axis

    @property
    def sets(self) -> list[str]:
        """Return each value as --set has it."""
        return [f"{self.option}={text}" for text in self.texts]


@dataclass(frozen=True)
class Sweep:
    """Plans of a sweep, the beginning of each run's name without its values, and notes about all of them."""

    plans: list[Plan]
    bases: dict[str, str]
    notes: list[str]


@merged_warnings()
def plan_sweep(
    names: list[str], configs: list[Any], sets: list[str], over: list[str], last: str | None = None
) -> Sweep:
    """Return a plan for each recipe and each combination of values, under names such as `rso rule.beta=0.1 seed=0`.

    last: the step that a command ends with (jobs/recipes.py). Raise WinnowError with all mistakes: those of every plan,
    an option that is listed twice or also given by --set, and values that make no other run because they say how a step
    runs, or because the target does not need the step.
    """
    axes: list[Axis] = []
    problems: list[str] = []
    for text in over:
        try:
            axes.append(Axis.parse(text))
        except WinnowError as error:
            problems += error.problems
    for option, count in Counter(axis.option for axis in axes).items():
        if count > 1:
            problems.append(f"--over {option}: given {count} times; list its values in one --over")
        problems += [f"--set {text} and --over {option}: give one of them" for text in sets
                     if text.partition("=")[0].strip() == option]  # fmt: skip
    if problems:
        raise WinnowError(*problems)

    result = Sweep([], {}, [])
    for name in names:
        path = recipes.recipe_path(name)
        plans: dict[tuple[str, ...], Plan] = {}  # by the values of the axes
        for values in product(*(axis.sets for axis in axes)):
            try:
                plan = plans[values] = recipes.plan_named(name, configs, [*sets, *values], path.stem, last)
            except WinnowError as error:
                for problem in error.problems:
                    for value in values:  # which the plan knows as --set
                        problem = problem.replace(f"--set {value}", f"--over {value}")
                    problems.append(f"{name}: {problem}")
                continue
            others = {*(axis.option for axis in axes), *recipes.options_beside(path, [*sets, *values], plan)}
            base = recipes.run_name(path, sets, plan, others)
            labels = _labels(axes, {*others, *(text.partition("=")[0].strip() for text in sets)})
            plan.name = f"{base} {as_file_name(' '.join(labels[value] for value in values), LABEL_BYTES)}"
            if plan.name in result.bases:
                problems.append(f"{name}: two runs would be {plan.name!r}; rename a file, or use two commands "
                                "with a --store each")  # fmt: skip
            result.bases[plan.name] = base
            result.plans.append(plan)
        problems += [f"{name}: {line}" for line in _without_effect(axes, plans)]
    if problems:
        raise WinnowError(*dict.fromkeys(problems))
    result.notes.extend(_notes(result.plans))
    return result


def sweep_table(plans: list[Plan], store: Store, to_run: Collection[str]) -> pa.Table:
    """Return a row per run: its steps, how many are cached, shared with rows above, and which will run.

    to_run: the keys of all that will; `steps` are those of the plan's part, each key once.
    """
    seen: set[str] = set()
    rows = []
    for plan in plans:
        steps = list({step.key: step for step in plan.steps_to_run}.values())  # a judge may be the proxy again
        cached = {step.key for step in steps} - set(to_run)
        new = [step.name for step in steps if step.key not in seen | cached]
        shared = {step.key for step in steps if step.key in seen - cached}
        row = {"run": plan.name, "steps": len(steps), "cached": len(cached), "shared": len(shared)}
        rows.append(row | {"will run": len(new), "these": ", ".join(new)})
        seen |= {step.key for step in steps}
    return pa.Table.from_pylist(rows)


def _labels(axes: list[Axis], options: Collection[str]) -> dict[str, str]:
    """Return the short form of each value in a run's name, whose option is told from these."""
    labels = {}
    for axis in axes:
        for text in axis.texts:
            value, label = parse(text, "--over"), text
            if isinstance(value, dict) and isinstance(value.get("name"), str):  # `hinge(delta=1.0)`
                arguments = ",".join(f"{name}={option}" for name, option in value.items() if name != "name")
                label = f"{value['name']}({arguments})" if arguments else value["name"]
            labels[f"{axis.option}={text}"] = f"{option_label(axis.option, options)}={''.join(label.split())}"
    return labels


def _without_effect(axes: list[Axis], plans: dict[tuple[str, ...], Plan]) -> list[str]:
    """Return a line for each axis that says how a step runs, or of which two values make the same run."""
    problems = []
    for n, axis in enumerate(axes):
        if any(recipes.is_execution(Override.parse(axis.sets[0]), plan) for plan in plans.values()):
            problems.append(
                f"--over {axis.option}: says how a step runs and not what it computes, so all values would be the same "
                "run; give one value with --set"
            )
            continue
        alike: dict[Any, list[str]] = {}  # the other axes' values and all keys of the run -> values of this axis
        for values, plan in plans.items():
            rest = (*values[:n], *values[n + 1 :], *(step.key for step in plan.steps))
            alike.setdefault(rest, []).append(values[n].partition("=")[2])
        if same := next((texts for texts in alike.values() if len(texts) > 1), None):
            problems.append(
                f"--over {axis.option}: {' and '.join(same)} would be the same run, because the target does not depend "
                "on the difference; omit it, or sweep this recipe in a command of its own"
            )
    return problems


def _notes(plans: list[Plan]) -> list[str]:
    """Return a note if runs that differ in seeds alone evaluate one policy: they are no replicates of its training."""
    steps = {step.key: {"key": step.key, "stage": step.stage, "identity": step.identity}
             for plan in plans for step in plan.steps}  # fmt: skip
    methods = method_keys(list(steps.values()))
    policies: dict[str, list[str]] = {}
    for plan in plans:
        if candidates := plan.target.inputs.get("candidates"):
            policies.setdefault(methods[plan.target.key], []).append(drawn_from(candidates.identity))
    if all(len(set(samples)) == len(samples) for samples in policies.values()):
        return []
    return [
        "some of these runs evaluate one policy: a seed of the evaluation alone is no further seed of a method on the "
        "leaderboard; sweep one of the training, such as optimize.seed"
    ]
