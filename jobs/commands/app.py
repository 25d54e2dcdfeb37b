"""What every command shares: the app, how it prints, and the options that several take."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipeline.store.store import Store
from schemas import WinnowError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Sample, rank, optimize: an offline pipeline from preferences to a better policy.",
)
console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)
complaints = Console(soft_wrap=True, stderr=True)
QUERIES = Path(__file__).parent.parent / "queries"
STORE = "store"
Recipes = Annotated[list[str], typer.Argument(help="recipe names, or YAML files")]
On = Annotated[list[Path], typer.Option("--config", help="YAML with your data and models, laid over the recipe")]
Sets = Annotated[list[str], typer.Option("--set", help="step.option=value")]
StorePath = Annotated[str, typer.Option("--store", help="where artifacts live: a folder, or s3://bucket/folder")]
Workers = Annotated[int, typer.Option(help="Ray workers a step, where the profile does not say", min=1)]
ProfileName = Annotated[str | None, typer.Option("--profile", help="resources a stage: a profile's name, or a file")]
Only = Annotated[str | None, typer.Option(help="this step alone; what it reads must be sealed")]
Onward = Annotated[str | None, typer.Option("--from", help="this step, and what is made of it")]
Force = Annotated[str | None, typer.Option(help="make this step again, and what was made of it")]
RunName = Annotated[str | None, typer.Option("--run", help="only this run's rows")]


def used(folder: str) -> Store:
    """A store to look at; raises WinnowError where nothing was ever made."""
    store = Store(folder)
    if isinstance(store.root, Path) and not store.root.is_dir():
        raise WinnowError(f"--store {folder}: there is no such folder in {store.root.parent}; winnow run makes one")
    if not store.runs():
        raise WinnowError(f"--store {folder}: no runs in this folder; winnow run makes one")
    return store
