"""The artifact store: <root>/<stage>/<key>/ holds a step, in a folder or in an object store.

A part of a step is its tables, each in a file named by its content, and then a sidecar (part-00003-of-00008.json; a
stage that is called once for all parts has one for all, part-whole.json). A manifest is written last and marks the step
as finished. Whatever lacks its last file does not count, so a crash loses only the parts in flight. Sidecars and
manifests are written once: of two runs that make the same part the first one's counts, and both continue from it.
"""

import fcntl
import io
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from dataclasses import replace as with_changes
from functools import lru_cache
from hashlib import file_digest
from math import gcd
from pathlib import Path
from threading import get_ident
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.store.manifests import FORMAT, checked_format, checked_manifest, checked_run
from pipeline.store.storage import (
    Location,
    cache,
    create,
    delete,
    download,
    named,
    parse_location,
    read,
    read_all,
    replace,
    sizes,
)
from schemas import COMMAND, TABLES, MachineError, Model, WinnowError, combine_chunks, shard_of, table_name

if TYPE_CHECKING:  # a step of a plan, of which the store needs its name in the run, its stage and its key
    from pipeline.config.plan import Step

Json = dict[str, Any]

LOCKS, RUNS, TAGS = "locks", "runs", "tags"  # folders beside those of the stages
SIDECAR = "part-{:05d}-of-{:05d}.json"
SIDECAR_NAME = re.compile(r"part-(\d{5}-of-(\d{5})|whole)\.json")
WHOLE = "part-whole.json"  # one sidecar for all parts, so that the results of two calls are never mixed
IdRange = tuple[str, str | None]  # prompt ids from the first to below the second; None: to the last
ROW_GROUP = 8192  # rows
ID_BYTES = 24  # of an id in memory, with its offset
DICTIONARY_COLUMNS = ["prompt_id"]  # for ids and texts that hardly repeat, a dictionary makes files larger and slower
PROGRESS, METRICS_NOW = (
    "progress.json",
    "metrics_now.jsonl",
)  # of a step that runs: how far it is, and its metrics so far
# Scratch files, removed when the step is finished.
LEFTOVERS = ("checkpoint", "pieces", "refusal.txt", "ray_train", PROGRESS, METRICS_NOW)
REPAIR_HINT = (
    f"put the file back, or make its step and all that depend on it again: `{COMMAND} run RECIPE --force STEP`"
)


