"""Results of SQL as a table for people, CSV, JSON lines, or Parquet; to the terminal or to a file."""

import csv
import io
import os
import resource
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from threading import Thread
from typing import TextIO

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from jobs.console import VisibleConsole, as_json, as_result, visible
from pipeline.sql.catalog import Catalog, QueryResult, as_winnow_error
from pipeline.store.store import columns_with_statistics
from schemas import COMMAND, WinnowError

MAX_TABLE_ROWS = 1000  # nobody reads more
_scratch: set[Path] = set()  # files that are being written


class Format(StrEnum):
    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


SUFFIXES = {".csv": Format.csv, ".json": Format.json, ".jsonl": Format.json, ".parquet": Format.parquet}


def format_of(format: Format | None, out: Path | None) -> Format:
    """Return the format that is set, or that of the file's suffix; a table on the terminal."""
    if format or out is None:
        return format or Format.table
    if out.suffix.lower() not in SUFFIXES:
        raise WinnowError(
            f"--out {out}: its format is not known by its name; end it in {', '.join(SUFFIXES)}, or add --format"
        )
    return SUFFIXES[out.suffix.lower()]


def write_result(result: QueryResult, format: Format, out: Path | None, console: Console) -> None:
    """Write a result to the terminal, or to a file: completely, or not at all. All formats but tables are streamed."""
    if out is None:
        if format is Format.parquet:
            raise WinnowError("--format parquet: needs a file; add --out FILE")
        _write_text(result, format, _Visible(sys.stdout) if sys.stdout.isatty() else sys.stdout, console)
        return
    if not out.absolute().parent.is_dir():
        raise WinnowError(f"--out {out}: no such folder {out.parent}; create it first")
    if out.exists() and not out.is_file():
        raise WinnowError(f"--out {out}: is not a file; name one, or omit --out for the terminal")
    target = out.resolve()
    scratch = target.with_name(f".{target.name}.{os.getpid()}")  # another name until the file is complete
    _scratch.add(scratch)
    try:
        if format is Format.parquet:
            batches = result.batches()
            schema = next(batches).schema
            statistics = columns_with_statistics(schema)
            with pq.ParquetWriter(scratch, schema, compression="zstd", write_statistics=statistics) as writer:
                for batch in batches:
                    writer.write_batch(batch)
        else:
            with scratch.open("w", encoding="utf-8", newline="") as file:
                _write_text(result, format, file, VisibleConsole(file=file, soft_wrap=True, width=console.width))
        scratch.replace(target)
    except pa.ArrowNotImplementedError as error:
        raise WinnowError(f"--format parquet: {error}; CAST that column to another type in the statement") from None
    finally:
        scratch.unlink(missing_ok=True)
        _scratch.discard(scratch)


class _Visible(io.TextIOBase):
    """Terminal for CSV and JSON; in a pipe or a file their bytes are the data's own."""

    def __init__(self, terminal: TextIO) -> None:
        self.terminal = terminal

    def write(self, text: str) -> int:
        return self.terminal.write(visible(text))


def interruptible(catalog: Catalog, work: Callable[[], None], seconds: float | None = None) -> None:
    """Call `work` on a catalog so that Ctrl-C ends it within a second, and so does the end of its time.

    DuckDB looks for an interruption between pieces of its work, and never within one: where a single value takes
    longer, this process ends. Memory is limited to half of the machine's. Raises WinnowError at the end of the time.
    """
    done: Future[None] = Future()

    def call() -> None:
        try:
            work()
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    with _limited_memory():
        Thread(target=call, daemon=True).start()
        try:
            done.result(seconds)
        except TimeoutError:
            if done.done():  # of the work itself
                raise
            message = f"sql: it took more than {seconds:,.0f} seconds; --timeout allows more"
            _interrupt(catalog, done, 2, message)
            raise WinnowError(message) from None
        except KeyboardInterrupt:
            _interrupt(catalog, done, 130, "interrupted")
            raise


def _interrupt(catalog: Catalog, done: "Future[None]", exit_code: int, message: str) -> None:
    """Interrupt a query until it ends; after a second end this process."""
    for _ in range(8):  # an interruption before the query begins is lost
        catalog.interrupt()
        wait([done], timeout=0.1)
        if done.done():
            return
    for file in _scratch:
        file.unlink(missing_ok=True)
    print(f"{COMMAND}: {message}", file=sys.stderr, flush=True)
    os._exit(exit_code)


@contextmanager
def _limited_memory() -> Iterator[None]:
    """Let this process take no more than half of the machine's memory on top of what it has, where Linux can say so."""
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        taken = int(next(line for line in lines if line.startswith("VmData")).split()[1])  # in KiB
    except OSError:
        yield
        return
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    bound = taken * 1024 + half
    if limits[1] != resource.RLIM_INFINITY:
        bound = min(bound, limits[1])
    resource.setrlimit(resource.RLIMIT_DATA, (bound, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


@as_winnow_error()
def _write_text(result: QueryResult, format: Format, file: TextIO | _Visible, console: Console) -> None:
    if format is Format.table:
        rows = result.head(MAX_TABLE_ROWS + 1)
        console.print(as_result(rows.slice(0, MAX_TABLE_ROWS), console.width))
        if rows.num_rows > MAX_TABLE_ROWS:
            more = f"{result.count() - MAX_TABLE_ROWS:,} more rows; --format csv, json or parquet gives all of them"
            console.print(more, highlight=False)
        return
    writer = csv.writer(file, lineterminator="\n")
    if format is Format.csv:
        writer.writerow(result.columns)
    for row in (row for batch in result.batches() for row in batch.to_pylist()):
        if format is Format.csv:
            writer.writerow([as_json(value) if isinstance(value, list | dict) else value for value in row.values()])
        else:
            file.write(as_json(row) + "\n")
