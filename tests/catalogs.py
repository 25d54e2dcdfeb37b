"""Small stores for queries: finished steps with the rows that a test writes, and runs that link to them."""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import pyarrow as pa

from pipeline.store.fingerprints import digests_of, model_digest
from pipeline.store.manifests import encode_sealed
from pipeline.store.store import StepFolder, Store, write_json
from schemas import table_name
from schemas.tables import REJECTS, REWARDS


def put(
    store: Store, stage: str, key: str, tables: Sequence[pa.Table], seconds: float = 1.5, version: int = 1, **extra
) -> None:
    """Write a finished step of one part, as a run does; `extra` are further fields of its manifest."""
    folder = StepFolder(store.root / stage / key, parts=1)
    time = {"seconds": seconds, "gpu_seconds": 2 * seconds, "cpu_seconds": seconds}
    folder.write_part(
        0, {table_name(table.schema): table for table in tables}, time | {"counters": {"tokens": 7}, "rejects": {}}
    )
    record = {
        "stage": stage,
        "key": key,
        "identity": {"version": version, "options": {"k": 8}, "inputs": {"prompts": "abc"}},
        "made": "2026-01-01T00:00:00+00:00",
        "commit": "c0ffee",
        "wall_seconds": seconds,
    }
    folder.seal(record | extra, lambda manifest: None)


def link(store: Store, run: str, **steps: tuple[str, str]) -> None:
    """Write a run; each step is its stage and key."""
    links = {name: {"stage": stage, "key": key} for name, (stage, key) in steps.items()}
    write_json(store.root / "runs" / f"{run}.json", links)


def rewards(*values: float, prompt: str = "p") -> pa.Table:
    rows = [dict(prompt_id=prompt, candidate_id=f"c{n}", reward=value) for n, value in enumerate(values)]
    return pa.Table.from_pylist(rows, REWARDS)


def rejects(*reasons: str) -> pa.Table:
    return pa.Table.from_pylist([dict(place="here", reason=reason, detail="") for reason in reasons], REJECTS)


def table(schema: pa.Schema, *rows: Mapping) -> pa.Table:
    """Return rows of which a test sets the columns that it is about; the others are null, zero, or empty."""
    defaults: dict[str, object] = {}
    for field in schema:
        if field.nullable:
            defaults[field.name] = None
        else:
            defaults[field.name] = [] if pa.types.is_list(field.type) else "" if pa.types.is_string(field.type) else 0
    return pa.Table.from_pylist([defaults | dict(row) for row in rows], schema)


def record_changes(folder: Path) -> None:
    """Record files of a finished step that a test has changed, as if they had been written so."""
    for record in [folder / "manifest.json", *folder.glob("part-*.json")]:
        content = json.loads(record.read_text())
        if content.get("model"):
            content |= {"model": model_digest(folder / "model"), "model_files": digests_of(folder / "model")}
        parts = content["parts"] if isinstance(content.get("parts"), list) else [content]
        for file in (file for part in parts for file in part["files"]):
            data = (folder / file["file"]).read_bytes()
            file |= {"bytes": len(data), "sha256": sha256(data).hexdigest()}
        record.write_bytes(encode_sealed(content))