@dataclass(frozen=True)
class StepFolder:
    """Folder of one step; small, because it travels to every worker.

    parts: into how many parts its tables are divided, as a recipe wants it; `divided` says how they are.
    """

    path: Location
    parts: int = 0

    def divided(self) -> "StepFolder":
        """Return this folder with the number of parts of its result, else of most finished parts, else as wanted."""
        if manifest := self.manifest:
            return with_changes(self, parts=manifest.get("parts", 0))
        matches = [match for name in sizes(self.path) if (match := SIDECAR_NAME.fullmatch(name))]
        if any(match[1] == "whole" for match in matches):
            with suppress(WinnowError):  # a damaged one does not count
                if record := read_json(self.path / WHOLE):
                    return with_changes(self, parts=len(record["parts"]))
        finished = Counter(int(match[2]) for match in matches if match[2])
        most = max(finished, key=lambda parts: (finished[parts], parts == self.parts, parts), default=self.parts)
        return with_changes(self, parts=most)

    @property
    def manifest_path(self) -> Location:
        return self.path / "manifest.json"

    @property
    def manifest(self) -> Json | None:
        """Return the step's record, or None while the step is not finished."""
        manifest = read_json(self.manifest_path)
        return manifest and checked_format(self.manifest_path, manifest)

    def sidecar(self, shard: int, file_sizes: dict[str, int] | None = None) -> Json | None:
        """Return the record of a finished part, or None if it, or a file that it lists, is missing or damaged.

        `file_sizes` of this folder spare a listing where many parts are looked up.
        """
        file_sizes = sizes(self.path) if file_sizes is None else file_sizes
        if not file_sizes.keys() & {WHOLE, SIDECAR.format(shard, self.parts)}:
            return None
        try:
            record = self._read_sidecar(shard)
        except WinnowError:  # a sidecar that lost its content in a power cut
            return None
        if record and all(file_sizes.get(file["file"]) == file["bytes"] for file in record["files"]):
            return record
        return None

    def _read_sidecar(self, shard: int) -> Json | None:
        if record := read_json(self.path / SIDECAR.format(shard, self.parts)):
            return record
        record = read_json(self.path / WHOLE)
        return record["parts"][shard] if record and len(record["parts"]) == self.parts else None

    def missing(self) -> list[int]:
        """Return the numbers of the parts that are not finished."""
        file_sizes = sizes(self.path)
        return [shard for shard in range(self.parts) if self.sidecar(shard, file_sizes) is None]

    def read(self, schema: pa.Schema, shard: int | None = None, ids: IdRange | None = None, of: int = 0) -> pa.Table:
        """Return one finished part of a table or, without `shard`, all parts of a finished step in order.

        A schema with some of the table's columns reads these alone, of a file on a disk, and `ids` the rows of these
        prompts, hardly more than once if the table is in their order. of: the number of parts that `shard` is one of,
        if this table is divided into another number: then the rows are of all parts that share prompts with it, in
        order of prompt ids. Raises WinnowError if the table is not there or a file of it is damaged, and OSError if the
        disk or object store fails, which may succeed when it is tried again.
        """
        if shard is not None and of and of != self.parts:
            fields = [*schema, *([] if "prompt_id" in schema.names else [pa.field("prompt_id", pa.string())])]
            tables = []
            for part in overlapping(shard, of, self.parts):
                table = self.read(pa.schema(fields, schema.metadata), part, ids)
                tables.append(table.filter(pa.array(shards_of_rows(table, of) == shard)))
            table = pa.concat_tables(tables)
            return combine_chunks(table.take(pc.sort_indices(table["prompt_id"])).select(schema.names))
        name = table_name(schema)
        record = (self.manifest if shard is None else self._read_sidecar(shard)) or {"files": []}
        files = [file["file"] for file in record["files"] if table_of(file) == name]
        if not files:
            raise MachineError(f"{self.path}: table {name} is not finished; run the recipe again")
        rows_read = None
        if ids is not None:
            prompt = pc.field("prompt_id")
            rows_read = (prompt >= ids[0]) if ids[1] is None else (prompt >= ids[0]) & (prompt < ids[1])
        tables = []
        for file in files:
            path, content = self.path / file, None
            try:
                if not isinstance(path, Path):  # one request; a request per column and row group takes longer
                    content = pa.BufferReader(read(path))
                tables.append(pq.read_table(content or str(path), schema=schema, partitioning=None, filters=rows_read))
            except (OSError, pa.ArrowInvalid) as error:
                # A disk that fails says so by a number, and an object store before there is any content.
                has_failed = content is None and (not isinstance(path, Path) or getattr(error, "errno", None))
                if has_failed and not isinstance(error, FileNotFoundError):
                    raise
                raise WinnowError(f"{self.path}: table {name} is damaged ({file}: {error}); {REPAIR_HINT}") from None
        return combine_chunks(pa.concat_tables(tables))

    def decoded_bytes(self, schema: pa.Schema, shard: int, of: int) -> int:
        """Return about how many bytes the schema's columns of a finished part take in memory; 0 in an object store.

        There a part is read at once: one request for each column of each row group takes longer. of: the number of
        parts that `shard` is one of; of a table in other parts, it is the bytes of all that share prompts with it.
        """
        records = [self._read_sidecar(part) or {"files": []} for part in overlapping(shard, of, self.parts)]
        size = 0
        for file in (file for record in records for file in record["files"]):
            if not isinstance(self.path, Path) or table_of(file) != table_name(schema):
                continue
            footer = pq.read_metadata(self.path / file["file"])
            groups = [footer.row_group(n) for n in range(footer.num_row_groups)]
            chunks = (group.column(leaf) for group in groups for leaf in range(footer.num_columns))
            names = set(schema.names)
            size += sum(
                chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in names
            )
            size += ID_BYTES * len(names.intersection(DICTIONARY_COLUMNS)) * footer.num_rows  # not in the file again
        return size

    def model(self) -> Model:
        """Return the finished model, from an object store as a copy on this machine; raise WinnowError without one."""
        manifest = self.manifest
        if manifest is None or not manifest["model"]:
            raise MachineError(f"{self.path}: no finished model here; run the recipe again")
        digest: str = manifest["model"]
        if isinstance(self.path, Path):
            return Model(self.path / "model", digest)
        copy = cache() / "models" / digest
        if not copy.exists():
            download(self.path / model_name(digest), copy)
        return Model(copy, digest)

    def write_part(self, shard: int, tables: dict[str, pa.Table], record: Json) -> None:
        """Write all tables of one part, then its sidecar, unless another run's sidecar exists already."""
        with self.part_writer(shard) as part:
            part.write(tables)
            part.finish(record)

    @contextmanager
    def part_writer(self, shard: int) -> Iterator["PartWriter"]:
        """Yield a writer of one part, whose tables may come in pieces; without its `finish` nothing stays."""
        writer = PartWriter(self, shard)
        try:
            yield writer
        finally:
            writer.discard()

    def write_whole(self, parts: list[tuple[dict[str, pa.Table], Json]]) -> None:
        """Write all tables of all parts that one call made, then one sidecar for all."""
        records = []
        for shard, (tables, record) in enumerate(parts):
            with self.part_writer(shard) as part:
                part.write(tables)
                records.append({"shard": shard, "files": part.files(), **record})
        self.write_sidecar(WHOLE, {"parts": records}, range(len(parts)))

    def write_sidecar(self, name: str, content: Json, shards: Sequence[int]) -> None:
        """Write the record of finished parts, unless there is one already that is not damaged."""
        path = self.path / name
        if not write_json(path, content, overwrite=False):
            existing = self.divided()  # another run may have divided it into another number
            numbers = range(existing.parts) if name == WHOLE else shards
            if any(existing.sidecar(shard) is None for shard in numbers):
                write_json(path, content)

    def seal(self, record: Json, check: Callable[[Json], None]) -> Json:
        """Finish the step: gather all sidecars in a manifest, give it to `check`, which may raise, and write it.

        Returns the manifest that counts: if another run wrote one in the meantime, that one.
        """
        file_sizes = sizes(self.path)
        parts: list[Json] = []
        for shard in range(self.parts):
            if (part := self.sidecar(shard, file_sizes)) is None:
                raise MachineError(f"{self.path}: part {shard} is not finished; run again")
            parts.append(part)

        files = [file for part in parts for file in part["files"]]
        rows: Counter[str] = Counter()
        size: Counter[str] = Counter()
        for file in files:
            rows[table_of(file)] += file["rows"]
            size[table_of(file)] += file["bytes"]
        manifest = record | {
            "format": FORMAT,
            "rows": {name: rows[name] for name in TABLES if name in rows},
            "bytes": {name: size[name] for name in TABLES if name in size},
            **add_records(parts),
            "parts": self.parts,
            "model": parts[0].get("model"),
            "files": files,
        }
        check(manifest)
        if not write_json(self.manifest_path, manifest, overwrite=False):
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

    def is_locked(self) -> bool | None:
        """Return whether a run is making this step now, or None where nothing says so: there are no locks."""
        if not isinstance(self.path, Path):
            return None
        try:
            with (self.path.parent.parent / LOCKS / self.path.name).open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        except OSError:  # a shared disk without locks
            return None
        return False


