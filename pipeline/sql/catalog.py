"""SQL over a whole store: an in-memory DuckDB with a view per table, built from the manifests whenever it is opened.

The catalog holds no data of its own. It is read-only and confined to the store: it runs single SELECT statements and
EXPLAIN of them only, DuckDB may open no file but those of the tables, and its configuration is locked.
"""

import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import pyarrow as pa

from pipeline.config.rounds import run_and_round, split_round
from pipeline.registry import nearest
from pipeline.sql.live import metrics_now_rows, running_rows
from pipeline.sql.replicates import with_methods
from pipeline.sql.views import (
    LIVE,
    VIEWS,
    address,
    null_columns,
    run_rows,
    sql_identifier,
    sql_literal,
    stage_versions,
    step_rows,
    table_files,
    view,
)
from pipeline.store.storage import Location, rename_new
from pipeline.store.store import REPAIR_HINT, Json, Store
from schemas import COMMAND, TABLES, WinnowError

if TYPE_CHECKING:
    import pandas

HINT = (
    f"`SHOW TABLES` and `DESCRIBE candidates` list tables and columns; `.tables NAME` in `{COMMAND} sql` explains them"
)
BATCH_ROWS = 65536
MAX_STATEMENT = 100_000  # characters; DuckDB's parser takes minutes for some long ones, and is not interrupted
MEMORY = "50%"  # of the machine's, for what DuckDB keeps; the rest of a larger query is spilled to disk
FEW_FILES = 5000  # that a connection may open whatever a statement names
EXPLAIN = re.compile(r"\s*EXPLAIN\b(?!\s*(ANALYZE\b|\())", re.IGNORECASE)


