"""Garbage collection: find what no run reaches, and delete it only while that is still so.

A step is reached if a run links to it, whether it is finished or not. Before a step is deleted it is locked, its
manifest is taken away, and the links are read again. A run does this in the other order: it links first and looks for
manifests then. So either its link is seen, and the manifest is put back, or it finds no manifest and makes the step
again once the lock is free. An object store has no locks: run `gc --yes` there only while no run is working.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.registry import nearest
from pipeline.store.inventory import Inventory, followers_first
from pipeline.store.manifests import KEY
from pipeline.store.storage import SCRATCH, create, delete, move, read, sizes, sync
from pipeline.store.store import COMMANDS, FORGOTTEN, LOCKS, RUNS, SIDECAR_NAME, TAGS, StepFolder, Store
from schemas import WinnowError

STALE_SECONDS = 3600.0


@dataclass(frozen=True)
class GarbageItem:
    """Folder or file by its path relative to the store's root, why it is garbage, and its size."""

    path: str
    why: str
    bytes: int


@dataclass(frozen=True)
class GarbageReport:
    """Garbage in the order in which it may be deleted.

    `busy` are the keys of steps that some process is making although no run links to them any more.
    """

    garbage: list[GarbageItem]
    busy: list[str]


def garbage(store: Store, forget: tuple[str, ...] = (), missing_ok: bool = False) -> GarbageReport:
    """Return what could be deleted if the runs in `forget` did not exist; write nothing, not even a lock.

    While a step is being made that no run links to, nothing says which steps it reads: no finished step is garbage
    then. Raises WinnowError if a run in `forget` does not exist and that is not ok, or if there are steps and no runs.
    """
    inventory = Inventory(store)
    runs = list(inventory.runs)
    forgotten = any(path.startswith(f"{FORGOTTEN}/") for path in inventory.files)  # by a `gc` that was cut off
    if not missing_ok and (unknown := [run for run in forget if run not in runs]):
        raise WinnowError(*(f"--forget {run}: no such run; {nearest(run, runs)}" for run in unknown))
    if not runs and not forgotten and (inventory.steps or not missing_ok):
        # a store copied without its runs, or a wrong folder: all of it would be garbage
        raise WinnowError(
            f"--store {store.root}: no runs here, so that everything would count as garbage, and nothing is deleted; "
            "run a recipe whose results you want to keep, or remove the folder yourself"
        )

    # An object store has no locks: there, a step that was written to lately counts as being made.
    steps, recent = inventory.steps, time.time() - STALE_SECONDS
    if isinstance(store.root, Path):
        names = [path.partition("/")[2] for path in inventory.files if path.startswith(f"{LOCKS}/")]
        busy = {key for key in filter(KEY.fullmatch, names) if store.at(LOCKS, key).is_locked()}
    else:
        unfinished = {key: step.files.values() for key, step in steps.items() if not step.manifest}
        busy = {key for key, files in unfinished.items() if any(file.modified > recent for file in files)}

    # Steps that no run reaches, each before those that it was made from: whenever the deletion stops, no finished
    # step has lost its inputs.
    reached = inventory.reached(forget)
    unlinked = sorted(busy - reached)
    loose = {key: step for key, step in steps.items() if key not in reached | busy and not (step.manifest and unlinked)}
    items = []
    for key in followers_first({key: step.inputs for key, step in loose.items()}):
        why = "no run reaches it" if loose[key].manifest else "not finished, and no run links to it"
        items.append(GarbageItem(f"{loose[key].stage}/{key}", why, loose[key].bytes))

    # Files in a finished step that its manifest does not list.
    for step in (step for key, step in steps.items() if key in reached):
        for name, size in step.unlisted().items():
            if not SCRATCH.fullmatch(name):
                items.append(GarbageItem(f"{step.stage}/{step.key}/{name}", "its manifest does not list it", size))

    # Locks that no process holds, and scratch files of processes that died before they renamed them.
    for path, file in inventory.files.items():
        folder, _, name = path.rpartition("/")
        if file.modified > recent or path.partition("/")[2].partition("/")[0] in loose:
            continue
        if folder == LOCKS and name not in busy and (KEY.fullmatch(name) or name.startswith(".trial-")):
            items.append(GarbageItem(path, "no process holds this lock", file.bytes))
        elif SCRATCH.fullmatch(name) and (folder in (LOCKS, RUNS, TAGS, COMMANDS) or folder.partition("/")[2] in steps):
            items.append(GarbageItem(path, "scratch file that was never renamed", file.bytes))
    return GarbageReport(items, unlinked)


def delete_garbage(store: Store, report: GarbageReport, forget: tuple[str, ...] = ()) -> Iterator[GarbageItem]:
    """Delete the runs in `forget`, then each item of the report that is still garbage; yield it when it is deleted."""
    for run in forget:  # their files stay until all is deleted, so that a `gc` that is cut off can be repeated
        move(store.root / RUNS / f"{run}.json", store.root / FORGOTTEN / f"{run}.json")
        for folder_name in (TAGS, COMMANDS):
            delete(store.root / folder_name / f"{run}.json")
    for item in report.garbage:
        stage, key, *rest = item.path.split("/")
        if SCRATCH.fullmatch((rest or [key])[0]) or key.startswith(".trial-"):
            delete(store.root / item.path)
            yield item
            continue
        folder = store.at(stage, key)
        lock = folder.try_lock()
        if lock is None:  # some process makes it now
            continue
        try:
            if stage == LOCKS:
                delete(folder.path)
                deleted = True
            elif rest:  # the step may have been made again since, with this file
                manifest = folder.manifest
                deleted = manifest is not None and rest[0] not in {file["file"] for file in manifest["files"]}
                if deleted:
                    delete(folder.path / rest[0])
            else:
                deleted = remove([folder], partial(_is_linked, store, key))
        finally:
            lock.release()
        if deleted:
            yield item
    delete(store.root / FORGOTTEN)


def _is_linked(store: Store, key: str) -> bool:
    return any(link["key"] == key for steps in store.runs().values() for link in steps.values())


def remove(folders: list[StepFolder], reached: Callable[[], bool]) -> bool:
    """Delete steps unless `reached` returns True, before or after their manifests are taken away.

    Returns whether they were deleted; if not, or if `reached` raises, everything is as before. The caller holds their
    locks, and lists each step before those that it was made from. If the process is killed in between, a step has lost
    its manifest, and the next run writes it again from its parts.
    """
    if reached():
        return False
    manifests: list[tuple[StepFolder, bytes]] = []
    restore = True
    try:
        for folder in folders:
            if folder.manifest_path.exists():
                manifests.append((folder, read(folder.manifest_path)))
                delete(folder.manifest_path)
        restore = reached()
    finally:
        if restore:
            for folder, manifest in reversed(manifests):
                create(folder.manifest_path, manifest)
    if restore:
        return False
    for folder in folders:
        # The manifest and the sidecars go first, so that no half of a step counts.
        delete(folder.manifest_path)
        for name in sizes(folder.path):
            if SIDECAR_NAME.fullmatch(name):
                delete(folder.path / name)
        if isinstance(folder.path, Path):  # else a power cut may bring the manifest back, and not its tables
            sync(folder.path)
        delete(folder.path)
        delete(folder.path.parent.parent / LOCKS / folder.path.name)
    return True
