"""YAML to steps: what a recipe `extends`, a world's data and models between base and recipe, and --set overrides.

A recipe is a mapping of step names to `use` (a stage; the step's own name by default), `from` (inputs)
and `with` (options); `like` takes all three from another step, and says only what differs. `shards`,
`target`, `rounds`, `about` and `extends` are settings of the whole. `rounds` is a number of equal rounds,
or a list of overlays, one a round (pipeline/config/rounds.py).
"""

from dataclasses import dataclass, field
from functools import reduce
from hashlib import sha256
from pathlib import Path
from typing import Any

from pipeline.config.overrides import Override, apply, overrides_of
from pipeline.config.rounds import Steps, entries, first_only, malformed, malformed_wire, split, unroll
from pipeline.config.yaml import parse
from pipeline.registry import nearest
from schemas import WinnowError

SETTINGS = {"about": str, "extends": str, "shards": int, "target": str}
ROUNDS = "rounds"  # a setting as well, of two types
PARTS = ("use", "like", "from", "with")
DEEPEST = 3  # a base, a method, and one's own: a recipe is read in one look


@dataclass
class Recipe:
    """Steps, not yet checked against any stage; those that change from round to round are `step@1`, `step@2`, ..."""

    name: str
    shards: int = 8
    target: str = "evaluate"
    about: str = ""
    steps: Steps = field(default_factory=dict)
    rounds: int = 0

    @property
    def targets(self) -> list[str]:
        """The target of every round, the last one last."""
        each = [f"{self.target}@{number}" for number in range(1, self.rounds + 1)]
        return [step for step in each if step in self.steps] or [self.target]

    @property
    def written(self) -> list[str]:
        """The names of the steps as the recipe writes them."""
        return list(dict.fromkeys(split(step)[0] for step in self.steps))


def load_recipe(
    path: Path,
    overlays: tuple[Path, ...] = (),
    sets: tuple[str, ...] = (),
    name: str | None = None,
    library: tuple[Path, ...] = (),
) -> Recipe:
    """What the files say together, then --set over it; raises WinnowError."""
    run = name or _run_name(path.stem + "".join(f"[{item}]" for item in sets))
    return _recipe(merged(path, overlays, library), sets, run, str(path))


