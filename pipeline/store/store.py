"""The artifact store: <root>/<stage>/<key>/ holds a step, in a folder or in an object store.

A part of a step is its tables, each in a file named by its content, and then a sidecar (part-00003-of-00008.json; a
stage that is called once for all parts has one for all, part-whole.json). A table without rows in a part has no file
there: the sidecar names it. The parts of a small table are one file in the end: `by_part` of its record says how many
of its rows, in order, are whose. A manifest is written last and marks the step
as finished. Whatever lacks its last file does not count, so a crash loses only the parts in flight. Sidecars and
manifests are written once: of two runs that make the same part the first one's counts, and both continue from it.
"""

import fcntl
import io
import json
import os
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from dataclasses import replace as with_changes
from functools import lru_cache
from hashlib import file_digest, sha256
from math import gcd
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.store.fingerprints import digests_of, model_digest
from pipeline.store.manifests import (
    FORMAT,
    VERIFY_HINT,
    DamagedError,
    checked_manifest,
    checked_run,
    checked_sidecar,
    decode,
    decode_sealed,
    encode_sealed,
)
from pipeline.store.storage import (
    SCRATCH,
    Location,
    cache,
    create,
    delete,
    download,
    is_left_over,
    is_synced,
    make_folder,
    move,
    named,
    parse_location,
    read,
    read_all,
    replace,
    scratch_path,
    sizes,
    sync,
)
from schemas import (
    COMMAND,
    TABLES,
    MachineError,
    Model,
    WinnowError,
    WinnowWarning,
    combine_chunks,
    shard_of,
    table_name,
)

if TYPE_CHECKING:  # a step of a plan, of which the store needs its name in the run, its stage and its key
    from pipeline.config.plan import Step

Json = dict[str, Any]

