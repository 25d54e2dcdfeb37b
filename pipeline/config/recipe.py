"""Recipes: files are merged (layers.py), then --set, then `like`, then the rounds are unrolled.

A recipe is a mapping of step names to `use` (a stage; the step's own name by default), `from` (inputs) and `with`
(options); `like` takes all three from another step, and the step writes only what differs. `about`, `dtype`,
`evaluations`, `extends`, `judges`, `plugins`, `rounds`, `shards`, `target` and `track` are settings of the whole
recipe. `rounds` is a number of equal rounds, or a list of overlays, one per round (pipeline/config/rounds.py); `judges`
are steps written in short (pipeline/config/judges.py), and what reads a step `heldout_prompts` follows from its name
(pipeline/config/heldout.py).
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.config.heldout import with_heldout_prompts
from pipeline.config.judges import JudgeBody, with_judges
from pipeline.config.layers import (
    Layer,
    Origin,
    merge,
    merge_all,
    origins_of,
    plugins_of,
    read_file,
    read_layers,
    with_overlays,
)
from pipeline.config.rounds import Steps, resolved, round_overlays, split_round, unknown_step_hint, unroll
from pipeline.config.yaml import parse
from pipeline.plugins import with_named
from pipeline.registry import FORMER, name_or, nearest, registry_of, validated
from pipeline.stage import stages
from schemas import WinnowError

NAME_BYTES = 150  # of a run's name, or a step's
MAX_SHARDS = 4096  # each is a task and a file per table: more take longer to list than to compute
# What names of files lack, lines of a terminal, and runs, whose rounds end with an @ and their number.
NOT_IN_FILES = re.compile(r"[/\x00-\x1f\x7f-\x9f\u2028\u2029]|@(?=[0-9]+$)")
# Settings that --set may name
SETTABLE = ("about", "dtype", "evaluations", "rounds", "shards", "target", "track", "trained")
STRICT = ConfigDict(strict=True, extra="forbid")

# What a recipe may contain.


class ChangingInput(BaseModel):
    """Input that reads one step in round 1 and another, of the round before, in every later round."""

    model_config = STRICT
    first: str | None = Field(description="the name of a step, or null for none")
    then: str | None = Field(description="the name of a step, or null for none")


STEP_OR_CHANGE = name_or(ChangingInput, "the name of a step, or {first: ..., then: ...}")


class StepBody(BaseModel):
    """Body of a step as a recipe writes it."""

    model_config = STRICT
    use: str = Field("", description="the name of a stage")
    like: str | None = Field(None, description="the name of a step")
    inputs: dict[str, Annotated[str | ChangingInput | None, STEP_OR_CHANGE]] = Field(
        {}, alias="from", description="a mapping of inputs to steps"
    )
    options: dict[str, Any] = Field({}, alias="with", description="a mapping of options to values")


class Settings(BaseModel):
    """Settings of a whole recipe beside `extends`, which is resolved when files are merged, and `rounds`."""

    model_config = STRICT
    about: str = ""
    dtype: Literal["float32", "bfloat16"] | None = None
    evaluations: list[str] = []
    judges: dict[str, JudgeBody | None] = {}
    plugins: list[str] = []
    shards: int = Field(default=8, ge=1, le=MAX_SHARDS)
    target: str = "evaluate"
    trained: str = ""
    track: list[Any] = []  # of every training


BODY_KEYS = tuple(item.alias or name for name, item in StepBody.model_fields.items())
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
    trained: str = ""  # the step to end with if what only the target reads is not given; none if a user set the target
    origins: dict[str, dict[str, Origin]] = field(default_factory=dict)  # step -> dotted path of an option -> origin
    notes: list[str] = field(default_factory=list)  # parts of configs that do not concern this recipe
    dtype: tuple[str, Origin] | None = None  # of all stages and functions with such an option (config/precision.py)
    track: list[Any] = field(default_factory=list)  # option of each step whose stage has it, unless the step sets it
    evaluations: list[str] = field(default_factory=list)  # steps to end with beside `evaluate`, if that is the target
    likes: dict[str, str] = field(default_factory=dict)  # step -> the step that it is like, as the recipe writes them

    @property
    def targets(self) -> list[str]:
        """Return the target of every round, that of the last round last."""
        return self.in_rounds(self.target)

    @property
    def further_targets(self) -> list[str]:
        """Return the other evaluations of every round; none where something else than `evaluate` is wanted."""
        names = self.evaluations if self.target == Settings.model_fields["target"].default else []
        return [step for name in names for step in self.in_rounds(name)]

    def in_rounds(self, step: str) -> list[str]:
        """Return the names of a step in every round, or its name if it is one step for all."""
        names = [f"{step}@{number}" for number in range(1, self.rounds + 1)]
        return [name for name in names if name in self.steps] or [step]

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

    pipeline/config/layers.py says which file outranks which; `like` is resolved by `_with_like`, rounds by `unroll`
    (pipeline/config/rounds.py).
    """
    if naming := name_problems(path.stem if name is None else name):
        what, cure = (f"{path.name}: its name, which is the run's,", "rename the file, or give `--name`")
        if name is not None:
            what, cure = f"--name {name!r}", "give another"
        raise WinnowError(f"{what} {naming[0]}; {cure}")
    layers, notes, layer_problems = read_layers(path, overlays, library, _layer_problems)
    set_problems: list[str] = []
    problems: list[str] = []
    judging: list[str] = []  # steps to end with
    if not layer_problems:
        with _collected(problems):
            layers, judging = _with_implied_steps(layers)

    # --set is read first: some of it changes settings, the rest changes options of steps.
    overrides: list[Override] = []
    for text in sets:
        with _collected(set_problems):
            overrides.append(Override.parse(text, _steps(layers)))
    replaced = {override.name: override.value for override in overrides if not override.path}
    content = merge_all(layers)
    settings = Settings()
    with _collected(problems):
        values = content | replaced | {"plugins": plugins_of(layers)}
        settings = validated(
            Settings, {key: values[key] for key in Settings.model_fields if values.get(key) is not None}
        )
    rounds_layers = [layers]
    overlaid: list[Any] = []
    with _collected(problems):
        overlaid = round_overlays(content.get("rounds"), replaced.get("rounds"))
        rounds_layers = with_overlays(layers, overlaid, replaced.get("rounds")) or [layers]

    # Each round is the steps with the round's overlay among them. Only what an overlay breaks is reported as its own.
    steps = _steps(layers)
    step_problems = _step_problems(steps)
    problems += step_problems
    for position, overlay in enumerate(overlaid, 1):
        entry = f"rounds, entry {position}"
        if not isinstance(overlay, dict):
            problems.append(f"{entry}: must be a mapping of step names ({{}} for none), got {overlay!r}")
            continue
        unknown = [step for step in overlay if step not in steps]
        problems += [f"{entry}: unknown step {step!r}; {nearest(str(step), list(steps))}" for step in unknown]
        overlaid_steps = {step: body for step, body in _steps(rounds_layers[position - 1]).items() if step in steps}
        overlaid_steps |= {step: None for step in overlay if step in steps and overlay[step] is None}
        problems += [f"{entry}: {line}" for line in _step_problems(overlaid_steps) if line not in step_problems]
    problems = [line for line in problems if line not in layer_problems]
    # Again, now that the steps are known, whose options may be meant.
    for checked in layers if layer_problems else ():
        problems += [f"{checked.name}: " * (len(layers) > 1) + line for line in _layer_problems(checked, steps)]
    if problems:
        raise WinnowError(*set_problems, *problems)

    # --set outranks every file and every overlay, and `like` copies what --set has changed.
    rounds = [_steps(of_round) for of_round in rounds_layers]
    # In the order of the command, but what replaces a function comes before its options.
    options = sorted((override for override in overrides if override.path), key=Override.position)
    for override in options:
        with _collected(set_problems):
            override.apply(rounds, len(overlaid))
    if set_problems:
        raise WinnowError(*set_problems)
    likes = {step: body["like"] for bodies in rounds for step, body in bodies.items() if body.get("like")}
    rounds = [{step: _with_like(step, bodies) for step in bodies} for bodies in rounds]

    named = {step for overlay in overlaid for step in overlay} | {item.step for item in options if item.round}
    unrolled = unroll(rounds, named) if overlaid else {step: resolved(body) for step, body in rounds[0].items()}

    origins = {}
    for unrolled_name, body in unrolled.items():
        step, number = split_round(unrolled_name)
        of_round = [
            *rounds_layers[(number or 1) - 1],
            *(item.layer for item in options if item.round in (None, number)),
        ]
        origins[unrolled_name] = origins_of(step, body.get("with") or {}, of_round)

    dtype = None  # of the last layer that sets it, and where it comes from
    if "dtype" in replaced:
        dtype = replaced["dtype"], Origin("--set dtype", True)
    elif layer := next((layer for layer in reversed(layers) if layer.content.get("dtype") is not None), None):
        dtype = layer.content["dtype"], Origin(f"dtype of {layer.name}", layer.is_own)

    return Recipe(
        name or default_run_name(path, sets),
        settings.shards,
        settings.target,
        settings.about,
        unrolled,
        len(overlaid),
        with_named(Path(file) for file in settings.plugins),
        "" if "target" in replaced or _is_target_required(layers) else settings.trained,
        origins,
        notes,
        dtype,
        settings.track,
        [*settings.evaluations, *judging],
        likes,
    )


