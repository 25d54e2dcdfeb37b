"""Recipe to steps with keys, inputs before consumers. All mistakes of a recipe are found here, at once."""

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pipeline.config.keys import canonical, key_of
from pipeline.config.recipe import Recipe
from pipeline.config.rounds import why_not
from pipeline.registry import Entry, nearest
from pipeline.stage import Input, InputStep, StageSignature, signature_of, stages
from schemas import WinnowError


@dataclass(eq=False)
class Step:
    """One stage with its options and inputs; its key says where the result lives."""

    name: str
    entry: Entry
    options: dict[str, Any]
    inputs: dict[str, "Step"]
    shards: int

    @property
    def shape(self) -> StageSignature:
        return signature_of(self.entry)

    @property
    def stage(self) -> str:
        return self.entry.name

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the result, and nothing else."""
        return {
            "stage": self.entry.name,
            "version": self.shape.version,
            "shards": self.shards,
            "options": canonical({k: v for k, v in self.options.items() if k not in self.entry.execution}),
            "inputs": {name: step.key for name, step in self.inputs.items()},
        }

    @cached_property
    def key(self) -> str:
        return key_of(self.identity)

    @property
    def code(self) -> dict[str, str]:
        """Return digests of the plugin functions that the step uses, by name: none yet."""
        return {}


@dataclass
class Plan:
    """The steps that a recipe's targets need, in the order in which they can run; a target a round."""

    name: str
    steps: list[Step] = field(default_factory=list)
    targets: list[Step] = field(default_factory=list)
    part: list[Step] | None = None  # those to make, where not all are; what they read besides is sealed

    @property
    def wanted(self) -> list[Step]:
        return self.steps if self.part is None else self.part

    @property
    def target(self) -> Step:
        """The last round's."""
        return self.targets[-1]


def make_plan(recipe: Recipe) -> Plan:
    """Check every name, type, wire and option of the recipe; raises WinnowError with all mistakes."""
    problems: list[str] = []
    entries = {name: _entry(name, body, problems) for name, body in recipe.steps.items()}
    wires = {name: _wires(name, body, recipe, problems) for name, body in recipe.steps.items()}
    targets = _targets(recipe, problems)
    needed = _order(targets, wires, problems)
    order = _order([*(name for name in needed if reads_files(entries[name])), *targets], wires, problems)
    options = {name: _options(name, recipe.steps[name], entries[name], name in order, problems) for name in entries}
    wired: dict[str, InputStep] = {}
    for name in order:
        behind = {wire: wired[source] for wire, source in wires[name].items() if source in wired}
        wired[name] = InputStep(entries[name].name if entries[name] else "", options[name] or {}, behind)  # type: ignore[union-attr]
        _check_step(name, entries, wires[name], options[name], behind, problems)
    problems += _idle_rounds(recipe, order)
    if problems:
        raise WinnowError(*_once(problems))
    plan = Plan(recipe.name)
    made: dict[str, Step] = {}
    for name in order:
        inputs = {wire: made[source] for wire, source in wires[name].items()}
        made[name] = Step(name, entries[name], options[name], inputs, recipe.shards)  # type: ignore[arg-type]
        plan.steps.append(made[name])
    plan.targets = [made[name] for name in targets]
    return plan


def _entry(name: str, body: dict[str, Any], problems: list[str]) -> Entry | None:
    use = body.get("use", name)
    if use in stages.entries:
        return stages.entries[use]
    problems.append(f"{name}.use: unknown stage {use!r}; {nearest(use, list(stages.entries))}")
    return None


def _wires(name: str, body: dict[str, Any], recipe: Recipe, problems: list[str]) -> dict[str, str]:
    wires = {wire: source for wire, source in (body.get("from") or {}).items() if source is not None}
    for wire, source in wires.items():
        if source not in recipe.steps:
            hint = why_not(source, recipe.written, recipe.rounds)
            problems.append(f"{name}.from.{wire}: no step {source!r} in this recipe; {hint}")
    return {wire: source for wire, source in wires.items() if source in recipe.steps}


def reads_files(entry: Entry | None) -> bool:
    """No table, that is. Such steps run as early as they can: what is wrong with the data is said before training."""
    return entry is not None and all(item.schema is None for item in signature_of(entry).inputs)


def _targets(recipe: Recipe, problems: list[str]) -> list[str]:
    if recipe.targets[-1] in recipe.steps:
        return recipe.targets
    hint = why_not(recipe.target, recipe.written, recipe.rounds)
    problems.append(f"target: no step {recipe.target!r} in this recipe; {hint}")
    return []


def _idle_rounds(recipe: Recipe, order: list[str]) -> list[str]:
    """Several rounds in which the target is one and the same."""
    if recipe.rounds < 2 or not order or any("@" in name for name in order):
        return []
    return [
        f"rounds: {recipe.rounds} of the same, for nothing that {recipe.target!r} needs changes between them; wire "
        "a step as `from: {policy: {first: sft, then: optimize}}`, or write an overlay for each round"
    ]


def _order(targets: list[str], wires: dict[str, dict[str, str]], problems: list[str]) -> list[str]:
    """Depth first from each target; a circle is a mistake that names its members."""
    order: list[str] = []

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            problems.append(f"{name}.from: a circle: {' -> '.join([*trail[trail.index(name) :], name])}")
        elif name not in order:
            for source in wires[name].values():
                visit(source, (*trail, name))
            order.append(name)

    for target in targets:
        visit(target, ())
    return order


def _options(
    name: str, body: dict[str, Any], entry: Entry | None, needed: bool, problems: list[str]
) -> dict[str, Any] | None:
    if entry is None:
        return None
    try:
        return entry.validate(body.get("with") or {}, name)
    except WinnowError as error:
        # What an unneeded step lacks does not matter; what it says wrongly does.
        problems += [problem for problem in error.problems if needed or ": required" not in problem]
        return None


def _check_step(
    name: str,
    entries: dict[str, Entry | None],
    wires: dict[str, str],
    options: dict[str, Any] | None,
    wired: dict[str, InputStep],
    problems: list[str],
) -> None:
    entry = entries[name]
    if entry is None:
        return
    shape = signature_of(entry)
    known = {item.name: item for item in shape.inputs}
    for wire, source in wires.items():
        if wire not in known:
            problems.append(f"{name}.from.{wire}: {entry.name} has no such input; {nearest(wire, list(known))}")
        else:
            problems += _mismatch(name, known[wire], source, entries[source])
    problems += [
        f"{name}.from.{item.name}: required ({_phrase(item.kind)}), and the recipe does not wire it"
        for item in shape.inputs
        if not item.optional and item.name not in wires
    ]
    if options is not None:
        problems += [f"{name}: {problem}" for problem in shape.check(options, wired)]


def _mismatch(name: str, wire: Input, source: str, entry: Entry | None) -> list[str]:
    if entry is None or signature_of(entry).makes(wire.kind):
        return []
    return [f"{name}.from.{wire.name}: needs {_phrase(wire.kind)}, and step {source!r} ({entry.name}) makes none"]


def _phrase(kind: str) -> str:
    return "a model" if kind == "model" else f"a table of {kind}"


def _once(problems: list[str]) -> list[str]:
    """A mistake that several rounds share is told once, of the step as the recipe names it."""
    alike: dict[str, list[str]] = {}
    for problem in dict.fromkeys(problems):
        alike.setdefault(re.sub(r"(?<=\w)@\d+\b", "", problem), []).append(problem)
    return [re.sub(r"^(\w+)@\d+", r"\1", each[0]) if len(each) > 1 else each[0] for each in alike.values()]
