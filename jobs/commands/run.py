"""Commands that make things: plan, run, paper, demo."""

import shlex
import shutil
import signal
import sys
from contextlib import closing
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from jobs import profiles, recipes
from jobs import tables as show
from jobs.commands.app import (
    QUERIES,
    STORE,
    Force,
    On,
    Only,
    Onward,
    ProfileName,
    Recipes,
    Sets,
    StorePath,
    Workers,
    app,
    console,
)
from jobs.commands.query import report
from jobs.console import ProgressReporter, as_table
from jobs.demo import OVERLAY, SMALL, data
from jobs.resume import resumable
from pipeline.config.partial import Rerun, rerun
from pipeline.config.plan import Plan, reads_files
from pipeline.execution.executor import Executor, LocalExecutor
from pipeline.execution.ray_executor import RayExecutor
from pipeline.execution.run import run as run_plan
from pipeline.sql.catalog import open_catalog, query
from pipeline.store.manifests import checked_run
from pipeline.store.store import Store
from schemas import WinnowError

MAIN = ("sft", "dpo", "sft_sample_rank", "rso", "raft")


class ExecutorName(StrEnum):
    in_process = "in-process"
    ray = "ray"


@app.command()
def plan(recipe: Recipes, on: On = [], sets: Sets = [], store: StorePath = STORE) -> None:  # noqa: B006
    """Print each recipe's tree: keys, what is cached, what will run and why. Runs nothing."""
    for made in recipes.plans(recipe, on, sets):
        console.print(show.plan_tree(made, Store(store)), highlight=False, soft_wrap=True)


@app.command()
def run(
    recipe: Recipes,
    on: On = [],  # noqa: B006
    sets: Sets = [],  # noqa: B006
    store: StorePath = STORE,
    executor: Annotated[ExecutorName | None, typer.Option(help="this process; or Ray, as --address says too")] = None,
    workers: Workers = 2,
    address: Annotated[
        str | None, typer.Option(help="with Ray: a cluster that this machine belongs to, or auto; a local one without")
    ] = None,
    profile: ProfileName = None,
    only: Only = None,
    onward: Onward = None,
    force: Force = None,
) -> None:
    """Make what the recipes need and the store has not. All recipes are checked before anything runs."""
    if address and executor is ExecutorName.in_process:
        raise WinnowError(f"--executor in-process --address {address}: a cluster is Ray's; leave one of them out")
    again = rerun(recipes.plans(recipe, on, sets), Store(store), only, onward, force)
    made = again.plans
    given = profiles.load(profile)
    chosen: Executor = LocalExecutor(given)
    if executor is ExecutorName.ray or address:
        chosen = RayExecutor(workers, address, given)
        Store(store).check()
        chosen.check(again.to_make(Store(store)))
    drop(again)
    run_all(made, Store(store), chosen)
    if address is None:  # else who reads this may be elsewhere, and the recipe here a copy (jobs/bundle.py)
        _next_moves(made[0], recipe[0], on, sets, store)


def drop(again: Rerun) -> None:
    """What is to be made again goes once all checks are over."""
    for made in again.gone:
        console.print(f"[yellow]made again[/]: {made.stage} [dim]{made.key}[/]", highlight=False)
    again.drop()


def run_all(plans: list[Plan], store: Store, executor: Executor) -> None:
    """Run plans one after the other, then show what they came to."""
    run_plans(plans, store, executor)
    _summary(store, [made.name for made in plans])


def run_plans(plans: list[Plan], store: Store, executor: Executor) -> None:
    watcher = ProgressReporter(console)
    signal.signal(signal.SIGINT, watcher.interrupt)
    with resumable(), closing(watcher):
        for made in plans:
            console.print(f"[bold]{escape(made.name)}[/]", highlight=False)
            _say_if_moved(made, store)
            run_plan(made, store, executor, watcher)


def _say_if_moved(plan: Plan, store: Store) -> None:
    """Another world, other data: a run's name stands for one of them."""
    try:
        before = checked_run(plan.name, store.run(plan.name))
    except (OSError, WinnowError):  # the run is about to write it anew, or to say why it cannot
        return
    read = [step for step in plan.steps if step.name in before and reads_files(step.entry)]
    if moved := [step.name for step in read if before[step.name]["key"] != step.key]:
        console.print(
            f"  [yellow]{escape(plan.name)} was of another {' and '.join(moved)} before[/]; what was made of that "
            "stays, but this run names it no more, and unless another does, `winnow gc` lists it. Another --store "
            "keeps both",
            highlight=False,
        )


def _summary(store: Store, runs: list[str]) -> None:
    """What these runs came to: beside all others of the store, for that is what a leaderboard is for."""
    ours = open_catalog(store, runs)
    titles = {
        "leaderboard": "leaderboard: against the SFT policy's responses on held-out prompts, with 95 % intervals",
        "heldout": "trained models on held-out examples (token_accuracy: the ranker's A or B)",
        "rejects": "left out, and why",
    }
    for name, title in titles.items():
        sql = (QUERIES / f"{name}.sql").read_text()
        if (answer := query(ours, sql)).num_rows:
            console.print(as_table(query(open_catalog(store), sql) if name == "leaderboard" else answer, title))


def _next_moves(made: Plan, recipe: str, on: list[Path], sets: list[str], store: str) -> None:
    """Commands that can be pasted as they stand."""
    me = sys.argv[0] if sys.argv[0].endswith("winnow") else "winnow"
    kept = [item for item in sets if not item.startswith("select.rule")]
    world = [word for path in on for word in ("--config", str(path))] + [
        word for item in kept for word in ("--set", item)
    ]
    moves = {"one prompt's life": ["trace", made.name], "a page to look at": ["report"]}
    rules = [step.options["rule"] for step in made.steps if step.entry.name == "select"]
    if any(rule.options.get("beta") for rule in rules):
        moves["what another beta would run"] = ["plan", recipe, *world, "--set", "select.rule.beta=0.1"]
    lines = [f"{shlex.join([me, *words, '--store', store])}  # {what}" for what, words in moves.items()]
    console.print("\n  ".join(["Next, for example:", *lines]), highlight=False, markup=False)


@app.command()
def paper(
    on: On = [],  # noqa: B006
    sets: Sets = [],  # noqa: B006
    store: StorePath = STORE,
    gamma: Annotated[float, typer.Option(help="factor of the log-ratio in both normalised losses; paper: 0.05")] = 1.0,
) -> None:
    """Tables 1 and 2 of the RSO paper on your world: every cell trained and judged, beside the paper's figures."""
    from jobs.paper import paper_plans, tables

    run_plans(paper_plans(on, sets, gamma), Store(store), LocalExecutor())
    for title, table in tables(Store(store)):
        console.print(as_table(table, title))


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="where the demo's world, store and report go")] = Path("demo"),
    methods: Annotated[bool, typer.Option("--methods", help="every method, small, in a store apart")] = False,
) -> None:
    """The main job on a world made on the spot: SFT, ranker, DPO, sft-sample-rank, RSO, RAFT, and a report."""
    data.write(folder)
    overlays = [Path(shutil.copyfile(file, folder / file.name)) for file in (OVERLAY, *([SMALL] if methods else []))]
    store = str(folder / ("methods" if methods else "store"))
    chosen = [name for name in recipes.names() if name != "own_candidates"] if methods else list(MAIN)
    plans = recipes.plans(chosen, overlays, [])
    run_all(plans, Store(store), LocalExecutor())
    report(store, folder / ("methods.html" if methods else "report.html"))
    _next_moves(next(plan for plan in plans if plan.name == "rso"), "rso", overlays, [], store)
