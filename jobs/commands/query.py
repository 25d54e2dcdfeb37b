"""Commands that look: status, sql, trace, report."""

from pathlib import Path
from typing import Annotated

import typer

from jobs import queries
from jobs.commands.app import STORE, RunName, StorePath, app, complaints, console, used
from jobs.console import as_table
from jobs.output import Format, format_of, interruptible, write
from pipeline.sql.catalog import open_catalog, query
from schemas import WinnowError


@app.command()
def status(
    store: StorePath = STORE,
    address: Annotated[
        str | None, typer.Option(help="the jobs of this cluster instead, by its dashboard's URL")
    ] = None,
) -> None:
    """What the store holds: runs, their steps, rows, seconds. Or a cluster's jobs."""
    if address:
        from jobs.submit import listing

        console.print(as_table(listing(address)))
        return
    answer = query(open_catalog(used(store)), queries.text("status"))
    console.print(as_table(answer))


@app.command()
def sql(
    statement: Annotated[
        str | None, typer.Argument(help="one SELECT over the tables, `runs` and `steps`; or a shipped query's name")
    ] = None,
    store: StorePath = STORE,
    run: RunName = None,
    format: Annotated[Format | None, typer.Option(help="of the answer; else as --out ends, or a table")] = None,
    out: Annotated[Path | None, typer.Option(help="a file for the answer")] = None,
    db: Annotated[Path | None, typer.Option(help="a new DuckDB file with all rows, to use elsewhere")] = None,
    listed: Annotated[bool, typer.Option("--list", help="name the shipped queries")] = False,
) -> None:
    """Ask the store anything: a view for every table, read-only, confined to the store. A shell without a statement."""
    if listed:
        from jobs.shell import shipped

        console.print(as_table(shipped()))
        return
    if (statement is None and out) or (statement is not None and db):
        raise WinnowError("sql: --out is for the answer to a statement, --db for a whole store without one")
    catalog, chosen = open_catalog(used(store), run), format_of(format, out)
    if db:
        catalog.export(db)
        console.print(f"wrote {db} ({db.stat().st_size / 1e6:,.1f} MB)", highlight=False)
    elif statement is None:
        from jobs.shell import Shell

        shell = Shell(catalog, lambda answer: write(answer, chosen, None, console), console, complaints)
        shell.run()
        if shell.failed and not shell.interactive:
            raise typer.Exit(2)
    else:
        text = queries.statement(statement)
        interruptible(catalog, lambda: write(catalog.sql(text), chosen, out, console))


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
    out: Annotated[Path | None, typer.Option(help="the page; report.html in the store, or here for a bucket")] = None,
) -> None:
    """Write one self-contained HTML page about all runs of the store."""
    from jobs.report import write_report

    found = used(store)
    page = out or (found.root / "report.html" if isinstance(found.root, Path) else Path("report.html"))
    write_report(found, page)
    console.print(f"wrote {page} ({page.stat().st_size / 1e3:,.0f} kB)", highlight=False)
