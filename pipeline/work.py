"""One unit of work: one shard of one step, in whatever process it runs."""

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.plan import Step
from pipeline.registry import Entry
from pipeline.stage import Input, shape_of
from pipeline.store import StepFolder, Store
from pipeline.workspace import Tell, Warm, Workspace
from schemas import Model, WinnowError, conform, shard_of, table_name


@dataclass(frozen=True)
class Work:
    """A step as its workers see it: no plan, no store, only what the call needs."""

    name: str
    entry: Entry
    options: dict[str, Any]
    sources: dict[str, StepFolder]
    out: StepFolder
    shards: int

    def units(self) -> list[int]:
        """What is left to do: missing shards, or the one call of a whole stage."""
        missing = self.out.missing(self.shards)
        return [0] if missing and shape_of(self.entry).whole else missing


def work_of(step: Step, store: Store) -> Work:
    sources = {name: store.folder(source) for name, source in step.inputs.items()}
    return Work(step.name, step.entry, step.options, sources, store.folder(step), step.shards)


def execute(work: Work, unit: int, warm: Warm, tell: Tell) -> int:
    """Run one unit, commit its part or parts, and return the rows that it made."""
    shape = shape_of(work.entry)
    started = time.perf_counter()
    inputs = {item.name: _read(work, item, None if shape.whole else unit) for item in shape.inputs}
    workspace = Workspace(work.out.path, warm, tell)
    tables = _call(work, inputs, workspace)
    seconds = time.perf_counter() - started
    if shape.whole:
        return _commit_whole(work, tables, workspace, seconds)
    return _commit(work, unit, tables, workspace, seconds)


def _read(work: Work, item: Input, shard: int | None) -> pa.Table | Model | None:
    source = work.sources.get(item.name)
    if source is None:
        return None
    if item.schema is None:
        return source.model()
    return source.read(item.schema, shard if _by_prompt(item.schema) else None)


def _by_prompt(schema: pa.Schema) -> bool:
    """Are its rows dealt to shards by prompt? Tables of anything else stand in part 0, and every call reads them."""
    return "prompt_id" in schema.names


def _call(work: Work, inputs: dict[str, Any], workspace: Workspace) -> dict[str, pa.Table]:
    """The stage's tables by name, checked against their schemas; a shard without rows wakes nothing."""
    shape = shape_of(work.entry)
    tables_in = [value for value in inputs.values() if isinstance(value, pa.Table) and _by_prompt(value.schema)]
    if tables_in and not shape.whole and not any(table.num_rows for table in tables_in):
        made: list[Any] = [schema.empty_table() for schema in shape.outputs]
    else:
        extra = {shape.workspace: workspace} if shape.workspace else {}
        result = work.entry.fn(**inputs, **extra, **work.options)
        made = [item for item in _listed(result) if not isinstance(item, Model)]
    tables = {table_name(schema): conform(table, schema) for schema, table in zip(shape.outputs, made, strict=True)}
    return tables | {"rejects": workspace.rejects}


def _listed(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple) else [result]


def _commit(work: Work, shard: int, tables: dict[str, pa.Table], workspace: Workspace, seconds: float) -> int:
    reasons = Counter(tables["rejects"].column("reason").to_pylist())
    record = {"seconds": round(seconds, 3), "counters": dict(workspace.counters), "rejects": dict(reasons)}
    work.out.write_part(shard, tables, record)
    return sum(table.num_rows for name, table in tables.items() if name != "rejects")


def _commit_whole(work: Work, tables: dict[str, pa.Table], workspace: Workspace, seconds: float) -> int:
    """Tables with a prompt_id are dealt to their shards, so that shard i of every table has the same prompts."""
    homes = {name: _homes(name, table, work.shards) for name, table in tables.items()}
    rows = 0
    for shard in range(work.shards):
        part = {name: table.filter(pa.array(homes[name] == shard)) for name, table in tables.items()}
        last = workspace if shard == 0 else Workspace(work.out.path, Warm(), workspace.progress)
        rows += _commit(work, shard, part, last, seconds if shard == 0 else 0.0)
    return rows


def _homes(name: str, table: pa.Table, shards: int) -> np.ndarray:
    """The shard of each row; part 0 for what belongs to no prompt, and for rejects."""
    if name == "rejects" or not _by_prompt(table.schema):
        return np.zeros(table.num_rows, dtype=np.int64)
    prompts = table.column("prompt_id").to_pylist()
    shard_by_prompt = {prompt: shard_of(prompt, shards) for prompt in set(prompts)}
    return np.array([shard_by_prompt[prompt] for prompt in prompts], dtype=np.int64)


def fail_if_nothing_left(name: str, options: dict[str, Any], manifest: dict[str, Any]) -> None:
    """A stage that left out every row of a table has failed, whatever its exit."""
    made = {table: rows for table, rows in manifest["rows"].items() if table != "rejects"}
    if manifest["model"] or (all(made.values()) if manifest["rejects"] else any(made.values())):
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(manifest["rejects"].items()))
    empty = " and ".join(table for table, rows in made.items() if not rows)
    split = f" of split {options['split']}: see `heldout` of the data" if "split" in options else ""
    raise WinnowError(f"{name}: every row of {empty} was left out ({reasons or f'its inputs have no rows{split}'})")
