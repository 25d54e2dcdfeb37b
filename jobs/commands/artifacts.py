"""Commands about what is kept: ls, why, adopt, gc."""

import shlex
from typing import Annotated

import typer
from rich.markup import escape

from jobs import recipes
from jobs import tables as show
from jobs.commands.app import STORE, On, Sets, StorePath, app, console, used
from jobs.console import as_table
from pipeline.config.keys import differences
from pipeline.store.store import Store


@app.command()
def ls(
    run: Annotated[str | None, typer.Argument(help="a run, for its steps; all runs without")] = None,
    store: StorePath = STORE,
) -> None:
    """List runs, or a run's steps: how much of them is made, how large, how old."""
    found = used(store)
    console.print(as_table(show.steps_of(found, run) if run else show.runs_of(found)))


@app.command()
def why(
    one: Annotated[str, typer.Argument(help="a run, run/step, or a step's key or its beginning")],
    other: Annotated[str, typer.Argument(help="what to compare it with")],
    store: StorePath = STORE,
) -> None:
    """Print the fields in which two runs, or two steps, differ: where a difference arises, not what follows from it."""
    from jobs.why import why

    for line in why(used(store), one, other):
        console.print(line, highlight=False, markup=False)


@app.command()
def adopt(
    recipe: Annotated[str, typer.Argument(help="a recipe's name, or a YAML file")],
    step: Annotated[str, typer.Argument(help="whose result it is to be")],
    path: Annotated[str, typer.Argument(help="a step's folder of a store, Parquet files, or a model's folder")],
    on: On = [],  # noqa: B006
    sets: Sets = [],  # noqa: B006
    store: StorePath = STORE,
) -> None:
    """Register what was made elsewhere as a step's result. All is checked first; the manifest says where it is from."""
    from jobs.adopt import adopt

    plan = recipes.plan_named(recipe, on, sets)
    made, manifest = adopt(plan, step, path, Store(store))
    origin = manifest["adopted"]
    console.print(f"adopted {made.name} [dim]{made.key}[/]: {show.rows(manifest):,} rows", highlight=False)
    for line in differences(origin["identity"], made.identity) if origin["identity"] else []:
        console.print(f"  though it was made with {escape(line)}", highlight=False)


@app.command()
def gc(
    store: StorePath = STORE,
    yes: Annotated[bool, typer.Option("--yes", help="delete it")] = False,
    forget: Annotated[list[str], typer.Option(help="a run to do without; with --yes its name is deleted")] = [],  # noqa: B006
) -> None:
    """List what no run reaches, with sizes; --yes deletes it. What a run reaches always stays."""
    from pipeline.store.gc import garbage, sweep

    found = garbage(Store(store), tuple(forget))
    for key in found.busy:
        console.print(f"{key} is being made, and no run names it: sealed steps stay until that is over")
    gone = list(sweep(Store(store), found, tuple(forget))) if yes else found.garbage
    for item in gone:
        console.print(f"{show.size(item.bytes):>10}  {escape(item.path)}  [dim]{item.why}[/]", highlight=False)
    total = show.size(sum(item.bytes for item in gone))
    if yes:
        console.print(f"deleted {len(gone)}, {total}", highlight=False)
    elif gone or forget:
        runs = [word for run in forget for word in ("--forget", run)]
        words = ["winnow", "gc", "--yes", "--store", str(store), *runs]
        console.print(f"{len(gone)} to delete, {total}; `{shlex.join(words)}` does it", highlight=False, markup=False)
    else:
        console.print("nothing to delete", highlight=False)
