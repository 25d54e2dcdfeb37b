"""SQL over everything a store holds: an in-memory DuckDB with one view a table, built from the manifests.

The files are the truth, the catalog is disposable. It is read-only and confined to the store: only a
single SELECT is taken, DuckDB may open nothing outside the store, and its configuration is locked.
"""

import json
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from pipeline.registry import nearest
from pipeline.rounds import split
from pipeline.store import Store
from schemas import TABLES, WinnowError

RUNS = pa.schema(
    [
        ("run", pa.string()),
        ("step", pa.string()),
        ("round", pa.int32()),
        ("stage", pa.string()),
        ("key", pa.string()),
    ]
)
LOOK = "`SHOW TABLES` and `DESCRIBE candidates` say what is there, schemas/tables.py what it means"
SQL_TYPES = {
    "string": "VARCHAR",
    "int8": "TINYINT",
    "int32": "INTEGER",
    "int64": "BIGINT",
    "float": "FLOAT",
    "double": "DOUBLE",
}
STEPS = pa.schema(
    [
        ("stage", pa.string()),
        ("key", pa.string()),
        ("options", pa.string()),
        ("inputs", pa.string()),
        ("rows", pa.int64()),
        ("rejects", pa.int64()),
        ("bytes", pa.int64()),
        ("seconds", pa.float64()),
        ("tokens", pa.int64()),
        ("ranker_calls", pa.int64()),
        ("made", pa.string()),
        ("commit", pa.string()),
    ]
)


def open_catalog(
    store: Store, run: str | list[str] | None = None, round: int | None = None
) -> duckdb.DuckDBPyConnection:
    """Views over all sealed steps, those of one run or several, or of one round and those that all rounds share.

    Each view has `stage` and `key` beside its table's columns; `runs` says which step of which round has that key.
    """
    links = _links(store, run, round)
    manifests = store.sealed()
    if run is not None:
        keys = {link["key"] for link in links}
        manifests = [manifest for manifest in manifests if manifest["key"] in keys]
    connection = duckdb.connect(":memory:")
    for name, schema in TABLES.items():
        connection.execute(_view(name, schema, manifests))
    _materialise(connection, "runs", links, RUNS)
    _materialise(connection, "steps", [_step_row(manifest) for manifest in manifests], STEPS)
    _confine(connection, store.root)
    return connection


def _links(store: Store, run: str | list[str] | None, round: int | None) -> list[dict[str, Any]]:
    """The rows of `runs`."""
    runs = store.runs()
    wanted = list(runs) if run is None else [run] if isinstance(run, str) else run
    for name in wanted:
        if name not in runs:
            raise WinnowError(f"no run {name!r} in {store.root}; {nearest(name, list(runs))}")
    rows = [
        {"run": name, **dict(zip(("step", "round"), split(step), strict=True)), **link}
        for name in wanted
        for step, link in runs[name].items()
    ]
    rounds = sorted({row["round"] for row in rows} - {None})
    if round is not None and round not in rounds:
        raise WinnowError(f"run {run}: no round {round}; it has {', '.join(map(str, rounds)) or 'no rounds'}")
    return [row for row in rows if round is None or row["round"] in (None, round)]


def query(connection: duckdb.DuckDBPyConnection, sql: str) -> pa.Table:
    """The answer to one SELECT; anything else is refused."""
    try:
        statements = connection.extract_statements(sql)
        if [statement.type for statement in statements] != [duckdb.StatementType.SELECT]:
            raise WinnowError("sql: exactly one SELECT is taken; the store is read-only")
        answer: pa.Table = connection.sql(statements[0].query).to_arrow_table()
    except duckdb.Error as error:
        raise WinnowError(f"sql: {error}\n{LOOK}") from None
    return answer.rename_columns(_distinct(answer.column_names))


def _distinct(names: list[str]) -> list[str]:
    """Names of which none stands twice: a join answers with the joined column of both sides."""
    made: list[str] = []
    for name in names:
        fresh = (name, *(f"{name}_{n}" for n in range(2, len(names) + 2)))
        made.append(next(each for each in fresh if each not in made and (each == name or each not in names)))
    return made


def _view(name: str, schema: pa.Schema, manifests: list[dict[str, Any]]) -> str:
    """A union of the table's files, one arm a step, or an empty table with the right columns."""
    arms = [arm for manifest in manifests if (arm := _arm(name, manifest))]
    if not arms:
        columns = ", ".join(f"NULL::{_sql_type(field.type)} AS {_name(field.name)}" for field in schema)
        arms = [f"SELECT {columns}, NULL::VARCHAR AS stage, NULL::VARCHAR AS key WHERE false"]
    return f"CREATE VIEW {_name(name)} AS {' UNION ALL '.join(arms)}"


def _arm(name: str, manifest: dict[str, Any]) -> str | None:
    files = [
        f"{manifest['folder']}/{file['file']}"
        for file in manifest["files"]
        if file["file"].rsplit("-", 1)[0] == name and file["rows"]
    ]
    if not files:
        return None
    listed = ", ".join(_text(file) for file in files)
    return (
        f"SELECT *, {_text(manifest['stage'])} AS stage, {_text(manifest['key'])} AS key "
        f"FROM read_parquet([{listed}], hive_partitioning=false)"
    )


def _sql_type(kind: pa.DataType) -> str:
    """DuckDB's name of an Arrow type of ours."""
    if pa.types.is_list(kind):
        return f"{_sql_type(kind.value_type)}[]"
    if pa.types.is_struct(kind):
        return f"STRUCT({', '.join(f'{_name(field.name)} {_sql_type(field.type)}' for field in kind)})"
    if pa.types.is_map(kind):
        return f"MAP({_sql_type(kind.key_type)}, {_sql_type(kind.item_type)})"
    return SQL_TYPES[str(kind)]


def _name(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _materialise(
    connection: duckdb.DuckDBPyConnection, name: str, rows: list[dict[str, Any]], schema: pa.Schema
) -> None:
    connection.register("incoming", pa.Table.from_pylist(rows, schema=schema))
    connection.execute(f"CREATE TABLE {_name(name)} AS SELECT * FROM incoming")
    connection.unregister("incoming")


def _step_row(manifest: dict[str, Any]) -> dict[str, Any]:
    rows, identity = manifest["rows"], manifest["identity"]
    return {
        "stage": manifest["stage"],
        "key": manifest["key"],
        "options": json.dumps(identity["options"], sort_keys=True),
        "inputs": json.dumps(identity["inputs"], sort_keys=True),
        "rows": sum(count for name, count in rows.items() if name != "rejects"),
        "rejects": rows.get("rejects", 0),
        "bytes": sum(manifest["bytes"].values()),
        "seconds": manifest["seconds"],
        "tokens": manifest["counters"].get("tokens", 0),
        "ranker_calls": manifest["counters"].get("ranker_calls", 0),
        "made": manifest["made"],
        "commit": manifest["commit"],
    }


def _confine(connection: duckdb.DuckDBPyConnection, root: Path) -> None:
    connection.execute(f"SET allowed_directories=[{_text(str(root) + '/')}]")
    for setting in (
        "enable_external_access=false",
        "python_enable_replacements=false",
        "autoinstall_known_extensions=false",
        "autoload_known_extensions=false",
        "lock_configuration=true",
    ):
        connection.execute(f"SET {setting}")
