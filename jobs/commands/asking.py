"""Commands that look: status, sql, trace, report."""

import csv
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from jobs.commands.app import QUERIES, STORE, RunName, StorePath, app, console, used
from jobs.console import as_json, as_table
from pipeline.catalog import open_catalog, query


class Format(StrEnum):
    table = "table"
    csv = "csv"
    json = "json"


@app.command()
def status(store: StorePath = STORE) -> None:
    """What the store holds: runs, their steps, rows, seconds."""
    answer = query(open_catalog(used(store)), (QUERIES / "status.sql").read_text())
    console.print(as_table(answer))


@app.command()
def sql(
    statement: Annotated[str, typer.Argument(help="one SELECT over the tables, `runs` and `steps`")],
    store: StorePath = STORE,
    run: RunName = None,
    format: Annotated[Format, typer.Option(help="how to print the answer")] = Format.table,
) -> None:
    """Ask the store anything: a view for every table, read-only, confined to the store."""
    answer = query(open_catalog(used(store), run), statement)
    if format is Format.table:
        console.print(as_table(answer))
    elif format is Format.json:
        typer.echo("\n".join(as_json(row) for row in answer.to_pylist()))
    else:
        lines = csv.writer(sys.stdout, lineterminator="\n")
        lines.writerow(answer.column_names)
        lines.writerows(
            [as_json(v) if isinstance(v, list | dict) else v for v in row.values()] for row in answer.to_pylist()
        )


@app.command()
def trace(
    run: Annotated[str, typer.Argument(help="a run's name")],
    prompt: Annotated[str | None, typer.Argument(help="prompt id, or its beginning; the first by default")] = None,
    store: StorePath = STORE,
    round: Annotated[int | None, typer.Option(help="of a run with rounds; the last by default")] = None,
) -> None:
    """Print one prompt's whole life in a run."""
    from jobs.trace import life

    life(used(store), run, prompt or "", console, round)


@app.command()
def report(
    store: StorePath = STORE,
    out: Annotated[Path | None, typer.Option(help="the page; report.html in the store by default")] = None,
) -> None:
    """Write one self-contained HTML page about all runs of the store."""
    from jobs.report import write_report

    page = out or store / "report.html"
    write_report(used(store), page)
    console.print(f"wrote {page} ({page.stat().st_size / 1e3:,.0f} kB)", highlight=False)
