"""Recipes: files are merged, then --set, then `like`, then the rounds are unrolled.

A recipe is a mapping of step names to `use` (a stage; the step's own name by default), `from` (inputs) and `with`
(options); `like` takes all three from another step, and the step writes only what differs. `about`, `extends`,
`plugins`, `rounds`, `shards` and `target` are settings of the whole recipe. `rounds` is a number of equal rounds, or a
list of overlays, one per round (pipeline/config/rounds.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from pipeline.config.rounds import Steps, resolved, round_overlays, split_round, unknown_step_hint, unroll
from pipeline.config.yaml import parse, read_yaml
from pipeline.registry import nearest, validated
from schemas import WinnowError

MAX_FILES = 3  # depth of `extends`: a base, a method, and the user's own
SETTABLE = ("about", "rounds", "shards", "target")  # settings that --set may name
STRICT = ConfigDict(strict=True, extra="forbid")

# What a recipe may contain.


class ChangingInput(BaseModel):
    """Input that reads one step in round 1 and another, of the round before, in every later round."""

    model_config = STRICT
    first: str | None = Field(description="the name of a step, or null for none")
    then: str | None = Field(description="the name of a step, or null for none")


def _parse_input(value: Any) -> Any:
    if not isinstance(value, str | dict | None):
        raise ValueError("must be the name of a step, or {first: ..., then: ...}")
    return validated(ChangingInput, value, noun="key") if isinstance(value, dict) else value


class StepBody(BaseModel):
    """Body of a step as a recipe writes it."""

    model_config = STRICT
    use: str = Field("", description="the name of a stage")
    like: str | None = Field(None, description="the name of a step")
    inputs: dict[str, Annotated[str | ChangingInput | None, PlainValidator(_parse_input)]] | None = Field(
        None, alias="from", description="a mapping of inputs to steps"
    )
    options: dict[Any, Any] | None = Field(None, alias="with", description="a mapping of options to values")


class Settings(BaseModel):
    """Settings of a whole recipe beside `extends`, which is resolved when files are merged, and `rounds`."""

    model_config = STRICT
    about: str = ""
    plugins: list[str] = []
    shards: int = Field(default=8, ge=1, le=99_999)
    target: str = "evaluate"


NAMES = ("extends", "rounds", *Settings.model_fields)


@dataclass
class Recipe:
    """Steps, not yet checked against any stage; those that change from round to round are `step@1`, `step@2`, ..."""

    name: str
    shards: int = 8
    target: str = "evaluate"
    about: str = ""
    steps: Steps = field(default_factory=dict)
    rounds: int = 0
    plugins: list[Path] = field(default_factory=list)

    @property
    def targets(self) -> list[str]:
        """Return the target of every round, that of the last round last."""
        targets = [f"{self.target}@{number}" for number in range(1, self.rounds + 1)]
        return [step for step in targets if step in self.steps] or [self.target]

    @property
    def step_names(self) -> list[str]:
        """Return the names of the steps as the recipe writes them."""
        return list(dict.fromkeys(split_round(step)[0] for step in self.steps))


# From files to a recipe.


def load_recipe(
    path: Path,
    overlays: tuple[Path, ...] = (),
    sets: tuple[str, ...] = (),
    name: str | None = None,
    library: tuple[Path, ...] = (),
) -> Recipe:
    """Return the recipe that its files and --set make together. Raise WinnowError with all mistakes.

    A base with

        sft: {use: model}
        sample: {from: {policy: sft}}
        pair: {from: {candidates: sample}, with: {rule: matches, seed: 0}}
        optimize: {from: {init: sft, examples: pair}}

    a recipe that extends it with

        rounds: 2
        sample: {from: {policy: {first: sft, then: optimize}}}
        again: {like: pair, with: {seed: 1}}

    and `--set pair@2.seed=5` make the steps `sft`, `optimize@1`, `optimize@2` and

        sample@1: {use: sample, from: {policy: sft}}
        sample@2: {use: sample, from: {policy: optimize@1}}
        pair@1:   {use: pair, from: {candidates: sample@1}, with: {rule: matches, seed: 0}}
        pair@2:   {use: pair, from: {candidates: sample@2}, with: {rule: matches, seed: 5}}
        again@1:  {use: pair, from: {candidates: sample@1}, with: {rule: matches, seed: 1}}
        again@2:  {use: pair, from: {candidates: sample@2}, with: {rule: matches, seed: 1}}

    Files are merged by `merged`, `like` is resolved by `_with_like`, rounds by `unroll` (pipeline/config/rounds.py).
    """
    content = merged(path, overlays, library)
    set_problems: list[str] = []
    problems: list[str] = []

    # --set is read first: some of it changes settings, the rest changes options of steps.
    overrides: list[Override] = []
    for text in sets:
        with _collected(set_problems):
            overrides.append(Override.parse(text))
    replaced = {override.name: override.value for override in overrides if not override.path}
    settings, overlaid = Settings(), list[Any]()
    with _collected(problems):
        values = content | replaced
        settings = validated(
            Settings, {key: values[key] for key in Settings.model_fields if values.get(key) is not None}
        )
    with _collected(problems):
        overlaid = round_overlays(content.get("rounds"), replaced.get("rounds"))

    # Each round is the steps with the round's overlay over them. Only what an overlay breaks is reported as its own.
    steps: Steps = {str(key): body or {} for key, body in content.items() if key not in NAMES}
    step_problems = _step_problems(steps)
    problems += step_problems
    rounds: list[Steps] = []
    for position, overlay in enumerate(overlaid, 1):
        entry = f"rounds, entry {position}"
        if not isinstance(overlay, dict):
            problems.append(f"{entry}: must be a mapping of step names ({{}} for none), got {overlay!r}")
            continue
        unknown = [step for step in overlay if step not in steps]
        problems += [f"{entry}: unknown step {step!r}; {nearest(str(step), list(steps))}" for step in unknown]
        rounds.append(_merge(steps, {step: body for step, body in overlay.items() if step in steps}))
        problems += [f"{entry}: {line}" for line in _step_problems(rounds[-1]) if line not in step_problems]
    if problems:
        raise WinnowError(*set_problems, *problems)

    # --set outranks every file and every overlay, and `like` copies what --set has changed.
    rounds = rounds or [dict(steps)]
    options = [override for override in overrides if override.path]
    for override in options:
        with _collected(set_problems):
            override.apply(rounds, len(overlaid))
    if set_problems:
        raise WinnowError(*set_problems)
    rounds = [{step: _with_like(step, bodies) for step in bodies} for bodies in rounds]

    named = {step for overlay in overlaid for step in overlay} | {item.step for item in options if item.round}
    unrolled = unroll(rounds, named) if overlaid else {step: resolved(body) for step, body in rounds[0].items()}

    # A run has a file of its name; one that no file can have is cut, and made unique by a hash.
    default_name = path.stem + "".join(f"[{text}]" for text in sets)
    file_name = default_name.replace("/", "_").encode()[:150].decode(errors="ignore")
    if file_name != default_name:
        file_name += f"-{sha256(default_name.encode()).hexdigest()[:8]}"
    return Recipe(
        name or file_name,
        settings.shards,
        settings.target,
        settings.about,
        unrolled,
        len(overlaid),
        [Path(file) for file in settings.plugins],
    )


@contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except WinnowError as error:
        problems += error.problems


# Layers.


def merged(path: Path, overlays: tuple[Path, ...] = (), library: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return base, configs, method, and the recipe that extends it, each over the one before, as one file would be.

    What a method sets outranks what a config sets for all methods. What a recipe extends is looked for beside it, then
    in the folders of `library`. Plugins add up: each file lists those that it needs.
    """
    files, contents = [path], [_read_file(path, "recipe")]
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
        files, contents = [file, *files], [_read_file(file, "recipe"), *contents]
    base, *methods = contents if len(contents) > 1 else [{}, *contents]
    layers = [base, *(_read_file(overlay, "--config") for overlay in overlays), *methods]
    plugins: list[Any] = []
    for layer in layers:
        listed = layer.get("plugins") or []
        plugins += [item for item in (listed if isinstance(listed, list) else [listed]) if item not in plugins]
    content: dict[str, Any] = reduce(_merge, layers, {})
    content = {name: value for name, value in content.items() if name not in ("extends", "plugins")}
    return content | ({"plugins": plugins} if plugins else {})