@dataclass(frozen=True)
class QueryResult:
    """Result of one SELECT, computed anew by each method. Run no other statement while `batches` is being read."""

    relation: duckdb.DuckDBPyRelation

    @property
    def columns(self) -> list[str]:
        return self.relation.columns

    def arrow(self) -> pa.Table:
        with as_winnow_error():
            return self.relation.to_arrow_table(
                BATCH_ROWS
            )  # of DuckDB's 1,000,000 rows, 2 KB of text each are too much

    def pandas(self) -> "pandas.DataFrame":
        with as_winnow_error():
            return self.relation.df()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the rows in batches, so that the result need not fit into memory; the first one is empty.

        The empty batch has the types of the columns, which a result without rows has too.
        """
        with as_winnow_error():
            reader = self.relation.to_arrow_reader(BATCH_ROWS)
            yield pa.RecordBatch.from_pylist([], reader.schema)
            yield from reader

    def head(self, rows: int) -> pa.Table:
        with as_winnow_error():
            return self.relation.limit(rows).to_arrow_table()

    def count(self) -> int:
        """Return the number of rows, which DuckDB may know without computing them."""
        with as_winnow_error():
            return self.relation.count("*").to_arrow_table()[0][0].as_py()


@dataclass(frozen=True)
class OpenConnection:
    """Connection with the tables whose files it may read, and those whose views are not placeholders any more."""

    connection: duckdb.DuckDBPyConnection
    tables: Set[str]
    opened: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Catalog:
    """Views over finished steps; the files of a table are opened when a statement names it, and not before.

    Each view has `stage` and `key` beside its table's columns; the table `runs` says which steps of which runs have
    that key. `evolved` says whether any stage in the store has several versions: also for the catalog of one run,
    because a finished step may have parts that an older version wrote.
    """

    root: Location
    runs: dict[str, Json]
    manifests: list[Json]
    evolved: bool
    is_part: bool = False  # of one run or several
    tags: dict[str, dict[str, str]] = field(default_factory=dict)  # by run

    def for_run(self, run: str | list[str] | None = None, round: int | None = None) -> "Catalog":
        """Return the catalog of one run or several, or of one round (also `raft@2`) with what all rounds share.

        Raises WinnowError for an unknown run or round, with the known ones.
        """
        if run is None and round is None:
            return self
        if isinstance(run, str):
            run, round = run_and_round(run, self.runs, round)
        names = list(self.runs) if run is None else [run] if isinstance(run, str) else run
        for name in names:
            if name not in self.runs:
                raise WinnowError(f"no run {name!r} in {self.root}; {nearest(split_round(name)[0], list(self.runs))}")
        runs = {name: self.runs[name] for name in names}
        if round is not None:
            rounds = sorted({number for steps in runs.values() for step in steps if (number := split_round(step)[1])})
            if round not in rounds:
                raise WinnowError(f"run {run}: no round {round}; it has {', '.join(map(str, rounds)) or 'no rounds'}")
            runs = {
                name: {step: link for step, link in steps.items() if split_round(step)[1] in (None, round)}
                for name, steps in runs.items()
            }
        keys = {link["key"] for steps in runs.values() for link in steps.values()}
        manifests = [manifest for manifest in self.manifests if manifest["key"] in keys]
        return replace(self, runs=runs, manifests=manifests, is_part=True)

    def sql(self, statement: str) -> QueryResult:
        """Return the result of one SELECT, or the plan of EXPLAIN SELECT; raise WinnowError for any other statement."""
        try:
            statement.encode()
        except UnicodeEncodeError:
            raise WinnowError("sql: the statement has half a surrogate pair, and is no text in Unicode") from None
        if len(statement) > MAX_STATEMENT:
            raise WinnowError(f"sql: the statement has more than {MAX_STATEMENT:,} characters")
        words = set(re.findall(r"\w+", statement.lower()))
        with as_winnow_error():
            connection = self._connection(TABLES.keys() & words)
            statements = connection.extract_statements(statement)
            explained = EXPLAIN.match(statement)
            inner = statement[explained.end() :] if explained else statement
            if len(statements) != 1 or not _is_select(connection, inner):
                raise WinnowError("sql: must be exactly one SELECT statement; the store is read-only")
            for name in LIVE.keys() & words:
                _create_table(connection, name, self.live(name))  # anew: they change while a step runs
            # The projection makes names distinct: a join has the joined column of both sides.
            return QueryResult(connection.sql(statements[0].query).project("*"))

    def live(self, name: str) -> pa.Table:
        """Return the rows of `running` or `metrics_now` at this moment."""
        links = [link for steps in self.runs.values() for link in steps.values()]
        keys = {link["key"] for link in links} if self.is_part else None
        return (running_rows if name == "running" else metrics_now_rows)(self.root, keys)

    def interrupt(self) -> None:
        """Stop the statement that another thread is running on this catalog."""
        if self._last:
            self._last[0].connection.interrupt()

    @cached_property
    def _last(self) -> list["OpenConnection"]:
        """Return the connection of the last statement, if there is one."""
        return []

    def _connection(self, names: Set[str]) -> duckdb.DuckDBPyConnection:
        """Return a connection that reads these tables, and those of the statements before: a new one for new names.

        DuckDB takes the files that it may open only before its configuration is locked, and a second for 50,000 of
        them: all at once if they are few.
        Every other table has a placeholder, which has its columns and raises an error if its rows are read. A statement
        that hides a table's name (`query_table('rew' || 'ards')`) thus fails instead of returning no rows.
        """
        if not (self._last and names <= self._last[0].tables):
            tables = names | (self._last[0].opened if self._last else set())
            if sum(len(manifest["files"]) for manifest in self.manifests) <= FEW_FILES:
                tables = TABLES.keys()
            connection = _confined_connection(self.root, ":memory:", self._allowed_files(tables))
            for name in TABLES:
                message = sql_literal(f"write the name {name} in full in the statement: its files are opened by it")
                placeholder = f"SELECT {null_columns(name)} WHERE error({message})::BOOLEAN"
                connection.execute(f"CREATE VIEW {sql_identifier(name)} AS {placeholder}")
            self._create_rows(connection)
            self._last[:] = [OpenConnection(connection, tables)]
        (last,) = self._last
        for name in names - last.opened:
            self._open_view(last.connection, "main", name)
            last.opened.add(name)
        return last.connection

    def _allowed_files(self, names: Iterable[str]) -> list[str]:
        """Return the files of tables that have rows: models, and what else lies in a store, are not read.

        Nor is what a link of a file, or of a step's folder, leads to outside of the store. A stage's folder may be one.
        """
        files = [file for name in names for file in self._files(name)]
        if not isinstance(self.root, Path):
            return files
        root, links = self.root.resolve(), dict[str, bool]()
        for folder in {os.path.dirname(file) for file in files}:
            links[folder] = os.path.islink(folder)
        return [
            file
            for file in files
            if not (links[os.path.dirname(file)] or os.path.islink(file)) or Path(file).resolve().is_relative_to(root)
        ]

    def _files(self, name: str) -> list[str]:
        """Return the files of a table, which are looked up once: there may be 100,000."""
        if name not in self._files_by_table:
            self._files_by_table[name] = table_files(name, self.manifests, address(self.root))
        return self._files_by_table[name]

    @cached_property
    def _files_by_table(self) -> dict[str, list[str]]:
        return {}

    @cached_property
    def _runs_and_steps(self) -> dict[str, pa.Table]:
        return {"runs": run_rows(self.runs, self.tags), "steps": step_rows(self.manifests)}

    def _create_rows(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Create the tables that are no files: `runs`, `steps`, and empty those of running steps."""
        for name, rows in self._runs_and_steps.items():
            _create_table(connection, name, rows)
        for name, schema in LIVE.items():
            _create_table(connection, name, schema.empty_table())

    def _open_view(self, connection: duckdb.DuckDBPyConnection, schema: str, name: str) -> None:
        """Create the view of a table over its files or, if it has no rows yet, an empty view with the same columns."""
        body = f"SELECT {null_columns(name)} WHERE false"
        if files := self._files(name):
            body = view(name, self.manifests, self.evolved)
            connection.register("incoming", pa.table({"file": files}))
            connection.execute(f"SET VARIABLE {sql_identifier(name)} = (SELECT list(file) FROM incoming)")
            connection.unregister("incoming")
        connection.execute(f"CREATE OR REPLACE VIEW {schema}.{sql_identifier(name)} AS {body}")

    def export(self, file: Path) -> None:
        """Write a DuckDB file with all rows, `runs` and `steps`, and each column's meaning; it needs no store.

        Raises WinnowError if the file exists already, or if its folder does not.
        """
        if file.exists():
            raise WinnowError(f"--db {file}: exists already; give another name, or move it away")
        if not file.parent.is_dir():
            raise WinnowError(f"--db {file}: there is no folder {file.parent}; create it first")
        scratch = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            with (
                as_winnow_error(),
                _confined_connection(self.root, str(scratch), self._allowed_files(TABLES)) as connection,
            ):
                self._create_rows(connection)
                for name in LIVE:
                    _create_table(connection, name, self.live(name))
                connection.execute("CREATE SCHEMA files")
                for name in TABLES:
                    self._open_view(connection, "files", name)
                    connection.execute(f"CREATE TABLE {sql_identifier(name)} AS FROM files.{sql_identifier(name)}")
                connection.execute("DROP SCHEMA files CASCADE")
                for name, schema in VIEWS.items():
                    table = sql_identifier(name)
                    connection.execute(f"COMMENT ON TABLE {table} IS {sql_literal(schema.metadata[b'about'].decode())}")
                    for field in schema:
                        meaning = sql_literal(field.metadata[b"meaning"].decode())
                        connection.execute(f"COMMENT ON COLUMN {table}.{sql_identifier(field.name)} IS {meaning}")
            rename_new(scratch, file)  # fails if another process has created the file meanwhile
        finally:
            scratch.unlink(missing_ok=True)
            scratch.with_name(f"{scratch.name}.wal").unlink(missing_ok=True)


