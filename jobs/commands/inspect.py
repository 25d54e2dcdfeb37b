"""Command that looks at data before anything runs."""

from pathlib import Path
from typing import Annotated

import duckdb
import typer

from jobs import recipes
from jobs.commands.app import Configs, Plugins, Sets, console
from jobs.output import Format, format_of, write_result
from pipeline.sql.catalog import QueryResult


def inspect(
    recipe: Annotated[list[str], typer.Argument(help="recipes whose prompts and preferences are read")],
    configs: Configs = [],  # noqa: B006
    sets: Sets = [],  # noqa: B006
    plugins: Plugins = [],  # noqa: B006
    words: Annotated[int, typer.Option(help="length of the n-grams of words that near duplicates share", min=1)] = 3,
    overlap: Annotated[
        float, typer.Option(help="share of them, of those that either prompt has, from which it is one", min=0.1, max=1)
    ] = 0.5,
    format: Annotated[Format | None, typer.Option(help="of the result; else by the suffix of --out, or table")] = None,
    out: Annotated[Path | None, typer.Option(help="a file for the result")] = None,
) -> None:
    """Check the data of a config: rejected rows, near duplicates across splits, lengths, scripts. Stores nothing."""
    from jobs.inspection import inspect_data

    output_format = format_of(format, out)
    table = inspect_data(recipes.plans(recipe, configs, sets), words, overlap)
    with duckdb.connect() as connection:
        write_result(QueryResult(connection.from_arrow(table)), output_format, out, console)
    if out:
        console.print(f"wrote {out}", highlight=False, markup=False)
