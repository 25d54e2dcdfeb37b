"""Files that a submission sends to a cluster: our code, each recipe as one file, its plugins, the profile.

Data, models and the environment are not sent.
"""

import shutil
from pathlib import Path

from jobs import recipes
from jobs.tables import format_size
from pipeline.config.keys import content_paths, key_of
from pipeline.config.plan import Plan
from pipeline.config.recipe import merged
from pipeline.config.yaml import dump
from pipeline.execution.run import PACKAGES, SHIPPED, commit
from schemas import WinnowError

ROOT = Path(__file__).parents[1]
SUFFIXES = {".py", ".yaml", ".sql", ".html", ".jinja", ".sh"}
LIMIT = 100 * 2**20  # bytes that Ray's Jobs API accepts in one upload
FOLDER = "submission"  # of all files that are not our code
PROFILE = f"{FOLDER}/profile.yml"  # no recipe can have this name: those end in .yaml


def plan_key(plans: list[Plan]) -> str:
    """Return 8 hex digits that identify everything that the plans compute, inputs included."""
    return key_of(sorted({step.key for plan in plans for step in plan.steps_to_run}))[:8]


def pack_submission(folder: Path, recipe: list[str], configs: list[Path], profile: str | None) -> list[str]:
    """Fill the folder, and return the words after `winnow run` that name the files in it; --set and --store stay.

    A run of these files has the keys and the name of a run here. Raise WinnowError if the upload would be too large.
    """
    # Our code: PACKAGES are what runs, so neither tests nor benchmarks are sent.
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*"):
            if file.suffix in SUFFIXES and file.is_file():
                copy = folder / file.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
    (folder / SHIPPED).write_text(commit() or "")

    # Each recipe with all that it extends and its configs in one file, under its own name, which is the run's.
    (folder / FOLDER).mkdir()
    words: list[str] = []
    for name in recipe:
        path = recipes.recipe_path(name)
        content, word = merged(path, tuple(configs), (recipes.FOLDER,)), f"{FOLDER}/{path.stem}.yaml"
        if word in words:
            raise WinnowError(f"two recipes are named {path.stem}.yaml, and so would their runs be; rename one")
        # Plugins, numbered: two may have one file name. Their content is part of the keys, their path is not.
        for number, file in enumerate(content.get("plugins", [])):
            copy = folder / FOLDER / "plugins" / f"{path.stem}-{number}" / Path(file).name
            copy.parent.mkdir(parents=True)
            shutil.copyfile(file, copy)
            content["plugins"][number] = str(copy.relative_to(folder / FOLDER))
        (folder / word).write_text(dump(content), encoding="utf-8")
        # The run's name tells options of --set from those of the recipe alone.
        alone = merged(path, (), (recipes.FOLDER,))
        (folder / word).with_suffix(recipes.ALONE).write_text(dump(alone | {"plugins": []}), encoding="utf-8")
        words.append(word)
    if profile:
        shutil.copyfile(recipes.profile_path(profile), folder / PROFILE)
        words += ["--profile", PROFILE]

    sizes = {file.relative_to(folder): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    if (total := sum(sizes.values())) > LIMIT:
        largest = sorted(sizes, key=lambda file: -sizes[file])[:3]
        raise WinnowError(
            f"submission: {format_size(total)}, and Ray's Jobs API accepts {format_size(LIMIT)}; the largest files: "
            + ", ".join(f"{file} ({format_size(sizes[file])})" for file in largest)
            + "; only code is sent: move other files out of these folders"
        )
    return words


def plugin_words(folder: Path, files: list[Path], plans: list[Plan]) -> list[str]:
    """Return the words that let the job run the plugins that were packed, and those of `files` with a named function.

    A function's file (`{name: python, file: ...}`) the cluster must see where it is here, as it must see data.
    """
    packed = sorted(file for file in (folder / FOLDER / "plugins").rglob("*") if file.is_file())
    functions = [entry for plan in plans for step in plan.steps for entry in step.functions if entry.from_file]
    of_functions = {entry.plugin.path.resolve() for entry in functions if entry.plugin}
    others = [path for file in files if (path := file.expanduser().resolve()) in of_functions]
    names = [*(str(file.relative_to(folder)) for file in packed), *map(str, others)]
    return [word for name in names for word in ("--plugin", name)]


def check_paths(plans: list[Plan]) -> None:
    """Raise WinnowError for every relative path in an option: the job runs in another working folder."""
    problems = [
        f"{step.name}: {path.written} is relative to this folder, and the cluster runs in another; "
        f"write {path.path}, or in a file ./{Path(path.written).name} for a path relative to that file"
        for plan in plans
        for step in plan.steps
        for path in content_paths(step.options)
        if not Path(path.written).is_absolute() and not getattr(path, "hub_name", None)  # looked up there
    ]
    if problems:
        raise WinnowError(*dict.fromkeys(problems))