LOCKS, RUNS, TAGS = "locks", "runs", "tags"  # folders beside those of the stages
COMMANDS = "commands"  # of each run, what was called
FORGOTTEN = "forgotten"  # runs that `gc` is deleting
SET_ASIDE = "set_aside"  # what was damaged, in folders as those of the steps; nothing reads it
REPAIR = "repair.json"  # in a step that was finished and is computed again: what it had
SIDECAR = "part-{:05d}-of-{:05d}.json"
SIDECAR_NAME = re.compile(r"part-(\d{5}-of-(\d{5})|whole)\.json")
TABLE_FILE = re.compile(r"(?!speeds-).+-(\d{5}|all)\.[0-9a-f]{12}\.parquet")
WHOLE = "part-whole.json"  # one sidecar for all parts, so that the results of two calls are never mixed
IdRange = tuple[str, str | None]  # prompt ids from the first to below the second; None: to the last
ROW_GROUP = 8192  # rows
SMALL_TABLE = 8 << 20  # bytes of a table whose parts are one file
ID_BYTES = 24  # of an id in memory, with its offset
DICTIONARY_COLUMNS = ["prompt_id"]  # for ids and texts that hardly repeat, a dictionary makes files larger and slower
# Levels of zstd, of columns where it is worth its time; 1 for all others. What a network has drawn is written once and
# is most of a store: in bytes per token of 8,192 real responses (tests/bench/encodings.md), ids and text together take
# 1.98 at level 6, 2.35 at 1, 2.21 at 3, and 1.94 at 9 for half as much time again. Dictionaries (1.31 for ids at level
# 6, where plain ones take 0.97), byte-stream split (1.12) and deltas (1.94) hide repeated phrases from zstd.
LEVELS = {"candidates": {"token_ids.list.element": 6, "text": 6, "raw_text": 6}}
PROGRESS, METRICS_NOW = (
    "progress.json",
    "metrics_now.jsonl",
)  # of a step that runs: how far it is, and its metrics so far
# Scratch files, removed when the step is finished.
LEFTOVERS = ("checkpoint", "pieces", "refusal.txt", "ray_train", ".weights", PROGRESS, METRICS_NOW, REPAIR)
REPAIR_HINT = f"`{COMMAND} verify --repair` sets aside what is damaged and makes it again"


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
            with suppress(DamagedError):
                if record := self.read_sidecar(WHOLE):
                    return with_changes(self, parts=len(record["parts"]))
        finished = Counter(int(match[2]) for match in matches if match[2])
        most = max(finished, key=lambda parts: (finished[parts], parts == self.parts, parts), default=self.parts)
        return with_changes(self, parts=most)

    @property
    def manifest_path(self) -> Location:
        return self.path / "manifest.json"

    @property
    def manifest(self) -> Json | None:
        """Return the step's record, or None while the step is not finished; a damaged record is none."""
        try:
            return self.read_manifest()
        except DamagedError:
            return None

    def read_manifest(self) -> Json | None:
        """Return the step's record, or None if there is no file of it; raise DamagedError if that is damaged."""
        try:
            manifest = decode_sealed(self.manifest_path, read(self.manifest_path))
        except FileNotFoundError:
            return None
        checked_manifest(manifest | {"folder": str(self.path)}, in_place=False)
        return manifest

    def sidecar(self, shard: int, file_sizes: dict[str, int] | None = None) -> Json | None:
        """Return the record of a finished part, or None if it, or a file that it lists, is missing or damaged.

        `file_sizes` of this folder spare a listing where many parts are looked up.
        """
        file_sizes = sizes(self.path) if file_sizes is None else file_sizes
        if not file_sizes.keys() & {WHOLE, SIDECAR.format(shard, self.parts)}:
            return None
        try:
            record = self._record(shard)
        except DamagedError:
            return None
        if record and all(file_sizes.get(file["file"]) == file["bytes"] for file in record["files"]):
            return record
        return None

    def _record(self, shard: int) -> Json | None:
        if record := self.read_sidecar(SIDECAR.format(shard, self.parts)):
            return record
        record = self.read_sidecar(WHOLE)
        return record["parts"][shard] if record and len(record["parts"]) == self.parts else None

    def read_sidecar(self, name: str) -> Json | None:
        """Return what a sidecar holds, or None if there is no such file; raise DamagedError if it is damaged."""
        try:
            return checked_sidecar(self.path / name, decode_sealed(self.path / name, read(self.path / name)))
        except FileNotFoundError:
            return None

    def _files(self, table: str, shard: int | None) -> list[Json] | None:
        """Return a table's files in a finished part, as its sidecar or else the manifest lists them, or in all parts.

        That is none for a table without rows there, and None where nothing says that the table is finished.
        """
        record: Json | None = None
        if shard is not None:
            with suppress(DamagedError):
                record = self._record(shard)
        if record:
            listed, tables = record["files"], {*record.get("empty", ()), *map(table_of, record["files"])}
        else:
            manifest = self.manifest or {"files": [], "rows": {}}
            listed, tables = manifest["files"], set(manifest["rows"])
            if shard is not None:
                of_part = f"-{shard:05d}."
                listed = [file for file in listed if of_part in file["file"] or "by_part" in file]
                tables = tables if shard < manifest.get("parts", 0) else set(map(table_of, listed))
        return [file for file in listed if table_of(file) == table] if table in tables else None

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
        if (files := self._files(name, shard)) is None:
            raise MachineError(f"{self.path}: table {name} is not finished; run the recipe again")
        try:
            tables = [self._read_file(file, schema, shard, ids) for file in files]
        except DamagedError:
            if (merged := self._files(name, shard)) == files:
                raise
            # Another process finished the step meanwhile, and has made one file of those of its parts.
            tables = [self._read_file(file, schema, shard, ids) for file in merged or []]
        return combine_chunks(pa.concat_tables(tables)) if tables else schema.empty_table()

    def _read_file(
        self, file: Json, schema: pa.Schema | None, shard: int | None = None, ids: IdRange | None = None
    ) -> pa.Table:
        """Return the rows of a file, or of a part in it, of these prompts. Raises as `read` does."""
        rows_read = None
        if ids is not None:
            prompt = pc.field("prompt_id")
            rows_read = (prompt >= ids[0]) if ids[1] is None else (prompt >= ids[0]) & (prompt < ids[1])
        of_part = "by_part" in file and shard is not None
        path, content = self.path / file["file"], None
        where = f"{self.path}: table {table_of(file)} is damaged ({file['file']}: "
        try:
            if isinstance(path, Path):
                problem = file_problem(path, file)
            else:  # one request; a request per column and row group takes longer
                content = read(path)
                problem = content_problem(file, content)
            if problem:
                raise DamagedError(f"{where}{problem}); {REPAIR_HINT}")
            source = str(path) if content is None else pa.BufferReader(content)
            if not of_part:
                return pq.read_table(source, schema=schema, partitioning=None, filters=rows_read)
            table = pq.read_table(source, schema=schema, partitioning=None)
        except (OSError, pa.ArrowInvalid) as error:
            # A disk that fails says so by a number, and an object store before there is any content.
            has_failed = content is None and (not isinstance(path, Path) or getattr(error, "errno", None))
            if has_failed and not isinstance(error, FileNotFoundError):
                raise
            raise DamagedError(f"{where}{error}); {REPAIR_HINT}") from None
        table = table.slice(sum(file["by_part"][:shard]), file["by_part"][shard])
        return table if rows_read is None else table.filter(rows_read)

    def decoded_bytes(self, schema: pa.Schema, shard: int, of: int) -> int:
        """Return about how many bytes the schema's columns of a finished part take in memory; 0 in an object store.

        There a part is read at once: one request for each column of each row group takes longer. of: the number of
        parts that `shard` is one of; of a table in other parts, it is the bytes of all that share prompts with it.
        """
        size = 0
        if not isinstance(self.path, Path):
            return 0
        names = set(schema.names)
        parts = overlapping(shard, of, self.parts)
        for part, file in ((n, file) for n in parts for file in self._files(table_name(schema), n) or []):
            try:
                footer = pq.read_metadata(self.path / file["file"])
            except (OSError, pa.ArrowInvalid):  # which `read` reports
                continue
            groups = [footer.row_group(n) for n in range(footer.num_row_groups)]
            chunks = (group.column(leaf) for group in groups for leaf in range(footer.num_columns))
            of_file = sum(
                chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in names
            )
            of_file += ID_BYTES * len(names.intersection(DICTIONARY_COLUMNS)) * footer.num_rows  # not in the file again
            size += of_file * file["by_part"][part] // footer.num_rows if "by_part" in file else of_file
        return size

    def model(self) -> Model:
        """Return the finished model, from an object store as a copy on this machine; raise WinnowError without one."""
        manifest = self.manifest
        if manifest is None or not manifest["model"]:
            raise MachineError(f"{self.path}: no finished model here; run the recipe again")
        digest: str = manifest["model"]
        folder = self.path / "model" if isinstance(self.path, Path) else cache() / "models" / digest
        if not isinstance(self.path, Path) and not folder.exists():
            download(self.path / model_name(digest), folder)
        # Digests of large files are cached by their times and sizes: this reads weights once per machine.
        if problems := model_problems(folder, digest, manifest.get("model_files")):
            raise DamagedError(f"{folder}: the model is damaged ({problems[0]}); {REPAIR_HINT}")
        return Model(folder, digest)

    def write_part(self, shard: int, tables: dict[str, pa.Table], record: Json) -> None:
        """Write all tables of one part, then its sidecar, unless another run's sidecar exists already."""
        with self.part_writer(shard) as part:
            part.write(tables)
            part.finish(record)

    @contextmanager
    def part_writer(self, shard: int | None) -> Iterator["PartWriter"]:
        """Yield a writer of one part, or of all (None), whose tables may come in pieces; nothing stays unfinished."""
        writer = PartWriter(self, shard)
        try:
            yield writer
        finally:
            writer.discard()

    def write_whole(self, parts: list[tuple[dict[str, pa.Table], Json]]) -> None:
        """Write all tables of all parts that one call made, a small one as one file, then one sidecar for all."""
        nbytes: dict[str, list[int]] = {}  # of the parts with rows
        for name, table in ((name, table) for tables, _ in parts for name, table in tables.items() if table.num_rows):
            nbytes.setdefault(name, []).append(table.nbytes)
        small = {name for name, values in nbytes.items() if len(values) > 1 and sum(values) <= SMALL_TABLE}
        with self.part_writer(None) as writer:
            for tables, _ in parts:
                writer.write({name: rows for name, rows in tables.items() if name in small})
            listed = writer.close()["files"]
        for file in listed:
            file["by_part"] = [tables[table_of(file)].num_rows for tables, _ in parts]
        records = []
        for shard, (tables, record) in enumerate(parts):
            with self.part_writer(shard) as part:
                part.write({name: rows for name, rows in tables.items() if name not in small})
                files = [*(file for file in listed if file["by_part"][shard]), *part.close()["files"]]
            empty = [name for name, rows in tables.items() if not rows.num_rows]
            records.append({"shard": shard, "files": files, "empty": empty, **record})
        self.write_sidecar(WHOLE, {"parts": records}, range(len(parts)))

    def _merge(self, parts: list[Json]) -> list[Json]:
        """Make one file of those of each small table, and one sidecar of all; return the records of the parts."""
        files: dict[str, list[Json | None]] = {}
        for shard, part in enumerate(parts):
            for file in part["files"]:
                files.setdefault(table_of(file), [None] * len(parts))[shard] = file
        merged: dict[str, Json] = {}
        for name, of_parts in files.items():
            listed = [file for file in of_parts if file]
            is_small = sum(file["bytes"] for file in listed) <= SMALL_TABLE
            if len(listed) < 2 or not is_small:
                continue
            tables = [self._read_file(file, None) for file in listed]
            if any(not table.schema.equals(tables[0].schema, check_metadata=True) for table in tables):
                continue  # parts of two versions of the stage
            # A file names the items of a list otherwise than the table that was written, which are equal but in bytes.
            declared = TABLES.get(name)
            is_declared = declared is not None and tables[0].schema.equals(declared)
            with self.part_writer(None) as writer:
                for table in tables:
                    writer.write({name: table.cast(declared) if is_declared else table})
                (merged[name],) = writer.close()["files"]
            merged[name]["by_part"] = [file["rows"] if file else 0 for file in of_parts]
        if not merged:
            return parts
        records = [
            part | {"files": [merged.get(table_of(file), file) for file in part["files"]], "shard": shard}
            for shard, part in enumerate(parts)
        ]
        self.write_sidecar(WHOLE, {"parts": records}, range(len(parts)))
        return records

    def _records_of_all(self) -> list[Json] | None:
        """Return the records of all parts as one sidecar has them; None without one, or without a file of it."""
        file_sizes = sizes(self.path)
        with suppress(DamagedError):
            parts: list[Json] = (self.read_sidecar(WHOLE) or {"parts": []})["parts"]
            files = [file for part in parts for file in part["files"]]
            if len(parts) == self.parts and all(file_sizes.get(file["file"]) == file["bytes"] for file in files):
                return parts
        return None

    def _delete_merged(self, files: list[Json]) -> None:
        """Delete what the sidecar of all parts has replaced: that of each part, then tables that it does not list.

        Wherever this ends, each part has a sidecar whose files are there.
        """
        names = sizes(self.path)
        if WHOLE not in names:
            return
        listed = {file["file"] for file in files}
        replaced = [name for name in names if SIDECAR_NAME.fullmatch(name) and name != WHOLE]
        tables = [name for name in names if re.fullmatch(r"[^.].*\.parquet", name) and name not in listed]
        for group in (replaced, tables):
            for name in group:
                delete(self.path / name)
            if group and isinstance(self.path, Path):  # a power cut may undo deletions in any order
                sync(self.path)

    def write_sidecar(self, name: str, content: Json, shards: Sequence[int]) -> None:
        """Write the record of finished parts, unless there is one already that is not damaged.

        The names of their files are synced with its own.
        """
        path = self.path / name
        if not create(path, encode_sealed(content)):
            existing = self.divided()  # another run may have divided it into another number
            numbers = range(existing.parts) if name == WHOLE else shards
            if any(existing.sidecar(shard) is None for shard in numbers):
                replace(path, encode_sealed(content))

    def seal(self, record: Json, check: Callable[[Json], None]) -> Json:
        """Finish the step: gather all sidecars in a manifest, give it to `check`, which may raise, and write it.

        Returns the manifest that counts: if another run wrote one in the meantime, that one.
        """
        if (parts := self._records_of_all()) is None:
            file_sizes = sizes(self.path)
            parts = []
            for shard in range(self.parts):
                if (part := self.sidecar(shard, file_sizes)) is None:
                    raise MachineError(f"{self.path}: part {shard} is not finished; run again")
                parts.append(part)
            parts = self._merge(parts)
        by_name = {file["file"]: file for part in parts for file in part["files"]}
        order = [*TABLES, *map(table_of, by_name.values())]  # whoever wrote the parts, a run or `adopt`
        files = sorted(by_name.values(), key=lambda file: (order.index(table_of(file)), file["file"]))
        rows: Counter[str] = Counter()
        size: Counter[str] = Counter()
        for table in (table for part in parts for table in part.get("empty", ())):
            rows[table] += 0
            size[table] += 0
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
            **({"model_files": parts[0]["model_files"]} if "model_files" in parts[0] else {}),
            "files": files,
        }
        check(manifest)
        self._delete_merged(files)
        if isinstance(self.path, Path):  # what it lists may be of another run, which has not synced its names yet
            sync(self.path, self.path.parent, self.path.parent.parent)
        if not create(self.manifest_path, encode_sealed(manifest)):
            if existing := self.manifest:
                manifest = existing
            else:
                replace(self.manifest_path, encode_sealed(manifest))  # the one that exists is damaged
        for leftover in LEFTOVERS:
            delete(self.path / leftover)
        return manifest

    def sweep(self) -> None:
        """Delete scratch of processes that have ended; the caller holds the step's lock, so that nobody writes here."""
        for name in sizes(self.path):
            if SCRATCH.fullmatch(name):
                delete(self.path / name)

    def set_aside(self, *names: str) -> Location:
        """Move files of this step, or its whole folder if none is named, to where nothing reads them; return where."""
        folder, number = self.path.parent.parent / SET_ASIDE / self.path.parent.name / self.path.name, 1
        while (folder / str(number)).exists():
            number += 1
        if not names:
            move(self.path, folder / str(number))
        for name in names:
            move(self.path / name, folder / str(number) / name)
        return folder / str(number)

    def set_aside_damaged(self) -> list[str]:
        """Move aside what cannot be read of a step that is not finished; return the names.

        The caller holds the step's lock, so that nobody else writes here. Parts that lack their sidecar, or a file of
        it, are computed again.
        """
        file_sizes = sizes(self.path)
        damaged: list[str] = []
        try:
            if self.read_manifest():
                return []
        except DamagedError as error:
            damaged = list(file_sizes) if "belongs to" in str(error) else ["manifest.json"]
        was_finished = bool(damaged)
        for name in sorted(file_sizes):
            if SIDECAR_NAME.fullmatch(name) and name not in damaged:
                try:
                    record = self.read_sidecar(name) or {"files": []}
                except DamagedError:
                    damaged.append(name)
                    continue
                files = [file for part in record.get("parts", [record]) for file in part["files"]]
                short = [file["file"] for file in files if file_sizes.get(file["file"]) != file["bytes"]]
                if short:
                    damaged += [name, *(file for file in short if file in file_sizes)]
        if was_finished and (damaged != ["manifest.json"] or self.divided().missing()):
            self.note_repair()
        if damaged:
            self.set_aside(*dict.fromkeys(damaged))
        return list(dict.fromkeys(damaged))

    def note_repair(self) -> None:
        """Record the content of a step that was finished, for it is about to be computed again: in part or whole."""
        if not self.is_repaired:
            model = ""
            if isinstance(self.path, Path) and (self.path / "model").is_dir():
                with suppress(OSError, ValueError, KeyError, TypeError):
                    model = model_digest(self.path / "model")
            manifest = self.manifest or {}
            names = [file["file"] for file in manifest["files"]] if manifest else list(sizes(self.path))
            write_json(self.path / REPAIR, content_of(names, manifest.get("model") or model))

    @property
    def is_repaired(self) -> bool:
        """Return whether this step was finished once, was damaged, and is not finished again."""
        return (self.path / REPAIR).exists()

    def is_as_before(self, manifest: Json) -> bool:
        """Return whether a step that was computed again has the content that it had, as far as that is known."""
        names = [file["file"] for file in manifest["files"]]
        with suppress(DamagedError):
            return read_json(self.path / REPAIR) == content_of(names, manifest["model"] or "")
        return False

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
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return StepLock(file, path)
        file.close()  # it was deleted between open and flock: lock the file that other runs see
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

    def __init__(self, folder: StepFolder, shard: int | None) -> None:
        self.folder, self.shard = folder, shard
        self.suffix = "all" if shard is None else f"{shard:05d}"
        self.writers: dict[str, TableWriter] = {}

    def write(self, tables: Mapping[str, pa.Table]) -> None:
        """Append rows to the tables."""
        for table, rows in tables.items():
            if table not in self.writers:
                self.writers[table] = TableWriter(self.folder.path, f"{table}-{self.suffix}", rows.schema)
            self.writers[table].write(rows)

    def close(self) -> Json:
        """Finish all tables, on the disk before they have their names; return what a sidecar records of them.

        Tables without rows have no file: on an object store, a put is money and time.
        """
        for writer in self.writers.values():
            writer.close()
        empty = [table for table, writer in self.writers.items() if not writer.rows]
        written = [writer for writer in self.writers.values() if writer.rows]
        sync(*(writer.scratch for writer in written))
        return {"files": [writer.publish() for writer in written], "empty": empty}

    def finish(self, record: Json) -> None:
        """Finish all tables, then write the part's sidecar, unless another run's sidecar exists already."""
        content = {"shard": self.shard, **self.close(), **record}
        assert self.shard is not None
        self.folder.write_sidecar(SIDECAR.format(self.shard, self.folder.parts), content, [self.shard])

    def discard(self) -> None:
        """Delete what is not finished."""
        for writer in self.writers.values():
            writer.discard()


