"""Command that checks every stored byte: verify."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

import jobs
from jobs import resume
from jobs.commands.app import STORE, Plugins, StorePath, console
from pipeline.config.rounds import run_and_round, steps_of_round
from pipeline.registry import nearest
from pipeline.store.store import Json, Store
from pipeline.store.verify import find_damage, set_aside
from schemas import WinnowError

REPEATED = ("run", "sweep", "demo", "paper")  # commands that make what is damaged again


def verify(
    run: Annotated[str | None, typer.Argument(help="a run; all of the store if omitted")] = None,
    store: StorePath = STORE,
    plugins: Plugins = [],  # noqa: B006
    repair: Annotated[
        bool, typer.Option("--repair", help="set aside what is damaged, and run again what its runs were called with")
    ] = False,
) -> None:
    """Check every stored byte against its digest: tables, manifests, models. Damage ends it with exit code 2.

    --repair deletes nothing: what is damaged is moved to the folder `set_aside` of the store.
    """
    source = Store(store)
    if isinstance(source.root, Path) and not source.root.is_dir():
        raise WinnowError(f"--store {store}: no such folder in {source.root.parent}")
    runs = _readable_runs(source)
    keys = None
    if run is not None:
        name, round = run_and_round(run, runs)
        if name not in runs:
            raise WinnowError(f"no run {run!r} in {source.root}; {nearest(run, list(runs))}")
        keys = {link["key"] for link in steps_of_round(name, runs[name], round).values()}
    damages = list(find_damage(source, keys))
    if not damages:
        console.print("no damage: every stored byte is as it was written", highlight=False)
        return
    for damage in damages:
        console.print(f"damaged  {damage}", highlight=False, markup=False)
    if not repair:
        words = ["verify", *([run] if run else []), "--repair", "--store", store]
        raise WinnowError(f"{len(damages)} damaged files; `{resume.hint(*words)}` sets them aside and makes them again")

    moved, unfinished = set_aside(source, damages)
    if moved:
        console.print(f"set aside in {source.root / 'set_aside'}", highlight=False, markup=False)
    damaged_links = {Path(damage.file).stem for damage in damages if damage.stage == "runs"}
    commands: dict[str, Json] = {}
    for name in sorted({*runs, *damaged_links}):
        if name in damaged_links or any(link["key"] in unfinished for link in runs[name].values()):
            if command := source.command(name):
                if problem := _problem(command, source):
                    console.print(f"{name}: {problem}; run its recipe again", highlight=False, markup=False)
                    continue
                words = _without_plugins(resume.without_force(command["words"]))
                words += [word for file in plugins for word in ("--plugin", str(file.expanduser().resolve()))]
                commands.setdefault(str(command), command | {"words": words})
            else:
                console.print(f"{name}: it is not known how this run was called; run its recipe again", markup=False)
    for command in commands.values():
        console.print(
            f"running in {command['folder']}: {resume.hint(*command['words'])}", highlight=False, markup=False
        )
        _call(command)
    damages = list(find_damage(source, keys))
    lacking = sorted(unfinished - {manifest["key"] for manifest in source.sealed()})
    for damage in damages:
        console.print(f"damaged  {damage}", highlight=False, markup=False)
    if damages or lacking:
        raise WinnowError(f"not made again: {', '.join(lacking) or damages[0]}; run the recipes that need it again")
    console.print("no damage any more", highlight=False)


def _readable_runs(store: Store) -> dict[str, Json]:
    names = [path.stem for path in (store.root / "runs").glob("*.json")]
    runs = {}
    for name in sorted(names):
        try:
            runs[name] = store.run(name)
        except WinnowError:  # it is among the damage
            continue
    return runs


def _problem(command: Json, store: Store) -> str:
    """Return why a command that a store contains is not called: a store may be somebody else's, and say anything."""
    words, folder = command["words"], Path(command["folder"])
    if not words or words[0] not in REPEATED:
        return f"it was called as {' '.join(words)!r}, which is not repeated from here"
    stores = [value for name, value in pairwise([*words, ""]) if name == "--store"]
    stores += [word.partition("=")[2] for word in words if word.startswith("--store=")]
    if words[0] == "demo":
        return ""
    for name in stores or [STORE]:
        is_this = (folder / name).resolve() == store.root if isinstance(store.root, Path) else name == str(store.root)
        if not is_this:
            return f"its command is for the store {name} in {folder}, and not for this one"
    return ""


def _without_plugins(words: list[str]) -> list[str]:
    """Return the words without the code that they name: that is for whoever repairs to name."""
    return [
        word
        for before, word in pairwise(["", *words])
        if before != "--plugin" and word != "--plugin" and not word.startswith("--plugin=")
    ]


def _call(command: Json) -> None:
    """Call the program again as a run was called, in a process of its own, and print what it prints."""
    if not Path(command["folder"]).is_dir():
        console.print(f"there is no folder {command['folder']} any more", highlight=False, markup=False)
        return
    paths = [str(Path(jobs.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    sys.stdout.flush()
    subprocess.run(
        [sys.executable, "-m", "jobs", *command["words"]], cwd=command["folder"], env=environment, check=False
    )
