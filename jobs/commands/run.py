"""Commands that compute: demo, plan, run, sweep, paper."""

import signal
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from jobs import queries, recipes, resume
from jobs.commands.app import (
    STORE,
    ClusterAddress,
    Configs,
    Executor,
    ExecutorName,
    Force,
    Name,
    Only,
    Onward,
    Over,
    Plugins,
    ProfileName,
    Recipes,
    Sets,
    StorePath,
    Tags,
    Track,
    Until,
    Workers,
    console,
    parsed_tags,
    print_tree,
    with_trackers,
)
from jobs.commands.query import print_judges, report
from jobs.console import ProgressReporter, as_table
from jobs.costs import cost_lines, cost_table, remaining_costs
from jobs.demo import OVERLAY, QUESTIONS, REAL, REWARD, SMALL, data, smollm2
from jobs.methods import make_leaderboard
from jobs.models import find_model, rendering
from jobs.runs import with_free_names
from jobs.sweeps import Sweep, plan_sweep, sweep_table
from jobs.tables import leaderboard_table, overruled, plan_tree
from pipeline.config.estimates import check_memory, step_costs
from pipeline.config.partial import Part, Rerun, rerun
from pipeline.config.plan import Plan, reads_files, stale_code
from pipeline.config.precision import float32_by_default
from pipeline.config.rounds import split_round
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.ray_executor import RayExecutor
from pipeline.execution.run import commit, groups_at_once, run_at_once
from pipeline.resources import Profile, visible_gpus
from pipeline.sql.catalog import open_catalog, query
from pipeline.store.store import Store
from schemas import WinnowError

GPU = Path("/dev/nvidiactl")  # exists where NVIDIA's driver is loaded
DEMO_RECIPES = ("sft", "dpo", "rso", "sft_sample_rank", "raft")  # which takes its draws from those of rso
REAL_RECIPES = ("rso", "raft")  # from the same candidates


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
        # The same methods from another start, at several times the cost.
        names = [name for name in names if not name.endswith("_pretrained")]
    if real:
        files, names, title = [REAL], list(REAL_RECIPES), "real"
    store, page = str(folder / title), folder / f"{'report' if title == 'store' else title}.html"
    contents = {file.name: file.read_bytes() for file in [*files, *([QUESTIONS, REWARD] if real else [])]}
    _write_new(folder, contents if real else contents | data.files(), [] if Path(store).exists() else [page])
    configs = [folder / file.name for file in files]
    if real:
        smollm2.write(folder / smollm2.NAME)
    plans = recipes.plans(names, configs, [])
    print_store(Store(store), with_free_names(plans, Store(store)))
    run_plans(plans, Store(store), LocalExecutor())
    _print_summary(Store(store), plans)
    if real:
        runs = [plan.name for plan in plans]
        for name, query_runs in (("gold", runs), ("responses", runs[:1])):
            result = query(open_catalog(Store(store), query_runs), queries.text(name))
            console.print(as_table(result, queries.about(name)))
    report(store, page)
    _print_next_commands(next(plan for plan in plans if plan.name == "rso"), "rso", configs, [], store)