class TableWriter:
    """File of a table, named by its content when it is finished. Until then it is a scratch file on this machine.

    There is none before the first row group is full or the table is finished, and never one without rows.
    """

    def __init__(self, folder: Location, name: str, schema: pa.Schema) -> None:
        self.folder, self.name, self.schema = folder, name, schema
        self.scratch = scratch_path((folder if isinstance(folder, Path) else Path(tempfile.gettempdir())) / name)
        self.rows, self.rest = 0, schema.empty_table()
        self._writer: pq.ParquetWriter | None = None

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
            if self._writer is None:
                make_folder(self.scratch.parent)
                self._writer = pq.ParquetWriter(
                    str(self.scratch),
                    self.schema,
                    compression="zstd",
                    compression_level=LEVELS.get(table_name(self.schema)),
                    use_dictionary=DICTIONARY_COLUMNS,
                    write_statistics=columns_with_statistics(self.schema),
                )
            self._writer.write_table(combine_chunks(rows), row_group_size=ROW_GROUP)

    def close(self) -> None:
        """Write the rest."""
        if self.rest.num_rows:
            self._write_group(self.rest)
        if self._writer:
            with named(self.folder):
                self._writer.close()

    def publish(self) -> Json:
        """Give the file its name; return what a sidecar records of it."""
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
        if self._writer:
            with suppress(OSError):  # of a full disk, which has raised already
                self._writer.close()
        self.scratch.unlink(missing_ok=True)


