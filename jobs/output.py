"""How an answer is written: a table for people, CSV, JSON lines, or Parquet; to the terminal or to a file."""

import csv
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from jobs.console import as_json, as_table
from pipeline.sql.catalog import Answer, Catalog
from schemas import WinnowError

MOST = 1000  # rows of a table: nobody reads more


class Format(StrEnum):
    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


def format_of(asked: Format | None, out: Path | None) -> Format:
    """As asked, or as the file's name ends."""
    endings = {".csv": Format.csv, ".json": Format.json, ".jsonl": Format.json, ".parquet": Format.parquet}
    return asked or endings.get(out.suffix if out else "", Format.table)


def write(answer: Answer, format: Format, out: Path | None, console: Console) -> None:
    """To a file, whole or not at all, or to the terminal. CSV, JSON and Parquet are written as they come."""
    if out is None:
        _to_terminal(answer, format, console)
        return
    if not out.absolute().parent.is_dir():
        raise WinnowError(f"--out {out}: there is no folder {out.parent}; make it first")
    if out.exists() and not out.is_file():
        raise WinnowError(f"--out {out}: is no file; name one, or leave it away for the terminal")
    with _scratch(out.resolve()) as scratch:
        if format is Format.parquet:
            _parquet(answer, scratch)
            return
        with scratch.open("w", encoding="utf-8", newline="") as file:
            if format is Format.table:
                _table(answer, Console(file=file, soft_wrap=True, width=console.width))
            else:
                _lines(answer, format, file)


def interruptible(catalog: Catalog, work: Callable[[], None]) -> None:
    """StepSpec on a catalog that Ctrl-C ends at once: DuckDB itself looks for signals only now and then."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        try:
            done.result()
        except KeyboardInterrupt:
            while not done.done():  # an interruption before the query begins is lost
                catalog.interrupt()
                wait([done], timeout=0.1)
            raise


def _to_terminal(answer: Answer, format: Format, console: Console) -> None:
    if format is Format.parquet:
        raise WinnowError("--format parquet: is for a file; say which by --out FILE")
    if format is Format.table:
        _table(answer, console)
    else:
        _lines(answer, format, sys.stdout)


def _table(answer: Answer, console: Console) -> None:
    rows = answer.head(MOST + 1)
    console.print(as_table(rows.slice(0, MOST)))
    if rows.num_rows > MOST:
        more = f"{answer.count() - MOST:,} more rows; --format csv, json or parquet gives all of them"
        console.print(more, highlight=False)


def _lines(answer: Answer, format: Format, file: TextIO) -> None:
    lines = csv.writer(file, lineterminator="\n")
    if format is Format.csv:
        lines.writerow(answer.columns)
    for row in (row for batch in answer.batches() for row in batch.to_pylist()):
        if format is Format.csv:
            lines.writerow([as_json(value) if isinstance(value, list | dict) else value for value in row.values()])
        else:
            file.write(as_json(row) + "\n")


def _parquet(answer: Answer, file: Path) -> None:
    batches: Iterator[Any] = answer.batches()
    first = next(batches)
    try:
        with pq.ParquetWriter(file, first.schema, compression="zstd") as writer:
            for batch in batches:
                writer.write_batch(batch)
    except pa.ArrowNotImplementedError as error:
        raise WinnowError(f"--format parquet: {error}; CAST that column to another type in the statement") from None


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """Another name until the file is whole."""
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        yield scratch
        scratch.replace(out)
    finally:
        scratch.unlink(missing_ok=True)
