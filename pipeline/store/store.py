"""The artifact store: <root>/<stage>/<key>/, parts first, manifest last; in a folder or in an object store.

A part is its tables, each under a name that its content gives it, and then its sidecar (part-00003.json; one for all
parts of a whole stage, part-whole.json); a step is sealed by its manifest. Whatever lacks its last file never happened,
so a crash loses only parts in flight. Sidecars and manifests are made once: of two runs that make one part, the first
one's counts, and both go on from it.
"""

import fcntl
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.store.storage import (
    Location,
    cache,
    copy_here,
    create,
    delete,
    parse_location,
    read,
    read_all,
    replace,
    sizes,
)
from schemas import TABLES, Model, WinnowError, table_name

Json = dict[str, Any]


class StoredBy(Protocol):
    """A step of a plan as the store sees it: which stage, under which key."""

    @property
    def name(self) -> str: ...
    @property
    def stage(self) -> str: ...
    @property
    def key(self) -> str: ...


WHOLE = "part-whole.json"  # of a stage that is called once: what two calls made is never mixed
REPEATED = ["prompt_id"]  # a dictionary of ids and texts that hardly repeat only makes files larger and slower
CURE = "put the file back, or make its step and all that follows again: `winnow run RECIPE --force STEP`"  # of damage
FORMAT = 1  # of manifests; one that says more was made by a later version of this code
LEFTOVERS = ("progress.json", "outcome.json", "checkpoint", "pieces")


