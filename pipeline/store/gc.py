"""What no run reaches, and what nobody would miss; deleted only while that is still so.

A step is reached if a run's link names it, made or on its way. Before each deletion the step is claimed, its manifest
is put away, and the links are read again. A run links first and looks for manifests then: it either is seen, and the
manifest goes back, or finds none, and makes the step once the claim is over. An object store knows no claims: there,
delete when nothing runs.
"""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.registry import nearest
from pipeline.store.inventory import KEY, LOCKS, RUNS, SIDECAR, Inventory, StoredStep, followers_first, links
from pipeline.store.storage import Location, create, delete, read, sizes
from pipeline.store.store import StepFolder, Store
from schemas import WinnowError

STALE_SECONDS = 3600.0
SCRATCH = re.compile(r"\..+\.\d+\.\d+")  # as pipeline.store.storage writes before it renames


@dataclass(frozen=True)
class GarbageItem:
    """A folder or a file, by its path from the store's root."""

    path: str
    why: str
    bytes: int


@dataclass(frozen=True)
class Found:
    """In the order in which it may go; `busy` are keys of what somebody is making and no run names any more."""

    garbage: list[GarbageItem]
    busy: list[str]


def garbage(store: Store, forget: tuple[str, ...] = ()) -> Found:
    """What could be deleted if the runs in `forget` were gone. Raises WinnowError for runs that there are not.

    While somebody makes a step that no run names any more, nothing says what it reads: then sealed steps stay.
    """
    contents = Inventory(store)
    _check(contents, forget)
    reached, busy = contents.reached(forget), _busy(contents)
    astray = sorted(busy - reached)
    loose = {
        key: made for key, made in contents.made.items() if key not in reached | busy and not (made.manifest and astray)
    }
    found = [_of_step(loose[key]) for key in followers_first({key: made.inputs for key, made in loose.items()})]
    found += [item for key, made in contents.made.items() if key in reached for item in _unlisted(made)]
    return Found(found + [item for item in _stale(contents, busy) if item.path.split("/")[1] not in loose], astray)


def _check(contents: Inventory, forget: tuple[str, ...]) -> None:
    unknown = [run for run in forget if run not in contents.runs]
    if unknown:
        raise WinnowError(*(f"--forget {run}: no such run; {nearest(run, list(contents.runs))}" for run in unknown))
    if not contents.runs:
        raise WinnowError(
            f"--store {contents.store.root}: no runs here, so that nothing would be kept; if that is meant, delete "
            "the folder"
        )


def _busy(contents: Inventory) -> set[str]:
    """Keys of steps at work: claimed on this disk; in an object store, which knows no claims, written to lately."""
    if isinstance(contents.store.root, Path):
        return set(contents.held())
    return {key for key, made in contents.made.items() if not made.manifest and _young(made.modified)}


def _of_step(made: StoredStep) -> GarbageItem:
    why = "no run reaches it" if made.manifest else "not finished, and no run names it"
    return GarbageItem(f"{made.stage}/{made.key}", why, made.bytes)


def _young(moment: float) -> bool:
    return time.time() - moment < STALE_SECONDS


def _unlisted(made: StoredStep) -> Iterator[GarbageItem]:
    for name, size in made.unlisted().items():
        if not SCRATCH.fullmatch(name):
            yield GarbageItem(f"{made.stage}/{made.key}/{name}", "its step is sealed without it", size)


def _stale(contents: Inventory, busy: set[str]) -> Iterator[GarbageItem]:
    """Locks that nobody holds, and what a process wrote aside and never renamed."""
    for path, file in contents.files.items():
        home, _, name = path.rpartition("/")
        if _young(file.modified):
            continue
        if home == LOCKS and name not in busy and (KEY.fullmatch(name) or name.startswith(".trial-")):
            yield GarbageItem(path, "nobody holds this lock", file.bytes)
        elif SCRATCH.fullmatch(name) and (home in (RUNS, LOCKS) or home.partition("/")[2] in contents.made):
            yield GarbageItem(path, "never renamed to what it was to be", file.bytes)


def sweep(store: Store, found: Found, forget: tuple[str, ...] = ()) -> Iterator[GarbageItem]:
    """Forget the runs, then delete what is still garbage; each one is told when it is gone."""
    for run in forget:
        delete(store.root / RUNS / f"{run}.json")
    for item in found.garbage:
        if _gone(store, item):
            yield item


def _gone(store: Store, item: GarbageItem) -> bool:
    """Delete it if it still is garbage; False where somebody is at work on it, or reaches it by now."""
    stage, key, *rest = item.path.split("/")
    if SCRATCH.fullmatch((rest or [key])[0]) or key.startswith(".trial-"):
        delete(store.root / item.path)
        return True
    folder = store.at(stage, key)
    claim = folder.claim()
    if claim is None:
        return False
    try:
        if stage == LOCKS:
            delete(folder.path)
            return True
        return _entry_gone(folder, rest[0]) if rest else _step_gone(store, folder)
    finally:
        claim.release()


def _step_gone(store: Store, folder: StepFolder) -> bool:
    def reached() -> bool:
        return any(link["key"] == folder.path.name for steps in links(store).values() for link in steps.values())

    return remove([folder], reached)


def remove(folders: list[StepFolder], reached: Callable[[], bool]) -> bool:
    """Delete steps, unless they are reached, by the last look at least; else, or if looking fails, all is as before.

    The caller has claimed them, and named those first that were made of others. Killed in between, a step has lost its
    manifest, and is sealed anew of its parts.
    """
    if reached():
        return False
    manifests: list[tuple[StepFolder, bytes]] = []
    wanted = True
    try:
        for folder in folders:
            if folder.manifest_path.exists():
                manifests.append((folder, read(folder.manifest_path)))
                delete(folder.manifest_path)
        wanted = reached()
    finally:
        for folder, manifest in reversed(manifests if wanted else []):
            create(folder.manifest_path, manifest)
    for folder in [] if wanted else folders:
        _remove(folder)
    return not wanted


def _remove(folder: StepFolder) -> None:
    """The manifest and the sidecars first, so that no half of it counts."""
    delete(folder.manifest_path)
    for name in sizes(folder.path):
        if SIDECAR.fullmatch(name):
            delete(folder.path / name)
    delete(folder.path)
    root: Location = folder.path.parent.parent
    delete(root / LOCKS / folder.path.name)


def _entry_gone(folder: StepFolder, name: str) -> bool:
    """Unless the step was made anew since, and of this file."""
    manifest = folder.manifest
    if manifest is None or name in {file["file"] for file in manifest["files"]}:
        return False
    delete(folder.path / name)
    return True
