"""Explanation of why two runs, or two steps, differ: the fields where a difference arises, not what follows from it."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.config.keys import differences
from pipeline.registry import nearest
from pipeline.store.store import Json, Store
from schemas import WinnowError

SameInput = Callable[[str, str], bool]  # whether two keys, one per side, count as the same input
KEY_PREFIX = re.compile(r"[0-9a-f]{4,16}")


@dataclass(frozen=True)
class Side:
    """One argument of `winnow why`: the steps that it names, by name, and all steps of its run, if it has one."""

    argument: str
    steps: dict[str, str]  # name -> key
    is_run: bool
    run_steps: dict[str, str]

    def names(self, key: str) -> set[str]:
        return {name for name, step_key in self.run_steps.items() if step_key == key}


def why(store: Store, one: str, other: str) -> list[str]:
    """Return lines for people: each field that differs, and the steps that differ only through their inputs.

    Both arguments are runs, or both are steps (`run/step`, a key or its beginning). Raise WinnowError for unknown
    names.
    """
    finished, runs = {manifest["key"]: manifest for manifest in store.sealed()}, store.runs()
    left, right = (_side(argument, runs, finished) for argument in (one, other))
    if left.is_run != right.is_run:
        raise WinnowError(f"why {one} {other}: a run and a step; give two runs, or two steps as run/step or by key")
    comparison = Comparison(left, right, finished)
    if left.is_run:
        comparison.compare_runs()
    else:
        comparison.compare_steps(*next(iter(left.steps.items())), next(iter(right.steps.values())))
    return comparison.lines()


def _side(argument: str, runs: dict[str, dict[str, Json]], finished: dict[str, Json]) -> Side:
    if argument in runs:
        keys = {name: link["key"] for name, link in runs[argument].items()}
        return Side(argument, keys, True, keys)
    run, _, step = argument.rpartition("/")
    if run in runs:
        if step not in runs[run]:
            raise WinnowError(f"{argument}: run {run} has no step {step!r}; {nearest(step, list(runs[run]))}")
        keys = {name: link["key"] for name, link in runs[run].items()}
        return Side(argument, {step: keys[step]}, False, keys)
    if not KEY_PREFIX.fullmatch(argument):
        hint = nearest(run or argument, list(runs))
        raise WinnowError(f"{argument}: no such run; {hint}; a step is run/step, or its key")
    matches = sorted(key for key in finished if key.startswith(argument))
    if len(matches) != 1:
        problem = (
            f"{', '.join(matches)} begin with it; give more digits"
            if matches
            else "no finished step's key begins with it"
        )
        raise WinnowError(f"{argument}: {problem}")
    return Side(argument, {finished[matches[0]]["stage"]: matches[0]}, False, {})


class Comparison:
    """Differences between two sides, in the order in which they are found."""

    def __init__(self, left: Side, right: Side, manifests: dict[str, Json]) -> None:
        self.left, self.right, self.manifests = left, right, manifests
        self.differences: list[str] = []
        self.only_through_inputs: list[str] = []
        self.unfinished: list[str] = []
        self.seen: set[tuple[str, str]] = set()

    def compare_runs(self) -> None:
        """Compare steps of equal name; inputs count as the same if they come from steps of equal name."""
        left, right = self.left.steps, self.right.steps
        for name in left:
            if name in right:
                self._compare(name, left[name], right[name], self._same_name)
        for side, names in ((self.left, left.keys() - right.keys()), (self.right, right.keys() - left.keys())):
            if names:
                self.differences.append(f"only in {side.argument}: {', '.join(sorted(names))}")

    def compare_steps(self, name: str, left: str, right: str) -> None:
        """Compare two steps, then their inputs one by one, down to where the difference arises.

        A step without a name in a run is called after the inputs that lead to it: `optimize.init` is the `init` of
        `optimize`.
        """
        if left == right or (left, right) in self.seen:
            return
        self.seen.add((left, right))
        self._compare(name, left, right, self._same_stage)
        one, other = (self.manifests.get(key, {}).get("identity", {"inputs": {}}) for key in (left, right))
        for input_name, source in one["inputs"].items():
            if self._same_stage(source, other["inputs"].get(input_name)):
                source_name = min(self.left.names(source), default=f"{name}.{input_name}")
                self.compare_steps(source_name, source, other["inputs"][input_name])

    def _same_name(self, left: str, right: str) -> bool:
        return bool(self.left.names(left) & self.right.names(right))

    def _same_stage(self, left: str, right: str | None) -> bool:
        """Return whether both are finished results of one stage, so that more can be said than that they differ."""
        one, other = self.manifests.get(left), self.manifests.get(right or "")
        return bool(one and other and one["stage"] == other["stage"])

    def _compare(self, name: str, left: str, right: str, same_input: SameInput) -> None:
        """Note the differences of two steps that do not come from those of their inputs."""
        if left == right:
            return
        one, other = self.manifests.get(left), self.manifests.get(right)
        if one is None or other is None:
            self.unfinished.append(name)
            return
        left_inputs, right_inputs = one["identity"]["inputs"], other["identity"]["inputs"]
        lines = list(differences(one["identity"] | {"inputs": None}, other["identity"] | {"inputs": None}))
        for input_name in sorted(left_inputs.keys() | right_inputs.keys()):
            a, b = left_inputs.get(input_name), right_inputs.get(input_name)
            if a != b and not (a and b and same_input(a, b)):
                lines.append(f"inputs.{input_name}: {self._label(self.left, a)} -> {self._label(self.right, b)}")
        self.differences += [f"{name}.{line}" for line in lines]
        if not lines:
            self.only_through_inputs.append(name)

    def _label(self, side: Side, key: str | None) -> str:
        if key is None:
            return "nothing"
        stage = self.manifests[key]["stage"] if key in self.manifests else "a step that is not finished"
        return min(side.names(key), default=f"{stage} {key}")

    def lines(self) -> list[str]:
        """Return the differences, and what can be said of the other steps, as lines for people."""
        lines = list(self.differences)
        if self.only_through_inputs:
            lines.append(f"only through their inputs: {', '.join(self.only_through_inputs)}")
        if self.unfinished:
            lines.append(f"not finished on both sides, so that they cannot be compared: {', '.join(self.unfinished)}")
        lines = lines or [f"no difference: {self.left.argument} and {self.right.argument} have the same keys"]
        for side in (self.left, self.right):
            for name, key in side.steps.items():
                if source := self.manifests.get(key, {}).get("adopted"):
                    lines.append(f"{side.argument}: {name} is adopted from {source['from']}")
        return lines
