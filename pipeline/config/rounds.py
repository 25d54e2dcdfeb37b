"""Rounds: the steps that change from one round to the next are unrolled into `step@1`, `step@2`, ...

A wire `{first: sft, then: optimize}` reads sft in round 1 and, in every other round, what optimize made in the
round before; without rounds it reads sft. A step varies if it has such a wire, if the overlay of a round or a
--set of one round names it, or if it reads a step that varies; all others are made once, for all rounds.
A wire may say the round itself (`evaluate@1`). That alone makes no step vary: what compares rounds is one step.
"""

import re
from typing import Any

from pipeline.registry import nearest

MOST = 99
ENDS = ("first", "then")
Steps = dict[str, dict[str, Any]]


def split(name: str) -> tuple[str, int | None]:
    """`select@2` is step select in round 2; a step without rounds has None."""
    found = re.fullmatch(r"(.+)@([0-9]+)", name)
    return (found[1], int(found[2])) if found else (name, None)


def why_not(name: str, steps: list[str], rounds: int) -> str:
    """Why no step answers to `name`, and what to write; `steps` are the names as the recipe writes them."""
    step, number = split(name)
    if number is None or step not in steps:
        return nearest(step, steps)
    if not rounds:
        return f"it has no rounds; write {step!r}, or say how many `rounds` there are"
    if 1 <= number <= rounds:
        return f"{step} is one step for all rounds; write {step!r}"
    return f"its rounds are 1 to {rounds}"


def entries(written: Any, asked: Any) -> list[Steps]:
    """One overlay a round, none without rounds. `asked` is --set rounds=...; a number takes the first of a list."""
    if type(asked) is int and isinstance(written, list):
        return written[:asked]
    chosen = written if asked is None else asked
    return [{}] * chosen if type(chosen) is int else chosen or []


def malformed(written: Any, asked: Any) -> list[str]:
    """What is wrong with `rounds` as the recipe and --set have them; the entries are overlays, checked elsewhere."""
    problems = [problem for value in (written, asked) if value is not None for problem in _miscounted(value)]
    if not problems and type(asked) is int and isinstance(written, list) and asked > len(written):
        problems.append(
            f"rounds: {asked} asked for, and the recipe writes {len(written)}, an entry for each; "
            f"ask for at most {len(written)}, or write an entry ({{}} for none) for each round more"
        )
    return problems


def _miscounted(value: Any) -> list[str]:
    number = len(value) if isinstance(value, list) else value
    if type(number) is int and 1 <= number <= MOST:
        return []
    what = f"a number from 1 to {MOST}, or a list with an overlay ({{}} for none) for each"
    return [f"rounds: must be {what}; got {value!r}"]


def malformed_wire(place: str, source: Any, steps: list[str]) -> list[str]:
    """A wire is the name of a step, null, or a mapping with `first` and `then`, which are names or null."""
    if not isinstance(source, dict):
        if isinstance(source, str | None):
            return []
        return [f"{place}: must be the name of a step, or {{first: ..., then: ...}}; got {source!r}"]
    problems = [f"{place}.{end}: unknown; {nearest(str(end), list(ENDS))}" for end in source if end not in ENDS]
    for end in ENDS:
        problems += _malformed_end(f"{place}.{end}", end, source, steps)
    return problems


def _malformed_end(place: str, end: str, source: dict[str, Any], steps: list[str]) -> list[str]:
    if end not in source:
        return [f"{place}: required in a wire that changes from round to round; a step's name, or null for none"]
    name = source[end]
    if not isinstance(name, str | None):
        return [f"{place}: must be the name of a step, or null for none; got {name!r}"]
    if name is None or split(name)[0] in steps:
        return []
    return [f"{place}: no step {name!r} in this recipe; {nearest(name, steps)}"]


def unroll(rounds: list[Steps], named: set[str]) -> Steps:
    """All rounds' steps as one mapping; `named` are those that an overlay or a --set of one round names."""
    varying = named | _varying(rounds, named)
    made: Steps = {}
    for number, steps in enumerate(rounds, 1):
        for step, body in steps.items():
            stage = {"use": body.get("use", step)} if step in varying else {}
            made[_at(step, number, varying)] = _plain(body | stage, number, varying)
    return made


def first_only(steps: Steps) -> Steps:
    """The steps of a recipe without rounds: a wire that changes from round to round is its `first`."""
    return {step: _plain(body, 1, set()) for step, body in steps.items()}


def _varying(rounds: list[Steps], named: set[str]) -> set[str]:
    wires = [(step, source) for steps in rounds for step, body in steps.items() for source in _sources(body)]
    found = named | {step for step, source in wires if isinstance(source, dict)}
    while more := {step for step, source in wires if isinstance(source, str) and source in found} - found:
        found |= more
    return found


def _sources(body: dict[str, Any]) -> list[Any]:
    return list((body.get("from") or {}).values())


def _plain(body: dict[str, Any], number: int, varying: set[str]) -> dict[str, Any]:
    """The step with each wire as the name of one step, as this round reads it."""
    if not _sources(body):
        return body
    return body | {"from": {wire: _source(source, number, varying) for wire, source in body["from"].items()}}


def _source(source: Any, number: int, varying: set[str]) -> Any:
    """The name of one step, or null."""
    if not isinstance(source, dict):
        return _at(source, number, varying)
    if number == 1:
        return _at(source["first"], 1, varying)
    return _at(source["then"], number - 1, varying)


def _at(step: Any, number: int, varying: set[str]) -> Any:
    return f"{step}@{number}" if step in varying else step