def open_catalog(store: Store, run: str | list[str] | None = None, round: int | None = None) -> Catalog:
    """Return the catalog of all finished steps, of one run or several, or of one round with what all rounds share."""
    manifests = store.sealed()
    evolved = len(stage_versions(manifests)) > len({manifest["stage"] for manifest in manifests})
    runs = with_methods(store.runs(), manifests)
    return Catalog(store.root, runs, manifests, evolved, tags=store.tags()).for_run(run, round)


def query(catalog: Catalog, sql: str) -> pa.Table:
    """Return the rows of one SELECT; raise WinnowError for any other statement."""
    return catalog.sql(sql).arrow()


def _is_select(connection: duckdb.DuckDBPyConnection, statement: str) -> bool:
    """Return whether a text is one SELECT. A PIVOT without its values is several, of which one makes a type."""
    statements = connection.extract_statements(statement)
    if len(statements) != 1:
        return False
    if statements[0].type != duckdb.StatementType.MULTI:
        return bool(statements[0].type == duckdb.StatementType.SELECT)
    kinds = duckdb.tokenize(statement)
    first = next((position for position, kind in kinds if kind is not duckdb.token_type.comment), 0)
    word = re.match(r"\w+", statement.encode()[first:].decode(errors="ignore"))
    return word is not None and word[0].upper() in ("FROM", "PIVOT", "PIVOT_WIDER", "SELECT", "WITH")


