"""Contents of a store at one moment: its step folders, what each step was made from, and which runs reach it."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from pathlib import Path

from pipeline.store.storage import File, walk
from pipeline.store.store import LOCKS, RUNS, SIDECAR_NAME, Json, StepFolder, Store, model_name, read_json

KEY = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class StoredStep:
    """Folder of a step with its files, by their paths relative to it, and its manifest if it is finished."""

    stage: str
    key: str
    folder: StepFolder
    files: dict[str, File]
    manifest: Json | None

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())

    @property
    def parts(self) -> list[str]:
        """Return the names of the sidecars, one per finished part."""
        return [name for name in self.files if SIDECAR_NAME.fullmatch(name)]

    @cached_property
    def inputs(self) -> frozenset[str] | None:
        """Return the keys of the steps that it was made from, or None if no file in it says so."""
        if self.manifest:
            return frozenset(self.manifest["identity"]["inputs"].values())
        sidecar = read_json(self.folder.path / self.parts[0]) if self.parts else None
        part = sidecar["parts"][0] if sidecar and "parts" in sidecar else sidecar
        return frozenset(part["inputs"].values()) if part and "inputs" in part else None

    def unlisted(self) -> dict[str, int]:
        """Return names and bytes of the files and subfolders that a finished step does not need.

        These are parts of a run that lost the race, and checkpoints from before the step was finished.
        """
        if self.manifest is None:
            return {}
        needed = {"manifest.json", *(file["file"] for file in self.manifest["files"]), *self.parts}
        if self.manifest["model"]:
            needed.add("model" if isinstance(self.folder.path, Path) else model_name(self.manifest["model"]))
        unlisted: dict[str, int] = {}
        for name, file in self.files.items():
            if (entry := name.split("/")[0]) not in needed:
                unlisted[entry] = unlisted.get(entry, 0) + file.bytes
        return unlisted


class Inventory:
    """All files, runs and steps (by key) of a store, read from one listing.

    Raises WinnowError if the file of a run or a manifest is damaged: the run may reach any step.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.files = walk(store.root)
        self.runs = store.runs()
        files_by_step: dict[tuple[str, str], dict[str, File]] = {}
        for path, file in self.files.items():  # anything else in the store's folder is not ours
            stage, _, rest = path.partition("/")
            key, _, name = rest.partition("/")
            if name and KEY.fullmatch(key) and stage not in (LOCKS, RUNS):
                files_by_step.setdefault((stage, key), {})[name] = file
        finished = {manifest["key"]: manifest for manifest in store.sealed()}
        self.steps = {
            key: StoredStep(stage, key, store.at(stage, key), files, finished.get(key))
            for (stage, key), files in files_by_step.items()
        }

    def reached(self, without: tuple[str, ...] = ()) -> set[str]:
        """Return the keys that runs link to, except the runs in `without`."""
        return {link["key"] for run, steps in self.runs.items() if run not in without for link in steps.values()}


def followers_first(inputs: Mapping[str, Collection[str] | None]) -> list[str]:
    """Return all keys in `inputs`, each before the keys that it was made from.

    Keys whose inputs are unknown (None) come first: they may have been made from any other.
    """
    graph = {key: sources for key, sources in inputs.items() if sources is not None}
    inputs_first = [key for key in TopologicalSorter(graph).static_order() if key in graph]
    return [key for key, sources in inputs.items() if sources is None] + inputs_first[::-1]
