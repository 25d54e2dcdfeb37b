"""What a submission takes to a cluster: our code, each recipe as one file, the profile. No data, no environment."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs import profiles, recipes
from pipeline.config.keys import key_of
from pipeline.config.plan import Plan
from pipeline.config.recipe import merged
from pipeline.config.yaml import written
from pipeline.execution.run import PACKAGES, SHIPPED, commit
from pipeline.registry import Bound
from pipeline.store.fingerprints import ContentPath
from schemas import WinnowError

ROOT = Path(__file__).parents[1]
KINDS = {".py", ".yaml", ".sql", ".html", ".jinja", ".sh"}
LIMIT = 100 * 2**20  # bytes that Ray's Jobs API takes in one upload
OWN = "submission"  # the folder of what is not code
PROFILE = f"{OWN}/profile.yml"  # no recipe's name there: those end in .yaml


def plan_key(plans: list[Plan]) -> str:
    """8 hex digits that stand for all that is to be made, and for what it is made of."""
    return key_of(sorted({step.key for plan in plans for step in plan.wanted}))[:8]


def pack(folder: Path, recipe: list[str], worlds: list[Path], profile: str | None) -> list[str]:
    """Fill the folder, and return the words after `winnow run` that name what is in it; --set and --store go as told.

    A run there has the keys and the name of a run here. Raises WinnowError for a folder that is too large to go.
    """
    for package in PACKAGES:
        _copy_code(ROOT / package, folder / package)
    (folder / SHIPPED).write_text(commit() or "")
    (folder / OWN).mkdir()
    words = [_write_recipe(folder, name, worlds) for name in recipe]
    if double := {word for word in words if words.count(word) > 1}:
        raise WinnowError(f"two recipes are called {Path(double.pop()).name}, and so would be their runs; rename one")
    if profile:
        shutil.copyfile(profiles.profile_path(profile), folder / PROFILE)
        words += ["--profile", PROFILE]
    _check_size(folder)
    return words


def _copy_code(package: Path, target: Path) -> None:
    for file in package.rglob("*"):
        if file.suffix in KINDS and file.is_file():
            copy = target / file.relative_to(package)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def _write_recipe(folder: Path, recipe: str, worlds: list[Path]) -> str:
    """Under its own name, which is the run's."""
    path = recipes.recipe_path(recipe)
    name = f"{OWN}/{path.stem}.yaml"
    content = merged(path, tuple(worlds), (recipes.FOLDER,))
    (folder / name).write_text(written(content), encoding="utf-8")
    return name


def _check_size(folder: Path) -> None:
    sizes = {file.relative_to(folder): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    if (total := sum(sizes.values())) <= LIMIT:
        return
    largest = sorted(sizes, key=lambda file: -sizes[file])[:3]
    raise WinnowError(
        f"submission: {_mib(total)}, and Ray's Jobs API takes {_mib(LIMIT)}; the largest files: "
        + ", ".join(f"{file} ({_mib(sizes[file])})" for file in largest)
        + "; only code travels: move what is not code out of these folders"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def check_paths(plans: list[Plan]) -> None:
    """Raises WinnowError for every path that another working folder would make another."""
    problems = [
        f"{step.name}: {path.written} is relative to this folder, and the cluster runs in another; "
        f"say {path.path}, or in a file ./{Path(path.written).name} for what lies beside it"
        for plan in plans
        for step in plan.steps
        for path in _paths(step.options)
        if not Path(path.written).is_absolute()
    ]
    if problems:
        raise WinnowError(*dict.fromkeys(problems))


def _paths(value: Any) -> Iterator[ContentPath]:
    if isinstance(value, ContentPath):
        yield value
    elif isinstance(value, Bound):
        yield from _paths(value.options)
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _paths(each)