@dataclass(frozen=True)
class StepLock:
    """Lock of a step; it ends with the process at the latest. `path` is its file, where the disk has locks."""

    file: IO[str] | None
    path: Path | None = None

    def release(self) -> None:
        if self.path and self.file and not self.file.closed:
            with suppress(OSError):
                if os.path.samestat(os.fstat(self.file.fileno()), self.path.stat()):
                    self.path.unlink()  # who opened it before sees that, and locks the next one
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
        """Return the checked manifests of all finished steps, sorted by path, each with its `folder`.

        Steps whose manifests are damaged are not finished; one warning names them.
        """
        return self._manifests("*/*/manifest.json")

    def _manifests(self, pattern: str) -> list[Json]:
        manifests, damaged = [], []
        for path, content in read_all(self.root, pattern).items():
            try:
                manifests.append(checked_manifest(decode_sealed(path, content) | {"folder": str(path.parent)}))
            except DamagedError as error:
                damaged.append(error.problems[0])
        if damaged:
            more = f" ({len(damaged)} such manifests)" if len(damaged) > 1 else ""
            warnings.warn(f"counts as not finished{more}: {damaged[0]}", WinnowWarning, stacklevel=3)
        return manifests

    def earlier(self, step: "Step") -> list[StepFolder]:
        """Return the finished steps whose rows a step can take for its own (`Step.row_key`), most rows first."""
        if not (step.signature.goes_on and step.takes_earlier_rows):
            return []
        rows: dict[StepFolder, int] = {}
        for manifest in self._manifests(f"{step.stage}/*/manifest.json"):
            if manifest.get("row_key") == step.row_key and manifest["key"] != step.key:
                folder = self.root / manifest["stage"] / manifest["key"]
                rows[StepFolder(folder, manifest["parts"])] = sum(manifest["rows"].values())
        return sorted(rows, key=lambda folder: (-rows[folder], folder.path.name))

    def runs(self) -> dict[str, Json]:
        """Return run name -> step name -> stage and key; raise DamagedError with all damaged files."""
        runs, problems = {}, list[str]()
        for path, content in read_all(self.root, f"{RUNS}/*.json").items():
            try:
                runs[path.stem] = checked_run(path.stem, decode(path, content))
            except DamagedError as error:
                problems += error.problems
        if problems:
            raise DamagedError(*problems)
        return runs

    def run(self, name: str) -> Json:
        """Return step name -> stage and key of a run; empty if there is no such run."""
        return checked_run(name, read_json(self.root / RUNS / f"{name}.json") or {})

    def link_run(self, name: str, steps: "Sequence[Step]") -> None:
        content = {step.name: {"stage": step.stage, "key": step.key} for step in steps}
        write_json(self.root / RUNS / f"{name}.json", content)

    def tags(self) -> dict[str, dict[str, str]]:
        """Return the tags of each run that has any, by their names; those without a value have an empty one."""
        files = read_all(self.root, f"{TAGS}/*.json").items()
        return {path.stem: checked_tags(path, decode(path, content)) for path, content in files}

    def tag_run(self, name: str, tags: dict[str, str]) -> None:
        """Add tags to a run, in a file of their own: they are words about its results, and no part of what they are."""
        if tags:
            path = self.root / TAGS / f"{name}.json"
            write_json(path, checked_tags(path, read_json(path) or {}) | tags)

    def record_command(self, name: str, words: list[str], folder: str) -> None:
        """Record the command line that a run was called with, and in which folder: `verify --repair` calls it again."""
        write_json(self.root / COMMANDS / f"{name}.json", {"words": words, "folder": folder})

    def command(self, name: str) -> Json | None:
        """Return the `words` of the command line that a run was called with, and its `folder`; None if not known."""
        with suppress(DamagedError):
            command = read_json(self.root / COMMANDS / f"{name}.json") or {}
            words, folder = command.get("words"), command.get("folder")
            if isinstance(folder, str) and isinstance(words, list) and all(isinstance(word, str) for word in words):
                return command
        return None

    def sweep(self) -> None:
        """Delete locks that no process holds, and scratch of processes of this machine that have ended."""
        if not isinstance(self.root, Path):
            return
        for folder in (LOCKS, RUNS, TAGS, COMMANDS):
            for name in sizes(self.root / folder):
                if is_left_over(name):
                    delete(self.root / folder / name)
                elif folder == LOCKS and not name.startswith(".") and (lock := self.at(LOCKS, name).try_lock()):
                    lock.release()

    def check(self) -> None:
        """Raise WinnowError if the store cannot be written to; called before any work is done."""
        is_synced()  # which checks the environment
        trial = self.root / LOCKS / f".trial-{os.getpid()}-{id(self):x}"
        try:
            replace(trial, b"", durable=False)  # before create(), because its error says why
            created_twice = create(trial, b"", durable=False)
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


