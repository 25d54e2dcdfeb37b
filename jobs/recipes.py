"""Recipes by name, and plans of several at once."""

from pathlib import Path

import jobs.demo.gold  # noqa: F401 - registers the demo's gold reward
import stages.all  # noqa: F401 - registers every stage
from pipeline.config.plan import Plan, make_plan
from pipeline.config.recipe import load_recipe
from pipeline.registry import nearest
from schemas import WinnowError

FOLDER = Path(__file__).parent / "recipes"
NO_CONFIG = "--config: not set; `--config my.yaml` names your data and models, and the README shows one"


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("_"))


def recipe_path(recipe: str) -> Path:
    """Return the file of a shipped recipe, or the YAML file itself. Raise WinnowError for an unknown name."""
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        return path
    if recipe not in names():
        raise WinnowError(f"unknown recipe {recipe!r}; {nearest(recipe, names())}; or give a YAML file")
    return FOLDER / f"{recipe}.yaml"


def plan_named(recipe: str, configs: list[Path], sets: list[str], name: str | None = None) -> Plan:
    """Return the plan of one recipe with configs, under a run name if given. Raise WinnowError with all mistakes."""
    loaded = load_recipe(recipe_path(recipe), tuple(configs), tuple(sets), name, (FOLDER,))
    try:
        return make_plan(loaded)
    except WinnowError as error:
        incomplete = not configs and any(": required" in problem for problem in error.problems)
        raise WinnowError(*error.problems, *([NO_CONFIG] if incomplete else [])) from None


def plans(recipes: list[str], configs: list[Path], sets: list[str]) -> list[Plan]:
    """Return the plans of all recipes with the same configs. Raise WinnowError with the mistakes of all of them."""
    result, problems = [], []
    for recipe in recipes:
        try:
            result.append(plan_named(recipe, configs, sets))
        except WinnowError as error:
            problems += [f"{recipe}: {problem}" for problem in error.problems]
    if problems:
        raise WinnowError(*problems)
    return result
