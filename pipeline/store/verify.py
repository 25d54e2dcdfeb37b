"""Check every stored byte against the digest that was recorded when it was written, and set aside what is damaged."""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from pipeline.store.fingerprints import forget_digests
from pipeline.store.inventory import Inventory, StoredStep
from pipeline.store.manifests import DamagedError, checked_manifest, checked_run, decode
from pipeline.store.storage import Location, move, read, read_all, sizes
from pipeline.store.store import (
    COMMANDS,
    REPAIR,
    RUNS,
    SET_ASIDE,
    SIDECAR_NAME,
    TAGS,
    Json,
    StepFolder,
    Store,
    checked_tags,
    content_problem,
    model_name,
    model_problems,
)


@dataclass(frozen=True)
class Damage:
    """File of a step that is not as it was written, by its name in the folder `stage`/`key`, or `runs/NAME.json`."""

    stage: str
    key: str
    file: str
    problem: str

    def __str__(self) -> str:
        return f"{'/'.join(name for name in (self.stage, self.key, self.file) if name)}: {self.problem}"


def find_damage(store: Store, keys: set[str] | None = None) -> Iterator[Damage]:
    """Yield what is damaged of all steps, or of those with these keys: manifests, sidecars, tables, models, runs.

    Every byte is read, also of what was read before. A step whose damage was set aside, and which was not made again
    since, is damaged too.
    """
    for folder in (RUNS, TAGS, COMMANDS) if keys is None else ():
        for path, content in read_all(store.root, f"{folder}/*.json").items():
            try:
                decoded = decode(path, content)
                if folder == RUNS:
                    checked_run(path.stem, decoded)
                elif folder == TAGS:
                    checked_tags(path, decoded)
            except DamagedError:
                yield Damage(folder, "", path.name, "cannot be read")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the manifests that do not count: they are what is listed here
        steps = Inventory(store, runs={}).steps
    for key, step in steps.items():
        if keys is None or key in keys:
            for file, problem in _step_damage(step):
                yield Damage(step.stage, key, file, problem)


def _step_damage(step: StoredStep) -> Iterator[tuple[str, str]]:
    """Yield name and problem of each damaged file of a step; the name of a model is that of its folder."""
    folder = step.folder
    listed: dict[str, Json] = {}
    model: Json = {}
    if step.manifest is None and "manifest.json" in step.files:
        try:
            checked_manifest((folder.read_manifest() or {}) | {"folder": str(folder.path)})
            yield "manifest.json", "is damaged"
        except DamagedError:
            yield "manifest.json", "is damaged, or belongs to another step"
    if step.manifest is None and REPAIR in step.files:
        yield REPAIR, "what was damaged here is set aside, and not made again yet"
    for name in step.parts:
        try:
            sidecar = folder.read_sidecar(name) or {"files": []}
        except DamagedError:
            yield name, "is damaged"
            continue
        if step.manifest is None:  # else the manifest lists what counts
            for part in sidecar.get("parts", [sidecar]):
                listed |= {file["file"]: file for file in part["files"]}
                model = part if part.get("model") else model
    if step.manifest:
        listed = {file["file"]: file for file in step.manifest["files"]}
        model = step.manifest if step.manifest.get("model") else {}
    for name, file in listed.items():
        try:
            problem = content_problem(file, read(folder.path / name))
        except FileNotFoundError:
            problem = "is missing"
        if problem:
            yield name, problem
    if not model:
        return
    digests = model.get("model_files")
    if isinstance(folder.path, Path):
        forget_digests(folder.path / "model")  # which are cached by times and sizes, and a disk may change neither
        for problem in model_problems(folder.path / "model", model["model"], digests):
            yield "model", problem
        return
    name = model_name(model["model"])
    for model_file, digest in (digests or {}).items():
        try:
            if sha256(read(folder.path / name / model_file)).hexdigest() != digest:
                yield name, f"{model_file} is not as it was written"
        except FileNotFoundError:
            yield name, f"{model_file} is missing"


def set_aside(store: Store, damages: Iterable[Damage]) -> tuple[list[Location], set[str]]:
    """Move what is damaged to where nothing reads it; return where, and the keys of steps that are unfinished now.

    With a table goes the sidecar that lists it, so that its part alone is computed again; with a model all of its
    step. Steps that some run is computing at the moment are left alone.
    """
    moved: list[Location] = []
    unfinished: set[str] = set()
    by_step: dict[tuple[str, str], list[str]] = {}
    for damage in damages:
        by_step.setdefault((damage.stage, damage.key), []).append(damage.file)
    for (stage, key), names in by_step.items():
        if not key:
            for name in names:
                number = 1
                while (target := store.root / SET_ASIDE / stage / name / str(number)).exists():
                    number += 1
                move(store.root / stage / name, target)
                moved.append(target)
            continue
        folder = store.at(stage, key)
        if lock := folder.try_lock():
            try:
                if names := _with_sidecars(folder, names):
                    moved.append(folder.set_aside(*names))
                if folder.manifest is None:
                    unfinished.add(key)
            finally:
                lock.release()
    return moved, unfinished


def _with_sidecars(folder: StepFolder, names: list[str]) -> list[str]:
    """Return the names with those of the sidecars, and the manifest, that do not hold without them."""
    entries = sizes(folder.path)
    sidecars = [name for name in entries if SIDECAR_NAME.fullmatch(name)]
    contents = [name for name in names if name not in ("manifest.json", REPAIR) and name not in sidecars]
    broken = [name for name in names if name in sidecars]
    if contents or (broken and ("manifest.json" in names or not folder.manifest)):
        if "manifest.json" in entries:
            folder.note_repair()
            broken.append("manifest.json")
        for name in sidecars:
            try:
                record = folder.read_sidecar(name) or {"files": []}
            except DamagedError:
                broken.append(name)
                continue
            parts = record.get("parts", [record])
            files = {file["file"] for part in parts for file in part["files"]}
            if files & set(contents) or (
                any(part.get("model") for part in parts) and any(not name.endswith(".parquet") for name in contents)
            ):
                broken.append(name)
    # The manifest first, then the sidecars: wherever this ends, nothing counts that lacks what it lists.
    order = sorted(dict.fromkeys([*broken, *names]), key=lambda name: (name != "manifest.json", name not in sidecars))
    return [name for name in order if name != REPAIR and (folder.path / name).exists()]
