"""The command `winnow`."""

import csv
import os
import shlex
import shutil
import signal
import sys
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from jobs import recipes, show
from jobs.bench.optimize import SHAPES
from jobs.console import Watcher, as_json, as_table
from jobs.demo import OVERLAY, SMALL, world
from pipeline.catalog import open_catalog, query
from pipeline.executors import Executor, InProcess, OnRay
from pipeline.plan import Plan
from pipeline.run import run as run_plan
from pipeline.store import Store
from schemas import WinnowError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Sample, rank, optimize: an offline pipeline from preferences to a better policy.",
)
console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)
complaints = Console(soft_wrap=True, stderr=True)
QUERIES = Path(__file__).parent / "queries"
MAIN = ("sft", "dpo", "sft_sample_rank", "rso", "raft")
INTERRUPTED = 130  # typer's exit code for ctrl-c


class ExecutorName(StrEnum):
    in_process = "in-process"
    ray = "ray"


class Format(StrEnum):
    table = "table"
    csv = "csv"
    json = "json"


Recipes = Annotated[list[str], typer.Argument(help="recipe names, or YAML files")]
On = Annotated[list[Path], typer.Option("--on", help="YAML with your data and models, laid over the recipe")]
Sets = Annotated[list[str], typer.Option("--set", help="step.option=value")]
StorePath = Annotated[Path, typer.Option("--store", help="where artifacts live")]
RunName = Annotated[str | None, typer.Option("--run", help="only this run's rows")]
STORE = Path("store")


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
    executor: Annotated[ExecutorName, typer.Option(help="this process, or a local Ray")] = ExecutorName.in_process,
    workers: Annotated[int, typer.Option(help="Ray workers a step", min=1)] = 2,
) -> None:
    """Make what the recipes need and the store has not. All recipes are checked before anything runs."""
    chosen: Executor = OnRay(workers) if executor is ExecutorName.ray else InProcess()
    made = recipes.plans(recipe, on, sets)
    run_all(made, Store(store), chosen)
    _next_moves(made[0], recipe[0], on, sets, store)


def run_all(plans: list[Plan], store: Store, executor: Executor) -> None:
    """Run plans one after the other, then show what they came to."""
    run_plans(plans, store, executor)
    _summary(store, [made.name for made in plans])


def run_plans(plans: list[Plan], store: Store, executor: Executor) -> None:
    watcher = Watcher(console)
    signal.signal(signal.SIGINT, watcher.interrupt)
    try:
        for made in plans:
            console.print(f"[bold]{escape(made.name)}[/]", highlight=False)
            run_plan(made, store, executor, watcher)
    finally:
        watcher.close()


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


def _next_moves(made: Plan, recipe: str, on: list[Path], sets: list[str], store: Path) -> None:
    """Commands that can be pasted as they stand."""
    me = sys.argv[0] if sys.argv[0].endswith("winnow") else "winnow"
    kept = [item for item in sets if not item.startswith("select.rule")]
    world = "".join(f" --on {path}" for path in on) + "".join(f" --set {shlex.quote(item)}" for item in kept)
    moves = [
        f"{me} trace {shlex.quote(made.name)} --store {store}  # one prompt's life",
        f"{me} report --store {store}  # a page to look at",
    ]
    rules = [step.options["rule"] for step in made.steps if step.entry.name == "select"]
    if any(rule.options.get("beta") for rule in rules):
        plan = f"{me} plan {recipe}{world} --store {store} --set select.rule.beta=0.1"
        moves.append(f"{plan}  # what another beta would run")
    console.print("\n  ".join(["Next, for example:", *moves]), highlight=False, markup=False)


def _used(folder: Path) -> Store:
    """A store to look at; raises WinnowError where nothing was ever made."""
    store = Store(folder)
    if not store.root.is_dir():
        raise WinnowError(f"--store {folder}: there is no such folder in {store.root.parent}; winnow run makes one")
    if not store.runs():
        raise WinnowError(f"--store {folder}: no runs in this folder; winnow run makes one")
    return store


@app.command()
def status(store: StorePath = STORE) -> None:
    """What the store holds: runs, their steps, rows, seconds."""
    answer = query(open_catalog(_used(store)), (QUERIES / "status.sql").read_text())
    console.print(as_table(answer))


@app.command()
def sql(
    statement: Annotated[str, typer.Argument(help="one SELECT over the tables, `runs` and `steps`")],
    store: StorePath = STORE,
    run: RunName = None,
    format: Annotated[Format, typer.Option(help="how to print the answer")] = Format.table,
) -> None:
    """Ask the store anything: a view for every table, read-only, confined to the store."""
    answer = query(open_catalog(_used(store), run), statement)
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

    life(_used(store), run, prompt or "", console, round)