@dataclass(frozen=True)
class StepFolder:
    """The folder of one step: a small value that travels to workers."""

    path: Location

    @property
    def manifest_path(self) -> Location:
        return self.path / "manifest.json"

    @property
    def manifest(self) -> Json | None:
        manifest = read_json(self.manifest_path)
        return manifest and _readable(self.manifest_path, manifest)

    def sidecar(self, shard: int) -> Json | None:
        """What a finished part recorded, or None while it is not finished."""
        return self._whole(shard, sizes(self.path))

    def _whole(self, shard: int, found: dict[str, int]) -> Json | None:
        if not found.keys() & {WHOLE, _sidecar_name(shard)}:
            return None
        try:
            record = self._recorded(shard)
        except WinnowError:  # a sidecar that lost its content with the power
            return None
        if record and all(found.get(file["file"]) == file["bytes"] for file in record["files"]):
            return record
        return None

    def _recorded(self, shard: int) -> Json | None:
        """What stands in a part's sidecar, whether its files are there or not."""
        if record := read_json(self.path / _sidecar_name(shard)):
            return record
        every = read_json(self.path / WHOLE)
        return every["parts"][shard] if every else None

    def missing(self, shards: int) -> list[int]:
        found = sizes(self.path)
        return [shard for shard in range(shards) if self._whole(shard, found) is None]

    def read(self, schema: pa.Schema, shard: int | None = None) -> pa.Table:
        """One finished part of a table, or, of a sealed step, all parts in order."""
        name = table_name(schema)
        record = (self.manifest if shard is None else self._recorded(shard)) or {"files": []}
        wanted = [file["file"] for file in record["files"] if file["file"].startswith(f"{name}-")]
        if not wanted:
            raise WinnowError(f"{self.path}: no sealed table {name} here; run the recipe again")
        try:
            tables = [_read_table(self.path / file, schema) for file in wanted]
        except (FileNotFoundError, DamagedError) as error:
            raise WinnowError(f"{self.path}: table {name} is damaged ({error}); {CURE}") from None
        return pa.concat_tables(tables).combine_chunks()

    def model(self) -> Model:
        """In its folder, or a copy of it on this machine."""
        manifest = self.manifest
        if manifest is None or not manifest["model"]:
            raise WinnowError(f"{self.path}: no sealed model here")
        digest: str = manifest["model"]
        if isinstance(self.path, Path):
            return Model(self.path / "model", digest)
        copy = cache() / "models" / digest
        if not copy.exists():
            copy_here(self.path / model_name(digest), copy)
        return Model(copy, digest)

    def write_part(self, shard: int, tables: dict[str, pa.Table], record: Json) -> None:
        """All tables of one shard, then the sidecar that makes them count, unless another's stands already."""
        self._count(_sidecar_name(shard), self._part(shard, tables, record), [shard])

    def write_whole(self, parts: list[tuple[dict[str, pa.Table], Json]]) -> None:
        """All tables of all shards of one call, then one sidecar for all."""
        made = [self._part(shard, tables, record) for shard, (tables, record) in enumerate(parts)]
        self._count(WHOLE, {"parts": made}, range(len(parts)))

    def _part(self, shard: int, tables: dict[str, pa.Table], record: Json) -> Json:
        files = [self._write_table(f"{name}-{shard:05d}", table) for name, table in tables.items()]
        return {"shard": shard, "files": files, **record}

    def _count(self, name: str, content: Json, shards: Iterable[int]) -> None:
        place = self.path / name
        if not create(place, _encoded(content)) and any(self.sidecar(shard) is None for shard in shards):
            replace(place, _encoded(content))  # what stood there was damaged

    def _write_table(self, stem: str, table: pa.Table) -> Json:
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", row_group_size=8192, use_dictionary=REPEATED)
        content = buffer.getvalue()
        digest = sha256(content).hexdigest()
        name = f"{stem}.{digest[:12]}.parquet"
        replace(self.path / name, content)
        return {"file": name, "rows": table.num_rows, "bytes": len(content), "sha256": digest}

    def seal(self, record: Json, shards: int, check: Callable[[Json], None]) -> Json:
        """Gather the sidecars into the manifest, made last and once, if `check` lets it."""
        found = sizes(self.path)
        parts = [self._whole(shard, found) for shard in range(shards)]
        if None in parts:
            raise WinnowError(f"{self.path}: part {parts.index(None)} is not finished; run again")
        done: list[Json] = [part for part in parts if part]
        counters: Counter[str] = sum((Counter(part["counters"]) for part in done), Counter())
        manifest = record | {
            "format": FORMAT,
            "rows": _tally(done, "rows"),
            "bytes": _tally(done, "bytes"),
            "seconds": round(sum(part["seconds"] for part in done), 3),
            "gpu_seconds": round(sum(part.get("gpu_seconds", 0.0) for part in done), 3),
            "cpu_seconds": round(sum(part.get("cpu_seconds", 0.0) for part in done), 3),
            "counters": dict(sorted(counters.items())),
            "rejects": dict(sum((Counter(part["rejects"]) for part in done), Counter())),
            "model": done[0].get("model"),
            "files": [file for part in done for file in part["files"]],
        }
        check(manifest)
        if not create(self.manifest_path, _encoded(manifest)):
            manifest = self.manifest or manifest
        for leftover in LEFTOVERS:
            delete(self.path / leftover)
        return manifest

    def claim(self) -> "Claim | None":
        """The right to make this step, while it is held; None where another run on this disk has it.

        It saves work and nothing depends on it: in an object store, which has no such thing, every run has it.
        """
        if not isinstance(self.path, Path):
            return Claim(None)
        locks = self.path.parent.parent / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        path = locks / self.path.name
        lock = path.open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        except OSError:  # a shared disk without locks
            return Claim(lock)
        if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            return Claim(lock)
        lock.close()  # swept away between the two: hold the one that others see
        return self.claim()


class Claim:
    """Ends with the process at the latest."""

    def __init__(self, lock: IO[str] | None) -> None:
        self.lock = lock

    def release(self) -> None:
        if self.lock:
            self.lock.close()


