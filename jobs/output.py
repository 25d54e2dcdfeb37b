"""Results of SQL as a table for people, CSV, JSON lines, or Parquet; to the terminal or to a file."""

import csv
import io
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from enum import StrEnum
from pathlib import Path
from typing import TextIO

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from jobs.console import VisibleConsole, as_json, as_result, visible
from pipeline.sql.catalog import Catalog, QueryResult
from pipeline.store.store import columns_with_statistics
from schemas import WinnowError

MAX_TABLE_ROWS = 1000  # nobody reads more


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


class _Visible(io.TextIOBase):
    """Terminal for CSV and JSON; in a pipe or a file their bytes are the data's own."""

    def __init__(self, terminal: TextIO) -> None:
        self.terminal = terminal

    def write(self, text: str) -> int:
        return self.terminal.write(visible(text))


def interruptible(catalog: Catalog, work: Callable[[], None]) -> None:
    """Call `work` on a catalog so that Ctrl-C ends it at once; DuckDB itself looks for signals only now and then."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        try:
            done.result()
        except KeyboardInterrupt:
            while not done.done():  # an interruption before the query begins is lost
                catalog.interrupt()
                wait([done], timeout=0.1)
            raise


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
