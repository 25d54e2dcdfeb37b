"""SQL over everything a store holds: an in-memory DuckDB with a view of each table, built from the manifests.

The files are the truth, the catalog is disposable. It is read-only and confined to the store: only a single SELECT
is taken, DuckDB may open nothing outside the store, and its configuration is locked.
"""

import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from pipeline.config.rounds import split
from pipeline.registry import nearest
from pipeline.sql.views import (
    VIEWS,
    address,
    columns,
    files_of,
    has_evolved,
    quoted,
    run_rows,
    step_rows,
    text,
)
from pipeline.sql.views import view as view_of
from pipeline.store.manifests import checked_manifest, checked_run
from pipeline.store.storage import Location
from pipeline.store.store import CURE, Store
from schemas import TABLES, WinnowError

Json = dict[str, Any]
LOOK = "`SHOW TABLES` and `DESCRIBE candidates` say what is there, schemas/tables.py what it means"
BATCH = 65536


@dataclass(frozen=True)
class Answer:
    """Of one SELECT, computed when asked for, each time anew. No other question is taken while batches are read."""

    relation: duckdb.DuckDBPyRelation

    @property
    def columns(self) -> list[str]:
        """Names of which none stands twice: a join answers with the joined column of both sides."""
        return _distinct(self.relation.columns)

    def arrow(self) -> pa.Table:
        with _told():
            return self.relation.to_arrow_table().rename_columns(self.columns)

    def pandas(self) -> Any:
        """A pandas.DataFrame."""
        with _told(), _needs("pandas"):
            import_module("pandas")
            return self.relation.df().set_axis(self.columns, axis=1)

    def polars(self) -> Any:
        """A polars.DataFrame."""
        with _needs("polars"):
            return import_module("polars").from_arrow(self.arrow())

    def batches(self) -> Iterator[pa.RecordBatch]:
        """In turn, so that an answer need not fit into memory; at least one, for the columns' types."""
        with _told():
            reader = self.relation.to_arrow_reader(BATCH)
            yield pa.RecordBatch.from_pylist([], reader.schema).rename_columns(self.columns)
            for batch in reader:
                yield batch.rename_columns(self.columns)

    def head(self, rows: int) -> pa.Table:
        with _told():
            return self.relation.limit(rows).to_arrow_table().rename_columns(self.columns)

    def count(self) -> int:
        """How many rows; DuckDB need not make them."""
        with _told():
            total: int = self.relation.count("*").to_arrow_table()[0][0].as_py()
        return total


