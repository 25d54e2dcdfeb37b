"""YAML to steps: one `extends`, a world's data and models between base and recipe, and --set overrides.

A recipe is a mapping of step names to `use` (a stage; the step's own name by default), `from` (inputs)
and `with` (options). `shards`, `target`, `about` and `extends` are settings of the whole.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from pipeline.registry import nearest
from schemas import WinnowError

SETTINGS = {"about": str, "extends": str, "shards": int, "target": str}
PARTS = ("use", "from", "with")


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: plain PyYAML reads 5e-7 as a string. A name given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [name.value for name, _ in node.value]
        if double := {name for name in names if names.count(name) > 1}:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {sorted(double)[0]!r} stands twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)$|^[-+]?[0-9]+\.[0-9]*$|^[-+]?\.(inf|Inf)$"),
    list("-+0123456789."),
)


@dataclass
class Recipe:
    """Steps as written: not yet checked against any stage."""

    name: str
    shards: int = 8
    target: str = "evaluate"
    about: str = ""
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)


def load_recipe(
    path: Path,
    overlays: tuple[Path, ...] = (),
    sets: tuple[str, ...] = (),
    name: str | None = None,
    library: tuple[Path, ...] = (),
) -> Recipe:
    """Base, world, recipe, --set, each over the one before; raises WinnowError with all mistakes.

    What a method says of itself outranks what a world says of all methods. A base is looked for beside
    the recipe, then in the folders of `library`.
    """
    recipe = _read(path)
    base = _base(recipe, (path.parent, *library))
    layers = [*base, *(_read(overlay) for overlay in overlays), recipe]
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, layer)
    problems = [problem for assignment in sets for problem in _attempt(_assign, merged, assignment)]
    if problems:
        raise WinnowError(*problems)
    return _recipe(merged, name or _run_name(path.stem + "".join(f"[{item}]" for item in sets)), str(path))


def _attempt(do: Callable[..., None], *args: Any) -> tuple[str, ...]:
    """What went wrong, so that all mistakes can be told at once."""
    try:
        do(*args)
    except WinnowError as error:
        return error.problems
    return ()


def _base(recipe: dict[str, Any], folders: tuple[Path, ...]) -> list[dict[str, Any]]:
    """What the recipe extends: beside it, or one of ours. One level, so that a recipe is read in one look."""
    name = recipe.get("extends")
    if name is None:
        return []
    found = [path for folder in folders if (path := folder / f"{name}.yaml").exists()]
    if not found:
        raise WinnowError(f"extends: no recipe {name!r} in {' or '.join(map(str, folders))}")
    base = _read(found[0])
    if "extends" in base:
        raise WinnowError(f"extends: {name} itself extends {base['extends']}; extend {base['extends']} instead")
    return [base]


def _run_name(name: str) -> str:
    """The name, if a file can have it; else a part of it, told apart from others by a hash."""
    plain = name.replace("/", "_").encode()[:150].decode(errors="ignore")
    return name if plain == name else f"{plain}-{sha256(name.encode()).hexdigest()[:8]}"


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WinnowError(f"recipe {path}: cannot be read ({error})") from None
    content = _parse(text, f"recipe {path}")
    if not isinstance(content, dict):
        raise WinnowError(f"recipe {path}: must be a mapping of step names, got {type(content).__name__}")
    return _rooted(content, path.parent)


def _parse(text: str, place: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError is a date that does not exist
        raise WinnowError(f"{place}: not YAML: {' '.join(str(error).split())}") from None


def _rooted(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`./data.jsonl` in a recipe file means beside that file, wherever the command runs."""
    if isinstance(content, dict):
        return {name: _rooted(value, folder) for name, value in content.items()}
    if isinstance(content, str) and content.startswith(("./", "../")):
        return str(folder / content)
    return content


def _merge(below: Any, above: Any) -> Any:
    """Mappings merge; anything else replaces. A step with another `use`, or a function with another name, is new."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if any(name in above and above[name] != below.get(name, above[name]) for name in ("use", "name")):
        return above
    return below | {name: _merge(below.get(name), value) for name, value in above.items()}


def _assign(merged: dict[str, Any], assignment: str) -> None:
    """`step.option=value` or `step.option.inner=value`; the value is YAML."""
    path, equals, value = assignment.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names) or (len(names) < 2 and names[0] not in SETTINGS):
        raise WinnowError(f"--set {assignment}: must read step.option=value")
    parsed = _parse(value, f"--set {assignment}")
    if len(names) == 1:
        merged[names[0]] = parsed
        return
    if names[0] not in merged:
        raise WinnowError(f"--set {assignment}: unknown step {names[0]!r}; {nearest(names[0], list(merged))}")
    place = _mapping(_mapping(merged, names[0]), "with")
    for name in names[1:-1]:
        place = _mapping(place, name)
    place[names[-1]] = parsed


def _mapping(parent: dict[str, Any], name: str) -> dict[str, Any]:
    """The mapping at `name`; a plain function name opens up into a mapping with `name`."""
    value = parent.get(name)
    if not isinstance(value, str | dict | None):
        raise WinnowError(f"--set: {name} is {value!r}, which has no options of its own")
    parent[name] = {"name": value} if isinstance(value, str) else dict(value or {})
    inner: dict[str, Any] = parent[name]
    return inner


def _recipe(merged: dict[str, Any], name: str, place: str) -> Recipe:
    settings = {key: value for key, value in merged.items() if key in SETTINGS and value is not None}
    steps = {str(key): value or {} for key, value in merged.items() if key not in SETTINGS}
    problems = [
        f"{place}: {key} must be {SETTINGS[key].__name__}, got {value!r}"
        for key, value in settings.items()
        if type(value) is not SETTINGS[key]
    ]
    problems += [problem for step, body in steps.items() for problem in _malformed(step, body)]
    if type(settings.get("shards")) is int and not 1 <= settings["shards"] <= 99_999:
        problems.append(f"{place}: shards must be from 1 to 99999, got {settings['shards']}")
    if problems:
        raise WinnowError(*problems)
    settings.pop("extends", None)
    return Recipe(name=name, steps=steps, **settings)


def _malformed(step: str, body: Any) -> list[str]:
    if not isinstance(body, dict):
        hint = f" ({nearest(step, list(SETTINGS))})" if isinstance(body, str | int) else ""
        return [f"{step}: must be a mapping with use, from, with; got {body!r}{hint}"]
    problems = [f"{step}.{part}: unknown; {nearest(str(part), list(PARTS))}" for part in body if part not in PARTS]
    for part in ("from", "with"):
        if not isinstance(body.get(part) or {}, dict):
            problems.append(f"{step}.{part}: must be a mapping, got {body[part]!r}")
    wires = body.get("from")
    problems += [
        f"{step}.from.{wire}: must be the name of a step, got {source!r}"
        for wire, source in (wires.items() if isinstance(wires, dict) else ())
        if not isinstance(source, str | None)
    ]
    if not isinstance(body.get("use", ""), str):
        problems.append(f"{step}.use: must be the name of a stage, got {body['use']!r}")
    return problems
