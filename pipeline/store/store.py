"""The artifact store: <root>/<stage>/<key>/ holds a step, in a folder or in an object store.

A part of a step is its tables, each in a file named by its content, and then a sidecar (part-00003.json; a stage that
is called once for all parts has one for all, part-whole.json). A manifest is written last and marks the step as
finished. Whatever lacks its last file does not count, so a crash loses only the parts in flight. Sidecars and manifests
are written once: of two runs that make the same part the first one's counts, and both continue from it.
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

from pipeline.store.manifests import FORMAT, checked_format, checked_manifest, checked_run
from pipeline.store.storage import (
    Location,
    cache,
    create,
    delete,
    download,
    parse_location,
    read,
    read_all,
    replace,
    sizes,
)
from schemas import TABLES, Model, WinnowError, table_name

Json = dict[str, Any]

LOCKS, RUNS = "locks", "runs"  # folders beside those of the stages
WHOLE = "part-whole.json"  # one file for all parts, so that the results of two calls are never mixed
DICTIONARY_COLUMNS = ["prompt_id"]  # for ids and texts that hardly repeat, a dictionary makes files larger and slower
LEFTOVERS = ("progress.json", "outcome.json", "checkpoint", "pieces")  # of making a step; a finished one needs none
CURE = "put the file back, or make its step and all that depend on it again: `winnow run RECIPE --force STEP`"


class StepRef(Protocol):
    """Step of a plan as the store sees it: its name in the run, its stage and its key."""

    @property
    def name(self) -> str: ...
    @property
    def stage(self) -> str: ...
    @property
    def key(self) -> str: ...


@dataclass(frozen=True)
class StepFolder:
    """Folder of one step; small, because it travels to every worker."""

    path: Location

    @property
    def manifest_path(self) -> Location:
        return self.path / "manifest.json"

    @property
    def manifest(self) -> Json | None:
        """Return the step's record, or None while the step is not finished."""
        manifest = read_json(self.manifest_path)
        return manifest and checked_format(self.manifest_path, manifest)

    def sidecar(self, shard: int) -> Json | None:
        """Return the record of a finished part, or None while the part is not finished."""
        return self._finished_part(shard, sizes(self.path))

    def missing(self, shards: int) -> list[int]:
        """Return the numbers of the parts that are not finished."""
        file_sizes = sizes(self.path)
        return [shard for shard in range(shards) if self._finished_part(shard, file_sizes) is None]

    def _finished_part(self, shard: int, file_sizes: dict[str, int]) -> Json | None:
        if not file_sizes.keys() & {WHOLE, _sidecar_name(shard)}:
            return None
        try:
            record = self._recorded_part(shard)
        except WinnowError:  # a sidecar that lost its content in a power cut
            return None
        if record and all(file_sizes.get(file["file"]) == file["bytes"] for file in record["files"]):
            return record
        return None

    def _recorded_part(self, shard: int) -> Json | None:
        """Return what a sidecar says of a part, whether the files that it lists exist or not."""
        if record := read_json(self.path / _sidecar_name(shard)):
            return record
        record = read_json(self.path / WHOLE)
        return record["parts"][shard] if record else None

    def read(self, schema: pa.Schema, shard: int | None = None) -> pa.Table:
        """Return one finished part of a table or, without `shard`, all parts of a finished step in order.

        Raises WinnowError if the table is not there or a file of it is damaged, and OSError if the disk or object
        store fails, which may succeed when it is tried again.
        """
        name = table_name(schema)
        record = (self.manifest if shard is None else self._recorded_part(shard)) or {"files": []}
        files = [file["file"] for file in record["files"] if table_of(file) == name]
        if not files:
            raise WinnowError(f"{self.path}: table {name} is not finished; run the recipe again")
        tables = []
        for file in files:
            content = None
            try:
                content = read(self.path / file)
                tables.append(pq.read_table(pa.BufferReader(content), schema=schema, partitioning=None))
            except (OSError, pa.ArrowInvalid) as error:
                if content is None and not isinstance(error, FileNotFoundError):
                    raise
                raise WinnowError(f"{self.path}: table {name} is damaged ({file}: {error}); {CURE}") from None
        return pa.concat_tables(tables).combine_chunks()

    def model(self) -> Model:
        """Return the finished model, from an object store as a copy on this machine; raise WinnowError without one."""
        manifest = self.manifest
        if manifest is None or not manifest["model"]:
            raise WinnowError(f"{self.path}: no finished model here; run the recipe again")
        digest: str = manifest["model"]
        if isinstance(self.path, Path):
            return Model(self.path / "model", digest)
        copy = cache() / "models" / digest
        if not copy.exists():
            download(self.path / model_name(digest), copy)
        return Model(copy, digest)

    def write_part(self, shard: int, tables: dict[str, pa.Table], record: Json) -> None:
        """Write all tables of one part, then its sidecar, unless another run's sidecar exists already."""
        self._write_sidecar(_sidecar_name(shard), self._write_tables(shard, tables, record), [shard])

    def write_whole(self, parts: list[tuple[dict[str, pa.Table], Json]]) -> None:
        """Write all tables of all parts that one call made, then one sidecar for all."""
        records = [self._write_tables(shard, tables, record) for shard, (tables, record) in enumerate(parts)]
        self._write_sidecar(WHOLE, {"parts": records}, range(len(parts)))

    def _write_tables(self, shard: int, tables: dict[str, pa.Table], record: Json) -> Json:
        files = []
        for table, rows in tables.items():
            buffer = io.BytesIO()
            pq.write_table(rows, buffer, compression="zstd", row_group_size=8192, use_dictionary=DICTIONARY_COLUMNS)
            content = buffer.getvalue()
            digest = sha256(content).hexdigest()
            name = f"{table}-{shard:05d}.{digest[:12]}.parquet"
            replace(self.path / name, content)
            files.append({"file": name, "rows": rows.num_rows, "bytes": len(content), "sha256": digest})
        return {"shard": shard, "files": files, **record}

    def _write_sidecar(self, name: str, content: Json, shards: Iterable[int]) -> None:
        path = self.path / name
        if not create(path, _encoded(content)) and any(self.sidecar(shard) is None for shard in shards):
            replace(path, _encoded(content))  # the one that exists is damaged

    def seal(self, record: Json, shards: int, check: Callable[[Json], None]) -> Json:
        """Finish the step: gather all sidecars in a manifest, give it to `check`, which may raise, and write it.

        Returns the manifest that counts: if another run wrote one in the meantime, that one.
        """
        file_sizes = sizes(self.path)
        parts: list[Json] = []
        for shard in range(shards):
            if (part := self._finished_part(shard, file_sizes)) is None:
                raise WinnowError(f"{self.path}: part {shard} is not finished; run again")
            parts.append(part)

        files = [file for part in parts for file in part["files"]]
        rows: Counter[str] = Counter()
        size: Counter[str] = Counter()
        for file in files:
            rows[table_of(file)] += file["rows"]
            size[table_of(file)] += file["bytes"]
        counters: Counter[str] = sum((Counter(part["counters"]) for part in parts), Counter())
        manifest = record | {
            "format": FORMAT,
            "rows": {name: rows[name] for name in TABLES if name in rows},
            "bytes": {name: size[name] for name in TABLES if name in size},
            "seconds": round(sum(part["seconds"] for part in parts), 3),
            "gpu_seconds": round(sum(part.get("gpu_seconds", 0.0) for part in parts), 3),
            "cpu_seconds": round(sum(part.get("cpu_seconds", 0.0) for part in parts), 3),
            "counters": dict(sorted(counters.items())),
            "rejects": dict(sum((Counter(part["rejects"]) for part in parts), Counter())),
            "model": parts[0].get("model"),
            "files": files,
        }
        check(manifest)
        if not create(self.manifest_path, _encoded(manifest)):
            manifest = self.manifest or manifest
        for leftover in LEFTOVERS:
            delete(self.path / leftover)
        return manifest

    def try_lock(self) -> "StepLock | None":
        """Return the right to make this step until it is released, or None while another run on this disk has it.

        The lock only saves work, and nothing depends on it: an object store has no locks, so there every run gets one.
        """
        if not isinstance(self.path, Path):
            return StepLock(None)
        locks = self.path.parent.parent / LOCKS
        locks.mkdir(parents=True, exist_ok=True)
        path = locks / self.path.name
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError:  # a shared disk without locks
            return StepLock(file)
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return StepLock(file)
        file.close()  # `gc` deleted it between open and flock: lock the file that other runs see
        return self.try_lock()


