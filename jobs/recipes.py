"""Recipes and profiles by name or file, and plans of several recipes at once."""

import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jobs.demo.gold  # noqa: F401 - registers the demo's gold reward
import stages.all  # noqa: F401 - registers every stage
from jobs.resume import hint
from pipeline.config.layers import read_file
from pipeline.config.partial import predecessors
from pipeline.config.plan import Plan, make_plan, merged_warnings
from pipeline.config.recipe import Override, Recipe, default_run_name, load_recipe
from pipeline.config.rounds import split_round
from pipeline.registry import Bound, Entry, nearest
from pipeline.resources import Profile, load_profile
from pipeline.stage import stages as registry
from schemas import WinnowError
from stages.evaluation.evaluate import gold_reward

FOLDER = Path(__file__).parent / "recipes"
PROFILES = Path(__file__).parent / "profiles"
ALONE = ".recipe"  # suffix of a submitted recipe without its configs, beside the file that has them (jobs/bundle.py)
# Recipes on candidates of another system, which no demo has
OWN_CANDIDATES = ("kto_direct", "own_candidates", "own_completions")
NO_CONFIG = "--config: not set; `--config my.yaml` names your data and models, and the README shows one"


def names(folder: Path = FOLDER) -> list[str]:
    return sorted(path.stem for path in folder.glob("[!_]*.yaml"))


def recipe_path(recipe: str) -> Path:
    """Return the file of a shipped recipe, or the YAML file itself. Raise WinnowError for an unknown name."""
    return _yaml_file(recipe, FOLDER, f"unknown recipe {recipe!r}")


def profile_path(profile: str) -> Path:
    """Return the file of a shipped profile, or the YAML file itself. Raise WinnowError for an unknown name."""
    return _yaml_file(profile, PROFILES, f"--profile {profile!r}: unknown")


def load_resources(profile: str | None) -> Profile:
    """Return the resources per stage; without a profile, stages share what Ray has. Raise WinnowError for mistakes."""
    return load_profile(profile_path(profile), list(registry.entries)) if profile else Profile()


def _yaml_file(name: str, folder: Path, problem: str) -> Path:
    if Path(name).suffix.lower() in (".yaml", ".yml"):
        return Path(name)
    if name not in names(folder):
        raise WinnowError(f"{problem}, and no YAML file; {nearest(name, names(folder))}")
    return folder / f"{name}.yaml"


def plan_named(
    recipe: str, configs: list[Path], sets: list[str], name: str | None = None, last: str | None = None
) -> Plan:
    """Return the plan of one recipe with configs, under a run name if given. Raise WinnowError with all mistakes.

    last: the step that a command ends with, after which nothing need be as it must.
    """
    path = recipe_path(recipe)
    if not any(text.startswith("target=") for text in sets):
        _refuse_config(path)
    loaded = load_recipe(path, tuple(configs), tuple(sets), name, (FOLDER,))
    try:
        plan = _plan_until(last, loaded)
        if name is None:
            effective = _effective(path, tuple(configs), sets, plan, last)
            plan.name = run_name(path, effective, plan, options_beside(path, effective, plan))
        return plan
    except WinnowError as error:
        incomplete = not configs and any(": required" in problem for problem in error.problems)
        raise WinnowError(*error.problems, *([NO_CONFIG] if incomplete else [])) from None


def _plan_until(last: str | None, recipe: Recipe) -> Plan:
    """Return the plan of a recipe or, if only what follows this step has mistakes, one that ends with the step.

    Raise WinnowError with all mistakes.
    """
    try:
        return make_plan(recipe, last)
    except WinnowError as error:
        if last is None or not {*recipe.in_rounds(last)} <= {*recipe.steps}:
            raise
        plan = make_plan(replace(recipe, target=last, evaluations=[], trained=""))
        plan.left_out.append(f"what follows {last} is left out, and could not be run as it is: {error.problems[0]}")
        return plan


def plan_with_gold(recipe: str, configs: list[Path], sets: list[str]) -> tuple[Plan, tuple[Bound, bool] | None]:
    """Return a plan, and the gold reward of its evaluation with whether that reads special tokens, None without one.

    Also where the plan ends before `evaluate`, as one without a ranker does: a config or --set may still name it.
    Raises WinnowError with all mistakes.
    """
    plan = plan_named(recipe, configs, sets)
    written = load_recipe(recipe_path(recipe), tuple(configs), tuple(sets), None, (FOLDER,)).steps
    bodies = [body.get("with") or {} for name, body in written.items() if split_round(name)[0] == "evaluate"]
    options = bodies[0] if bodies else {}
    gold = next((step.options["gold"] for step in plan.steps if step.stage == "evaluate"), options.get("gold"))
    return plan, None if gold is None else (gold_reward.bind(gold), bool(options.get("special_tokens", False)))


def run_name(path: Path, sets: list[str], plan: Plan, others: Collection[str]) -> str:
    """Return the name of a plan's run by its recipe and --set: how a step runs is no other run.

    others: options that those of --set are told from.
    """
    return default_run_name(path, [text for text in sets if not is_execution(Override.parse(text), plan)], others)