def plugin_files(path: Path) -> list[Path]:
    """Return the plugins that one config or recipe lists, without those of what it extends."""
    listed = validated(Settings, {"plugins": _read_file(path, "--config").get("plugins", [])})
    return [Path(file) for file in listed.plugins]


def _read_file(path: Path, what: str) -> dict[str, Any]:
    content = read_yaml(path, what)
    if not isinstance(content, dict):
        raise WinnowError(f"{what} {path}: must be a mapping of step names, got {type(content).__name__}")
    folder = path.absolute().parent
    if isinstance(files := content.get("plugins"), list):  # always paths, with or without `./`
        content["plugins"] = [str(folder / file) if isinstance(file, str) else file for file in files]
    return _rooted(content, folder)


def _rooted(content: Any, folder: Path) -> Any:
    """Return the content with `./data.jsonl` as a path beside its file, wherever the command runs."""
    if isinstance(content, dict):
        return {name: _rooted(value, folder) for name, value in content.items()}
    if isinstance(content, list):
        return [_rooted(value, folder) for value in content]
    if isinstance(content, str) and content.startswith(("./", "../")):
        return str(folder / content)
    return content


def _merge(below: Any, above: Any) -> Any:
    """Merge mappings; anything else replaces. A step with another `use`, or a function with another name, is new."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if any(name in above and above[name] != below.get(name, above[name]) for name in ("use", "name")):
        return above
    return below | {name: _merge(below.get(name), value) for name, value in above.items()}


def _step_problems(steps: dict[str, Any]) -> list[str]:
    """Return everything that is wrong with steps as they are written, before any stage is asked."""
    problems, names = [], list(steps)
    for step, content in steps.items():
        if "@" in step:
            problems.append(f"{step}: a step's name must not contain '@', which marks a round; change it in `rounds`")
            continue
        if not isinstance(content, dict):
            hint = f" ({nearest(step, list(NAMES))})" if isinstance(content, str | int) else ""
            problems.append(f"{step}: must be a mapping with use, like, from, with; got {content!r}{hint}")
            continue
        with _collected(problems):
            body = validated(StepBody, content, step, noun="key")
            # `first` and `then` are checked here, as a plan without rounds never sees `then`; plain inputs by the plan.
            sources = {
                f"{step}.from.{name}.{end}": getattr(source, end)
                for name, source in (body.inputs or {}).items()
                if isinstance(source, ChangingInput)
                for end in ("first", "then")
            }
            unknown = {where: name for where, name in sources.items() if name and split_round(name)[0] not in names}
            if body.like and body.like not in names:
                unknown[f"{step}.like"] = body.like
            problems += [
                f"{where}: no step {name!r} in this recipe; {nearest(name, names)}" for where, name in unknown.items()
            ]
    if problems:
        return problems
    for step in steps:
        chain: list[str] = []
        while (model := steps[chain[-1] if chain else step].get("like")) and model not in chain:
            chain.append(model)
        if step in chain:
            problems.append(f"{step}.like: a cycle: {' -> '.join([step, *chain])}")
    return problems


def _with_like(step: str, steps: Steps) -> dict[str, Any]:
    """Return the step's body over that of the step that it is like."""
    body = {key: value for key, value in steps[step].items() if key != "like"}
    model = steps[step].get("like")
    if model is None:
        return body
    return _merge({"use": model} | _with_like(model, steps), body)