def merged(path: Path, overlays: tuple[Path, ...] = (), library: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Base, world, method, the recipe that extends it, each over the one before: what one file would have to say.

    What a method says of itself outranks what a world says of all methods. What a recipe extends is looked
    for beside it, then in the folders of `library`.
    """
    base, *methods = _lineage(path, library)
    layers = [base, *(_read(overlay, "--config") for overlay in overlays), *methods]
    whole: dict[str, Any] = reduce(_merge, layers, {})
    return {name: value for name, value in whole.items() if name != "extends"}


def _lineage(path: Path, library: tuple[Path, ...]) -> list[dict[str, Any]]:
    """The base, an empty one if there is none, what extends it, and the recipe last."""
    files, recipes = [path], [_read(path, "recipe")]
    while (name := recipes[0].get("extends")) is not None:
        file = _extended(name, (files[0].parent, *library))
        trail = " -> ".join(each.stem for each in (*reversed(files), file))
        if file in files:
            raise WinnowError(f"extends: a circle: {trail}; a name is looked for beside the file first")
        if len(files) == DEEPEST:
            raise WinnowError(f"extends: {trail} is more than {DEEPEST} files; extend {files[0].stem} instead")
        files, recipes = [file, *files], [_read(file, "recipe"), *recipes]
    return recipes if len(recipes) > 1 else [{}, *recipes]


def _extended(name: Any, folders: tuple[Path, ...]) -> Path:
    found = [path for folder in folders if (path := folder / f"{name}.yaml").exists()]
    if not found:
        known = nearest(str(name), sorted({path.stem for folder in folders for path in folder.glob("*.yaml")}))
        raise WinnowError(f"extends: no recipe {name!r} in {' or '.join(map(str, folders))}; {known}")
    return found[0]


def _run_name(name: str) -> str:
    """The name, if a file can have it; else a part of it, told apart from others by a hash."""
    plain = name.replace("/", "_").encode()[:150].decode(errors="ignore")
    return name if plain == name else f"{plain}-{sha256(name.encode()).hexdigest()[:8]}"


def _read(path: Path, what: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise WinnowError(f"{what} {path}: there is no such file in {path.resolve().parent}") from None
    except IsADirectoryError:
        raise WinnowError(f"{what} {path}: is a folder; name a YAML file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise WinnowError(f"{what} {path}: cannot be read ({error})") from None
    content = parse(text, f"{what} {path}")
    if not isinstance(content, dict):
        raise WinnowError(f"{what} {path}: must be a mapping of step names, got {type(content).__name__}")
    rooted: dict[str, Any] = _rooted(content, path.absolute().parent)
    return rooted


def _rooted(content: Any, folder: Path) -> Any:
    """`./data.jsonl` in a recipe file means beside that file, wherever the command runs."""
    if isinstance(content, dict):
        return {name: _rooted(value, folder) for name, value in content.items()}
    if isinstance(content, list):
        return [_rooted(value, folder) for value in content]
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


def _recipe(merged: dict[str, Any], sets: tuple[str, ...], name: str, place: str) -> Recipe:
    """What the files say, checked; then each round's overlay over it, then --set."""
    told: list[str] = []
    overrides = overrides_of(sets, [*(key for key in SETTINGS if key != "extends"), ROUNDS], told)
    whole = {each.name: each.value for each in overrides if not each.path}
    settings = {key: value for key, value in (merged | whole).items() if key in SETTINGS and value is not None}
    steps = {str(key): body or {} for key, body in merged.items() if key not in (*SETTINGS, ROUNDS)}
    problems = [*_misset(settings, place), *_malformed(steps)]
    overlays = _overlays(merged.get(ROUNDS), whole.get(ROUNDS), steps, problems)
    if problems:
        raise WinnowError(*told, *problems)
    made = _unrolled(steps, overlays, [each for each in overrides if each.path], told)
    return Recipe(name=name, steps=made, rounds=len(overlays), **settings)


def _overlays(written: Any, asked: Any, steps: Steps, problems: list[str]) -> list[Steps]:
    """One a round; none where the recipe has no rounds."""
    if miscounted := malformed(written, asked):
        problems += miscounted
        return []
    overlays = entries(written, asked)
    problems += [problem for number, overlay in enumerate(overlays, 1) for problem in _mislaid(number, overlay, steps)]
    return overlays


def _unrolled(steps: Steps, overlays: list[Steps], overrides: list[Override], told: list[str]) -> Steps:
    """--set, then `like`, then rounds; raises WinnowError with what was told before and what is wrong here."""
    rounds: list[Steps] = [_merge(steps, overlay) for overlay in overlays or [{}]]
    problems = apply(overrides, rounds, len(overlays))
    if told or problems:
        raise WinnowError(*told, *problems)
    alike = [{step: _alike(step, each) for step in each} for each in rounds]
    if not overlays:
        return first_only(alike[0])
    named = {step for overlay in overlays for step in overlay} | {each.step for each in overrides if each.round}
    differ = {step for each in alike for step in each if each[step] != alike[0][step]}  # through what they are like
    return unroll(alike, named | differ)


def _alike(step: str, steps: Steps) -> dict[str, Any]:
    """The step's body over that of the step which it is like, --set included."""
    body = {part: value for part, value in steps[step].items() if part != "like"}
    model = steps[step].get("like")
    if model is None:
        return body
    whole: dict[str, Any] = _merge({"use": model} | _alike(model, steps), body)
    return whole


def _models(step: str, steps: Steps) -> list[str]:
    """The steps that it is like, the nearest first; a circle ends where it closes."""
    found: list[str] = []
    while isinstance(model := (steps.get(step) or {}).get("like"), str) and model not in found:
        found.append(model)
        step = model
    return found


def _misset(settings: dict[str, Any], place: str) -> list[str]:
    problems = [
        f"{place}: {key} must be {SETTINGS[key].__name__}, got {value!r}"
        for key, value in settings.items()
        if type(value) is not SETTINGS[key]
    ]
    if type(settings.get("shards")) is int and not 1 <= settings["shards"] <= 99_999:
        problems.append(f"{place}: shards must be from 1 to 99999, got {settings['shards']}")
    return problems


def _mislaid(number: int, overlay: Any, steps: Steps) -> list[str]:
    """What is wrong with a round's overlay, and was not before it was laid over the steps."""
    place = f"rounds, entry {number}"
    if not isinstance(overlay, dict):
        return [f"{place}: must be a mapping of step names ({{}} for none), got {overlay!r}"]
    unknown = [step for step in overlay if step not in steps]
    known, before = {step: body for step, body in overlay.items() if step in steps}, _malformed(steps)
    new = [problem for problem in _malformed(_merge(steps, known)) if problem not in before]
    return [f"{place}: unknown step {step!r}; {nearest(str(step), list(steps))}" for step in unknown] + [
        f"{place}: {problem}" for problem in new
    ]


def _malformed(steps: Steps) -> list[str]:
    """What cannot be read as steps, all of it."""
    names = list(steps)
    problems = [problem for step, body in steps.items() for problem in _malformed_step(step, body, names)]
    return problems or [f"{step}.like: a circle" for step in steps if step in _models(step, steps)]


def _malformed_step(step: str, body: Any, steps: list[str]) -> list[str]:
    if "@" in step:
        return [f"{step}: a step's name may not hold '@', which stands for a round; change a round in `rounds`"]
    if not isinstance(body, dict):
        hint = f" ({nearest(step, [*SETTINGS, ROUNDS])})" if isinstance(body, str | int) else ""
        return [f"{step}: must be a mapping with use, like, from, with; got {body!r}{hint}"]
    problems = [f"{step}.{part}: unknown; {nearest(str(part), list(PARTS))}" for part in body if part not in PARTS]
    for part in ("from", "with"):
        if not isinstance(body.get(part) or {}, dict):
            problems.append(f"{step}.{part}: must be a mapping, got {body[part]!r}")
    wires = body.get("from")
    for wire, source in wires.items() if isinstance(wires, dict) else ():
        problems += malformed_wire(f"{step}.from.{wire}", source, steps)
    if (model := body.get("like")) is not None and model not in steps:
        problems.append(f"{step}.like: no step {model!r} in this recipe; {nearest(str(model), steps)}")
    if not isinstance(body.get("use", ""), str):
        problems.append(f"{step}.use: must be the name of a stage, got {body['use']!r}")
    return problems
