"""Commands that compute: demo, plan, run, paper."""

import shutil
import signal
from contextlib import closing, suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from jobs import queries, recipes, resume
from jobs.commands.app import (
    DEFAULT_WORKERS,
    STORE,
    Configs,
    Force,
    Name,
    Only,
    Onward,
    ProfileName,
    Recipes,
    Sets,
    StorePath,
    Track,
    Until,
    Workers,
    console,
    with_trackers,
)
from jobs.commands.query import report
from jobs.console import ProgressReporter, as_table
from jobs.demo import OVERLAY, QUESTIONS, REAL, REWARD, SMALL, data, smollm2
from jobs.models import find_model
from jobs.runs import with_free_names
from jobs.tables import leaderboard_table, overruled, plan_tree
from pipeline.config.partial import Part, rerun
from pipeline.config.plan import Plan, reads_files, stale_code
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.ray_executor import RayExecutor
from pipeline.execution.run import run as run_plan
from pipeline.sql.catalog import open_catalog, query
from pipeline.store.store import Store
from schemas import WinnowError

GPU = Path("/dev/nvidiactl")  # exists where NVIDIA's driver is loaded
DEMO_RECIPES = ("sft", "dpo", "sft_sample_rank", "rso", "raft")
REAL_RECIPES = ("rso", "raft")  # from the same candidates


class ExecutorName(StrEnum):
    in_process = "in-process"
    ray = "ray"


def demo(
    folder: Annotated[Path, typer.Option(help="where the demo's data, store and report are written")] = Path("demo"),
    methods: Annotated[bool, typer.Option("--methods", help="every method, small, in a store of its own")] = False,
    real: Annotated[
        bool, typer.Option("--real", help="RSO and RAFT on SmolLM2-135M-Instruct, with a program as the reward")
    ] = False,
) -> None:
    """Run the whole pipeline on generated data, from SFT to RAFT and a report, or with --real on a real chat model."""
    if methods and real:
        raise WinnowError("demo: --methods and --real are two demos; omit one of them")
    files, names, title = [OVERLAY], list(DEMO_RECIPES), "store"
    if methods:
        files, title = [OVERLAY, SMALL], "methods"
        names = [name for name in recipes.names() if name not in recipes.OWN_CANDIDATES]
    if real:
        files, names, title = [REAL], list(REAL_RECIPES), "real"
        smollm2.write(folder / smollm2.NAME)
        for file in (QUESTIONS, REWARD):
            shutil.copyfile(file, folder / file.name)
    else:
        data.write(folder)
    configs = [Path(shutil.copyfile(file, folder / file.name)) for file in files]
    store = str(folder / title)
    plans = recipes.plans(names, configs, [])
    _print_store(Store(store), with_free_names(plans, Store(store)))
    _run_plans(plans, Store(store), LocalExecutor())
    _print_summary(Store(store), plans)
    if real:
        runs = [plan.name for plan in plans]
        for name, shown in (("gold", runs), ("responses", runs[:1])):
            console.print(as_table(query(open_catalog(Store(store), shown), queries.text(name)), queries.about(name)))
    report(store, folder / f"{'report' if title == 'store' else title}.html")
    _print_next_commands(next(plan for plan in plans if plan.name == "rso"), "rso", configs, [], store)


def plan(
    recipe: Recipes,
    configs: Configs = [],  # noqa: B006
    sets: Sets = [],  # noqa: B006
    store: StorePath = STORE,
    name: Name = None,
    options: Annotated[
        bool, typer.Option("--options", help="also each option that is not a default, and the file that it comes from")
    ] = False,
) -> None:
    """Print each recipe's tree of steps: keys, what is cached, what will run and why. Runs nothing."""
    plans = recipes.plans(recipe, configs, sets, name)
    _print_store(Store(store), with_free_names(plans, Store(store)))
    for item in plans:
        console.print(plan_tree(item, Store(store), options), highlight=False, soft_wrap=True)
        for line in overruled(item):
            console.print(f"  [dim]{escape(line)}[/]", highlight=False)
        _print_notes(item)
        _print_changed_code(item, Store(store))


