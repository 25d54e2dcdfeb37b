"""--set: one option of one step, in every round or in one, over whatever the files say."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from pipeline.config.rounds import Steps, split, why_not
from pipeline.config.yaml import parse
from pipeline.registry import nearest
from schemas import WinnowError


@dataclass(frozen=True)
class Override:
    """Of a setting (no path), of a step in every round, or of a step in one round."""

    text: str
    name: str
    path: tuple[str, ...]
    value: Any

    @property
    def step(self) -> str:
        return split(self.name)[0]

    @property
    def round(self) -> int | None:
        return split(self.name)[1]


def overrides_of(sets: tuple[str, ...], settings: Collection[str], problems: list[str]) -> list[Override]:
    """Those that can be read; what is wrong with the others goes to `problems`."""
    made = []
    for text in sets:
        try:
            made.append(_override(text, settings))
        except WinnowError as error:
            problems += error.problems
    return made


def _override(text: str, settings: Collection[str]) -> Override:
    """`step.option=value`, `step.option.inner=value`, `step@2.option=value` or `setting=value`; the value is YAML."""
    path, equals, value = text.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise WinnowError(f"--set {text}: must read step.option=value")
    if len(names) < 2 and names[0] not in settings:
        hint = nearest(names[0], list(settings))
        raise WinnowError(f"--set {text}: must read step.option=value, or name a setting of the whole; {hint}")
    return Override(text, names[0], tuple(names[1:]), parse(value, f"--set {text}"))


def apply(overrides: list[Override], rounds: list[Steps], count: int) -> list[str]:
    """Change the steps in place, and tell what could not be; `count` is 0 where the recipe has no rounds."""
    problems: list[str] = []
    for override in overrides:
        try:
            _apply(override, rounds, count)
        except WinnowError as error:
            problems += error.problems
    return problems


def _apply(override: Override, rounds: list[Steps], count: int) -> None:
    known, only = list(rounds[0]), override.round
    if override.step not in known or (only is not None and not 1 <= only <= count):
        hint = why_not(override.name, known, count)
        raise WinnowError(f"--set {override.text}: unknown step {override.name!r}; {hint}")
    for number, steps in enumerate(rounds, 1):
        if only in (None, number):
            _assign(_mapping(_mapping(steps, override.step), "with"), override)


def _assign(place: dict[str, Any], override: Override) -> None:
    for name in override.path[:-1]:
        place = _mapping(place, name)
    place[override.path[-1]] = override.value


def _mapping(parent: dict[str, Any], name: str) -> dict[str, Any]:
    """The mapping at `name`; a plain function name opens up into a mapping with `name`."""
    value = parent.get(name)
    if not isinstance(value, str | dict | None):
        raise WinnowError(f"--set: {name} is {value!r}, which has no options of its own")
    parent[name] = {"name": value} if isinstance(value, str) else dict(value or {})
    inner: dict[str, Any] = parent[name]
    return inner
