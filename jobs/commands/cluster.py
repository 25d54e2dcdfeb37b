"""Commands for a Ray cluster: submit, logs, stop."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from jobs import bundle, recipes
from jobs.commands.app import (
    STORE,
    Configs,
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
    with_trackers,
)
from jobs.console import visible
from jobs.opponents import find_opponents
from jobs.resume import hint, without_force
from jobs.sweeps import plan_sweep
from pipeline.config.estimates import check_memory
from pipeline.config.partial import Part, followers, narrowed, unfinished
from pipeline.config.plan import Plan, Step
from pipeline.execution.ray_executor import check_fits
from pipeline.store.storage import parse_location
from pipeline.store.store import Store
from schemas import COMMAND, WinnowError

if TYPE_CHECKING:
    from jobs.ray_jobs import RayJobs

Address = Annotated[str | None, typer.Option(help="URL of the cluster's dashboard, like http://head:8265")]
JobName = Annotated[
    str, typer.Argument(help=f"a job's name, as `{COMMAND} submit` and `{COMMAND} status --address` print it")
]
NoWait = Annotated[bool, typer.Option("--no-wait", help="do not follow the job's log")]
RESUBMIT = "submitting the same again, without --force, continues from the finished parts"


def submit(
    recipe: Recipes,
    address: Address = None,
    configs: Configs = [],  # noqa: B006
    sets: Sets = [],  # noqa: B006
    plugins: Plugins = [],  # noqa: B006
    store: StorePath = STORE,
    profile: ProfileName = None,
    workers: Workers = None,
    run_name: Name = None,
    only: Only = None,
    until: Until = None,
    from_step: Onward = None,
    force: Force = None,
    track: Track = [],  # noqa: B006
    tags: Tags = [],  # noqa: B006
    over: Over = [],  # noqa: B006
    attach: Annotated[
        bool, typer.Option("--attach", help="follow the job that computes the same, if one is running")
    ] = False,
    no_wait: NoWait = False,
) -> None:
    """Run recipes on a Ray cluster, and follow the log. The cluster must see the data, models and store.

    With --over, the job is a sweep.
    """
    from jobs.ray_jobs import RayJobs

    # Everything that can be checked here is checked before the first request to the cluster.
    if attach and force:
        raise WinnowError(f"--attach --force {force}: a running job cannot be forced; omit one of them")
    if over and run_name is not None:
        raise WinnowError(f"--over --name {run_name}: a sweep names its runs; omit --name")
    sets = with_trackers(sets, track)
    parsed_tags(tags)
    part = Part(only, until, from_step, force)
    if over:
        plans = plan_sweep(recipe, configs, sets, over, part.last).plans
    else:
        plans = recipes.plans(recipe, configs, sets, run_name, part.last)
    find_opponents(plans, Store(store))
    parts = narrowed(plans, part)
    steps = unfinished_steps(parts, force, Store(store))
    bundle.check_paths(plans)
    resources = recipes.load_resources(profile)
    check_memory(plans, steps, resources, local=False)
    location = str(parse_location(store))
    resume = hint(*without_force(sys.argv[1:]))
    cluster = RayJobs(address)
    _say(f"cluster {cluster.url} ({cluster.source})")
    _say(f"store {location}")
    check_fits(resources, steps, cluster.nodes())

    # The job runs `winnow run`, or `sweep`, with these words, in a copy of what is packed here.
    names, plan = " ".join(recipes.recipe_path(name).stem for name in recipe), bundle.plan_key(parts)
    flags = [("--set", item) for item in sets] + [("--over", item) for item in over]
    flags += [("--tag", word) for word in tags]
    flags += [("--name", run_name)] if run_name is not None else []
    flags += [
        *part.options.items(),
        *([("--workers", str(workers))] if workers else []),
        ("--store", location),
        ("--address", "auto"),
    ]
    with TemporaryDirectory() as folder:
        packed = bundle.pack_submission(Path(folder), recipe, configs, profile)
        packed += bundle.plugin_words(Path(folder), plugins, plans)
        words = ["sweep" if over else "run", *packed, *(word for flag, value in flags for word in (flag, value))]
        name, running = cluster.submit(Path(folder), words, recipes=names, plan=plan, store=location, resume=resume)

    if running and not attach:
        stop_command = _command("stop", name, cluster)
        raise WinnowError(
            f"{name} computes this already ({running.status.lower()}); --attach follows it, `{stop_command}` stops it"
        )
    _say(f"job {name}")
    if no_wait:
        _say(f"`{_command('logs', name, cluster)}` follows it")
    else:
        forced = ", if the log says `will run again`; if not, nothing has been forced yet" if force else ""
        _follow(cluster, name, f"`{resume}` continues from the finished parts{forced}")


def logs(job: JobName, address: Address = None, no_wait: NoWait = False) -> None:
    """Print a job's log, and follow it to its end."""
    from jobs.ray_jobs import RayJobs

    cluster = RayJobs(address)
    name = str(cluster.job(job).submission_id)
    if no_wait:
        typer.echo(visible(cluster.log(name)), nl=False)
    else:
        _follow(cluster, name, RESUBMIT)


def stop(job: JobName, address: Address = None) -> None:
    """Stop a job; its finished parts are kept."""
    from jobs.ray_jobs import RayJobs

    ended = RayJobs(address).stop(job, _say)
    note = f"; its finished parts are kept; {RESUBMIT}" if ended.status == "STOPPED" else ""
    _say(f"{job}: {ended.status.lower()}{note}")


def unfinished_steps(parts: list[Plan], force: str | None, store: Store) -> list[Step]:
    """Return the steps that the job will run, to check their resources; the job itself looks again.

    If the store cannot be read from here, where its credentials need not be, these are all steps.
    """
    steps = [step for plan in parts for step in plan.steps_to_run]
    forced = {step.key for plan in parts for step in (followers(plan, force) if force else [])}
    try:
        missing = {step.key for step in unfinished(steps, store)}
    except (OSError, WinnowError):
        return steps
    return [step for step in steps if step.key in forced | missing]


def _follow(cluster: "RayJobs", name: str, advice: str) -> None:
    """Follow a job to its end, and exit with 1 unless it succeeds. Ctrl-C ends the following, not the job."""
    from jobs.ray_jobs import failure_reason

    try:
        job = cluster.follow(name, lambda text: typer.echo(visible(text), nl=False))
    except KeyboardInterrupt:
        _say(f"\n{name} continues; `{_command('logs', name, cluster)}` follows it, "
             f"`{_command('stop', name, cluster)}` stops it")  # fmt: skip
        raise typer.Exit(130) from None
    if job.status == "SUCCEEDED":
        milliseconds = (job.end_time or job.start_time or 0) - (job.start_time or 0)
        _say(f"{name}: succeeded in {milliseconds / 1000:,.0f} s")
        return
    _say(f"{name}: {job.status.lower()}{failure_reason(job)}; {advice}")
    raise typer.Exit(1)


def _command(verb: str, name: str, cluster: "RayJobs") -> str:
    return hint(verb, name, "--address", cluster.url)


def _say(text: str) -> None:
    console.print(text, highlight=False, markup=False)