def options_beside(path: Path, sets: list[str], plan: Plan) -> set[str]:
    """Return the paths of the options that a recipe's files set in a plan, from which those of --set are to be told.

    Those of the evaluation count only where --set has one of these: `n` is that of `sample`, and not `eval_sample.n`.
    """
    if not sets:
        return set()
    try:
        alone = path.with_suffix(ALONE)
        recipe = load_recipe(alone if alone.is_file() else path, (), (), None, (FOLDER,))
    except WinnowError:  # one that is complete only with its config
        return set()
    behind = [step for trained in recipe.in_rounds(recipe.trained) for step in predecessors(plan, trained)]
    names = {split_round(step.name)[0] for step in behind or plan.steps}
    if not {split_round(text.partition(".")[0])[0] for text in sets if "." in text.partition("=")[0]} <= names:
        names = {split_round(step.name)[0] for step in plan.steps}

    def paths(options: Mapping[str, Any], start: str) -> Iterator[str]:
        for name, value in options.items():
            if isinstance(value, dict):
                yield from paths(value, f"{start}.{name}")
            elif name != "name":  # of a function
                yield f"{start}.{name}"

    steps = {split_round(step)[0]: body.get("with") or {} for step, body in recipe.steps.items()}
    return {option for step in names & steps.keys() for option in paths(steps[step], step)}


def _effective(path: Path, configs: tuple[Path, ...], sets: list[str], plan: Plan, last: str | None) -> list[str]:
    """Return those of --set without which the plan would be another: a value that was set already is no other run."""
    keys = {step.name: step.key for step in plan.steps}
    effective = list(sets)
    for text in sets:
        rest = [other for other in effective if other is not text]
        with suppress(WinnowError), warnings.catch_warnings():  # without it, there is no plan
            warnings.simplefilter("ignore")  # of a plan that is not run
            other = _plan_until(last, load_recipe(path, configs, tuple(rest), None, (FOLDER,)))
            if {step.name: step.key for step in other.steps} == keys and other.target.name == plan.target.name:
                effective = rest
    return effective


def is_execution(override: Override, plan: Plan) -> bool:
    """Return whether an option says how its step runs, and not what it computes; trackers are told what it did."""
    if override.name == "track":
        return True
    steps = [step for step in plan.steps if split_round(step.name)[0] == override.step]
    return bool(steps) and all(_path_is_execution(step.entry, step.options, list(override.path)) for step in steps)


def _path_is_execution(entry: Entry, options: Mapping[str, Any], path: list[str]) -> bool:
    """Return whether a path names an option that is EXECUTION, an entry of a mapping, or an option of a function."""
    if not path:
        return False
    name, *inner = path
    value = options.get(name)
    if isinstance(value, Bound):
        return name in entry.execution or _path_is_execution(value.entry, value.options, inner)
    return name in entry.execution or (len(inner) > 0 and inner[0] in entry.execution_entries.get(name, ()))


def _refuse_config(path: Path) -> None:
    """Raise WinnowError for a file that extends no recipe and says of no step to end with what it reads: a config."""
    content = read_file(path, "recipe")
    target = content.get("target", "evaluate")
    body = content.get(target) if isinstance(target, str) else None
    if "extends" not in content and not (isinstance(body, dict) and body.keys() & {"use", "from", "like"}):
        raise WinnowError(
            f"{path} extends no recipe and has no step {target!r} with inputs: if it is a config, give it with a "
            f"recipe, as in `{hint('plan', 'rso', '--config', str(path))}`"
        )


@merged_warnings()
def plans(
    recipes: list[str], configs: list[Path], sets: list[str], name: str | None = None, last: str | None = None
) -> list[Plan]:
    """Return the plans of all recipes with the same configs, one under a name if given.

    last: the step that a command ends with, after which nothing need be as it must. Raises WinnowError with the
    mistakes of all of them.
    """
    if name is not None and len(recipes) > 1:
        raise WinnowError(f"--name {name!r}: names the run of one recipe, and there are {len(recipes)}; omit it")
    result: list[Plan] = []
    recipes_by_problem: dict[str, list[str]] = {}
    for recipe in recipes:
        try:
            result.append(plan_named(recipe, configs, sets, name, last))
        except WinnowError as error:
            for problem in error.problems:
                recipes_by_problem.setdefault(problem, []).append(recipe)
    problems = [f"{', '.join(names)}: {problem}" for problem, names in recipes_by_problem.items()]
    # A run is known by its recipe's name: two of one name would write the links of one run.
    for run, count in Counter(plan.name for plan in result).items():
        paths = dict.fromkeys(recipe for recipe in recipes if recipe_path(recipe).stem == run.partition("[")[0])
        if count > 1:
            problems.append(f"{' and '.join(paths)}: both would be run {run!r}; rename a file, or run them separately "
                            "with a --store each")  # fmt: skip
    if problems:
        raise WinnowError(*problems)
    return result