def checked_tags(path: Location, content: Json) -> dict[str, str]:
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise DamagedError(f"{path}: is not the tags of a run, texts by their names; correct it, or {VERIFY_HINT}")
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
    """Return the columns, by their paths in a Parquet file, that may have statistics in it: not floats, optional texts.

    Arrow leaves NaN out of minimum and maximum, as the format asks; DuckDB, for which NaN is the largest number, takes
    from the maximum that there is none, so that `isnan(logp)` finds no row and `max(logp)` is finite (duckdb#25521).
    Its option `can_have_nan` is no way out: with it, `max` of a column without NaN is NaN (seen in 2.0). A row group of
    one text and nulls DuckDB 2.0.0 takes for the text alone, for which `model IS NULL` is true of all its rows or none.
    """
    buffer = io.BytesIO()
    pq.write_table(schema.empty_table(), buffer)  # for the paths, which depend on how Parquet nests lists and maps
    columns = pq.ParquetFile(buffer).schema
    leaves = [columns.column(n) for n in range(len(columns))]
    optional_texts = {field.name for field in schema if field.nullable and pa.types.is_string(field.type)}
    return [
        leaf.path
        for leaf in leaves
        if leaf.physical_type not in ("FLOAT", "DOUBLE") and leaf.path not in optional_texts
    ]


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