def run(
    recipe: Recipes,
    configs: Configs = [],  # noqa: B006
    sets: Sets = [],  # noqa: B006
    store: StorePath = STORE,
    executor: Annotated[
        ExecutorName | None, typer.Option(help="this process, or Ray (which --address implies)")
    ] = None,
    workers: Workers = None,
    address: Annotated[
        str | None, typer.Option(help="with Ray: a cluster that this machine is part of, or auto; by default a new one")
    ] = None,
    profile: ProfileName = None,
    name: Name = None,
    only: Only = None,
    until: Until = None,
    from_step: Onward = None,
    force: Force = None,
    track: Track = [],  # noqa: B006
) -> None:
    """Run the steps that the recipes need and the store lacks. All recipes are checked before anything runs."""
    if address and executor is ExecutorName.in_process:
        raise WinnowError(f"--executor in-process --address {address}: only Ray has an address; omit one of them")
    if workers and not (address or executor is ExecutorName.ray):
        raise WinnowError(f"--workers {workers}: only Ray has workers; add `--executor ray`, or omit it")
    target = Store(store)
    plans = recipes.plans(recipe, configs, with_trackers(sets, track), name)
    notes = with_free_names(plans, target)
    selection = rerun(plans, target, Part(only, until, from_step, force))
    resources = recipes.load_resources(profile)
    chosen: LocalExecutor = LocalExecutor(resources)
    if executor is ExecutorName.ray or address:
        chosen = RayExecutor(workers or DEFAULT_WORKERS, address, resources)
        target.check()
        chosen.check(selection.to_run())
    elif profile:
        console.print(
            f"  [yellow]note[/]: --profile {escape(profile)}: in this process only `tensor_parallel` of it is read; "
            "add `--executor ray` for its workers, CPUs, GPUs and memory",
            highlight=False,
        )
    _print_store(target, notes)
    # Results to compute again are deleted only now that all checks are over.
    for step in selection.to_delete:
        console.print(f"[yellow]will run again[/]: {step.stage} [dim]{step.key}[/]", highlight=False)
    selection.delete()
    _run_plans(selection.plans, target, chosen)
    _print_summary(target, selection.plans)
    if address is None:  # else the reader may be on another machine, and the recipe here a copy (jobs/bundle.py)
        _print_next_commands(selection.plans[0], recipe[0], configs, sets, store)


def paper(
    configs: Configs = [],  # noqa: B006
    sets: Sets = [],  # noqa: B006
    store: StorePath = STORE,
    gamma: Annotated[float, typer.Option(help="factor of the log-ratio in both normalised losses; paper: 0.05")] = 1.0,
) -> None:
    """Reproduce tables 1 and 2 of the RSO paper on your data: every cell trained and judged, beside the paper's."""
    from jobs.paper import paper_plans, tables

    _run_plans(paper_plans(configs, sets, gamma), Store(store), LocalExecutor())
    for title, table in tables(Store(store)):
        console.print(as_table(table, title))


def _run_plans(plans: list[Plan], store: Store, executor: LocalExecutor) -> None:
    reporter = ProgressReporter(console)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, reporter.interrupt)
    resume.started = True
    try:
        with closing(reporter):
            for plan in plans:
                console.print(f"[bold]{escape(plan.name)}[/]", highlight=False)
                _print_notes(plan)
                _warn_of_other_data(plan, store)
                _print_changed_code(plan, store)
                run_plan(plan, store, executor, reporter)
    except KeyboardInterrupt:
        raise SystemExit(128 + (reporter.interrupted or signal.SIGINT)) from None
    resume.started = False


