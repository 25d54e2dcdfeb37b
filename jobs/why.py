"""Where two runs, or two steps, begin to differ: told is the field where it arises, not what follows from it."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.config.keys import differences
from pipeline.registry import nearest
from pipeline.store.inventory import links, manifests
from pipeline.store.store import Json, Store
from schemas import WinnowError

Same = Callable[[str, str], bool]  # are these two keys what one wire reads, on either side?
BEGINNING = re.compile(r"[0-9a-f]{4,16}")


@dataclass(frozen=True)
class Side:
    """What was asked about: a run's steps by name, or one step; and all steps of its run, if it has one."""

    said: str
    steps: dict[str, str]
    is_run: bool
    run: dict[str, str]

    def names(self, key: str) -> set[str]:
        return {name for name, own in self.run.items() if own == key}


def why(store: Store, one: str, other: str) -> list[str]:
    """Lines for people: each field that differs, and which steps differ only through their inputs.

    Both are runs, or both are steps (`run/step`, a key or its beginning). Raises WinnowError for unknown names.
    """
    sealed, runs = manifests(store), links(store)
    left, right = (_side(text, runs, sealed) for text in (one, other))
    if left.is_run != right.is_run:
        raise WinnowError(f"why {one} {other}: a run and a step; give two runs, or two steps as run/step or by key")
    comparison = Comparison(left, right, sealed)
    if left.is_run:
        comparison.runs()
    else:
        comparison.steps(*next(iter(left.steps.items())), next(iter(right.steps.values())))
    return comparison.lines()


def _side(text: str, runs: dict[str, dict[str, Json]], sealed: dict[str, Json]) -> Side:
    if text in runs:
        keys = _keys(runs[text])
        return Side(text, keys, True, keys)
    run, _, step = text.rpartition("/")
    if run in runs:
        if step not in runs[run]:
            raise WinnowError(f"{text}: run {run} has no step {step!r}; {nearest(step, list(runs[run]))}")
        keys = _keys(runs[run])
        return Side(text, {step: keys[step]}, False, keys)
    if not BEGINNING.fullmatch(text):
        raise WinnowError(f"{text}: no such run; {nearest(run or text, list(runs))}; a step is run/step, or its key")
    found = sorted(key for key in sealed if key.startswith(text))
    if len(found) != 1:
        known = f"{', '.join(found)} all begin so; write more of it" if found else "no sealed step's key begins so"
        raise WinnowError(f"{text}: {known}")
    return Side(text, {sealed[found[0]]["stage"]: found[0]}, False, {})


def _keys(links: dict[str, Json]) -> dict[str, str]:
    return {name: link["key"] for name, link in links.items()}


class Comparison:
    """What was found so far, and what remains to be said of it at once."""

    def __init__(self, left: Side, right: Side, manifests: dict[str, Json]) -> None:
        self.left, self.right, self.manifests = left, right, manifests
        self.found: list[str] = []
        self.through: list[str] = []
        self.unknown: list[str] = []
        self.seen: set[tuple[str, str]] = set()

    def runs(self) -> None:
        """Step by step, by name; a wire is the same if it comes from a step of the same name."""
        left, right = self.left.steps, self.right.steps
        for name in left:
            if name in right:
                self._step(name, left[name], right[name], lambda a, b: bool(self.left.names(a) & self.right.names(b)))
        for side, names in ((self.left, left.keys() - right.keys()), (self.right, right.keys() - left.keys())):
            if names:
                self.found.append(f"only in {side.said}: {', '.join(sorted(names))}")

    def steps(self, name: str, left: str, right: str) -> None:
        """Two steps, then what they read, wire by wire, down to where the difference comes from.

        What no run gives a name has that of the wires that lead there: `optimize.init` is the `init` of `optimize`.
        """
        if left == right or (left, right) in self.seen:
            return
        self.seen.add((left, right))
        self._step(name, left, right, self._alike)
        one, other = (self.manifests.get(key, {}).get("identity", {"inputs": {}}) for key in (left, right))
        for wire, source in one["inputs"].items():
            if self._alike(source, other["inputs"].get(wire)):
                called = min(self.left.names(source), default=f"{name}.{wire}")
                self.steps(called, source, other["inputs"][wire])

    def _alike(self, left: str, right: str | None) -> bool:
        """Two results of one stage, of which more can be told than that they differ."""
        one, other = self.manifests.get(left), self.manifests.get(right or "")
        return bool(one and other and one["stage"] == other["stage"])

    def _step(self, name: str, left: str, right: str, same: Same) -> None:
        if left == right:
            return
        one, other = self.manifests.get(left), self.manifests.get(right)
        if one is None or other is None:
            self.unknown.append(name)
            return
        own = list(self._own(one["identity"], other["identity"], same))
        self.found += [f"{name}.{line}" for line in own]
        if not own:
            self.through.append(name)

    def _own(self, left: Json, right: Json, same: Same) -> Iterator[str]:
        """Differences of two identities that do not come from those of their inputs."""
        yield from differences(left | {"inputs": None}, right | {"inputs": None})
        for wire in sorted(left["inputs"].keys() | right["inputs"].keys()):
            a, b = left["inputs"].get(wire), right["inputs"].get(wire)
            if a != b and not (a and b and same(a, b)):
                yield f"inputs.{wire}: {self._called(self.left, a)} -> {self._called(self.right, b)}"

    def _called(self, side: Side, key: str | None) -> str:
        if key is None:
            return "nothing"
        stage = self.manifests[key]["stage"] if key in self.manifests else "a step that is not sealed"
        return next(iter(sorted(side.names(key))), f"{stage} {key}")

    def lines(self) -> list[str]:
        said = list(self.found)
        if self.through:
            said.append(f"only through their inputs: {', '.join(self.through)}")
        if self.unknown:
            said.append(f"not sealed on both sides, so that nothing is known of them: {', '.join(self.unknown)}")
        said = said or [f"no difference: {self.left.said} and {self.right.said} have the same keys"]
        return said + list(self._adopted())

    def _adopted(self) -> Iterator[str]:
        for side in (self.left, self.right):
            for name, key in side.steps.items():
                if source := self.manifests.get(key, {}).get("adopted"):
                    yield f"{side.said}: {name} is adopted from {source['from']}"
