"""What the catalog shows of a store: a view of each table over the files that manifests list, and `runs` and `steps`.

All names that come from a store's files are checked here before any of them stands in SQL: a part's name is plain and
lies in the folder of its manifest, whatever the manifest says.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.config.rounds import split
from pipeline.store.manifests import manifest_summary, stage_versions
from pipeline.store.storage import Location
from pipeline.store.store import table_of
from schemas import TABLES
from schemas.tables import column, described

Json = dict[str, Any]
STAGE = column("stage", pa.string(), "the function that made it")
KEY = column("key", pa.string(), "hash of the stage, its options and its inputs; joins every table")
RUNS = described(
    "runs",
    "one row a step of a run",
    column("run", pa.string(), "recipe, and what --set changed of it"),
    column("step", pa.string(), "as the recipe names it, and @ its round"),
    column("round", pa.int32(), "from 1; null of a step that all rounds share", null=True),
    STAGE,
    KEY,
)
STEPS = described(
    "steps",
    "one row a sealed step",
    STAGE,
    KEY,
    column("options", pa.string(), "JSON: all options of the stage"),
    column("inputs", pa.string(), "JSON: the key behind each input"),
    column("rows", pa.int64(), "of all tables but rejects"),
    column("rejects", pa.int64(), "rows left out"),
    column("bytes", pa.int64(), "of all tables, on disk"),
    column("seconds", pa.float64(), "of all its workers together; parts that share one share its time"),
    column("wall_seconds", pa.float64(), "from its first part to its last, in the run that sealed it"),
    column("tokens", pa.int64(), "drawn or read by a network"),
    column("ranker_calls", pa.int64(), "pairs or responses that a ranker read"),
    column("gpu_seconds", pa.float64(), "what it cost: seconds times a worker's GPUs", null=True),
    column("cpu_seconds", pa.float64(), "what it cost: seconds times a worker's CPUs", null=True),
    column("made", pa.string(), "when it was sealed, UTC"),
    column("commit", pa.string(), "of this code; with + where it had changes"),
    column("model", pa.string(), "digest of the model that it made", null=True),
)
VIEWS = {name: schema.append(STAGE).append(KEY) for name, schema in TABLES.items()} | {"runs": RUNS, "steps": STEPS}
SQL_TYPES = {
    "string": "VARCHAR",
    "int8": "TINYINT",
    "int32": "INTEGER",
    "int64": "BIGINT",
    "float": "FLOAT",
    "double": "DOUBLE",
}


def files_of(name: str, manifests: list[Json], root: str) -> list[str]:
    """Where the table's parts lie; those without rows have nothing to say.

    One of about the mean size stands first: DuckDB plans its joins as if all files had the rows of the first.
    """
    rows = {
        f"{root}/{manifest['stage']}/{manifest['key']}/{file['file']}": file["rows"]
        for manifest in manifests
        for file in _parts(name, manifest)
    }
    if not rows:
        return []
    mean = sum(rows.values()) / len(rows)
    usual = min(rows, key=lambda file: abs(rows[file] - mean))
    return [usual, *(file for file in rows if file != usual)]


def _parts(name: str, manifest: Json) -> list[Json]:
    """Of the table, those with rows."""
    return [file for file in manifest["files"] if table_of(file) == name and file["rows"]]


def address(root: Location) -> str:
    """The store's place as DuckDB is to read it: a folder, or a URL as its filesystem writes it."""
    if isinstance(root, Path):
        return str(root)
    return str(root.fs.unstrip_protocol(root.path)).rstrip("/")


def view(name: str, manifests: list[Json], evolved: bool) -> str:
    """SQL of one scan of all files in the variable `name`; stage and key are folders of a file's name, or constants.

    One scan, for a union of a scan a step opens all files at once; and as a file's own name is known before it is
    opened, `WHERE key = '…'` opens no other step's. In a store that has `evolved`, a table's columns may differ from
    one of its makers to another: those that a file lacks are null, for which all files must be looked at first.
    """
    made = [manifest for manifest in manifests if _parts(name, manifest)]
    stages, keys = ({manifest[each] for manifest in made} for each in ("stage", "key"))
    by_name = evolved and len(stage_versions(made)) > 1
    folder = "parse_dirpath(filename)"  # these functions are called once a file, and split_part once a row
    stage, key = _only(stages, f"parse_filename(parse_dirpath({folder}))"), _only(keys, f"parse_filename({folder})")
    return (
        f"SELECT *, {stage} AS stage, {key} AS key FROM "
        f"read_parquet(getvariable({text(name)}), hive_partitioning=false, union_by_name={str(by_name).lower()})"
    )


def has_evolved(manifests: list[Json]) -> bool:
    """Has any stage of a store, these being all that is sealed there, several versions?"""
    return len(stage_versions(manifests)) > len({manifest["stage"] for manifest in manifests})


def _only(names: set[str], otherwise: str) -> str:
    """The one name as a constant, which DuckDB need not carry through joins and groups; or the SQL that finds it."""
    return text(min(names)) if len(names) == 1 else otherwise


def columns(name: str) -> str:
    """The columns of a view that has no rows."""
    return ", ".join(f"NULL::{sql_type(field.type)} AS {quoted(field.name)}" for field in VIEWS[name])


def sql_type(kind: pa.DataType) -> str:
    """DuckDB's name of an Arrow type of ours."""
    if pa.types.is_list(kind):
        return f"{sql_type(kind.value_type)}[]"
    if pa.types.is_struct(kind):
        return f"STRUCT({', '.join(f'{quoted(field.name)} {sql_type(field.type)}' for field in kind)})"
    if pa.types.is_map(kind):
        return f"MAP({sql_type(kind.key_type)}, {sql_type(kind.item_type)})"
    return SQL_TYPES[str(kind)]


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def run_rows(runs: dict[str, Json]) -> pa.Table:
    """`runs`: a row a step of each run."""
    rows = [
        {"run": name, **dict(zip(("step", "round"), split(step), strict=True)), **link}
        for name, steps in runs.items()
        for step, link in steps.items()
    ]
    return pa.Table.from_pylist(rows, RUNS)


def step_rows(manifests: list[Json]) -> pa.Table:
    """`steps`: a row a sealed step."""
    return pa.Table.from_pylist([manifest_summary(manifest) for manifest in manifests], STEPS)
