"""Contents of a store at one moment: its step folders, what each step was made from, and which runs reach it."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from pathlib import Path

from pipeline.store.manifests import KEY, DamagedError
from pipeline.store.storage import File, walk
from pipeline.store.store import COMMANDS, LOCKS, RUNS, SIDECAR_NAME, Json, StepFolder, Store, model_name


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
        for name in self.parts:
            with suppress(DamagedError):
                sidecar = self.folder.read_sidecar(name) or {}
                part = sidecar["parts"][0] if sidecar.get("parts") else sidecar
                if "inputs" in part:
                    return frozenset(part["inputs"].values())
        return None

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

    Raises DamagedError if the file of a run is damaged: the run may reach any step.
    """

    def __init__(self, store: Store, runs: dict[str, Json] | None = None) -> None:
        self.store = store
        self.files = walk(store.root)
        self.runs = store.runs() if runs is None else runs
        files_by_step: dict[tuple[str, str], dict[str, File]] = {}
        for path, file in self.files.items():  # anything else in the store's folder is not ours
            stage, _, rest = path.partition("/")
            key, _, name = rest.partition("/")
            if name and KEY.fullmatch(key) and stage not in (LOCKS, RUNS, COMMANDS):
                files_by_step.setdefault((stage, key), {})[name] = file
        finished = {manifest["key"]: manifest for manifest in store.sealed()}
        self.steps = {
            key: StoredStep(stage, key, store.at(stage, key), files, finished.get(key))
            for (stage, key), files in files_by_step.items()
        }

    def reached(self, without: tuple[str, ...] = ()) -> set[str]:
        """Return the keys that runs link to, except the runs in `without`."""
        return {link["key"] for run, steps in self.runs.items() if run not in without for link in steps.values()}


def followers_of(key: str, store: Store) -> list[tuple[str, str]]:
    """Return stage and key of all stored steps that were made from a step, directly or not, each before its inputs."""
    steps = Inventory(store).steps
    inputs = {other: step.inputs for other, step in steps.items()}
    keys = {key}
    while more := {other for other, sources in inputs.items() if sources and sources & keys} - keys:
        keys |= more
    return [(steps[other].stage, other) for other in followers_first(inputs) if other in keys - {key}]


def followers_first(inputs: Mapping[str, Collection[str] | None]) -> list[str]:
    """Return all keys in `inputs`, each before the keys that it was made from.

    Keys whose inputs are unknown (None) come first: they may have been made from any other.
    """
    graph = {key: sources for key, sources in inputs.items() if sources is not None}
    inputs_first = [key for key in TopologicalSorter(graph).static_order() if key in graph]
    return [key for key, sources in inputs.items() if sources is None] + inputs_first[::-1]
