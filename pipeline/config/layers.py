"""Layers of a recipe: its files and configs, each over those before, and where each option comes from.

What outranks what is one order, from the lowest:

1. the stage's own default;
2. the recipe: its base, then what extends it, each with its rounds;
3. the configs, in the order of the command, each with its rounds; in a config, `recipes: {dpo: ...}` is for one recipe;
4. a recipe of the user's own that the command names: it is about one method, a config is about all;
5. --set.

What a recipe writes under `fixed` in place of `with`, and which steps it reads, make the method what it is. A config
that contradicts them is refused. A function's options belong to that function: `objective: {name: hinge, delta: 2.0}`
in a config says nothing of a recipe whose objective is fixed to another.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.yaml import read_yaml
from pipeline.registry import Registry, nearest, registry_of
from pipeline.stage import stages
from schemas import WinnowError

MAX_FILES = 3  # depth of `extends`: a base, a method, and the user's own
ONLY = "recipes"  # key of a config: what it says of single recipes
OptionPath = tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """Content of a file, with what it writes under `fixed` moved to `with`; `name` is the file as users know it."""

    name: str
    content: dict[str, Any]
    is_config: bool = False
    is_own: bool = False  # written by a user, as a config is
    fixed: dict[str, Any] = field(default_factory=dict)  # step -> use, from and with that configs may not contradict


class Origin(NamedTuple):
    """Layer that an option's value comes from, whether users wrote it, and the value of the recipe that it replaces."""

    layer: str
    by_user: bool
    replaces: Any = None


def read_layers(
    path: Path, configs: tuple[Path, ...], library: tuple[Path, ...], check: Callable[[Layer], list[str]]
) -> tuple[list[Layer], list[str], dict[str, Layer]]:
    """Return the layers of a recipe in their order, a note for each part of a config that is not for it, mistakes.

    `check` returns the mistakes of one layer: once they are merged, what lies below is not seen. Where there are any,
    what configs contradict is not checked.

    What a recipe extends is looked for beside it, then in the folders of `library`. Raise WinnowError for files that
    cannot be read or extended, and for all that a config contradicts.
    """
    files, contents = [path], [read_file(path, "recipe")]
    while (name := contents[0].get("extends")) is not None:
        folders = (files[0].parent, *library)
        file = next((file for folder in folders if (file := folder / f"{name}.yaml").exists()), None)
        if file is None:
            hint = nearest(str(name), sorted({file.stem for folder in folders for file in folder.glob("*.yaml")}))
            raise WinnowError(f"extends: no recipe {name!r} in {' or '.join(map(str, folders))}; {hint}")
        trail = " -> ".join(file.stem for file in (*reversed(files), file))
        if file in files:
            raise WinnowError(f"extends: a cycle: {trail}; a name is looked for beside the file first")
        if len(files) == MAX_FILES:
            raise WinnowError(f"extends: {trail} is more than {MAX_FILES} files; extend {files[0].stem} instead")
        files, contents = [file, *files], [read_file(file, "recipe"), *contents]
    is_own = path.parent.resolve() not in [folder.resolve() for folder in library]
    recipe = [
        _recipe_layer(file, content, n > 0) for n, (file, content) in enumerate(zip(files, contents, strict=True))
    ]
    below, above = (recipe[:-1], [replace(recipe[-1], is_own=True)]) if is_own else (recipe, [])

    recipe_names = {file.stem for folder in (*library, path.parent) for file in folder.glob("*.yaml")}
    config_layers: list[Layer] = []
    for config in configs:
        content = read_file(config, "--config")
        single = content.pop(ONLY, None) or {}
        if not isinstance(single, dict) or not all(isinstance(body, dict) for body in single.values()):
            raise WinnowError(
                f"--config {config}: {ONLY}: must be a mapping of recipes to what differs for each of them"
            )
        names = recipe_names | {file.stem for file in config.parent.glob("*.yaml")}
        if unknown := [str(name) for name in single if name not in names]:
            raise WinnowError(
                *(f"--config {config}: {ONLY}.{name}: {nearest(name, sorted(names))}" for name in unknown)
            )
        config_layers.append(Layer(str(config), content, is_config=True, is_own=True))
        config_layers += [
            Layer(f"{config}, {ONLY}.{file.stem}", single[file.stem], is_config=True, is_own=True)
            for file in files
            if file.stem in single
        ]
    if mistakes := {problem: layer for layer in (*recipe, *config_layers) for problem in check(layer)}:
        return [*below, *config_layers, *above], [], mistakes
    applicable, notes = _without_other_functions(below, config_layers)
    variants = [applicable]
    for layer in applicable:
        rounds = layer.content.get("rounds")
        for number, overlay in enumerate(rounds if isinstance(rounds, list) else [], 1):
            if isinstance(overlay, dict):
                overlaid = replace(layer, name=f"{layer.name}, round {number}", content=overlay)
                variants.append([*applicable, overlaid])
    if problems := [line for configured in variants for line in _contradictions(below, configured, above)]:
        raise WinnowError(*dict.fromkeys(problems))
    return [*below, *applicable, *above], notes, {}