class StepLock:
    """Lock of a step; it ends with the process at the latest."""

    def __init__(self, file: IO[str] | None) -> None:
        self.file = file

    def release(self) -> None:
        if self.file:
            self.file.close()


class Store:
    """Finished and unfinished steps, and the runs that link names to them."""

    def __init__(self, root: str | Location) -> None:
        self.root = parse_location(root)
        if isinstance(self.root, Path) and self.root.is_file():
            raise WinnowError(f"--store {self.root}: is a file; give a folder or a URL such as s3://bucket/store")

    def folder(self, step: StepRef) -> StepFolder:
        return self.at(step.stage, step.key)

    def at(self, stage: str, key: str) -> StepFolder:
        return StepFolder(self.root / stage / key)

    def manifest_at(self, stage: str, key: str) -> Json | None:
        return self.at(stage, key).manifest

    def sealed(self) -> list[Json]:
        """Return the checked manifests of all finished steps, sorted by path, each with its `folder`."""
        manifests = []
        for path, content in read_all(self.root, "*/*/manifest.json").items():
            manifest = checked_format(path, _decoded(path, content))
            manifests.append(checked_manifest(manifest | {"folder": str(path.parent)}))
        return manifests

    def runs(self) -> dict[str, Json]:
        """Return run name -> step name -> stage and key."""
        files = read_all(self.root, f"{RUNS}/*.json").items()
        return {path.stem: checked_run(path.stem, _decoded(path, content)) for path, content in files}

    def run(self, name: str) -> Json:
        """Return step name -> stage and key of a run; empty if there is no such run."""
        return checked_run(name, read_json(self.root / RUNS / f"{name}.json") or {})

    def link_run(self, name: str, steps: Sequence[StepRef]) -> None:
        content = {step.name: {"stage": step.stage, "key": step.key} for step in steps}
        write_json(self.root / RUNS / f"{name}.json", content)

    def check(self) -> None:
        """Raise WinnowError if the store cannot be written to; called before any work is done."""
        trial = self.root / LOCKS / f".trial-{os.getpid()}-{id(self):x}"
        try:
            replace(trial, b"")  # before create(), because its error says why
            created_twice = create(trial, b"")
            delete(trial)
        except OSError as error:
            raise WinnowError(
                f"--store {self.root}: cannot be written ({error}); give a location where you may write, or check that "
                "its disk has room and that the credentials in the environment are there and have not expired"
            ) from None
        if created_twice:
            raise WinnowError(
                f"--store {self.root}: this object store has no conditional writes: it created the same file twice, so "
                "two runs could overwrite each other's results; use another object store, a newer version, or a disk"
            )


def model_name(digest: str) -> str:
    """Return the name of a model's folder in an object store, where two runs may upload theirs at the same time."""
    return f"model-{digest[:16]}"


def write_json(path: Location, content: Any) -> None:
    """Write a JSON file atomically."""
    replace(path, _encoded(content))


def read_json(path: Location) -> Json | None:
    """Return the object in a JSON file, or None if there is no such file; raise WinnowError if it is damaged."""
    try:
        return _decoded(path, read(path))
    except FileNotFoundError:
        return None


def _encoded(content: Any) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _decoded(path: Location, content: bytes) -> Json:
    try:
        decoded = json.loads(content)
    except ValueError as error:
        raise WinnowError(f"{path}: cannot be read ({error}); delete it and run again") from None
    if not isinstance(decoded, dict):
        raise WinnowError(f"{path}: cannot be read (it is not a JSON object); delete it and run again")
    return decoded


def _sidecar_name(shard: int) -> str:
    return f"part-{shard:05d}.json"


def table_of(file: Json) -> str:
    """Return the name of the table that a file, as a manifest or a sidecar lists it, is a part of."""
    return str(file["file"]).rsplit("-", 1)[0]