def _create_table(connection: duckdb.DuckDBPyConnection, name: str, rows: pa.Table) -> None:
    connection.register("incoming", rows)
    connection.execute(f"CREATE OR REPLACE TABLE {name} AS FROM incoming")
    connection.unregister("incoming")


def _confined_connection(root: Location, database: str, files: list[str]) -> duckdb.DuckDBPyConnection:
    """Return a connection that reads nothing but these files.

    It spills to a temporary folder of its own.
    """
    connection = duckdb.connect(database)
    if not isinstance(root, Path):
        connection.register_filesystem(root.fs)
    spill = Path(tempfile.gettempdir()) / f"winnow-{secrets.token_hex(8)}"
    for setting in (
        f"allowed_paths=[{', '.join(map(sql_literal, files))}]",
        f"memory_limit={sql_literal(MEMORY)}",
        f"temp_directory={sql_literal(str(spill))}",
        "enable_external_access=false",
        "python_enable_replacements=false",
        "autoinstall_known_extensions=false",
        "autoload_known_extensions=false",
        "lock_configuration=true",
    ):
        connection.execute(f"SET {setting}")
    return connection


@contextmanager
def as_winnow_error() -> Iterator[None]:
    """Turn DuckDB's errors into WinnowErrors with a hint, and its own error for Ctrl-C into KeyboardInterrupt."""
    try:
        yield
    except duckdb.PermissionException as error:
        if ".parquet/**/*.parquet" in str(error):  # DuckDB takes a listed file that is not there for a folder to search
            raise WinnowError(f"sql: a file that a manifest lists is missing; {REPAIR_HINT}\n{error}") from None
        raise WinnowError(
            f"sql: {error}\nOnly files of tables can be read, and not through a link that leads out of the store"
        ) from None
    except duckdb.IOException as error:
        raise WinnowError(f"sql: {error}\nA file that a manifest lists is missing or damaged; {REPAIR_HINT}") from None
    except OSError as error:
        if "arrow_large_buffer_size" not in str(error):
            raise
        raise WinnowError(
            f"sql: more than 2 GiB of text in {BATCH_ROWS:,} rows; select fewer rows or less of each: left(text, 1000)"
        ) from None
    except MemoryError:
        raise WinnowError(
            "sql: it takes more memory than a query may have; select fewer rows, or less of each"
        ) from None
    except (pa.ArrowException, OverflowError, ValueError) as error:  # such as a date of the year 300,000
        if isinstance(error, WinnowError):
            raise
        raise WinnowError(
            f"sql: a value cannot be read ({error}); CAST its column to VARCHAR in the statement"
        ) from None
    except duckdb.Error as error:
        raise WinnowError(f"sql: {error}\n{HINT}") from None
    except RuntimeError as error:
        if "interrupted" not in str(error):
            raise
        raise KeyboardInterrupt from None