def default_run_name(path: Path, sets: Iterable[str], others: Iterable[str] = ()) -> str:
    """Return the recipe's name with what --set changed: `rso[rule.beta=0.1,n=16]`.

    Of an option that is set twice, the last value counts. others: options that a label is to be told from. A run has a
    file of its name; one that no file can have is cut, and made unique by a hash.
    """
    values = {option.strip(): value for option, _, value in (text.partition("=") for text in sets)}
    labels = [f"{option_label(option, {*values, *others})}={value}" for option, value in values.items()]
    return as_file_name(path.stem + (f"[{','.join(labels)}]" if labels else ""), NAME_BYTES)


def option_label(option: str, others: Iterable[str]) -> str:
    """Return the shortest end of an option's path that no other one has: `rule.beta` of `select.rule.beta`."""
    path = option.split(".")
    paths = [other.split(".") for other in others if other != option]
    lengths = range(1, len(path))
    length = next((n for n in lengths if all(other[-n:] != path[-n:] for other in paths)), len(path))
    return ".".join(path[-length:])


def name_problems(name: str) -> list[str]:
    """Return why a run, or a tag, cannot have a name that a user writes: it is a file's, and a word of commands."""
    if not name.strip() or name != name.strip():
        return ["is empty, or begins or ends with a space"]
    if "@" in name:
        return ["has an @, which begins the number of a round: `raft@1` is what round 1 of raft trained"]
    if name.startswith(("-", ".")):
        return [f"begins with {name[0]}, as an option or a hidden file does"]
    if not name.isprintable() or NOT_IN_FILES.search(name):
        return ["has a slash, or a character that cannot be printed in a line"]
    if len(name.encode()) > NAME_BYTES:
        return [f"has more than {NAME_BYTES} bytes, and a file cannot be called so"]
    return []


