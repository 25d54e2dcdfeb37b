"""Command that checks every stored byte: verify."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

import jobs
from jobs import resume
from jobs.commands.app import STORE, StorePath, console
from pipeline.registry import nearest
from pipeline.store.store import Json, Store
from pipeline.store.verify import find_damage, set_aside
from schemas import WinnowError


def verify(
    run: Annotated[str | None, typer.Argument(help="a run; all of the store if omitted")] = None,
    store: StorePath = STORE,
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
    if run is not None and run not in runs:
        raise WinnowError(f"no run {run!r} in {source.root}; {nearest(run, list(runs))}")
    keys = None if run is None else {link["key"] for link in runs[run].values()}
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
                commands.setdefault(str(command), command)
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