def _print_store(store: Store, notes: list[str]) -> None:
    console.print(f"store {store.root}", style="dim", highlight=False, markup=False)
    for line in notes:
        console.print(f"  [yellow]note[/]: {escape(line)}", highlight=False)


def _print_notes(plan: Plan) -> None:
    lines = [*plan.left_out, *plan.notes]
    if GPU.exists() and not any(path.rpartition(".")[2] == "dtype" for step in plan.steps for path in step.origins):
        lines.append(
            "dtype: not set, and every step computes in float32; on a GPU, `dtype: bfloat16` at the top of the config "
            "takes less memory and time"
        )
    for line in lines:
        console.print(f"  [yellow]note[/]: {escape(line)}", highlight=False)


def _print_changed_code(plan: Plan, store: Store) -> None:
    """Print which cached results were computed by other code of the same version, and what to do."""
    manifests = [(step, store.folder(step).manifest) for step in plan.steps]
    for line in [line for step, manifest in manifests if manifest for line in stale_code(step, manifest)]:
        console.print(f"  [yellow]code changed[/]: {escape(line)}", highlight=False)


def _warn_of_other_data(plan: Plan, store: Store) -> None:
    """Print a note if the run's name stood for other data or models so far: a name stands for one of them."""
    try:
        before = store.run(plan.name)
        changed = [
            step.name
            for step in plan.steps
            if reads_files(step.entry) and step.name in before and before[step.name]["key"] != step.key
        ]
    except (OSError, WinnowError, KeyError, TypeError):  # the run writes the links anew, or reports why it cannot
        return
    if changed:
        console.print(
            f"  [yellow]{escape(plan.name)} used another {' and '.join(changed)} before[/]; those results stay in the "
            "store, but this run no longer links to them, and unless another run does, `winnow gc` lists them. Use "
            "another --store to keep both",
            highlight=False,
        )


def _print_summary(store: Store, plans: list[Plan]) -> None:
    """Print what these runs achieved; the leaderboard has all runs of the store, to compare them."""
    of_these_runs = open_catalog(store, [plan.name for plan in plans])
    titles = {
        "leaderboard": "leaderboard: against the SFT policy's responses on held-out prompts, with 95 % intervals",
        "heldout": "trained models on held-out examples (token_accuracy: the ranker's A or B; longer_one: of the "
        "rule that the longer response is better)",
        "rejects": "rejected, by step and reason",
    }
    for name, title in titles.items():
        sql = queries.text(name)
        if (table := query(of_these_runs, sql)).num_rows:
            if name == "leaderboard":
                table = leaderboard_table(query(open_catalog(store), sql))
            console.print(as_table(table, title))
    for plan in plans:
        with suppress(WinnowError):  # a recipe without a policy of its own, or one that ends before
            console.print(
                f"policy of {plan.name}: {find_model(store, plan.name).location}", highlight=False, markup=False
            )
        for line in plan.left_out:
            console.print(f"[yellow]{escape(plan.name)}[/]: {escape(line)}", highlight=False)


def _print_next_commands(plan: Plan, recipe: str, configs: list[Path], sets: list[str], store: str) -> None:
    """Print commands that can be pasted as they are."""
    same = [word for path in configs for word in ("--config", str(path))]
    same += [word for item in sets if not item.startswith("select.rule") for word in ("--set", item)]
    at_store = ["--store", store]
    run = plan.name
    commands = {
        "everything about one prompt": ["trace", *at_store, "--", run] if run[0] == "-" else ["trace", run, *at_store],
        "a page about all runs": ["report", *at_store],
    }
    rules = [step.options["rule"] for step in plan.steps if step.entry.name == "select"]
    if any(rule.options.get("beta") for rule in rules):
        commands["what another beta would run"] = ["plan", recipe, *same, "--set", "select.rule.beta=0.1", *at_store]
    lines = [f"{resume.hint(*words)}  # {what}" for what, words in commands.items()]
    console.print("\n  ".join(["Next, for example:", *lines]), highlight=False, markup=False)
