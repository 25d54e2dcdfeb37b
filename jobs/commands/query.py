"""Commands that read a store, and those that describe what a recipe can contain."""

import errno
from pathlib import Path
from typing import Annotated, Literal

import pyarrow as pa
import typer

from jobs import queries
from jobs.commands.app import STORE, Configs, Plugins, RunName, StorePath, console, error_console, existing_store
from jobs.console import as_table
from jobs.export import Split, export_pairs
from jobs.export_formats import FormatName
from jobs.output import Format, format_of, interruptible, write_result
from jobs.reference import option_pages, recipe_table, stage_table
from jobs.tables import judges_rows, leaderboard_table
from pipeline.config.recipe import plugin_files
from pipeline.plugins import load_plugins, with_named
from pipeline.sql.catalog import Catalog, open_catalog, query
from schemas import WinnowError

ExportFormat = Literal[FormatName, "blind-comparison"]
Timeout = Annotated[float, typer.Option(help="seconds that a statement may take", min=0.1, max=10**7)]


def status(
    store: StorePath = STORE,
    run: RunName = None,
    address: Annotated[
        str | None, typer.Option(help="list the jobs of this cluster instead, by its dashboard's URL")
    ] = None,
) -> None:
    """Show the runs of a store with their steps, rows and seconds, or the jobs of a cluster."""
    if address and run:
        raise WinnowError(f"--address {address} --run {run}: runs are in a store, and jobs on a cluster; omit one")
    if address:
        from jobs.ray_jobs import RayJobs

        table = RayJobs(address).jobs_table()
    else:
        table = query(open_catalog(existing_store(store), run), queries.text("status"))
    console.print(as_table(table))


def sql(
    statement: Annotated[
        str | None, typer.Argument(help="one SELECT over the tables, `runs` and `steps`; or a shipped query's name")
    ] = None,
    store: StorePath = STORE,
    run: RunName = None,
    format: Annotated[Format | None, typer.Option(help="of the result; else by the suffix of --out, or table")] = None,
    out: Annotated[Path | None, typer.Option(help="a file for the result")] = None,
    db: Annotated[Path | None, typer.Option(help="a new DuckDB file with all rows, to use elsewhere")] = None,
    timeout: Timeout = 600,
    list_queries: Annotated[bool, typer.Option("--list", help="list the shipped queries")] = False,
) -> None:
    """Query the store: a view of every table, read-only, confined to the store. A shell if no statement is given."""
    if list_queries:
        console.print(as_table(queries.table()))
        return
    if (statement is None and out) or (statement is not None and db):
        raise WinnowError("sql: --out takes the result of a statement, --db a whole store without one")
    catalog, output_format = open_catalog(existing_store(store), run), format_of(format, out)
    if db:
        catalog.export(db)
        console.print(f"wrote {db} ({db.stat().st_size / 1e6:,.1f} MB)", highlight=False, markup=False)
    elif statement is None:
        from jobs.shell import Shell

        shell = Shell(
            catalog, lambda result: write_result(result, output_format, None, console), console, error_console, timeout
        )
        shell.run()
        if shell.errors and not shell.interactive:
            raise typer.Exit(2)
    else:
        text = queries.statement(statement)
        interruptible(catalog, lambda: write_result(catalog.sql(text), output_format, out, console), timeout)
        if out:
            console.print(f"wrote {out}", highlight=False, markup=False)


def trace(
    run: Annotated[str, typer.Argument(help="a run's name")],
    prompt: Annotated[str | None, typer.Argument(help="prompt id, or its beginning; the first by default")] = None,
    store: StorePath = STORE,
    round: Annotated[int | None, typer.Option(help="of a run with rounds; the last by default")] = None,
) -> None:
    """Print everything that happened to one prompt in a run."""
    from jobs.trace import trace_prompt

    trace_prompt(existing_store(store), run, prompt or "", console, round)


def leaderboard(store: StorePath = STORE) -> None:
    """Compare the policies of a store: one line for runs that differ in seeds alone, with intervals over these too."""
    from jobs.methods import make_leaderboard

    catalog = open_catalog(existing_store(store))
    table, lines = make_leaderboard(catalog)
    console.print(as_table(leaderboard_table(table)))
    for line in lines:
        console.print(line, highlight=False, markup=False)
    print_judges(catalog)


def print_judges(catalog: Catalog) -> None:
    """Print a table of all judges' win rates, where a config names judges."""
    if rows := judges_rows(catalog):
        title = "judges: win rates on held-out prompts with 95 % intervals; undecided comparisons count in none"
        console.print(as_table(pa.Table.from_pylist(rows), title))