@dataclass(frozen=True)
class Catalog:
    """Views over sealed steps: those that a statement names are opened when it is asked, and not before.

    Each view has `stage` and `key` beside its table's columns; `runs` says which step of which round has that key.
    `evolved` is of the whole store, also where `manifests` are those of a run: it may have been made from old parts.
    """

    root: Location
    runs: dict[str, dict[str, Json]]
    manifests: list[Json]
    evolved: bool

    def of(self, run: str | list[str] | None = None, round: int | None = None) -> "Catalog":
        """Of one run or several alone, or of one round and the steps that all rounds share.

        Raises WinnowError with the names there are.
        """
        if run is None and round is None:
            return self
        chosen = self._chosen(list(self.runs) if run is None else [run] if isinstance(run, str) else run)
        rounds = sorted({number for steps in chosen.values() for step in steps if (number := split(step)[1])})
        if round is not None and round not in rounds:
            raise WinnowError(f"run {run}: no round {round}; it has {', '.join(map(str, rounds)) or 'no rounds'}")
        if round is not None:
            chosen = {name: _in_round(steps, round) for name, steps in chosen.items()}
        keys = {link["key"] for steps in chosen.values() for link in steps.values()}
        manifests = [manifest for manifest in self.manifests if manifest["key"] in keys]
        return replace(self, runs=chosen, manifests=manifests)

    def _chosen(self, names: list[str]) -> dict[str, dict[str, Json]]:
        for name in names:
            if name not in self.runs:
                raise WinnowError(f"no run {name!r} in {self.root}; {nearest(name, list(self.runs))}")
        return {name: self.runs[name] for name in names}

    def sql(self, statement: str) -> Answer:
        """The answer to one SELECT; anything else is refused. Raises WinnowError."""
        with _told():
            statements = self._connection.extract_statements(statement)
            if [each.type for each in statements] != [duckdb.StatementType.SELECT]:
                raise WinnowError("sql: exactly one SELECT is taken; the store is read-only")
            for name in self._closed & set(re.findall(r"\w+", statement.lower())):
                _open_view(self._connection, "main", name, self)
                self._closed.remove(name)
            return Answer(self._connection.sql(statements[0].query))

    def interrupt(self) -> None:
        """Ends what another thread asks of this catalog at the moment."""
        self._connection.interrupt()

    @cached_property
    def _closed(self) -> set[str]:
        """Tables whose views are not opened yet."""
        return set(TABLES)

    @cached_property
    def _connection(self) -> duckdb.DuckDBPyConnection:
        """With a view of each table that has its columns, and whose rows cannot be asked for before it is opened."""
        connection = _confined(self.root, ":memory:")
        for name in TABLES:
            words = text(f"write the name {name} out in the statement, so that its files are opened")
            connection.execute(f"CREATE VIEW {quoted(name)} AS SELECT {columns(name)} WHERE error({words})::BOOLEAN")
        self._put_runs_and_steps(connection)
        return connection

    def _put_runs_and_steps(self, connection: duckdb.DuckDBPyConnection) -> None:
        for name, rows in (("runs", run_rows(self.runs)), ("steps", step_rows(self.manifests))):
            connection.register("incoming", rows)
            connection.execute(f"CREATE TABLE {name} AS FROM incoming")
            connection.unregister("incoming")

    def export(self, file: Path) -> None:
        """A DuckDB file with all rows, `runs` and `steps`, and each column's meaning: it needs no store.

        Raises WinnowError where a file stands already, or its folder does not.
        """
        if file.exists():
            raise WinnowError(f"--db {file}: is there already; delete it, or give another name")
        if not file.parent.is_dir():
            raise WinnowError(f"--db {file}: there is no folder {file.parent}; make it first")
        scratch = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            with _told(), _confined(self.root, str(scratch)) as connection:
                self._fill(connection)
            os.link(scratch, file)
        finally:
            scratch.unlink(missing_ok=True)
            scratch.with_name(f"{scratch.name}.wal").unlink(missing_ok=True)

    def _fill(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._put_runs_and_steps(connection)
        connection.execute("CREATE SCHEMA files")
        for name in TABLES:
            _open_view(connection, "files", name, self)
            connection.execute(f"CREATE TABLE {quoted(name)} AS FROM files.{quoted(name)}")
        connection.execute("DROP SCHEMA files CASCADE")
        for name, schema in VIEWS.items():
            _comment(connection, quoted(name), schema)


def open_catalog(store: Store, run: str | list[str] | None = None, round: int | None = None) -> Catalog:
    """Of all sealed steps, those of one run or several, or of one round and those that all rounds share."""
    runs = {name: checked_run(name, steps) for name, steps in store.runs().items()}
    manifests = [checked_manifest(manifest) for manifest in store.sealed()]
    return Catalog(store.root, runs, manifests, has_evolved(manifests)).of(run, round)


def query(catalog: Catalog, sql: str) -> pa.Table:
    """The answer to one SELECT; anything else is refused."""
    return catalog.sql(sql).arrow()


def _in_round(steps: dict[str, Json], round: int) -> dict[str, Json]:
    return {step: link for step, link in steps.items() if split(step)[1] in (None, round)}


def _open_view(connection: duckdb.DuckDBPyConnection, schema: str, name: str, catalog: Catalog) -> None:
    """The table's files as a view, or no row with the right columns."""
    files = files_of(name, catalog.manifests, address(catalog.root))
    body = view_of(name, catalog.manifests, catalog.evolved) if files else f"SELECT {columns(name)} WHERE false"
    if files:
        connection.register("incoming", pa.table({"file": files}))
        connection.execute(f"SET VARIABLE {quoted(name)} = (SELECT list(file) FROM incoming)")
        connection.unregister("incoming")
    connection.execute(f"CREATE OR REPLACE VIEW {schema}.{quoted(name)} AS {body}")


def _comment(connection: duckdb.DuckDBPyConnection, table: str, schema: pa.Schema) -> None:
    """What a row and each column mean."""
    connection.execute(f"COMMENT ON TABLE {table} IS {text(schema.metadata[b'about'].decode())}")
    for field in schema:
        meaning = text(field.metadata[b"meaning"].decode())
        connection.execute(f"COMMENT ON COLUMN {table}.{quoted(field.name)} IS {meaning}")


def _confined(root: Location, database: str) -> duckdb.DuckDBPyConnection:
    """A connection that reads nothing but the store, and spills what memory cannot hold to a folder of its own."""
    connection = duckdb.connect(database)
    if not isinstance(root, Path):
        connection.register_filesystem(root.fs)
    spill = Path(tempfile.gettempdir()) / f"winnow-{secrets.token_hex(8)}"
    for setting in (
        f"allowed_directories=[{text(address(root) + '/')}]",
        f"temp_directory={text(str(spill))}",
        "enable_external_access=false",
        "python_enable_replacements=false",
        "autoinstall_known_extensions=false",
        "autoload_known_extensions=false",
        "lock_configuration=true",
    ):
        connection.execute(f"SET {setting}")
    return connection


@contextmanager
def _told() -> Iterator[None]:
    """What DuckDB raises, for people; Ctrl-C, which it tells as an error of its own, is Ctrl-C again."""
    try:
        yield
    except duckdb.PermissionException as error:
        raise WinnowError(
            f"sql: {error}\nOnly what lies in the store is read, and no link that leads out of it"
        ) from None
    except duckdb.IOException as error:
        raise WinnowError(f"sql: {error}\nA file that a manifest lists is gone or damaged; {CURE}") from None
    except duckdb.Error as error:
        raise WinnowError(f"sql: {error}\n{LOOK}") from None
    except RuntimeError as error:
        if "interrupted" not in str(error):
            raise
        raise KeyboardInterrupt from None


def _distinct(names: list[str]) -> list[str]:
    made: list[str] = []
    for name in names:
        fresh = (name, *(f"{name}_{n}" for n in range(2, len(names) + 2)))
        made.append(next(each for each in fresh if each not in made and (each == name or each not in names)))
    return made


@contextmanager
def _needs(library: str) -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise WinnowError(f"sql: {library} is not installed here; pip install {library}, or take .arrow()") from None
