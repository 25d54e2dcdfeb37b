"""The artifact store: <root>/<stage>/<key>/, parts first, manifest last.

A part is its tables and then its sidecar (part-00003.json), each renamed into place; a step is sealed by
its manifest. Whatever lacks its last file never happened, so a crash loses only parts in flight.
"""

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import get_ident
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.content import model_digest
from pipeline.plan import Step
from schemas import TABLES, Model, WinnowError, table_name

Json = dict[str, Any]


@dataclass(frozen=True)
class StepFolder:
    """The folder of one step: a small value that travels to workers."""

    path: Path

    @property
    def manifest_path(self) -> Path:
        return self.path / "manifest.json"

    @property
    def manifest(self) -> Json | None:
        return read_json(self.manifest_path)

    def sidecar(self, shard: int) -> Json | None:
        """What a finished part recorded, or None while it is not finished."""
        found = read_json(self.path / f"part-{shard:05d}.json")
        if found and all(_size(self.path / file["file"]) == file["bytes"] for file in found["files"]):
            return found
        return None

    def missing(self, shards: int) -> list[int]:
        return [shard for shard in range(shards) if self.sidecar(shard) is None]

    def read(self, schema: pa.Schema, shard: int | None = None) -> pa.Table:
        """One part of a table, or all parts in order."""
        name = table_name(schema)
        made = [file["file"] for file in (self.manifest or {"files": []})["files"]]
        end = "" if shard is None else f"{shard:05d}.parquet"
        wanted = [file for file in made if file.startswith(f"{name}-") and file.endswith(end)]
        if not wanted:
            raise WinnowError(f"{self.path}: no sealed table {name} here; run the recipe again")
        try:
            tables = [pq.read_table(self.path / file, schema=schema, partitioning=None) for file in wanted]
        except (OSError, pa.ArrowInvalid) as error:
            raise WinnowError(
                f"{self.path}: table {name} is damaged ({error}); put the file back, or delete this folder and "
                "those of all steps made from it (winnow status lists them), for they would not fit a new one"
            ) from None
        return pa.concat_tables(tables).combine_chunks()

    def model(self) -> Model:
        manifest = self.manifest
        if manifest is None or not manifest["model"]:
            raise WinnowError(f"{self.path}: no sealed model here")
        return Model(self.path / "model", manifest["model"])

    def write_part(self, shard: int, tables: dict[str, pa.Table], record: Json) -> None:
        """All tables of one shard, then the sidecar that makes them count."""
        self.path.mkdir(parents=True, exist_ok=True)
        files = [self._write_table(f"{name}-{shard:05d}.parquet", table) for name, table in tables.items()]
        write_json(self.path / f"part-{shard:05d}.json", {"shard": shard, "files": files, **record})

    def _write_table(self, name: str, table: pa.Table) -> Json:
        scratch = _scratch(self.path / name)
        pq.write_table(table, scratch, compression="zstd", row_group_size=8192)
        digest = sha256(scratch.read_bytes()).hexdigest()
        size = scratch.stat().st_size
        scratch.replace(self.path / name)
        return {"file": name, "rows": table.num_rows, "bytes": size, "sha256": digest}

    def seal(self, record: Json, shards: int, check: Callable[[Json], None]) -> Json:
        """Gather the sidecars into the manifest, written last, if `check` lets it."""
        parts = [self.sidecar(shard) for shard in range(shards)]
        if None in parts:
            raise WinnowError(f"{self.path}: part {parts.index(None)} is not finished; run again")
        done: list[Json] = [part for part in parts if part]
        counters: Counter[str] = sum((Counter(part["counters"]) for part in done), Counter())
        folder = self.path / "model"
        manifest = record | {
            "rows": _tally(done, "rows"),
            "bytes": _tally(done, "bytes"),
            "seconds": round(sum(part["seconds"] for part in done), 3),
            "counters": dict(sorted(counters.items())),
            "rejects": dict(sum((Counter(part["rejects"]) for part in done), Counter())),
            "model": model_digest(folder) if folder.is_dir() else None,
            "files": [file for part in done for file in part["files"]],
        }
        check(manifest)
        for leftover in [self.path / name for name in ("progress.json", "checkpoint", "outcome.json")]:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        write_json(self.manifest_path, manifest)
        return manifest

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One run at a time makes a step; a second one waits here, and then finds it made."""
        locks = self.path.parent.parent / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with (locks / self.path.name).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


class Store:
    """A folder of sealed steps, and links from run names to them."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()

    def folder(self, step: Step) -> StepFolder:
        return StepFolder(self.root / step.entry.name / step.key)

    def sealed(self) -> list[Json]:
        """Every manifest in the store, with its folder, oldest stage names first."""
        found = ((path, read_json(path)) for path in sorted(self.root.glob("*/*/manifest.json")))
        return [manifest | {"folder": str(path.parent)} for path, manifest in found if manifest]

    def runs(self) -> dict[str, Json]:
        """Run name -> step name -> stage and key."""
        found = ((path.stem, read_json(path)) for path in sorted((self.root / "runs").glob("*.json")))
        return {name: content for name, content in found if content is not None}

    def link_run(self, name: str, steps: list[Step]) -> None:
        content = {step.name: {"stage": step.entry.name, "key": step.key} for step in steps}
        write_json(self.root / "runs" / f"{name}.json", content)

    def manifest_at(self, stage: str, key: str) -> Json | None:
        return StepFolder(self.root / stage / key).manifest


def _scratch(path: Path) -> Path:
    """Where a file is written before it is renamed into place: one for each writer, thread by thread."""
    return path.with_name(f".{path.name}.{os.getpid()}.{get_ident()}")


def write_json(path: Path, content: Any) -> None:
    """Atomic: the file is either the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = _scratch(path)
    scratch.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    scratch.replace(path)


def read_json(path: Path) -> Json | None:
    try:
        content: Json = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise WinnowError(f"{path}: cannot be read ({error}); delete it and run again") from None
    return content


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _tally(parts: list[Json], what: str) -> dict[str, int]:
    """Sum over parts of one figure of each table."""
    total: Counter[str] = Counter()
    for part in parts:
        for file in part["files"]:
            total[file["file"].rsplit("-", 1)[0]] += file[what]
    return {name: total[name] for name in TABLES if name in total}