def _write_new(folder: Path, contents: Mapping[str, bytes], others: Sequence[Path] = ()) -> None:
    """Write files that are not there yet. Raise WinnowError for one with other content, which may be a user's own.

    others: files that are written later, and are not to be there.
    """
    taken = [path for path in others if path.exists()]
    taken += [
        path for name, content in contents.items() if (path := folder / name).exists() and path.read_bytes() != content
    ]
    if taken:
        raise WinnowError(
            *(f"demo: {path} is there, with other content: move it away, or give another --folder" for path in taken)
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def plan(
    recipe: Recipes,
    configs: Configs = [],  # noqa: B006
    sets: Sets = [],  # noqa: B006
    plugins: Plugins = [],  # noqa: B006
    store: StorePath = STORE,
    name: Name = None,
    profile: ProfileName = None,
    options: Annotated[
        bool, typer.Option("--options", help="also each option that is not a default, and the file that it comes from")
    ] = False,
    over: Over = [],  # noqa: B006
    only: Only = None,
    until: Until = None,
    from_step: Onward = None,
    force: Force = None,
) -> None:
    """Print each recipe's tree of steps: keys, what is cached, what will run, why, and at what cost. Runs nothing.

    --only, --until, --from and --force are those of `run`, and what they would run is what is printed. With --over, a
    row per run of the sweep instead, and what all of them together would run.
    """
    part = Part(only, until, from_step, force)
    if over:
        if name is not None or options:
            raise WinnowError(
                f"--over {over[0]}: a sweep names its runs and prints no trees; omit --name and --options"
            )
        _print_sweep(plan_sweep(recipe, configs, sets, over, part.last), Store(store), part)
        return
    plans = recipes.plans(recipe, configs, sets, name, part.last)
    resources = recipes.load_resources(profile)
    problems: list[str] = []
    notes = with_free_names(plans, Store(store))
    selection = rerun(plans, Store(store), part)
    deleted, to_run = {stored.key for stored in selection.to_delete}, {step.key for step in selection.to_run()}
    print_store(Store(store), notes)
    for item in selection.plans:
        print_tree(plan_tree(item, Store(store), options, deleted))
        for line in overruled(item):
            console.print(f"  [dim]{escape(line)}[/]", highlight=False)
        costs = remaining_costs(step_costs(item, Store(store), resources, local=True), to_run)
        if costs:
            console.print(cost_table(costs))
            for line in cost_lines(costs):
                console.print(f"  [dim]{escape(line)}[/]", highlight=False)
        problems += [cost.problem for cost in costs if cost.problem]
        _print_notes(item)
        _print_changed_code(item, Store(store))
    if problems:
        raise WinnowError(*dict.fromkeys(problems))


def run(
    recipe: Recipes,
    configs: Configs = [],  # noqa: B006
    sets: Sets = [],  # noqa: B006
    plugins: Plugins = [],  # noqa: B006
    store: StorePath = STORE,
    executor: Executor = None,
    workers: Workers = None,
    address: ClusterAddress = None,
    profile: ProfileName = None,
    name: Name = None,
    only: Only = None,
    until: Until = None,
    from_step: Onward = None,
    force: Force = None,
    track: Track = [],  # noqa: B006
    tags: Tags = [],  # noqa: B006
) -> None:
    """Run the steps that the recipes need and the store lacks. All recipes are checked before anything runs."""
    check_executor_options(executor, workers, address)
    target = Store(store)
    part = Part(only, until, from_step, force)
    plans = recipes.plans(recipe, configs, with_trackers(sets, track), name, part.last)
    for item in plans:
        item.tags = parsed_tags(tags)
    notes = with_free_names(plans, target)
    selection = rerun(plans, target, part)
    _run_selection(selection, target, notes, make_executor(selection, executor, workers, address, profile))
    if address is None:  # else the reader may be on another machine, and the recipe here a copy (jobs/bundle.py)
        _print_next_commands(selection.plans[0], recipe[0], configs, sets, store, plugins)


def sweep(
    recipe: Recipes,
    over: Over = [],  # noqa: B006
    configs: Configs = [],  # noqa: B006
    sets: Sets = [],  # noqa: B006
    plugins: Plugins = [],  # noqa: B006
    store: StorePath = STORE,
    executor: Executor = None,
    workers: Workers = None,
    address: ClusterAddress = None,
    profile: ProfileName = None,
    only: Only = None,
    until: Until = None,
    from_step: Onward = None,
    force: Force = None,
    track: Track = [],  # noqa: B006
    tags: Tags = [],  # noqa: B006
) -> None:
    """Run recipes for each combination of --over values: what runs share is computed once, seeds are summarised."""
    check_executor_options(executor, workers, address)
    if not over:
        raise WinnowError("--over: not given; `--over optimize.seed=0,1,2` runs each recipe with three seeds")
    target = Store(store)
    part = Part(only, until, from_step, force)
    swept = plan_sweep(recipe, configs, with_trackers(sets, track), over, part.last)
    for item in swept.plans:
        item.tags = parsed_tags(tags)
    notes = [*with_free_names(swept.plans, target, swept.bases), *swept.notes]
    selection = rerun(swept.plans, target, part)
    _run_selection(selection, target, notes, make_executor(selection, executor, workers, address, profile))


def check_executor_options(executor: ExecutorName | None, workers: int | None, address: str | None) -> None:
    """Raise WinnowError for options of Ray without Ray, before anything else is read."""
    if address and executor is ExecutorName.in_process:
        raise WinnowError(f"--executor in-process --address {address}: only Ray has an address; omit one of them")
    if workers and not (address or executor is ExecutorName.ray):
        raise WinnowError(f"--workers {workers}: only Ray has workers; add `--executor ray`, or omit it")


def make_executor(
    selection: Rerun, name: ExecutorName | None, workers: int | None, address: str | None, profile: str | None
) -> LocalExecutor:
    """Return the executor that a command names. Raise WinnowError if a cluster cannot run what is selected."""
    resources = recipes.load_resources(profile)
    check_memory(selection.plans, selection.to_run(), resources, local=address is None)
    if name is ExecutorName.ray or address:
        executor = RayExecutor(workers, address, resources)
        selection.store.check()
        executor.check(selection.to_run())
        return executor
    if profile:
        console.print(
            f"  [yellow]note[/]: --profile {escape(profile)}: in this process only `tensor_parallel` and `gpus` of it "
            "are read, and the memory that a step may take; add `--executor ray` for its workers, CPUs and GPUs",
            highlight=False,
        )
    elif (gpus := visible_gpus()) > 1:
        console.print(
            f"  [yellow]note[/]: of {gpus} GPUs, this process computes on one; `--executor ray` takes all of them, for "
            "the parts of a step and for runs that are at work at once",
            highlight=False,
        )
    return LocalExecutor(resources)


def _run_selection(selection: Rerun, store: Store, notes: list[str], executor: LocalExecutor) -> None:
    """Delete what is computed again, only now that all checks are over; run; print what was achieved."""
    print_store(store, notes)
    for step in selection.to_delete:
        console.print(f"[yellow]will run again[/]: {step.stage} [dim]{step.key}[/]", highlight=False)
    selection.delete()
    run_plans(selection.plans, store, executor)
    _print_summary(store, selection.plans)


def paper(
    configs: Configs = [],  # noqa: B006
    sets: Sets = [],  # noqa: B006
    plugins: Plugins = [],  # noqa: B006
    store: StorePath = STORE,
    gamma: Annotated[float, typer.Option(help="factor of the log-ratio in the pair losses; paper: 0.05")] = 1.0,
    against: Annotated[
        Literal["target", "sft"], typer.Option(help="win rates against the data's target texts, or the SFT policy's")
    ] = "target",
    executor: Executor = None,
    workers: Workers = None,
    address: ClusterAddress = None,
    profile: ProfileName = None,
) -> None:
    """Reproduce tables 1 and 2 of the RSO paper on your data: every cell trained and judged, beside the paper's."""
    from jobs.paper import paper_plans, tables

    check_executor_options(executor, workers, address)
    plans, target = paper_plans(configs, sets, gamma, against), Store(store)
    cell_runs = [plan.name for plan in plans]
    # With another --gamma, `paper-2 ...` beside the runs of before.
    print_store(target, with_free_names(plans, target, dict.fromkeys(cell_runs, "paper")))
    run_plans(plans, target, make_executor(rerun(plans, target), executor, workers, address, profile))
    names = dict(zip(cell_runs, (plan.name for plan in plans), strict=True))
    for title, table in tables(target, names):
        console.print(as_table(table, title))


def run_plans(plans: list[Plan], store: Store, executor: LocalExecutor) -> None:
    reporter = ProgressReporter(console)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, reporter.interrupt)
    resume.started = True
    try:
        with closing(reporter):
            for group in groups_at_once(plans, executor):
                for plan in group:
                    console.print(f"[bold]{escape(plan.name)}[/]", highlight=False)
                    _print_notes(plan, executor.profile)
                    _warn_of_other_data(plan, store)
                    _print_changed_code(plan, store)
                    plan.command = resume.recorded_command()
                reporter.set_plans(group)
                run_at_once(group, store, executor, reporter)
    except KeyboardInterrupt:
        raise SystemExit(128 + (reporter.interrupted or signal.SIGINT)) from None
    resume.started = False


