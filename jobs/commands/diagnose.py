"""Command that looks at cached candidates and rewards before anything is trained."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import duckdb
import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from jobs import recipes
from jobs.commands.app import STORE, Configs, Plugins, Sets, StorePath, console, existing_store
from jobs.console import visible
from jobs.output import Format, format_of, write_result
from pipeline.config.yaml import parse
from pipeline.sql.catalog import QueryResult
from schemas import WinnowError

if TYPE_CHECKING:  # they import what draws, which no other command needs
    from jobs.diagnosis.sections import Section

WIDTH = 80  # columns of the console that the tables and findings need
LABEL = 18  # columns of a table's first one


def diagnose(
    recipe: Annotated[str, typer.Argument(help="recipe whose candidates and rewards are finished in the store")],
    configs: Configs = [],  # noqa: B006
    sets: Sets = [],  # noqa: B006
    plugins: Plugins = [],  # noqa: B006
    store: StorePath = STORE,
    rules: Annotated[
        list[str], typer.Option("--rule", help="another selection rule, such as '{name: best_of, k: 4}'")
    ] = [],  # noqa: B006
    prompts: Annotated[int | None, typer.Option(help="read this many prompts, by hash; all by default", min=1)] = None,
    round: Annotated[int | None, typer.Option(help="of a recipe with rounds; the first by default")] = None,
    to: Annotated[Path | None, typer.Option(help="a file for the diagnosis as an HTML page")] = None,
    format: Annotated[Format | None, typer.Option(help="of the numbers; else by the suffix of --out")] = None,
    out: Annotated[Path | None, typer.Option(help="a file for the numbers")] = None,
) -> None:
    """Say what cached candidates and rewards can support, before training: agreement, tilt, best of n, length."""
    from jobs.diagnosis.cached import read_cached
    from jobs.diagnosis.sections import make_diagnosis
    from stages.selection.rules import selection_rule

    output_format = format_of(format, out)
    source = existing_store(store)
    if to and not to.absolute().parent.is_dir():
        raise WinnowError(f"--to {to}: no such folder {to.parent}; create it first")
    plan, gold = recipes.plan_with_gold(recipe, configs, sets)
    extra = []
    for text in rules:
        prefix = f"--rule {text}: "
        try:
            rule = selection_rule.bind(parse(text, f"--rule {text}"))
        except WinnowError as error:
            raise WinnowError(*(prefix + problem.removeprefix(prefix) for problem in error.problems)) from None
        if "check" in rule.metadata and (problems := rule.metadata["check"](rule.options)):
            raise WinnowError(*(prefix + problem for problem in problems))
        extra.append(rule)
    result = make_diagnosis(read_cached(plan, source, gold, round, prompts), plan.name, extra)
    if output_format is Format.table and out is None:
        for name, fact in result.facts.items():
            console.print(f"{name:<11} {fact}", highlight=False, markup=False, width=WIDTH, soft_wrap=False)
        for section in result.sections.values():
            console.print(_console_table(section))
        for finding in result.findings:
            console.print(f"- {finding}", highlight=False, markup=False, width=WIDTH, soft_wrap=False)
    else:
        with duckdb.connect() as connection:
            write_result(QueryResult(connection.from_arrow(result.flat_table())), output_format, out, console)
    if out:
        console.print(f"wrote {out}", highlight=False, markup=False)
    if to:
        from jobs.diagnosis.page import write_page

        write_page(result, to)
        console.print(f"wrote {to} ({to.stat().st_size / 1e3:,.0f} kB)", highlight=False, markup=False)


def _console_table(section: "Section") -> Table:
    """Return the columns of a section's table that fit 80 columns."""
    from jobs.page import page_table

    rows = [{name: row[name] for name in section.short if name in row} for row in section.rows]
    for row in rows:
        for name in [*row][1:]:  # numbers, to four digits; the first column is the row's label
            if isinstance(row[name], float):
                row[name] = round(row[name], 3 - len(f"{abs(row[name]):.0f}"))
    table = page_table(rows)
    result = Table(title=escape(section.title), title_justify="left", title_style="bold", box=SIMPLE_HEAD,
                   pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)  # fmt: skip
    for number, name in enumerate(rows[0]):
        is_label = isinstance(rows[0][name], str)
        widest = max(len(line) for line in [*name.split(), *(row[number] for row in table["rows"])])
        result.add_column(
            escape(name), justify="left" if is_label else "right", max_width=LABEL if is_label else widest
        )
    for row in table["rows"]:
        result.add_row(*(Text(visible(cell)) for cell in row))
    return result