@app.command()
def report(
    store: StorePath = STORE,
    out: Annotated[Path | None, typer.Option(help="the page; report.html in the store by default")] = None,
) -> None:
    """Write one self-contained HTML page about all runs of the store."""
    from jobs.report import write_report

    page = out or store / "report.html"
    write_report(_used(store), page)
    console.print(f"wrote {page} ({page.stat().st_size / 1e3:,.0f} kB)", highlight=False)


@app.command()
def paper(
    on: On = [],  # noqa: B006
    sets: Sets = [],  # noqa: B006
    store: StorePath = STORE,
    gamma: Annotated[float, typer.Option(help="factor of the log-ratio in both normalised losses; paper: 0.05")] = 1.0,
) -> None:
    """Tables 1 and 2 of the RSO paper on your world: every cell trained and judged, beside the paper's figures."""
    from jobs.paper import paper_plans, tables

    run_plans(paper_plans(on, sets, gamma), Store(store), InProcess())
    for title, table in tables(Store(store)):
        console.print(as_table(table, title))


bench = typer.Typer(help="Slow proofs, measured on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command()
def mixes(
    on: On = [],  # noqa: B006
    store: StorePath = STORE,
    groups: Annotated[int, typer.Option(help="groups of each side", min=64)] = 2048,
    repeats: Annotated[int, typer.Option(help="alternating repeats", min=1)] = 3,
) -> None:
    """Seconds a step of ALRIGHT, MAXRIGHT, the mixture and the sequence, against one objective alone."""
    from jobs.bench.mixes import measure

    watcher = Watcher(console)
    try:
        table = measure(Store(store), on, watcher, groups, repeats, console.print)
    finally:
        watcher.close()
    console.print(as_table(table, "a step of each mix: median over repeats [least, most]"))


@bench.command()
def optimize(
    shapes: Annotated[str, typer.Option(help="prompt/response/responses/pairs, by commas")] = SHAPES,
    dtypes: Annotated[str, typer.Option(help="by commas")] = "float32,bfloat16",
    steps: Annotated[int, typer.Option(help="timed steps of a run, after one of warm-up", min=1)] = 1,
    repeats: Annotated[int, typer.Option(help="alternating runs of each side", min=1)] = 3,
    vocabulary: Annotated[int, typer.Option(help="of the random Llama", min=16)] = 8192,
    threads: Annotated[int, typer.Option(help="of either side", min=1)] = os.cpu_count() or 1,
    out: Annotated[Path | None, typer.Option(help="the same tables as a Markdown page")] = None,
) -> None:
    """Pairs a second and memory of `optimize` and `reference` beside TRL's DPOTrainer, and what each idea is worth."""
    from jobs.bench.optimize.measure import Bench, apart
    from jobs.bench.optimize.tables import page, tables
    from jobs.bench.optimize.world import World, parse

    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), vocabulary)
        made = Bench(world, [parse(shape) for shape in shapes.split(",")], dtypes.split(","), steps, repeats)
        made.run(apart(threads), console.print)
        for title, table in tables(made).items():
            console.print(as_table(table, title))
        if out:
            out.write_text(page(made, threads))


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="where the demo's world, store and report go")] = Path("demo"),
    methods: Annotated[bool, typer.Option("--methods", help="every method, small, in a store apart")] = False,
) -> None:
    """The main job on a world made on the spot: SFT, ranker, DPO, sft-sample-rank, RSO, RAFT, and a report."""
    world.write(folder)
    overlays = [Path(shutil.copyfile(file, folder / file.name)) for file in (OVERLAY, *([SMALL] if methods else []))]
    store = folder / ("methods" if methods else "store")
    chosen = [name for name in recipes.names() if name != "own_candidates"] if methods else list(MAIN)
    plans = recipes.plans(chosen, overlays, [])
    run_all(plans, Store(store), InProcess())
    report(store, folder / ("methods.html" if methods else "report.html"))
    _next_moves(next(plan for plan in plans if plan.name == "rso"), "rso", overlays, [], store)


def main() -> None:
    """Errors that people can mend end with their message and exit code 2; never a traceback."""
    try:
        app()
    except WinnowError as error:
        for problem in error.problems:
            complaints.print(f"winnow: {problem}", style="red", highlight=False, markup=False)
        raise SystemExit(2) from None
    except OSError as error:
        complaints.print(f"winnow: {error}; finished parts are kept, the same command goes on from them", style="red")
        raise SystemExit(2) from None
    except SystemExit as end:
        if end.code == INTERRUPTED:
            complaints.print("winnow: interrupted; finished parts are kept, the same command goes on from them")
        raise


if __name__ == "__main__":
    main()