def print_store(store: Store, notes: list[str]) -> None:
    console.print(f"store {store.root}", style="dim", highlight=False, markup=False)
    for line in notes:
        console.print(f"  [yellow]note[/]: {escape(line)}", highlight=False)


def _print_sweep(swept: Sweep, store: Store, part: Part) -> None:
    """Print a row per run of a sweep, and how much of it is computed once."""
    print_store(store, [*with_free_names(swept.plans, store, swept.bases), *swept.notes])
    selection = rerun(swept.plans, store, part)
    to_run = {step.key for step in selection.to_run()}
    console.print(as_table(sweep_table(selection.plans, store, to_run)))
    steps = [step for plan in selection.plans for step in plan.steps_to_run]
    different = {step.key for step in steps}
    console.print(
        f"{len(selection.plans)} runs of {len(steps)} steps: {len(different)} different ones, of which "
        f"{len(different) - len(to_run)} are cached and {len(to_run)} will run",
        highlight=False,
    )
    for line in dict.fromkeys(line for plan in swept.plans for line in (*plan.left_out, *plan.notes)):
        console.print(f"  [yellow]note[/]: {escape(line)}", highlight=False)


def _print_notes(plan: Plan, profile: Profile = Profile()) -> None:  # noqa: B008 - frozen
    lines = [*plan.left_out, *plan.notes]
    slow = {
        split_round(step.name)[0]: None
        for step in plan.steps
        if (GPU.exists() or profile.of(step.entry.name).gpus) and float32_by_default(step.options, step.origins)
    }
    if slow and not any(note.startswith("dtype:") for note in plan.notes):  # else those steps are named there
        lines.append(
            f"dtype: not set for {', '.join(slow)}, which compute in float32, the default on every machine; on a GPU, "
            "`dtype: bfloat16` at the top of the config takes less memory and a small part of the time"
        )
    for line in lines:
        console.print(f"  [yellow]note[/]: {escape(line)}", highlight=False)