def read_file(path: Path, what: str) -> dict[str, Any]:
    """Return the content of a recipe or config, its paths beside it; raise WinnowError for what is no mapping."""
    content = read_yaml(path, what)
    if not isinstance(content, dict):
        raise WinnowError(f"{what} {path}: must be a mapping of step names, got {type(content).__name__}")
    folder = path.absolute().parent
    if isinstance(files := content.get("plugins"), list):  # always paths, with or without `./`
        content["plugins"] = [str(folder / file) if isinstance(file, str) else file for file in files]
    return rooted(content, folder)


def rooted(content: Any, folder: Path) -> Any:
    """Return the content with `./data.jsonl` as a path beside its file, wherever the command runs."""
    if isinstance(content, dict):
        return {name: rooted(value, folder) for name, value in content.items()}
    if isinstance(content, list):
        return [rooted(value, folder) for value in content]
    if isinstance(content, str) and content.startswith(("./", "../")):
        return str(folder / content)
    return content


def _recipe_layer(file: Path, content: dict[str, Any], extends: bool) -> Layer:
    """Return the layer of a recipe's file; of a file that extends another, stages and inputs are fixed too."""
    bodies = dict(content)
    fixed: dict[str, Any] = {}
    for step, body in content.items():
        if not isinstance(body, dict):
            continue
        must = {key: body[key] for key in ("use", "from") if extends and key in body}
        if isinstance(options := body.get("fixed"), dict):
            must["with"] = options
            rest = {key: value for key, value in body.items() if key != "fixed"}
            bodies[step] = merge(rest, {"with": options})
        if must:
            fixed[step] = must
    return Layer(file.name, bodies, fixed=fixed)


# Merging.


def merge(below: Any, above: Any, options: bool = False) -> Any:
    """Merge mappings; anything else replaces. A step with another `use`, or a function with another name, is new.

    A function's name alone, among options, stands for a mapping with that name.
    """
    if options and isinstance(below, dict) and "name" in below and isinstance(above, str):
        above = {"name": above}
    elif options and isinstance(below, str) and isinstance(above, dict) and "name" not in above:
        below = {"name": below}
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if any(name in above and above[name] != below.get(name, above[name]) for name in ("use", "name")):
        return above
    return below | {name: merge(below.get(name), value, options or name == "with") for name, value in above.items()}


def merge_all(layers: list[Layer]) -> dict[str, Any]:
    """Return the content of all layers, the last on top."""
    return reduce(merge, (layer.content for layer in layers), {})


def below_configs(layers: list[Layer], layer: Layer) -> list[Layer]:
    """Return the layers with one more, above the recipes of ours and below all that users write."""
    position = next((n for n, other in enumerate(layers) if other.is_own), len(layers))
    return [*layers[:position], layer, *layers[position:]]


def plugins_of(layers: list[Layer]) -> Any:
    """Return the plugins of all layers, each once: they add up, for each file lists those that it needs."""
    plugins: list[Any] = []
    for layer in layers:
        listed = layer.content.get("plugins")
        plugins += [item for item in (listed if isinstance(listed, list) else []) if item not in plugins]
    return plugins


def with_overlays(layers: list[Layer], overlaid: list[Any], replacement: Any = None) -> list[list[Layer]]:
    """Return the layers of each round: its overlay lies over the file that lists the rounds, and below the others.

    `replacement` is the value of --set: a list of it lies over all files.
    """
    writers = [n for n, layer in enumerate(layers) if layer.content.get("rounds") is not None]
    if isinstance(replacement, list) or not writers:
        position, writer = len(layers), Layer("--set", {}, is_config=True, is_own=True)
    else:
        position, writer = writers[-1] + 1, layers[writers[-1]]
    rounds = []
    for number, overlay in enumerate(overlaid, 1):
        content = overlay if isinstance(overlay, dict) else {}
        layer = replace(writer, name=f"{writer.name}, round {number}", content=content, fixed={})
        rounds.append([*layers[:position], layer, *layers[position:]])
    return rounds


# What configs may not contradict.


def _leaves(content: Any, path: OptionPath = ()) -> Iterator[tuple[OptionPath, Any]]:
    """Yield each value with its path. A string stands where a function's name may."""
    if isinstance(content, dict) and content:
        for name, value in content.items():
            yield from _leaves(value, (*path, str(name)))
    else:
        yield path, content


def _value(content: Any, path: OptionPath) -> Any:
    """Return the value at a path, of a function's name alone also under `name`; raise KeyError if there is none."""
    for n, name in enumerate(path):
        if isinstance(content, str) and path[n:] == ("name",):
            return content
        if not isinstance(content, dict) or name not in content:
            raise KeyError(path)
        content = content[name]
    if isinstance(content, dict) and isinstance(content.get("name"), str):
        return content["name"]
    return content


