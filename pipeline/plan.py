"""Recipe to steps with keys, inputs before consumers. All mistakes of a recipe are found here, at once."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pipeline.keys import canonical, key_of
from pipeline.recipe import Recipe
from pipeline.registry import Entry, nearest
from pipeline.stage import Input, Shape, shape_of, stages
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
    def shape(self) -> Shape:
        return shape_of(self.entry)

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


@dataclass
class Plan:
    """The steps that a recipe's target needs, in the order in which they can run."""

    name: str
    steps: list[Step] = field(default_factory=list)

    @property
    def target(self) -> Step:
        return self.steps[-1]


def make_plan(recipe: Recipe) -> Plan:
    """Check every name, type, wire and option of the recipe; raises WinnowError with all mistakes."""
    problems: list[str] = []
    entries = {name: _entry(name, body, problems) for name, body in recipe.steps.items()}
    wires = {name: _wires(name, body, recipe, problems) for name, body in recipe.steps.items()}
    needed = _order([recipe.target], wires, problems)
    order = _order([*(name for name in needed if _reads_files(entries[name])), recipe.target], wires, problems)
    options = {name: _options(name, recipe.steps[name], entries[name], name in order, problems) for name in entries}
    for name in order:
        _check_step(name, entries, wires[name], options[name], problems)
    if problems:
        raise WinnowError(*dict.fromkeys(problems))
    plan = Plan(recipe.name)
    made: dict[str, Step] = {}
    for name in order:
        inputs = {wire: made[source] for wire, source in wires[name].items()}
        made[name] = Step(name, entries[name], options[name], inputs, recipe.shards)  # type: ignore[arg-type]
        plan.steps.append(made[name])
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
            hint = nearest(source, list(recipe.steps))
            problems.append(f"{name}.from.{wire}: no step {source!r} in this recipe; {hint}")
    return {wire: source for wire, source in wires.items() if source in recipe.steps}


def _reads_files(entry: Entry | None) -> bool:
    """Such steps run as early as they can: what is wrong with the data is said before a model is trained."""
    return entry is not None and all(item.schema is None for item in shape_of(entry).inputs)


def _order(targets: list[str], wires: dict[str, dict[str, str]], problems: list[str]) -> list[str]:
    """Depth first from each target; a circle is a mistake that names its members."""
    if targets[-1] not in wires:
        problems.append(f"target: no step {targets[-1]!r} in this recipe; {nearest(targets[-1], list(wires))}")
        return []
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
    problems: list[str],
) -> None:
    entry = entries[name]
    if entry is None:
        return
    shape = shape_of(entry)
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
        problems += [f"{name}: {problem}" for problem in shape.check(options, frozenset(wires))]


def _mismatch(name: str, wire: Input, source: str, entry: Entry | None) -> list[str]:
    if entry is None or shape_of(entry).makes(wire.kind):
        return []
    return [f"{name}.from.{wire.name}: needs {_phrase(wire.kind)}, and step {source!r} ({entry.name}) makes none"]


def _phrase(kind: str) -> str:
    return "a model" if kind == "model" else f"a table of {kind}"