def _print_changed_code(plan: Plan, store: Store) -> None:
    """Print which cached results were computed by other code of the same version, and what to do."""
    code = commit()
    is_known = code is not None and not code.endswith("+")
    manifests = [(step, store.folder(step).manifest) for step in plan.steps]
    # Of the same commit there is nothing to compare, and to digest the sources of a plan takes half a second.
    others = [(step, past) for step, past in manifests if past and not (is_known and past["commit"] == code)]
    for line in [line for step, past in others for line in stale_code(step, past)]:
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
    catalog = open_catalog(store)
    of_these_runs = catalog.for_run([plan.name for plan in plans])
    titles = {
        "leaderboard": "leaderboard: against the SFT policy's responses on held-out prompts, with 95 % intervals",
        "heldout": "trained models on held-out examples (token_accuracy: the ranker's A or B; longer_one: of the "
        "rule that the longer response is better)",
        "rejects": "rejected, by step and reason",
    }
    for name, title in titles.items():
        sql = queries.text(name)
        if (table := query(of_these_runs, sql)).num_rows:
            lines: list[str] = []
            if name == "leaderboard":
                board, lines = make_leaderboard(catalog)
                table = leaderboard_table(board)
            console.print(as_table(table, title))
            for line in lines:
                console.print(line, highlight=False, markup=False)
            if name == "leaderboard":
                print_judges(of_these_runs)
    for plan in plans:
        with suppress(WinnowError):  # a recipe without a policy of its own, or one that ends before
            policy = find_model(store, plan.name)
            for line in (f"policy of {plan.name}: {policy.location}", *rendering(policy)):
                console.print(line, highlight=False, markup=False)
        for line in plan.left_out:
            console.print(f"[yellow]{escape(plan.name)}[/]: {escape(line)}", highlight=False)


def _print_next_commands(
    plan: Plan, recipe: str, configs: list[Path], sets: list[str], store: str, plugins: Sequence[Path] = ()
) -> None:
    """Print commands that can be pasted as they are."""
    same = [word for path in configs for word in ("--config", str(path))]
    same += [word for path in plugins for word in ("--plugin", str(path))]
    same += [word for item in sets if not item.startswith("select.rule") for word in ("--set", item)]
    at_store = ["--store", store]
    run = plan.name
    commands = {
        "everything about one prompt": ["trace", *at_store, "--", run] if run[0] == "-" else ["trace", run, *at_store],
        "a page about all runs": ["report", *at_store],
    }
    rules = [step.options["rule"] for step in plan.steps if step.entry.name == "select"]
    if betas := {rule.options["beta"] for rule in rules if rule.options.get("beta")}:
        other = 10 * max(betas) if 0.1 in betas else 0.1
        commands["what another beta would run"] = [
            "plan", recipe, *same, "--set", f"select.rule.beta={other}", *at_store
        ]  # fmt: skip
    lines = [f"{resume.hint(*words)}  # {what}" for what, words in commands.items()]
    console.print("\n  ".join(["Next, for example:", *lines]), highlight=False, markup=False)