# --set.


@dataclass(frozen=True)
class Override:
    """Value of --set: for a setting (no path), for an option of a step in every round, or in one (`step@2`)."""

    text: str
    name: str
    step: str
    round: int | None
    path: tuple[str, ...]
    value: Any

    @classmethod
    def parse(cls, text: str) -> "Override":
        """Read `step.option=value`, `step.option.inner=value`, `step@2.option=value` or `setting=value` (YAML)."""
        path, equals, value = text.partition("=")
        names = path.strip().split(".")
        if not equals or not all(names):
            raise WinnowError(f"--set {text}: must be step.option=value")
        if len(names) < 2 and names[0] not in SETTABLE:
            hint = nearest(names[0], list(SETTABLE))
            raise WinnowError(f"--set {text}: must be step.option=value, or name a setting of the recipe; {hint}")
        return cls(text, names[0], *split_round(names[0]), tuple(names[1:]), parse(value, f"--set {text}"))

    def apply(self, rounds: list[Steps], count: int) -> None:
        """Change the steps in place; mappings on the way are copied. `count` is 0 where the recipe has no rounds."""
        names = list(rounds[0])
        if self.step not in names or (self.round is not None and not 1 <= self.round <= count):
            hint = unknown_step_hint(self.name, names, count)
            raise WinnowError(f"--set {self.text}: unknown step {self.name!r}; {hint}")
        for steps in rounds if self.round is None else [rounds[self.round - 1]]:
            parent: dict[str, Any] = steps
            for name in (self.step, "with", *self.path[:-1]):
                value = parent.get(name)
                if not isinstance(value, str | dict | None):
                    raise WinnowError(f"--set {self.text}: {name} is {value!r}, which has no options of its own")
                parent[name] = {"name": value} if isinstance(value, str) else dict(value or {})  # a function's name
                parent = parent[name]
            parent[self.path[-1]] = self.value
