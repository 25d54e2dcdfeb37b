"""What the catalog shows of a store: a view per table over the files that manifests list, and `runs` and `steps`.

Stages, keys and file names come from checked manifests (pipeline.store.manifests), and every name and text is quoted
here before it becomes part of a statement.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pyarrow as pa

from pipeline.config.rounds import split_round
from pipeline.store.storage import Location
from pipeline.store.store import Json, table_of
from schemas import TABLES
from schemas.columns import column, table

STAGE = column("stage", pa.string(), "name of the stage that made the row")
KEY = column("key", pa.string(), "hash of the stage, its options and its inputs; joins all tables to runs and steps")
RUNS = table(
    "runs",
    "one row per step of a run",
    column("run", pa.string(), "name of the recipe, and what --set changed in it"),
    column("step", pa.string(), "name of the step in the recipe, without its round"),
    column("round", pa.int32(), "number of the round, from 1; null for a step that all rounds share", nullable=True),
    STAGE,
    KEY,
    column(
        "tags",
        pa.map_(pa.string(), pa.string()),
        "what --tag says of the run: values by names, empty for a tag without a value; null if it has none",
        nullable=True,
    ),
    column(
        "method",
        pa.string(),
        "hash as `key`, without any seed: steps that differ in seeds alone have one; null until the step is finished",
        nullable=True,
    ),
    column(
        "seeds",
        pa.string(),
        "JSON: every seed that the step depends on, its own and those of steps behind it, by step and option",
        nullable=True,
    ),
)
STEPS = table(
    "steps",
    "one row per finished step",
    STAGE,
    KEY,
    column("options", pa.string(), "JSON: all options of the stage"),
    column("inputs", pa.string(), "JSON: the key of the step behind each input"),
    column("rows", pa.int64(), "number of rows in all its tables except rejects"),
    column("rejects", pa.int64(), "number of rows it dropped"),
    column("bytes", pa.int64(), "size of all its tables on disk"),
    column("seconds", pa.float64(), "working time, summed over workers; parts made in one call share its time"),
    column("wall_seconds", pa.float64(), "time from its first part to its last, in the run that finished it"),
    column("tokens", pa.int64(), "tokens generated or read by a network"),
    column("ranker_calls", pa.int64(), "reads of a ranker: of a response alone, or of a pair in one order"),
    column("cut_responses", pa.int64(), "responses cut at max_tokens that a reward model scored at their last token"),
    column("gpu_seconds", pa.float64(), "cost: seconds times the GPUs of a worker", nullable=True),
    column("cpu_seconds", pa.float64(), "cost: seconds times the CPUs of a worker", nullable=True),
    column("made", pa.string(), "time at which it was finished, UTC"),
    column("commit", pa.string(), "git commit of this code, with + if there were uncommitted changes"),
    column("model", pa.string(), "digest of the model that it made", nullable=True),
)
RUNNING = table(
    "running",
    "one row per step that runs now",
    STAGE,
    KEY,
    column("done", pa.float64(), "what is done of it, counted in `unit`"),
    column("total", pa.float64(), "what there is to do"),
    column("unit", pa.string(), "what is counted: parts, or steps of a training, draws, ..."),
    column("rate", pa.float64(), "units per second; null while too few are done", nullable=True),
    column("seconds_left", pa.float64(), "time that the rest takes at this rate", nullable=True),
    column("started", pa.string(), "time at which this process began with it, UTC"),
    column("updated", pa.string(), "time at which these numbers were written, UTC"),
    column("process", pa.string(), "machine and process id of the run that computes it"),
)
METRICS_NOW = table(
    "metrics_now",
    "one row per metric or throughput measure per step of a training that is not finished",
    *TABLES["metrics"],
    STAGE,
    KEY,
)
SQL_TYPES = {
    pa.string(): "VARCHAR",
    pa.bool_(): "BOOLEAN",
    pa.int8(): "TINYINT",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.float32(): "FLOAT",
    pa.float64(): "DOUBLE",
}
LIVE = {"running": RUNNING, "metrics_now": METRICS_NOW}  # of steps that are not finished
VIEWS = {name: schema.append(STAGE).append(KEY) for name, schema in TABLES.items()}
VIEWS |= {"runs": RUNS, "steps": STEPS, **LIVE}


def table_files(name: str, manifests: list[Json], root: str) -> list[str]:
    """Return the paths of all files of a table that have rows.

    A file of about the mean size comes first: DuckDB plans joins as if all files had as many rows as the first.
    """
    rows = {
        f"{root}/{manifest['stage']}/{manifest['key']}/{file['file']}": file["rows"]
        for manifest in manifests
        if manifest["rows"].get(name)  # before its files: of most steps there are hundreds, of other tables
        for file in manifest["files"]
        if file["rows"] and table_of(file) == name
    }
    if not rows:
        return []
    mean = sum(rows.values()) / len(rows)
    typical = min(rows, key=lambda path: abs(rows[path] - mean))
    return [typical, *(path for path in rows if path != typical)]


def address(root: Location) -> str:
    """Return the store's location as DuckDB reads it: a path, or a URL in the form of its filesystem."""
    if isinstance(root, Path):
        return str(root)
    return str(root.fs.unstrip_protocol(root.path)).rstrip("/")


