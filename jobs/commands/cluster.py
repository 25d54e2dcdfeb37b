"""Commands for a Ray cluster: submit, logs, stop."""

import shlex
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from jobs import profiles, recipes
from jobs.commands.app import STORE, On, ProfileName, Recipes, Sets, StorePath, Workers, app, console
from pipeline.executors import check_fits
from pipeline.places import place_of
from schemas import WinnowError

if TYPE_CHECKING:
    from jobs.submit import Cluster, Job

Address = Annotated[str | None, typer.Option(help="URL of the cluster's dashboard, like http://head:8265")]
Name = Annotated[str, typer.Argument(help="a job's name, as `winnow submit` and `winnow status --address` print it")]
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
    attach: Annotated[
        bool, typer.Option("--attach", help="follow the job that makes this already, if there is one")
    ] = False,
    no_wait: NoWait = False,
) -> None:
    """Run recipes on a Ray cluster, and follow. Data, models and the store must lie where the cluster sees them."""
    from jobs import shipment
    from jobs.submit import Cluster

    plans = recipes.plans(recipe, on, sets)
    shipment.check_paths(plans)
    given = profiles.load(profile)
    cluster = Cluster(address)
    _say(f"cluster {cluster.url} ({cluster.source})")
    check_fits(given, plans, cluster.nodes())
    plan, place = shipment.plan_key(plans), str(place_of(store))
    again = f"winnow {shlex.join(sys.argv[1:])}"
    if job := cluster.at_work(plan, place):
        if not attach:
            raise WinnowError(
                f"{job.name} makes this already ({job.status.lower()}); --attach follows it, and "
                f"`{_command('stop', job.name, cluster)}` stops it"
            )
        name = job.name
    else:
        options = [word for item in sets for word in ("--set", item)] + ["--workers", str(workers)]
        with TemporaryDirectory() as scratch:
            shipped = shipment.pack(Path(scratch), recipe, on, profile)
            words = ["run", *shipped, *options, "--store", place, "--address", "auto"]
            called = " ".join(recipes.recipe_path(each).stem for each in recipe)
            name = cluster.submit(Path(scratch), words, recipes=called, plan=plan, store=place, again=again)
    _say(f"job {name}")
    if no_wait:
        _say(f"`{_command('logs', name, cluster)}` follows it")
    else:
        _follow(cluster, name, f"`{again}`")


@app.command()
def logs(job: Name, address: Address = None, no_wait: NoWait = False) -> None:
    """Print a job's log, and follow it to its end."""
    from jobs.submit import Cluster

    cluster = Cluster(address)
    if no_wait:
        typer.echo(cluster.log(cluster.job(job).name), nl=False)
    else:
        _follow(cluster, cluster.job(job).name, "submitting the same again")


@app.command()
def stop(job: Name, address: Address = None) -> None:
    """Stop a job; its finished parts are kept."""
    from jobs.submit import Cluster

    ended = Cluster(address).stop(job)
    kept = "; its finished parts are kept, and submitting the same again goes on from them"
    _say(f"{job}: {ended.status.lower()}{kept if ended.status == 'STOPPED' else ''}")


def _follow(cluster: "Cluster", name: str, again: str) -> None:
    """To the end, which is ours where it is not success; ctrl-c ends the following alone."""
    try:
        job = cluster.follow(name, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        _say(f"\n{name} goes on; `{_command('logs', name, cluster)}` follows it, "
             f"`{_command('stop', name, cluster)}` stops it")  # fmt: skip
        raise typer.Exit(1) from None
    if job.status == "SUCCEEDED":
        _say(f"{name}: succeeded in {(job.ended or job.started) - job.started:,.0f} s")
        return
    _say(f"{name}: {job.status.lower()}{_why(job)}; {again} goes on from the finished parts")
    raise typer.Exit(1)


def _why(job: "Job") -> str:
    """What its log does not say."""
    if job.exit == 127:
        return ": no python3 there; start Ray from its environment, activated"
    lines = job.message.strip().splitlines()
    return f": {lines[-1]}" if job.exit is None and job.status == "FAILED" and lines else ""


def _command(verb: str, name: str, cluster: "Cluster") -> str:
    return f"winnow {verb} {name} --address {cluster.url}"


def _say(text: str) -> None:
    console.print(text, highlight=False, markup=False)