class Store:
    """A place of sealed steps, and links from run names to them."""

    def __init__(self, root: str | Location) -> None:
        self.root = parse_location(root)
        if isinstance(self.root, Path) and self.root.is_file():
            raise WinnowError(
                f"--store {self.root}: is a file, and a store cannot be written to one; give a folder, or s3://"
            )

    def folder(self, step: StoredBy) -> StepFolder:
        return self.at(step.stage, step.key)

    def at(self, stage: str, key: str) -> StepFolder:
        return StepFolder(self.root / stage / key)

    def sealed(self) -> list[Json]:
        """Every manifest in the store, with its folder, oldest stage names first."""
        found = read_all(self.root, "*/*/manifest.json").items()
        return [_readable(place, _decoded(place, content)) | {"folder": str(place.parent)} for place, content in found]

    def runs(self) -> dict[str, Json]:
        """Run name -> step name -> stage and key."""
        return {place.stem: _decoded(place, content) for place, content in read_all(self.root, "runs/*.json").items()}

    def run(self, name: str) -> Json:
        """Step name -> stage and key; nothing for a run that there is not."""
        return read_json(self.root / "runs" / f"{name}.json") or {}

    def link_run(self, name: str, steps: Sequence[StoredBy]) -> None:
        content = {step.name: {"stage": step.stage, "key": step.key} for step in steps}
        write_json(self.root / "runs" / f"{name}.json", content)

    def manifest_at(self, stage: str, key: str) -> Json | None:
        return self.at(stage, key).manifest

    def check(self) -> None:
        """Raises WinnowError where nothing can be written: said before any work is done."""
        trial = self.root / "locks" / f".trial-{os.getpid()}-{id(self):x}"
        try:
            replace(trial, b"")  # first, for its refusal says why
            twice = create(trial, b"")
            delete(trial)
        except OSError as error:
            raise WinnowError(
                f"--store {self.root}: cannot be written ({error}); give a place where you may write, or check that "
                "its disk has room and that the credentials in the environment are there and have not expired"
            ) from None
        if twice:
            raise WinnowError(
                f"--store {self.root}: a file was made twice over where only the first may count; this kind of object "
                "store (or its version) has no conditional writes, so use another, or a disk"
            )


def model_name(digest: str) -> str:
    """Of a model's folder in an object store, where two runs may bring theirs at once."""
    return f"model-{digest[:16]}"


def write_json(place: Location, content: Any) -> None:
    """Atomic: the file is either the old one or the new one, whole."""
    replace(place, _encoded(content))


def read_json(place: Location) -> Json | None:
    try:
        return _decoded(place, read(place))
    except FileNotFoundError:
        return None


def _decoded(place: Location, content: bytes) -> Json:
    try:
        decoded: Json = json.loads(content)
    except ValueError as error:
        raise WinnowError(f"{place}: cannot be read ({error}); delete it and run again") from None
    return decoded


def _readable(place: Location, manifest: Json) -> Json:
    if manifest.get("format", FORMAT) > FORMAT:
        raise WinnowError(
            f"{place}: of format {manifest['format']}, and this winnow reads up to {FORMAT}; "
            "bring this winnow up to the version that made it"
        )
    return manifest


def _encoded(content: Any) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


class DamagedError(Exception):
    """Bytes that are there and no Parquet; where they could not be read, it is an OSError that may pass."""


def _read_table(place: Location, schema: pa.Schema) -> pa.Table:
    content = pa.BufferReader(read(place))
    try:
        return pq.read_table(content, schema=schema, partitioning=None)
    except (OSError, pa.ArrowInvalid) as error:
        raise DamagedError(str(error)) from None


def _sidecar_name(shard: int) -> str:
    return f"part-{shard:05d}.json"


def table_of(file: Json) -> str:
    """The table whose rows a file holds, by its name; `file` is as a manifest or a sidecar lists it."""
    return str(file["file"]).rsplit("-", 1)[0]


def _tally(parts: list[Json], what: str) -> dict[str, int]:
    """Sum over parts of one figure of each table."""
    total: Counter[str] = Counter()
    for part in parts:
        for file in part["files"]:
            total[table_of(file)] += file[what]
    return {name: total[name] for name in TABLES if name in total}