class PartWriter:
    """Tables of a part, each in a file that grows by row groups: the same bytes in one piece and in many."""

    def __init__(self, folder: StepFolder, shard: int) -> None:
        self.folder, self.shard = folder, shard
        self.writers: dict[str, TableWriter] = {}

    def write(self, tables: Mapping[str, pa.Table]) -> None:
        """Append rows to the tables."""
        for table, rows in tables.items():
            if table not in self.writers:
                self.writers[table] = TableWriter(self.folder.path, f"{table}-{self.shard:05d}", rows.schema)
            self.writers[table].write(rows)

    def files(self) -> list[Json]:
        """Finish all tables; return what a sidecar records of their files."""
        return [writer.finish() for writer in self.writers.values()]

    def finish(self, record: Json) -> None:
        """Finish all tables, then write the part's sidecar, unless another run's sidecar exists already."""
        content = {"shard": self.shard, "files": self.files(), **record}
        self.folder.write_sidecar(SIDECAR.format(self.shard, self.folder.parts), content, [self.shard])

    def discard(self) -> None:
        """Delete what is not finished."""
        for writer in self.writers.values():
            writer.discard()


class TableWriter:
    """File of a table, named by its content when it is finished. Until then it is a scratch file on this machine."""

    def __init__(self, folder: Location, name: str, schema: pa.Schema) -> None:
        self.folder, self.name = folder, name
        local = folder if isinstance(folder, Path) else Path(tempfile.gettempdir())
        local.mkdir(parents=True, exist_ok=True)
        self.scratch = local / f".{name}.{os.getpid()}.{get_ident()}"  # no other process or thread uses it
        self.rows, self.rest = 0, schema.empty_table()
        with named(self.folder):
            self.writer = pq.ParquetWriter(
                str(self.scratch),
                schema,
                compression="zstd",
                use_dictionary=DICTIONARY_COLUMNS,
                write_statistics=columns_with_statistics(schema),
            )

    def write(self, rows: pa.Table) -> None:
        """Append rows, in row groups of one size whatever their number."""
        self.rows += rows.num_rows
        self.rest = pa.concat_tables([self.rest, rows])
        ready = self.rest.num_rows // ROW_GROUP * ROW_GROUP
        for start in range(0, ready, ROW_GROUP):
            self._write_group(self.rest.slice(start, ROW_GROUP))
        self.rest = combine_chunks(self.rest.slice(ready))

    def _write_group(self, rows: pa.Table) -> None:
        with named(self.folder):
            self.writer.write_table(combine_chunks(rows), row_group_size=ROW_GROUP)

    def finish(self) -> Json:
        """Write the rest, and give the file its name; return what a sidecar records of it."""
        if self.rest.num_rows or not self.rows:
            self._write_group(self.rest)
        with named(self.folder):
            self.writer.close()
        with self.scratch.open("rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
        size, name = self.scratch.stat().st_size, f"{self.name}.{digest[:12]}.parquet"
        if isinstance(self.folder, Path):
            self.scratch.replace(self.folder / name)
        else:
            replace(self.folder / name, self.scratch.read_bytes())
        return {"file": name, "rows": self.rows, "bytes": size, "sha256": digest}

    def discard(self) -> None:
        """Delete the scratch file, if there still is one."""
        with suppress(OSError):  # of a full disk, which has raised already
            self.writer.close()
        self.scratch.unlink(missing_ok=True)


@dataclass(frozen=True)
class StepLock:
    """Lock of a step; it ends with the process at the latest."""

    file: IO[str] | None

    def release(self) -> None:
        if self.file:
            self.file.close()


class Store:
    """Finished and unfinished steps, and the runs that link names to them."""

    def __init__(self, root: str | Location) -> None:
        self.root = parse_location(root)
        if isinstance(self.root, Path) and self.root.is_file():
            raise WinnowError(f"--store {self.root}: is a file; give a folder or a URL such as s3://bucket/store")

    def folder(self, step: "Step") -> StepFolder:
        return StepFolder(self.root / step.stage / step.key, step.shards)

    def at(self, stage: str, key: str) -> StepFolder:
        return StepFolder(self.root / stage / key)

    def sealed(self) -> list[Json]:
        """Return the checked manifests of all finished steps, sorted by path, each with its `folder`."""
        manifests = []
        for path, content in read_all(self.root, "*/*/manifest.json").items():
            manifests.append(checked_manifest(_decoded(path, content) | {"folder": str(path.parent)}))
        return manifests

    def earlier(self, step: "Step") -> list[StepFolder]:
        """Return the finished steps whose rows a step can take for its own (`Step.row_key`), most rows first."""
        if not (step.signature.goes_on and step.takes_earlier_rows):
            return []
        rows: dict[StepFolder, int] = {}
        for path, content in read_all(self.root / step.stage, "*/manifest.json").items():
            manifest = checked_manifest(_decoded(path, content) | {"folder": str(path.parent)})
            if manifest.get("row_key") == step.row_key and manifest["key"] != step.key:
                rows[StepFolder(path.parent, manifest["parts"])] = sum(manifest["rows"].values())
        return sorted(rows, key=lambda folder: (-rows[folder], folder.path.name))

    def runs(self) -> dict[str, Json]:
        """Return run name -> step name -> stage and key."""
        files = read_all(self.root, f"{RUNS}/*.json").items()
        return {path.stem: checked_run(path.stem, _decoded(path, content)) for path, content in files}

    def run(self, name: str) -> Json:
        """Return step name -> stage and key of a run; empty if there is no such run."""
        return checked_run(name, read_json(self.root / RUNS / f"{name}.json") or {})

    def link_run(self, name: str, steps: "Sequence[Step]") -> None:
        content = {step.name: {"stage": step.stage, "key": step.key} for step in steps}
        write_json(self.root / RUNS / f"{name}.json", content)

    def tags(self) -> dict[str, dict[str, str]]:
        """Return the tags of each run that has any, by their names; those without a value have an empty one."""
        files = read_all(self.root, f"{TAGS}/*.json").items()
        return {path.stem: _checked_tags(path, _decoded(path, content)) for path, content in files}

    def tag_run(self, name: str, tags: dict[str, str]) -> None:
        """Add tags to a run, in a file of their own: they are words about its results, and no part of what they are."""
        if tags:
            path = self.root / TAGS / f"{name}.json"
            write_json(path, _checked_tags(path, read_json(path) or {}) | tags)

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


def _checked_tags(path: Location, content: Json) -> dict[str, str]:
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise WinnowError(f"{path}: is not the tags of a run, texts by their names; correct or delete it")
    return content


def overlapping(shard: int, of: int, parts: int) -> list[int]:
    """Return which of `parts` parts of a table have prompts of part `shard`, of `of` parts of another.

    A part is a prompt's hash modulo their number, so that these are the parts with the same remainder by the greatest
    common divisor: all of them, unless the numbers share one.
    """
    step = gcd(of, parts)
    return list(range(shard % step, parts, step))


def shards_of_rows(table: pa.Table, shards: int) -> NDArray[np.int64]:
    """Return the part of each row by its prompt id, int64 [N], one hash per prompt; 0 for rejects without one."""
    prompts = table.column("prompt_id").to_pylist()
    shard_by_prompt = {prompt: shard_of(prompt, shards) if prompt else 0 for prompt in set(prompts)}
    return np.array([shard_by_prompt[prompt] for prompt in prompts], dtype=np.int64)


@lru_cache(maxsize=128)  # a schema's paths cost milliseconds, once per part and table
def columns_with_statistics(schema: pa.Schema) -> list[str]:
    """Return the columns, by their paths in a Parquet file, that may have statistics in it: all but floats.

    Arrow leaves NaN out of minimum and maximum, as the format asks; DuckDB, for which NaN is the largest number, takes
    from the maximum that there is none, so that `isnan(logp)` finds no row and `max(logp)` is finite (duckdb#25521).
    Its option `can_have_nan` is no way out: with it, `max` of a column without NaN is NaN (seen in 2.0).
    """
    buffer = io.BytesIO()
    pq.write_table(schema.empty_table(), buffer)  # for the paths, which depend on how Parquet nests lists and maps
    columns = pq.ParquetFile(buffer).schema
    leaves = [columns.column(n) for n in range(len(columns))]
    return [leaf.path for leaf in leaves if leaf.physical_type not in ("FLOAT", "DOUBLE")]


def model_name(digest: str) -> str:
    """Return the name of a model's folder in an object store, where two runs may upload theirs at the same time."""
    return f"model-{digest[:16]}"


def add_records(records: list[Json]) -> Json:
    """Return the sums over the records of parts: seconds of workers, counters, measures, and rejects by reason."""
    total: Json = {
        name: round(sum(record.get(name, 0.0) for record in records), 3)
        for name in ("seconds", "gpu_seconds", "cpu_seconds")
    }
    for name in ("counters", "rejects"):
        counts: Counter[str] = sum((Counter(record[name]) for record in records), Counter())
        total[name] = dict(sorted(counts.items()))
    measures: Json = {}
    for name, part in (item for record in records for item in record.get("measures", {}).items()):
        mean = measures.setdefault(name, {"total": 0.0, "count": 0.0, "largest": 0.0})
        mean |= {key: mean[key] + part[key] for key in ("total", "count")}
        mean["largest"] = max(mean["largest"], part["largest"])
    return total | {"measures": measures}


def write_json(path: Location, content: Any, overwrite: bool = True) -> bool:
    """Write a JSON file atomically; without `overwrite`, return False, and write nothing, if it exists already."""
    encoded = (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
    if not overwrite:
        return create(path, encoded)
    replace(path, encoded)
    return True


def read_json(path: Location) -> Json | None:
    """Return the object in a JSON file, or None if there is no such file; raise WinnowError if it is damaged."""
    try:
        return _decoded(path, read(path))
    except FileNotFoundError:
        return None


def _decoded(path: Location, content: bytes) -> Json:
    try:
        decoded = json.loads(content)
    except ValueError as error:
        raise WinnowError(f"{path}: cannot be read ({error}); delete it and run again") from None
    if not isinstance(decoded, dict):
        raise WinnowError(f"{path}: cannot be read (it is not a JSON object); delete it and run again")
    return decoded


def table_of(file: Json) -> str:
    """Return the name of the table that a file, as a manifest or a sidecar lists it, is a part of."""
    return str(file["file"]).rsplit("-", 1)[0]