def as_file_name(full: str, bytes: int) -> str:
    """Return a run's name as it is, or cut to what a file can be called, and made unique by a hash."""
    name = NOT_IN_FILES.sub("_", full).encode()[:bytes].decode(errors="ignore")
    return name if name == full else f"{name}-{sha256(full.encode()).hexdigest()[:8]}"


def merged(path: Path, overlays: tuple[Path, ...] = (), library: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return one file's content that, alone and without configs, is what these files are together.

    Its rounds say all of each step that they name: what lies over a round's overlay here would lie below it there.
    """
    layers, _, problems = read_layers(path, overlays, library, _layer_problems)
    if problems:
        raise WinnowError(*problems)
    layers, _ = _with_implied_steps(layers)  # which would lie below the file that is returned, if they were not in it
    content = merge_all(layers)
    overlaid = round_overlays(content.get("rounds"))
    if isinstance(content.get("rounds"), list):
        rounds = with_overlays(layers, overlaid)
        content["rounds"] = [
            {step: _steps(of_round)[step] for step in overlay}
            for of_round, overlay in zip(rounds, overlaid, strict=True)
        ]
    plugins = [str(file) for file in with_named(Path(file) for file in plugins_of(layers))]
    removed = ("extends", "plugins", *(["trained"] if _is_target_required(layers) else []))
    content = {name: value for name, value in content.items() if name not in removed}
    return content | ({"plugins": plugins} if plugins else {})


def _with_implied_steps(layers: list[Layer]) -> tuple[list[Layer], list[str]]:
    """Return the layers with what a step `heldout_prompts` and judges imply, and the names of the steps to end with."""
    layers = with_heldout_prompts(layers)
    judges = merge_all(layers).get("judges") or {}
    return with_judges(layers, validated(Settings, {"judges": judges}).judges)


def _is_target_required(layers: list[Layer]) -> bool:
    """Return whether a layer above the one that says what is trained sets the target, so that nothing less will do."""
    positions = {
        name: max((n for n, layer in enumerate(layers) if name in layer.content), default=-1)
        for name in ("target", "trained")
    }
    return positions["target"] > positions["trained"]


def _steps(layers: list[Layer]) -> Steps:
    return {str(key): body or {} for key, body in merge_all(layers).items() if key not in NAMES}


@contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except WinnowError as error:
        problems += error.problems


def plugin_files(path: Path) -> list[Path]:
    """Return the plugins that one config or recipe lists, without those of what it extends."""
    listed = validated(Settings, {"plugins": read_file(path, "--config").get("plugins", [])})
    return [Path(file) for file in listed.plugins]


# Steps.


def _layer_problems(layer: Layer, all_steps: Steps | None = None) -> list[str]:
    """Return what is wrong with the types of one layer: settings, rounds, the bodies of steps.

    all_steps: those of all layers together. An option of theirs that is in the wrong place is told where to write it.
    """
    problems = []
    if layer.is_config and "extends" in layer.content:
        problems.append("extends: only a recipe extends another; name the recipe in the command")
    with _collected(problems):
        settings = {name: layer.content[name] for name in Settings.model_fields if name in layer.content}
        validated(Settings, settings if settings.get("plugins", True) is not None else settings | {"plugins": []})
    overlays: list[Any] = []
    with _collected(problems):
        overlays = round_overlays(layer.content.get("rounds"))
    bodies = {str(name): body for name, body in layer.content.items() if name not in NAMES}
    for prefix, steps in [("", bodies), *((f"rounds, entry {n}: ", item) for n, item in enumerate(overlays, 1))]:
        for step, body in steps.items() if isinstance(steps, dict) else ():
            if not isinstance(body, dict):
                hint = how_to_set(step, body, all_steps or {})
                if not hint and isinstance(body, str | int):
                    hint = f" ({nearest(step, list(NAMES))})"
                problems.append(f"{prefix}{step}: must be a mapping with use, like, from, with; got {body!r}{hint}")
                continue
            keys = [key for key in body if key not in BODY_KEYS]
            hints = {
                key: how_to_set(f"{step}.{key}", body[key], all_steps or {})
                or (_judges_hint(key, body[key]) if step == "judge" else "")
                for key in keys
            }
            problems += [f"{prefix}{step}.{key}: unknown key{hint}" for key, hint in hints.items() if hint]
            try:
                validated(StepBody, {key: body[key] for key in body if not hints.get(key)}, step, noun="key")
            except WinnowError as error:
                # `first` or `then` may be written in another layer
                problems += [f"{prefix}{line}" for line in error.problems if ": required" not in line]
    return list(dict.fromkeys(problems))


def _judges_hint(key: str, body: Any) -> str:
    """Return the end of a message about a key of step `judge` that may be the name of a judge."""
    if not isinstance(body, dict) or not {"use", "ranker", "with", "against"}.intersection(body):
        return ""
    return f"; a judge of that name is written under `judges`: `judges: {{{key}: ...}}`"


def _step_problems(steps: dict[str, Any]) -> list[str]:
    """Return everything that is wrong with steps as they are written, before any stage is asked."""
    problems, names = [], list(steps)
    for step, content in steps.items():
        if "@" in step:
            problems.append(f"{step}: a step's name must not contain '@', which marks a round; change it in `rounds`")
            continue
        if not step.strip() or not step.isprintable() or len(step.encode()) > NAME_BYTES:
            problems.append(
                f"{step[:NAME_BYTES]!r}: a step's name must be at most {NAME_BYTES} bytes of text that can be printed "
                "in a line; give it another"
            )
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
                for name, source in body.inputs.items()
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
    return merge({"use": model} | _with_like(model, steps), body)


# --set.


def option_paths(name: str, steps: Steps) -> list[str]:
    """Return where an option of this name is set: in steps (`optimize.epochs`), and in the functions that they use."""
    paths = []
    for step in steps:
        with suppress(WinnowError, KeyError, TypeError, AttributeError):  # wrong steps are reported later
            body = _with_like(step, steps)
            fields = stages.find(body.get("use", step)).options.model_fields
            if name in fields:
                paths.append(f"{step}.{name}")
            for option, field in fields.items():
                function = (body.get("with") or {}).get(option, field.default)
                function = function.get("name") if isinstance(function, dict) else getattr(function, "name", function)
                registry = registry_of(field)
                entry = registry and registry.entries.get(registry.aliases.get(str(function), str(function)))
                if entry and name in entry.options.model_fields:
                    paths.append(f"{step}.{option}.{name}")
    return paths


def how_to_set(location: str, value: Any, steps: Steps) -> str:
    """Return the end of a message about an option that is written where it is none: the line to write.

    location: its name, perhaps after that of a step (`optimize.learning_rate`), whose option it then is if it has it.
    Return "" if no step has an option of this name, today's or a former one.
    """
    step, _, name = location.rpartition(".")
    paths = option_paths(name, steps)
    if not paths and name in FORMER:
        paths = option_paths(FORMER[name], steps)
    paths = list(dict.fromkeys(re.sub(r"@\d+", "", path) for path in paths))
    if not paths:
        return ""
    # The step itself, or one that is called like its stage (`optimize` before `sft`, which uses it).
    bases = {split_round(name)[0]: body for name, body in steps.items()}
    own_names = [name for name, body in bases.items() if isinstance(body, dict) and body.get("use", name) == name]
    path = min(paths, key=lambda path: (path.partition(".")[0] != step, path.partition(".")[0] not in own_names))
    first, *options = path.split(".")
    text = (
        str(value)
        if type(value) in (int, float) or value == "..."
        else json.dumps(value, ensure_ascii=False, default=str)
    )
    for option in reversed(["with", *options]):
        text = f"{{{option}: {text}}}"
    others = [other for other in paths if other != path]
    more = f" (or likewise {', '.join(others[:3])}{', ...' if len(others) > 3 else ''})" if others else ""
    return f"; it is an option of step {first}: write `{first}: {text}`{more}"


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
    def parse(cls, text: str, steps: Steps | None = None) -> "Override":
        """Read `step.option=value`, `step.option.inner=value`, `step@2.option=value` or `setting=value` (YAML).

        Raises WinnowError for anything else; of an option alone it names the steps that have it.
        """
        path, equals, value = text.partition("=")
        names = path.strip().split(".")
        if not equals or not all(names):
            raise WinnowError(f"--set {text}: must be step.option=value")
        if len(names) < 2 and names[0] not in SETTABLE:
            if paths := option_paths(names[0], steps or {}):
                raise WinnowError(f"--set {text}: must be step.option=value; steps have {', '.join(paths)}")
            hint = nearest(names[0], list(SETTABLE))
            raise WinnowError(f"--set {text}: must be step.option=value, or name a setting of the recipe; {hint}")
        line = value  # as a config has it
        for key in reversed(names[1:]):
            line = f"{{{key}: {line}}}"
        if names[0] == "judges" and len(names) > 1:
            raise WinnowError(
                f"--set {text}: judges are given in a config, since they become steps; write `judges: {line}` there"
            )
        if names[1:2] == ["with"] and len(names) > 2:
            raise WinnowError(f"--set {text}: write --set {'.'.join([names[0], *names[2:]])}={value}, without `with`")
        if len(names) > 1 and names[1] in BODY_KEYS:
            raise WinnowError(
                f"--set {text}: it sets options, as {names[0]}.OPTION=VALUE, and those of a function that an option "
                f"names, as optimize.objective.beta=0.1; write `{names[0]}: {line}` in a config"
            )
        content = parse(value, f"--set {text}")
        if len(names) < 2 and content is None:
            raise WinnowError(f"--set {text}: {names[0]} must have a value")
        return cls(text, names[0], *split_round(names[0]), tuple(names[1:]), content)

    def position(self) -> int:
        return 2 * len(self.path) - self._is_name

    @property
    def layer(self) -> Layer:
        """Return the option as a layer of its own."""
        content: Any = self.value
        for name in (*reversed(self.path), "with", self.step):
            content = {name: content}
        return Layer("--set", content, is_config=True, is_own=True)

    def apply(self, rounds: list[Steps], count: int) -> None:
        """Change the steps in place; mappings on the way are copied. `count` is 0 where the recipe has no rounds.

        Another `name` is another function, which has none of the options of the one before.
        """
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
            if self._is_name and parent.get("name") != self.value:
                parent.clear()
            parent[self.path[-1]] = self.value

    @property
    def _is_name(self) -> bool:
        return len(self.path) > 1 and self.path[-1] == "name"