def stage_versions(manifests: list[Json]) -> set[tuple[str, int | None]]:
    return {(manifest["stage"], manifest["identity"].get("version")) for manifest in manifests}


def view(name: str, manifests: list[Json], evolved: bool) -> str:
    """Return SQL that scans all files in the variable `name` and adds the columns stage and key.

    One scan, because a union of one scan per step opens all files at once. DuckDB knows a file's name before it opens
    the file, so `WHERE key = '…'` opens no file of another step. If any stage in the store has several versions
    (`evolved`), the columns of a table may differ between the stages that write it: those that a file lacks are null,
    and to find them DuckDB must look at all files first.
    """
    writers = [manifest for manifest in manifests if manifest["rows"].get(name)]
    union_by_name = evolved and len(stage_versions(writers)) > 1
    # <root>/<stage>/<key>/<file>: these functions are called once per file, and split_part would be once per row
    key_folder = "parse_dirpath(filename)"
    columns = {"stage": f"parse_filename(parse_dirpath({key_folder}))", "key": f"parse_filename({key_folder})"}
    for column_name in columns:
        values = {manifest[column_name] for manifest in writers}
        if len(values) == 1:  # a constant, which DuckDB need not carry through joins and groups
            columns[column_name] = sql_literal(values.pop())
    return (
        f"SELECT *, {columns['stage']} AS stage, {columns['key']} AS key "
        f"FROM read_parquet(getvariable({sql_literal(name)}), hive_partitioning=false, "
        f"union_by_name={str(union_by_name).lower()})"
    )


def null_columns(name: str) -> str:
    """Return a SELECT list with the columns of a view, all null: for a view without rows."""
    return ", ".join(f"NULL::{sql_type(field.type)} AS {sql_identifier(field.name)}" for field in VIEWS[name])


def sql_type(kind: pa.DataType) -> str:
    """Return DuckDB's type of an Arrow column, as it reads it of Parquet; asking it imports pandas, for 0.2 s."""
    if pa.types.is_list(kind):
        return f"{sql_type(kind.value_type)}[]"
    if pa.types.is_map(kind):
        return f"MAP({sql_type(kind.key_type)}, {sql_type(kind.item_type)})"
    if pa.types.is_struct(kind):
        return f"STRUCT({', '.join(f'{sql_identifier(field.name)} {sql_type(field.type)}' for field in kind)})"
    return SQL_TYPES[kind]


def sql_identifier(name: str) -> str:
    """Return a name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def sql_literal(value: str) -> str:
    """Return a string as an SQL literal."""
    return "'" + value.replace("'", "''") + "'"


def run_rows(runs: dict[str, Json], tags: Mapping[str, dict[str, str]] = MappingProxyType({})) -> pa.Table:
    """Return the table `runs`."""
    rows = []
    for run, steps in runs.items():
        for name, link in steps.items():
            step, round = split_round(name)
            of_run = [*sorted(tags[run].items())] if run in tags else None
            rows.append({"run": run, "step": step, "round": round, **link, "tags": of_run})
    return pa.Table.from_pylist(rows, RUNS)


def step_rows(manifests: list[Json]) -> pa.Table:
    """Return the table `steps`."""
    rows = []
    for manifest in manifests:
        identity, counters = manifest["identity"], manifest["counters"]
        rows.append(
            {
                "stage": manifest["stage"],
                "key": manifest["key"],
                "options": json.dumps(identity["options"], sort_keys=True),
                "inputs": json.dumps(identity["inputs"], sort_keys=True),
                "rows": sum(count for table, count in manifest["rows"].items() if table != "rejects"),
                "rejects": manifest["rows"].get("rejects", 0),
                "bytes": sum(manifest["bytes"].values()),
                "seconds": float(manifest["seconds"]),
                "wall_seconds": float(manifest["wall_seconds"]),
                "tokens": counters.get("tokens", 0),
                "ranker_calls": counters.get("ranker_calls", 0),
                "cut_responses": counters.get("cut_responses", 0),
                "gpu_seconds": manifest.get("gpu_seconds"),
                "cpu_seconds": manifest.get("cpu_seconds"),
                "made": manifest["made"],
                "commit": str(manifest["commit"]),
                "model": manifest.get("model"),
            }
        )
    return pa.Table.from_pylist(rows, STEPS)