def _canonical(use: str, path: OptionPath, name: Any) -> Any:
    """Return the name of a function that an option of a stage names, for an alias; any other value as it is."""
    registry = _registry_of(use, path)
    return registry.aliases.get(name, name) if registry and isinstance(name, str) else name


def _registry_of(use: str, path: OptionPath) -> Registry | None:
    """Return the registry of the functions that an option of a stage names; None if it names none."""
    if path[:1] != ("with",) or use not in stages.entries:
        return None
    option = stages.entries[use].options.model_fields.get(path[1])
    return registry_of(option) if option else None


def _without_other_functions(below: list[Layer], configs: list[Layer]) -> tuple[list[Layer], list[str]]:
    """Return the configs without options of functions that the recipe does not use, and a note for each."""
    recipe = merge_all(below)
    fixed: dict[str, Any] = reduce(merge, (layer.fixed for layer in below), {})
    result, notes = [], []
    for layer in configs:
        content = dict(layer.content)
        for step, must in fixed.items():
            body = content.get(step)
            if not isinstance(body, dict) or not isinstance(body.get("with"), dict):
                continue
            options = dict(body["with"])
            for option, written in body["with"].items():
                path = ("with", option)
                with suppress(KeyError):
                    _value(must, path)
                    name = _value(recipe[step], path)
                    use = str(recipe[step].get("use", step))
                    other = written.get("name") if isinstance(written, dict) and len(written) > 1 else None
                    if other and _canonical(use, path, other) != _canonical(use, path, name):
                        del options[option]
                        notes.append(
                            f"{step}.{option}: what {layer.name} says is of {other}, and this recipe uses {name}"
                        )
            content[step] = body | {"with": options}
        result.append(replace(layer, content=content))
    return result, notes


def _contradictions(below: list[Layer], configs: list[Layer], above: list[Layer]) -> list[str]:
    """Return a line for each value that a recipe fixes and a config changes, unless the user's own recipe sets it."""
    recipe, everything = merge_all([*below, *above]), merge_all([*below, *configs, *above])
    problems = []
    for layer in below:
        for step, path, value in ((step, *leaf) for step, must in layer.fixed.items() for leaf in _leaves(must)):
            use = str(recipe[step].get("use", step))
            with suppress(KeyError):
                expected = _value(recipe[step], path)
                try:
                    actual = _value(everything[step], path)
                except KeyError:
                    actual = None
                if _canonical(use, path, actual) != _canonical(use, path, expected):
                    where = ".".join([step, *(path[1:] if path[0] == "with" else path)])
                    config = next(layer.name for layer in reversed(configs) if step in layer.content)
                    problems.append(
                        f"{where}: {config} says {actual!r}, and {layer.name} is not itself without {value!r}; write "
                        f"a recipe of your own that extends {Path(layer.name).stem}, or, if this is meant for other "
                        f"recipes of the command, put it under `{ONLY}` in the config"
                        + (f", or --set {where}={actual}" if path[0] == "with" else "")
                        + _naming_hint(use, path, recipe[step], configs, step, actual)
                    )
    return problems


def _naming_hint(use: str, path: OptionPath, body: dict[str, Any], configs: list[Layer], step: str, value: Any) -> str:
    """Return the end of a line about an option of a function that the configs do not name: how to say which."""
    registry, written = _registry_of(use, path), merge_all(configs)[step].get("with", {}).get(path[-2])
    if registry is None or len(path) != 3 or not isinstance(written, dict) or "name" in written:
        return ""
    name = _canonical(use, path[:2], _value(body, path[:2]))
    others = [other for other in registry.having(path[2]) if other != name]
    if not others:
        return ""
    return (
        f", or name the {registry.kind} that is meant: `{path[1]}: {{name: {others[0]}, {path[2]}: {value}}}` leaves "
        f"recipes with {name} as they are"
    )


# Where options come from.


def origins_of(step: str, options: dict[str, Any], layers: list[Layer]) -> dict[str, Origin]:
    """Return the origin of each option of a step by its dotted path, given the layers of one round."""
    origins = {}
    for path, value in _leaves(options):
        if not path:
            continue
        layer, replaced = _origin(step, path, layers)
        if layer is not None:
            is_changed = layer.is_config and replaced is not None and replaced != value
            origins[".".join(path)] = Origin(layer.name, layer.is_own, replaced if is_changed else None)
    return origins


def _origin(step: str, path: OptionPath, layers: list[Layer]) -> tuple[Layer | None, Any]:
    """Return the last layer that writes an option, and the value that recipes below it wrote, or None."""
    writers: list[tuple[Layer, Any]] = []
    for layer in layers:
        with suppress(KeyError):
            writers.append((layer, _value(layer.content[step], ("with", *path))))
    if writers:
        layer = writers[-1][0]
        values = [value for writer, value in writers if not writer.is_config]
        return layer, values[-1] if values else None
    model = next((body["like"] for layer in reversed(layers)
                  if isinstance(body := layer.content.get(step), dict) and body.get("like")), None)  # fmt: skip
    return _origin(model, path, layers) if model and model != step else (None, None)
