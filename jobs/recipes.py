"""Recipes by name, and plans of several at once."""

from pathlib import Path

import jobs.demo.gold  # noqa: F401 - registers the demo's gold reward
import stages.all  # noqa: F401 - registers every stage
from pipeline.config.plan import Plan, make_plan
from pipeline.config.recipe import load_recipe
from pipeline.registry import nearest
from schemas import WinnowError

FOLDER = Path(__file__).parent / "recipes"
WORLD = "--config: not given; `--config world.yaml` says where your data and models are, and README shows one"


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("_"))


def recipe_path(recipe: str) -> Path:
    """A recipe of ours by name, or any YAML file."""
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        return path
    if recipe not in names():
        raise WinnowError(f"unknown recipe {recipe!r}; {nearest(recipe, names())}; or give a YAML file")
    return FOLDER / f"{recipe}.yaml"


def plan_named(recipe: str, worlds: list[Path], sets: list[str], name: str | None = None) -> Plan:
    """The plan of one recipe on a world, under a run name of its own if given."""
    loaded = load_recipe(recipe_path(recipe), tuple(worlds), tuple(sets), name, (FOLDER,))
    try:
        return make_plan(loaded)
    except WinnowError as error:
        lacks = not worlds and any(": required" in problem for problem in error.problems)
        raise WinnowError(*error.problems, *([WORLD] if lacks else [])) from None


def plans(recipes: list[str], worlds: list[Path], sets: list[str]) -> list[Plan]:
    """Every recipe planned on the same world, before anything runs; raises WinnowError with all mistakes of all."""
    made, problems = [], []
    for recipe in recipes:
        try:
            made.append(plan_named(recipe, worlds, sets))
        except WinnowError as error:
            problems += [f"{recipe}: {problem}" for problem in error.problems]
    if problems:
        raise WinnowError(*problems)
    return made
