"""Rounds: the steps that change from one round to the next are unrolled into `step@1`, `step@2`, ...

An input `{first: sft, then: optimize}` reads sft in round 1 and, in every other round, what optimize made in the round
before; without rounds it reads sft. A step varies if it has such an input, if the overlay of a round or a --set of one
round names it, or if it reads a step that varies; all others are computed once, for all rounds. An input may name the
round itself (`evaluate@1`). That alone makes no step vary: what compares rounds is one step.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from pipeline.registry import nearest
from schemas import WinnowError

MAX_ROUNDS = 99
Steps = dict[str, dict[str, Any]]


def split_round(name: str) -> tuple[str, int | None]:
    """Return step and round: `select@2` is step select in round 2; a step without rounds has None."""
    match = re.fullmatch(r"(.+)@([0-9]+)", name)
    return (match[1], int(match[2])) if match else (name, None)


def run_and_round(run: str, runs: Collection[str], round: int | None = None) -> tuple[str, int | None]:
    """Return a run and the round that its name says: `raft@2`, as the leaderboard calls it, is round 2 of `raft`.

    Raise WinnowError if `round` is another one.
    """
    name, number = split_round(run)
    if run in runs or number is None or name not in runs:
        return run, round
    if round not in (None, number):
        raise WinnowError(f"{run} --round {round}: these are two rounds; omit --round")
    return name, number


def steps_of_round(run: str, steps: Mapping[str, Any], round: int | None) -> dict[str, Any]:
    """Return a run's steps in one round, by name, and those that all rounds share; all without a round.

    Raise WinnowError for a round that it does not have.
    """
    rounds = sorted({number for step in steps if (number := split_round(step)[1])})
    if round is not None and round not in rounds:
        raise WinnowError(f"run {run}: no round {round}; it has {', '.join(map(str, rounds)) or 'no rounds'}")
    return {step: link for step, link in steps.items() if round is None or split_round(step)[1] in (None, round)}


def unknown_step_hint(name: str, steps: list[str], rounds: int) -> str:
    """Return why no step has this name, and what to write; `steps` are the names as the recipe writes them."""
    step, number = split_round(name)
    if number is None or step not in steps:
        return nearest(step, steps)
    if not rounds:
        return f"it has no rounds; write {step!r}, or set the number of `rounds`"
    if 1 <= number <= rounds:
        return f"{step} is one step for all rounds; write {step!r}"
    return f"its rounds are 1 to {rounds}"


def round_overlays(written: Any, replacement: Any = None) -> list[Any]:
    """Return one overlay per round, none without rounds. Raise WinnowError for anything but a number or a list.

    `replacement` is the value of --set: a number takes the first of a written list, anything else replaces it.
    """
    problems = []
    for value in (written, replacement):
        number = len(value) if isinstance(value, list) else value
        if value is not None and (type(number) is not int or not 1 <= number <= MAX_ROUNDS):
            problems.append(
                f"rounds: must be a number from 1 to {MAX_ROUNDS}, or a list with an overlay ({{}} for none) for each, "
                f"got {value!r}"
            )
    if not problems and isinstance(replacement, int) and isinstance(written, list):
        if replacement <= len(written):
            return written[:replacement]
        problems.append(
            f"rounds: --set asks for {replacement}, and the recipe lists {len(written)}, an entry for each; "
            f"ask for at most {len(written)}, or add an entry ({{}} for none) for each further round"
        )
    if problems:
        raise WinnowError(*problems)
    rounds = written if replacement is None else replacement
    return [{}] * rounds if isinstance(rounds, int) else rounds or []


def unroll(rounds: list[Steps], named: set[str]) -> Steps:
    """Return the steps of all rounds as one mapping, those that vary once per round, as `step@1`, `step@2`, ...

    `rounds` are the steps of each round with its overlay over them; `named` are those that the overlay or a --set of
    one round names. With `rounds: [{}, {select: {with: {seed: 1}}}]`, `select` is unrolled because it is named, and so
    is `pair`, which reads it; `sample` stays one step unless its policy is `{first: sft, then: optimize}`.
    """
    # What varies: what is named, what is like it, what has an input that changes, and then whatever reads any of them.
    varying = named | {step for steps in rounds for step in steps if steps[step] != rounds[0][step]}
    inputs = [
        (step, source)
        for steps in rounds
        for step, body in steps.items()
        for source in (body.get("from") or {}).values()
    ]
    varying |= {step for step, source in inputs if isinstance(source, dict)}
    while more := {step for step, source in inputs if isinstance(source, str) and source in varying} - varying:
        varying |= more
    unrolled: Steps = {}
    for number, steps in enumerate(rounds, 1):
        for step, body in steps.items():
            if step in varying:
                unrolled[f"{step}@{number}"] = resolved(body | {"use": body.get("use", step)}, number, varying)
            else:
                unrolled[step] = resolved(body, number, varying)
    return unrolled


def resolved(body: dict[str, Any], number: int = 1, varying: frozenset[str] | set[str] = frozenset()) -> dict[str, Any]:
    """Return the step with the name of one step, or None, for each input: what this round reads.

    Without rounds, an input that changes from round to round is its `first`.
    """
    inputs: dict[str, str | None] = {}
    for name, source in (body.get("from") or {}).items():
        read_from = number
        if isinstance(source, dict):
            source, read_from = (source["first"], 1) if number == 1 else (source["then"], number - 1)
        inputs[name] = f"{source}@{read_from}" if source in varying else source
    return body | {"from": inputs} if inputs else body
