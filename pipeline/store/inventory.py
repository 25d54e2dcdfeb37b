"""What lies in a store at one moment: its step folders, what each was made of, and which runs reach it."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from pathlib import Path

from pipeline.store.manifests import checked_manifest, checked_run
from pipeline.store.storage import File, walk
from pipeline.store.store import Json, StepFolder, Store, model_name, read_json

KEY = re.compile(r"[0-9a-f]{16}")
SIDECAR = re.compile(r"part-(\d{5}|whole)\.json")
LOCKS, RUNS = "locks", "runs"


@dataclass(frozen=True)
class StoredStep:
    """A step's folder and the files in it, by their paths from it."""

    stage: str
    key: str
    folder: StepFolder
    files: dict[str, File]
    manifest: Json | None

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())

    @property
    def modified(self) -> float:
        return max(file.modified for file in self.files.values())

    @property
    def parts(self) -> list[str]:
        """Sidecars of finished parts."""
        return [name for name in self.files if SIDECAR.fullmatch(name)]

    @cached_property
    def inputs(self) -> frozenset[str] | None:
        """Keys of the steps that it was made of; None where nothing in it says so."""
        if self.manifest:
            return frozenset(self.manifest["identity"]["inputs"].values())
        found = read_json(self.folder.path / self.parts[0]) if self.parts else None
        part = found["parts"][0] if found and "parts" in found else found
        return frozenset(part["inputs"].values()) if part and "inputs" in part else None

    def unlisted(self) -> dict[str, int]:
        """Bytes of what lies in a sealed step and is not of it: a lost race, a checkpoint of before."""
        if self.manifest is None:
            return {}
        own = {"manifest.json", *(file["file"] for file in self.manifest["files"]), *self.parts}
        if self.manifest["model"]:
            own |= {"model"} if isinstance(self.folder.path, Path) else {model_name(self.manifest["model"])}
        found: dict[str, int] = {}
        for name, file in self.files.items():
            if (entry := name.split("/")[0]) not in own:
                found[entry] = found.get(entry, 0) + file.bytes
        return found


class Inventory:
    """Read from one listing of the store; raises WinnowError where a run's link cannot be read."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.files = walk(store.root)
        self.runs = links(store)

    @cached_property
    def made(self) -> dict[str, StoredStep]:
        """Step folders by key: what lies elsewhere in the store is none of ours."""
        files: dict[tuple[str, str], dict[str, File]] = {}
        for path, file in self.files.items():
            stage, _, rest = path.partition("/")
            key, _, name = rest.partition("/")
            if name and KEY.fullmatch(key) and stage not in (LOCKS, RUNS):
                files.setdefault((stage, key), {})[name] = file
        sealed = manifests(self.store)
        return {
            key: StoredStep(stage, key, self.store.at(stage, key), found, sealed.get(key))
            for (stage, key), found in files.items()
        }

    def reached(self, without: tuple[str, ...] = ()) -> set[str]:
        """Keys that runs link to, some of the runs left out."""
        return {link["key"] for run, steps in self.runs.items() if run not in without for link in steps.values()}

    def held(self) -> Iterator[str]:
        """Keys of steps that somebody on this disk is making now."""
        for path in self.files:
            if path.startswith(f"{LOCKS}/") and KEY.fullmatch(path.partition("/")[2]):
                claim = self.store.at(LOCKS, path.partition("/")[2]).claim()
                if claim is None:
                    yield path.partition("/")[2]
                else:
                    claim.release()


def followers_first(inputs: Mapping[str, Collection[str] | None]) -> list[str]:
    """Keys, each before what it was made of; those that do not say of what they were made (None) before all."""
    known = {key: sources for key, sources in inputs.items() if sources is not None}
    order = [key for key in TopologicalSorter(known).static_order() if key in known]
    return [key for key, sources in inputs.items() if sources is None] + order[::-1]


def manifests(store: Store) -> dict[str, Json]:
    """Of all sealed steps, by key."""
    return {manifest["key"]: manifest for manifest in map(checked_manifest, store.sealed())}


def links(store: Store) -> dict[str, dict[str, Json]]:
    """Run -> step -> stage and key."""
    return {run: checked_run(run, steps) for run, steps in store.runs().items()}
