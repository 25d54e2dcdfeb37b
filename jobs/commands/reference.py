"""Commands that describe what can be written in a recipe: recipes, options."""

from typing import Annotated

import typer

from jobs.commands.app import console
from jobs.console import as_table
from jobs.reference import option_pages, recipe_table, stage_table


def recipes() -> None:
    """List the recipes that ship: the name, what it is, the objective of the policy."""
    console.print(as_table(recipe_table()))


def options(
    name: Annotated[
        str | None,
        typer.Argument(help="a stage, or a registered function such as rejection_sample; all stages if omitted"),
    ] = None,
) -> None:
    """Describe a stage or a registered function: inputs, outputs, and every option with type, default and choices."""
    if name is None:
        console.print(as_table(stage_table()))
        return
    from rich.markdown import Markdown

    for page in option_pages(name):
        console.print(Markdown(page))
