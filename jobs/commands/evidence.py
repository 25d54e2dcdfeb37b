"""Command that draws the figures of the field on the user's own configuration."""

import shlex
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import typer

from jobs.commands.app import (
    STORE,
    ClusterAddress,
    Configs,
    Executor,
    Plugins,
    ProfileName,
    Sets,
    StorePath,
    Workers,
    console,
)
from jobs.commands.run import check_executor_options, make_executor, print_store, run_plans
from jobs.console import as_table
from jobs.runs import with_free_names
from pipeline.config.partial import rerun
from pipeline.config.plan import merged_warnings
from pipeline.execution.run import commit
from pipeline.registry import nearest
from pipeline.store.store import Store
from schemas import COMMAND, WinnowError


def evidence(
    configs: Configs = [],  # noqa: B006
    sets: Sets = [],  # noqa: B006
    plugins: Plugins = [],  # noqa: B006
    store: StorePath = STORE,
    small: Annotated[bool, typer.Option("--small", help="fewer points and seeds: a sixth of the time")] = False,
    names: Annotated[list[str], typer.Option("--figure", help="this figure; may be repeated; all by default")] = [],  # noqa: B006
    other_prompts: Annotated[
        Path | None, typer.Option(help="file of prompts from another distribution, for the figure other-prompts")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for the page, pictures and tables")] = Path("evidence"),
    plan_only: Annotated[
        bool, typer.Option("--plan", help="print what would run and for how long; run nothing")
    ] = False,
    finished_only: Annotated[
        bool, typer.Option("--finished", help="draw what the store has finished; run nothing")
    ] = False,
    executor: Executor = None,
    workers: Workers = None,
    address: ClusterAddress = None,
    profile: ProfileName = None,
) -> None:
    """Draw the field's figures on your data: over-optimisation, equal KL, n, betas, compute, rankers, other prompts.

    Every point is an ordinary run of a recipe in the store: what is finished is not computed again, and a killed
    command goes on where it was. The page is written anew after each figure; on Ray, the runs of a figure are at once.
    """
    from jobs.evidence.figures import FIGURES, SCALES, make_basis
    from jobs.evidence.measure import different_plans, figure_costs, plan_figure
    from jobs.evidence.page import write_evidence

    if unknown := [name for name in names if name not in FIGURES]:
        raise WinnowError(f"--figure {unknown[0]}: unknown; {nearest(unknown[0], list(FIGURES))}")
    if other_prompts is not None and not other_prompts.is_file():
        raise WinnowError(f"--other-prompts {other_prompts}: no such file")
    check_executor_options(executor, workers, address)
    if plan_only and finished_only:
        raise WinnowError("--plan --finished: one prints and one draws; omit one of them")
    basis = make_basis(configs, sets, SCALES["small" if small else "full"], other_prompts)
    with merged_warnings():
        figures = [plan_figure(basis, figure) for name, figure in FIGURES.items() if not names or name in names]
    target = Store(store)
    without_judges = ["judges: left out of the figures, which are of gold and proxy"] if basis.overlay else []
    left_out = [f"{figure.figure.name}: {line}" for figure in figures for line in figure.left_out]
    # Other options make other runs beside those of before; one number for all, since the figures are of one command.
    plans = [plan for figure in figures for plan in figure.plans]
    bases = dict.fromkeys((plan.name for plan in plans), "evidence")
    renamed = [] if finished_only else with_free_names(plans, target, bases)
    print_store(target, [*without_judges, *left_out, *renamed])

    # What it will cost: each step with the first figure that needs it.
    if not finished_only:
        costs = figure_costs(figures, target)
        rows = [
            {"figure": cost.name, "policies": cost.policies, "steps to run": cost.steps, "seconds": round(cost.seconds)}
            for cost in costs
        ]
        console.print(as_table(pa.Table.from_pylist(rows), "what will run, each step once, at this store's rates"))
        unpriced = ", ".join(dict.fromkeys(stage for cost in costs for stage in cost.unknown))
        beside = f"; beside it {unpriced}, of which nothing like it has finished here" if unpriced else ""
        total = sum(cost.seconds for cost in costs)
        console.print(f"about {total / 60:.0f} min in all{beside}", highlight=False)
        if problems := [problem for cost in costs for problem in cost.problems]:
            raise WinnowError(*dict.fromkeys(problems))
    if plan_only:
        return

    words = [word for path in configs for word in ("--config", str(path))]
    words += [word for path in plugins for word in ("--plugin", str(path))]
    words += [word for text in sets for word in ("--set", text)] + (["--small"] if small else [])
    words += [word for name in names for word in ("--figure", name)]
    words += ["--other-prompts", str(other_prompts)] if other_prompts else []
    words += ["--finished"] if finished_only else []
    command = shlex.join([COMMAND, "evidence", *words, "--store", store])  # as anyone would call it
    if finished_only:
        written = write_evidence(figures, basis, target, out, command, commit() or "unknown")
    else:
        chosen = make_executor(rerun(plans, target), executor, workers, address, profile)
        for planned in figures:
            run_plans(different_plans([planned]), target, chosen)
            written = write_evidence(figures, basis, target, out, command, commit() or "unknown")
    console.print(f"wrote {written[0]} and {len(written) - 1} files beside it", highlight=False, markup=False)