def content_of(files: list[str], model: str) -> Json:
    """Return what two results of one key have in common: their tables, whose names have digests, and their model.

    Measured speeds differ between two computations.
    """
    return {"files": sorted(name for name in files if TABLE_FILE.fullmatch(name)), "model": model}


def model_problems(folder: Path, digest: str, recorded: dict[str, str] | None) -> list[str]:
    """Return which files of a model folder are not as they were stored; `recorded` has their digests by name."""
    if not folder.is_dir():
        return ["there is no such folder"]
    try:
        now = digests_of(folder, [folder / name for name in recorded]) if recorded else {}
        problems = [
            f"{name} is not as it was written" for name, value in (recorded or {}).items() if now[name] != value
        ]
        if not problems and model_digest(folder) != digest:
            problems = ["its files are not those that were stored"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{type(error).__name__}: {error}"]
    return problems


def file_problem(path: Path, file: Json) -> str:
    """Return what is wrong with a file on a disk, as `content_problem` does; a process reads it for that once."""
    stat = path.stat()
    if stat.st_size == file["bytes"] and (
        "sha256" not in file or _digest_of(path, stat.st_size, stat.st_mtime_ns) == file["sha256"]
    ):
        return ""
    return content_problem(file, path.read_bytes())


@lru_cache(maxsize=1 << 16)
def _digest_of(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()


def content_problem(file: Json, content: bytes) -> str:
    """Return why the content of a file is not what a sidecar or manifest recorded of it; empty if it is."""
    if len(content) != file["bytes"]:
        return f"it has {len(content):,} bytes of {file['bytes']:,}"
    if file.get("sha256", digest := sha256(content).hexdigest()) != digest:
        return "a byte of it is not as it was written"
    return ""


def write_json(path: Location, content: Any, durable: bool = True) -> None:
    """Write a JSON file atomically; without `durable`, what a power cut may lose."""
    replace(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode(), durable)


def read_json(path: Location) -> Json | None:
    """Return the object in a JSON file, or None if there is no such file; raise DamagedError if it is damaged."""
    try:
        return decode(path, read(path))
    except FileNotFoundError:
        return None


def table_of(file: Json) -> str:
    """Return the name of the table that a file, as a manifest or a sidecar lists it, is a part of."""
    return str(file["file"]).rsplit("-", 1)[0]
