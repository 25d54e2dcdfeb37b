"""Explanation of why two runs, or two steps, differ: the fields where a difference arises, not what follows from it."""

import re

from pipeline.config.keys import differences
from pipeline.config.rounds import run_and_round
from pipeline.registry import nearest
from pipeline.store.store import Json, Store
from schemas import WinnowError

KEY_PREFIX = re.compile(r"[0-9a-f]{4,16}")


def explain_difference(store: Store, one: str, other: str) -> list[str]:
    """Return lines for people: each field that differs, and the steps that differ only through their inputs.

    Both arguments are runs, or both are steps (`run/step`, a key or its beginning). Raise WinnowError for unknown
    names.
    """
    finished, runs = {manifest["key"]: manifest for manifest in store.sealed()}, store.runs()
    (steps_a, names_a), (steps_b, names_b) = (_find_steps(argument, runs, finished) for argument in (one, other))
    if (one in runs) != (other in runs):
        raise WinnowError(f"why {one} {other}: a run and a step; give two runs, or two steps as run/step or by key")

    # Pairs of steps to compare. Of two runs: the steps of equal name. Of two steps: they, then their inputs of equal
    # name, down to where the difference arises, as long as both are finished results of one stage, so that more can be
    # said than that they differ. A step without a name in a run is called after the inputs that lead to it:
    # `optimize.init` is the `init` of `optimize`.
    if one in runs:
        pairs = [(name, key, steps_b[name]) for name, key in steps_a.items() if name in steps_b]
    else:
        pairs = [(*next(iter(steps_a.items())), next(iter(steps_b.values())))]
    same_inputs = {(a, b) for _, a, b in pairs}
    if one not in runs:
        for name, a, b in pairs:
            if a == b or a not in finished or b not in finished:
                continue
            for input_name, source in finished[a]["identity"]["inputs"].items():
                match = finished[b]["identity"]["inputs"].get(input_name)
                stages = [finished[key]["stage"] for key in (source, match) if key in finished]
                if len(stages) == 2 and stages[0] == stages[1] and (source, match) not in same_inputs:
                    same_inputs.add((source, match))
                    pairs.append((names_a.get(source, f"{name}.{input_name}"), source, match))

    # Differences of each pair, except those of inputs that are a pair themselves: these are that pair's own.
    lines: list[str] = []
    only_through_inputs: list[str] = []
    unfinished: list[str] = []
    for name, a, b in pairs:
        if a == b:
            continue
        if a not in finished or b not in finished:
            unfinished.append(name)
            continue
        old, new = finished[a]["identity"], finished[b]["identity"]
        changes = differences(old | {"inputs": None}, new | {"inputs": None})
        for input_name in sorted(old["inputs"].keys() | new["inputs"].keys()):
            sources = old["inputs"].get(input_name), new["inputs"].get(input_name)
            if sources[0] != sources[1] and sources not in same_inputs:
                labels = []
                for key, names in zip(sources, (names_a, names_b), strict=True):
                    stage = finished[key]["stage"] if key in finished else "a step that is not finished"
                    labels.append(names.get(key, f"{stage} {key}") if key else "nothing")
                changes.append(f"inputs.{input_name}: {' -> '.join(labels)}")
        lines += [f"{name}.{change}" for change in changes]
        if not changes:
            only_through_inputs.append(name)

    if one in runs:
        for argument, rest in ((one, steps_a.keys() - steps_b.keys()), (other, steps_b.keys() - steps_a.keys())):
            if rest:
                lines.append(f"only in {argument}: {', '.join(sorted(rest))}")
    if only_through_inputs:
        lines.append(f"only through their inputs: {', '.join(only_through_inputs)}")
    if unfinished:
        lines.append(f"not finished on both sides, so that they cannot be compared: {', '.join(unfinished)}")
    lines = lines or [f"no difference: {one} and {other} have the same keys"]
    for argument, steps in ((one, steps_a), (other, steps_b)):
        for name, key in steps.items():
            if source := finished.get(key, {}).get("adopted"):
                lines.append(f"{argument}: {name} is adopted from {source['from']}")
    return lines


def _find_steps(
    argument: str, runs: dict[str, dict[str, Json]], finished: dict[str, Json]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return name -> key of the steps that an argument names, and key -> name of all steps of its run, if any."""
    run, _, step = (argument, "", "") if argument in runs else argument.rpartition("/")
    if run in runs:
        keys = {name: link["key"] for name, link in runs[run].items()}
        names = {key: name for name, key in sorted(keys.items(), reverse=True)}  # the first of several names
        if argument in runs:
            return keys, names
        if step not in keys:
            raise WinnowError(f"{argument}: run {run} has no step {step!r}; {nearest(step, list(keys))}")
        return {step: keys[step]}, names
    if run_and_round(argument, runs)[1] is not None:
        name, number = run_and_round(argument, runs)
        raise WinnowError(f"{argument}: a round is no run of its own; compare its steps, as {name}/optimize@{number}")
    if not KEY_PREFIX.fullmatch(argument):
        hint = nearest(run or argument, list(runs))
        raise WinnowError(f"{argument}: no such run; {hint}; a step is run/step, or its key")
    matches = sorted(key for key in finished if key.startswith(argument))
    if len(matches) != 1:
        ambiguous = f"{', '.join(matches)} begin with it; give more digits"
        raise WinnowError(f"{argument}: {ambiguous if matches else 'no key of a finished step begins with it'}")
    return {finished[matches[0]]["stage"]: matches[0]}, {}
