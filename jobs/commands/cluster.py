"""Commands for a Ray cluster: submit, logs, stop."""

import shlex
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from jobs import profiles, recipes
from jobs.commands.app import (
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
from jobs.resume import unforced
from pipeline.config.partial import followers, narrowed, unsealed
from pipeline.config.plan import Plan, Step
from pipeline.execution.ray_executor import check_fits
from pipeline.store.storage import parse_location
from pipeline.store.store import Store
from schemas import WinnowError

if TYPE_CHECKING:
    from jobs.submit import Cluster, Job

Address = Annotated[str | None, typer.Option(help="URL of the cluster's dashboard, like http://head:8265")]
Name = Annotated[str, typer.Argument(help="a job's name, as `winnow submit` and `winnow status --address` print it")]
GOES_ON = "submitting the same again, without --force, goes on from what is finished"
NoWait = Annotated[bool, typer.Option("--no-wait", help="do not follow the job's log")]


@app.command()
def submit(
    recipe: Recipes,
    address: Address = None,
    on: On = [],  # noqa: B006
    sets: Sets = [],  # noqa: B006
    store: StorePath = STORE,
    profile: ProfileName = None,
    workers: Workers = 2,
    only: Only = None,
    onward: Onward = None,
    force: Force = None,
    attach: Annotated[
        bool, typer.Option("--attach", help="follow the job that makes this already, if there is one")
    ] = False,
    no_wait: NoWait = False,
) -> None:
    """Run recipes on a Ray cluster, and follow. Data, models and the store must lie where the cluster sees them."""
    from jobs import bundle as shipment
    from jobs.submit import Cluster

    plans = recipes.plans(recipe, on, sets)
    if attach and force:
        raise WinnowError(f"--attach --force {force}: what is at work already forces nothing; leave one of them out")
    parts = narrowed(plans, only, onward, force)
    steps = to_make(parts, force, Store(store))
    shipment.check_paths(plans)
    given = profiles.load(profile)
    cluster = Cluster(address)
    place, again = str(parse_location(store)), shlex.join(["winnow", *unforced(sys.argv[1:])])
    _say(f"cluster {cluster.url} ({cluster.source})")
    _say(f"store {place}")
    check_fits(given, steps, cluster.nodes())
    called, plan = " ".join(recipes.recipe_path(each).stem for each in recipe), shipment.plan_key(parts)
    told = [("--set", item) for item in sets] + [("--only", only), ("--from", onward), ("--force", force)]
    told += [("--workers", str(workers)), ("--store", place), ("--address", "auto")]
    with TemporaryDirectory() as scratch:
        shipped = shipment.pack(Path(scratch), recipe, on, profile)
        words = ["run", *shipped, *(word for option, value in told if value for word in (option, value))]
        name, busy = cluster.submit(Path(scratch), words, recipes=called, plan=plan, store=place, again=again)
    if busy and not attach:
        stops = _command("stop", name, cluster)
        raise WinnowError(f"{name} makes this already ({busy.status.lower()}); --attach follows it, `{stops}` stops it")
    _say(f"job {name}")
    if no_wait:
        _say(f"`{_command('logs', name, cluster)}` follows it")
    else:
        begun = ", if `made again` stands above; if not, nothing was forced yet" if force else ""
        _follow(cluster, name, f"`{again}` goes on from the finished parts{begun}")


def to_make(parts: list[Plan], force: str | None, store: Store) -> list[Step]:
    """As far as the store can be seen from here, where its credentials need not be; the job looks again."""
    steps = [step for plan in parts for step in plan.wanted]
    again = {step.key for plan in parts for step in (followers(plan, force) if force else [])}
    try:
        lacking = {step.key for step in unsealed(steps, store)}
    except (OSError, WinnowError):
        return steps
    return [step for step in steps if step.key in again | lacking]


@app.command()
def logs(job: Name, address: Address = None, no_wait: NoWait = False) -> None:
    """Print a job's log, and follow it to its end."""
    from jobs.submit import Cluster

    cluster = Cluster(address)
    if no_wait:
        typer.echo(cluster.log(cluster.job(job).name), nl=False)
    else:
        _follow(cluster, cluster.job(job).name, GOES_ON)


@app.command()
def stop(job: Name, address: Address = None) -> None:
    """Stop a job; its finished parts are kept."""
    from jobs.submit import Cluster

    ended = Cluster(address).stop(job, _say)
    kept = f"; its finished parts are kept; {GOES_ON}" if ended.status == "STOPPED" else ""
    _say(f"{job}: {ended.status.lower()}{kept}")


def _follow(cluster: "Cluster", name: str, again: str) -> None:
    """To the end, which is ours where it is not success; ctrl-c ends the following alone."""
    try:
        job = cluster.follow(name, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        _say(f"\n{name} goes on; `{_command('logs', name, cluster)}` follows it, "
             f"`{_command('stop', name, cluster)}` stops it")  # fmt: skip
        raise typer.Exit(130) from None
    if job.status == "SUCCEEDED":
        _say(f"{name}: succeeded in {(job.ended or job.started) - job.started:,.0f} s")
        return
    _say(f"{name}: {job.status.lower()}{_why(job)}; {again}")
    raise typer.Exit(1)


def _why(job: "Job") -> str:
    """What its log does not say."""
    if job.exit is None:
        return f": {job.message}" if job.status == "FAILED" and job.message else ""
    if job.exit == 127:
        return ": no python3 there; start Ray from its environment, activated"
    number = -job.exit if job.exit < 0 else job.exit - 128  # of a process of Ray's, or of a shell's
    if number not in signal.valid_signals():
        return ""
    return f": killed by signal {number}{' (out of memory?)' if number == signal.SIGKILL else ''}"


def _command(verb: str, name: str, cluster: "Cluster") -> str:
    return shlex.join(["winnow", verb, name, "--address", cluster.url])


def _say(text: str) -> None:
    console.print(text, highlight=False, markup=False)
