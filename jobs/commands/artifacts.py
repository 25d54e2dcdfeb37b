"""Commands about stored results: ls, why, model, adopt, gc."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from jobs.commands.app import (
    STORE,
    Configs,
    Plugins,
    Sets,
    StorePath,
    console,
    error_console,
    existing_store,
)
from jobs.console import as_table
from jobs.recipes import plan_named
from jobs.resume import hint
from jobs.runs import with_free_names
from jobs.tables import format_size, row_count, runs_table, steps_table
from pipeline.config.keys import differences
from pipeline.config.rounds import run_and_round, split_round
from pipeline.store.store import Store
from schemas import WinnowError


def ls(
    run: Annotated[str | None, typer.Argument(help="a run, to list its steps; all runs if omitted")] = None,
    store: StorePath = STORE,
    tags: Annotated[list[str], typer.Option("--tag", help="only runs with this tag, a word or KEY=VALUE")] = [],  # noqa: B006
) -> None:
    """List runs, or the steps of a run: how much of them is finished, how large, how old."""
    if run and tags:
        raise WinnowError(f"--tag {tags[0]}: chooses among runs, and the steps of one are listed; omit one of them")
    source = existing_store(store)
    console.print(as_table(steps_table(source, run) if run else runs_table(source, tags)))


def why(
    one: Annotated[str, typer.Argument(help="a run, run/step, or a step's key or its beginning")],
    other: Annotated[str, typer.Argument(help="what to compare it with")],
    store: StorePath = STORE,
) -> None:
    """Explain why two runs, or two steps, differ: the fields in which a difference arises, not what follows from it."""
    from jobs.why import explain_difference

    for line in explain_difference(existing_store(store), one, other):
        console.print(line, highlight=False, markup=False)


def model(
    run: Annotated[str, typer.Argument(help="a run's name, or of a run with rounds also RUN@2")],
    to: Annotated[Path | None, typer.Option(help="a new folder for a copy, with its card")] = None,
    link: Annotated[bool, typer.Option("--link", help="with --to: weights as hard links, which take no space")] = False,
    push: Annotated[str | None, typer.Option(help="org/name on the Hugging Face hub to upload it to, private")] = None,
    public: Annotated[bool, typer.Option("--public", help="with --push: for everyone to see")] = False,
    step: Annotated[str | None, typer.Option(help="another step with a model, such as sft or ranker")] = None,
    store: StorePath = STORE,
) -> None:
    """Print the folder of a run's policy, copy it, or upload it. The token for the hub is HF_TOKEN or your login's."""
    from jobs.models import copy_model, find_model, push_model, rendering

    if (link and not to) or (public and not push):
        raise WinnowError("--link belongs to --to, and --public to --push: add it, or omit the option")
    policy = find_model(existing_store(store), run, step)
    if to:
        copy_model(policy, to, link)
    if push:
        error_console.print(f"uploaded to {push_model(policy, push, public)}", highlight=False, markup=False)
    for sentence in rendering(policy, to):  # beside the folder, which may be read by a program
        error_console.print(sentence, highlight=False, markup=False)
    console.print(str(to or policy.folder), highlight=False, markup=False)


def adopt(
    recipe: Annotated[str, typer.Argument(help="a recipe's name, or a YAML file")],
    step: Annotated[str, typer.Argument(help="the step whose result it becomes")],
    path: Annotated[str, typer.Argument(help="a step's folder of a store, Parquet files, or a model folder")],
    configs: Configs = [],  # noqa: B006
    sets: Sets = [],  # noqa: B006
    plugins: Plugins = [],  # noqa: B006
    store: StorePath = STORE,
) -> None:
    """Register files from elsewhere as the result of a step, after checking them. The manifest names their origin."""
    from jobs.adopt import adopt_artifact

    plan, target = plan_named(recipe, configs, sets), Store(store)
    for note in with_free_names([plan], target):
        console.print(f"  [yellow]note[/]: {escape(note)}", highlight=False)
    adopted, manifest = adopt_artifact(plan, step, path, target)
    origin = manifest["adopted"]
    console.print(
        f"adopted {escape(adopted.name)} [dim]{adopted.key}[/]: {row_count(manifest):,} rows", highlight=False
    )
    for line in differences(origin["identity"], adopted.identity) if origin["identity"] else []:
        console.print(f"  although it was computed with {escape(line)}", highlight=False)


def gc(
    store: StorePath = STORE,
    yes: Annotated[bool, typer.Option("--yes", help="delete it")] = False,
    forget: Annotated[list[str], typer.Option(help="a run to forget; with --yes its name is deleted")] = [],  # noqa: B006
) -> None:
    """List what no run uses, with sizes; --yes deletes it. What a run uses is never deleted."""
    from pipeline.store.gc import delete_garbage, garbage

    runs = Store(store).runs() if forget else {}
    if rounds := [name for name in forget if run_and_round(name, runs)[1] is not None]:
        raise WinnowError(*(
            f"--forget {name}: a round is no run of its own; --forget {split_round(name)[0]} is of all its rounds"
            for name in rounds
        ))  # fmt: skip
    report = garbage(Store(store), tuple(forget), missing_ok=yes)
    for run in set(forget) - Store(store).runs().keys() if yes else ():
        console.print(f"{run}: no such run; what it alone used is deleted", highlight=False, markup=False)
    for key in report.busy:
        console.print(f"{key} is running, and no run links to it: finished steps are kept until it ends", markup=False)
    items = list(delete_garbage(Store(store), report, tuple(forget))) if yes else report.garbage
    for item in items:
        console.print(
            f"{format_size(item.bytes):>10}  {escape(item.path)}  [dim]{escape(item.why)}[/]", highlight=False
        )
    total = format_size(sum(item.bytes for item in items))
    if yes:
        console.print(f"deleted {len(items)}, {total}", highlight=False)
    elif items or forget:
        words = ["gc", "--yes", "--store", store]
        words += [word for run in forget for word in ("--forget", run)]
        console.print(f"{len(items)} to delete, {total}; `{hint(*words)}` does it", highlight=False, markup=False)
    else:
        console.print("nothing to delete", highlight=False)
