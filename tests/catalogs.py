"""Small stores for questions: sealed steps with the rows that a test writes, and runs that name them."""

from collections.abc import Mapping, Sequence

import pyarrow as pa

from pipeline.store.store import StepFolder, Store, write_json
from schemas.tables import REJECTS, REWARDS


def put(
    store: Store, stage: str, key: str, tables: Sequence[pa.Table], seconds: float = 1.5, version: int = 1, **extra
) -> None:
    """A sealed step of one shard, as a run leaves it."""
    folder = StepFolder(store.root / stage / key)
    record = {
        "seconds": seconds,
        "gpu_seconds": 2 * seconds,
        "cpu_seconds": seconds,
        "counters": {"tokens": 7},
        "rejects": {},
    }
    folder.write_part(0, {table.schema.metadata[b"table"].decode(): table for table in tables}, record)
    identity = {"version": version, "options": {"k": 8}, "inputs": {"prompts": "abc"}}
    made = {"stage": stage, "key": key, "identity": identity, "made": "2026-01-01T00:00:00+00:00", "commit": "c0ffee"}
    folder.seal(made | {"wall_seconds": seconds} | extra, 1, lambda manifest: None)


def link(store: Store, run: str, **steps: tuple[str, str]) -> None:
    links = {name: {"stage": stage, "key": key} for name, (stage, key) in steps.items()}
    write_json(store.root / "runs" / f"{run}.json", links)


def rewards(*values: float, prompt: str = "p") -> pa.Table:
    rows = [dict(prompt_id=prompt, candidate_id=f"c{n}", reward=value) for n, value in enumerate(values)]
    return pa.Table.from_pylist(rows, REWARDS)


def rejects(*reasons: str) -> pa.Table:
    return pa.Table.from_pylist([dict(place="here", reason=reason, detail="") for reason in reasons], REJECTS)


def table(schema: pa.Schema, *rows: Mapping) -> pa.Table:
    """Rows of which a test says what it is about; the rest is null, zero, or empty."""
    empty = {field.name: None if field.nullable else _nothing(field.type) for field in schema}
    return pa.Table.from_pylist([empty | dict(row) for row in rows], schema)


def _nothing(kind: pa.DataType):
    if pa.types.is_list(kind):
        return []
    return "" if pa.types.is_string(kind) else 0