def report(
    store: StorePath = STORE,
    out: Annotated[
        Path | None, typer.Option(help="the page; report.html in the store, or here if that is a bucket or read-only")
    ] = None,
) -> None:
    """Write one self-contained HTML page about all runs of the store."""
    from jobs.report import write_report

    source = existing_store(store)
    page = out or (source.root / "report.html" if isinstance(source.root, Path) else Path("report.html"))
    try:
        write_report(source, page)
    except OSError as error:
        if out or error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        page = Path("report.html")  # of a store that is read-only
        write_report(source, page)
    console.print(f"wrote {page} ({page.stat().st_size / 1e3:,.0f} kB)", highlight=False, markup=False)


def export(
    run: Annotated[str, typer.Option("--run", help="the run whose pairs are written")],
    format: Annotated[
        ExportFormat,
        typer.Option(
            help="TRL's as token ids, which loses no pair, or as text; OpenAI's; all columns; a blind sheet for people"
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="the file: .jsonl, and .parquet for trl-ids and trl; .csv or .html for a blind sheet")
    ],
    store: StorePath = STORE,
    split: Annotated[Split, typer.Option(help="what the policy is trained on, or measured on")] = "train",
    round: Annotated[int | None, typer.Option(help="of a run with rounds; the last by default")] = None,
    against: Annotated[
        str | None, typer.Option(help="of a blind sheet: whose responses to compare with, sft, target or a run")
    ] = None,
    pairs: Annotated[int | None, typer.Option(help="of a blind sheet: the number of prompts, else all", min=1)] = None,
) -> None:
    """Write the pairs of a run for other trainers, with their reference log-probs, or held-out ones for people."""
    source = existing_store(store)
    if format == "blind-comparison":
        from jobs.blind import export_blind

        if split != "train":
            raise WinnowError(f"--split {split}: a blind comparison is of held-out responses; omit it")
        sheet = export_blind(source, run, out, against or "sft", pairs, round)
        console.print(
            f"wrote {sheet.out}: {sheet.pairs:,} pairs, and their key in {sheet.key}, which raters must not see",
            highlight=False,
            markup=False,
        )
        if sheet.formulas:
            console.print(
                f"  {sheet.formulas:,} texts begin as a formula does, which a spreadsheet would compute: give raters "
                "the page (--out NAME.html), or import every column as text",
                highlight=False,
            )
        return
    if against or pairs:
        raise WinnowError(f"--against, --pairs: of --format blind-comparison alone, not of {format}; omit them")
    result = export_pairs(source, run, format, out, split, round)
    form = result.form
    lines = [f"wrote {result.out}: {result.rows:,} pairs of run {run}, step {result.source.step}"]
    lines += [f"rejected: {n:,} {reason} ({result.rejects_file.name})" for reason, n in result.rejects.most_common()]
    if result.rejects:
        total = result.rows + result.rejects.total()
        lines.append(f"{result.rejects.total():,} of {total:,} pairs are lost; --format {result.complete} loses none")
    if result.end:
        lines.append(f"texts end with {result.end}, not with EOS: set tokenizer.eos_token = {result.end!r}, and give "
                     "the trainer that tokenizer as processing_class")  # fmt: skip
    if form.references and result.source.cached:
        lines.append(f"reference log-probs are those of {result.source.policy.folder}")
    elif form.references:
        lines.append("no reference log-probs: the recipe caches none, so ref_chosen_logps and ref_rejected_logps "
                     "are absent")  # fmt: skip
    if result.weighted and not form.weights:
        lines.append(f"{result.weighted:,} pairs have a weight or a label other than 1, which this format cannot hold")
    if form.note:
        lines.append(form.note)
    lines.append(f"the longest pair has {result.longest:,} tokens, prompt included")
    console.print("\n  ".join(lines), highlight=False, markup=False)


def recipes() -> None:
    """List the recipes that ship: the name, what it is, the objective of the policy."""
    console.print(as_table(recipe_table()))


def options(
    name: Annotated[
        str | None,
        typer.Argument(help="a stage, or a registered function such as rejection_sample; all stages if omitted"),
    ] = None,
    configs: Configs = [],  # noqa: B006
    plugins: Plugins = [],  # noqa: B006
) -> None:
    """Describe a stage or a registered function: inputs, outputs, and every option with type, default and choices.

    Those of installed plugins too, and of the plugins that the command or a config (or a recipe's file) names.
    """
    load_plugins(with_named(file for config in configs for file in plugin_files(config)))
    if name is None:
        console.print(as_table(stage_table()))
        return
    from rich.markdown import Markdown

    for page in option_pages(name):
        console.print(Markdown(page))
