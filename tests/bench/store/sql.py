"""The queries that ship, over tens of millions of candidates, against the same text given to a bare DuckDB."""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs import queries
from pipeline.config.plan import Step
from pipeline.sql.catalog import open_catalog
from pipeline.sql.views import LIVE, run_rows, step_rows
from pipeline.store.store import Store, table_of
from schemas import TABLES
from schemas.tables import EVALUATIONS, METRICS, OUTCOMES, SPEEDS
from stages.evaluation.evaluate import METRICS as EVALUATION_METRICS
from tests.bench.page import spread
from tests.bench.store import Sizes
from tests.bench.store.model import Part, Tables, make_step, one_row, seal_step, split_evenly
from tests.bench.store.parts import Results, Row, Summary, Task, Verdict, failure, one_line, run_in_process

DRAWS = 64
HELDOUT_PROMPTS, HELDOUT_DRAWS = 500, 4
FULL_SIZE, MAX_RATIO = 1_000_000, 1.2
MIN_SECONDS = 0.05  # of a query that takes less, what is measured is the machine
SIDES = ("ours", "bare")
ENOUGH_SECONDS, MAX_RUNS = 3.0, 15  # a query is repeated until each side has taken so many seconds, or runs
RTOL, ATOL = 1e-9, 1e-12  # floats are equal within these: threads add up in any order
COSTS = {  # seconds of a run per million candidates, roughly, of queries that take long
    "best_of": 0.6,
    "duplicates": 0.5,
    "length_bias": 0.5,
    "ranker_agreement": 0.4,
    "reference_margin": 0.25,
    "reward_by_length": 0.8,
    "unpaired": 0.5,
}


def tasks(sizes: Sizes, folder: Path) -> Iterator[Task]:
    rows = sizes.prompts * DRAWS / 1e6
    yield Task(("sql", "made"), 6 * rows, partial(run_in_process, _write_store, folder, sizes))
    for name in queries.names():
        cost = 10 + 2 * (1 + sizes.repeats) * COSTS.get(name, 0.03) * rows
        yield Task(("sql", name), cost, partial(measure_query, folder, name, sizes.repeats))


def _write_store(folder: Path, sizes: Sizes) -> int:
    """Write the steps of one run and return the bytes of the store."""
    counts = list(split_evenly(sizes.prompts, sizes.parts))
    large = [Part(count, DRAWS, n) for n, count in enumerate(counts)]
    heldout, baseline = (Part(HELDOUT_PROMPTS, HELDOUT_DRAWS, 1_000_000, version) for version in (1, 2))

    def prompts(n: int) -> pa.Table:  # with the held-out ones in part 0
        tables = [large[n].prompt_table(), *([heldout.prompt_table("heldout")] if n == 0 else [])]
        return pa.concat_tables(tables)

    by = {"name": "brevity", "words": 1}
    steps: list[tuple[Step, Callable[[int], Tables]]] = [
        (make_step("prompts", sizes.parts), lambda n: {"prompts": prompts(n)}),
        (make_step("sample", sizes.parts), lambda n: {"candidates": large[n].candidates()}),
        (make_step("reward", sizes.parts, by=by), lambda n: {"rewards": large[n].rewards()}),
        (make_step("select", sizes.parts, rule="everything"), lambda n: {"selections": large[n].selections()}),
        (make_step("compare", sizes.parts), lambda n: {"comparisons": large[n].matches()["comparisons"]}),
        (make_step("pair", sizes.parts), lambda n: {"pairs": large[n].matches()["pairs"]}),
        (make_step("reference", sizes.parts), lambda n: {"reference": large[n].reference()}),
        (make_step("sample", 1, "eval_sample", seed=1), lambda n: {"candidates": heldout.candidates()}),
        (make_step("sample", 1, "eval_baseline", seed=2), lambda n: {"candidates": baseline.candidates()}),
        (make_step("optimize", 1, objective="nll", learning_rate=1e-6), lambda n: _training_tables()),
        (make_step("evaluate", 1), lambda n: _evaluation_tables(heldout.candidates(), baseline.candidates())),
    ]
    store = Store(folder)
    for step, tables_of in steps:
        seal_step(store, step, tables_of)
    store.link_run("bench", [step for step, _ in steps])
    return sum(sum(manifest["bytes"].values()) for manifest in store.sealed())


def _training_tables() -> Tables:
    """Return metrics and speeds of a hundred steps of training."""
    steps = range(1, 101)
    metrics = [one_row(METRICS, step=n, metric=name, value=1 / n) for n in steps for name in ("loss", "margin")]
    speeds = [one_row(SPEEDS, step=n, measure="tokens_per_second", value=1000.0) for n in steps]
    return {"metrics": pa.concat_tables(metrics), "speeds": pa.concat_tables(speeds)}


def _evaluation_tables(candidates: pa.Table, baseline: pa.Table) -> Tables:
    rng = np.random.default_rng(0)
    columns = {name: candidates[name] for name in ("prompt_id", "k", "candidate_id", "n_tokens")}
    columns["baseline_id"] = baseline["candidate_id"]
    for name in ("proxy_win", "gold_win", "gold", "gold_baseline", "kl"):
        columns[name] = pa.array(rng.random(candidates.num_rows))
    outcomes = pa.table([columns[name] for name in OUTCOMES.names], schema=OUTCOMES)
    interval = {"value": 0.5, "low": 0.4, "high": 0.6, "n": HELDOUT_PROMPTS}
    evaluations = pa.concat_tables([one_row(EVALUATIONS, metric=name, **interval) for name in EVALUATION_METRICS])
    return {"outcomes": outcomes, "evaluations": evaluations}


@dataclass(frozen=True)
class QueryTimes:
    """Seconds of each repeat, by side; `error`: what the answers differ in, or how the query failed."""

    seconds: dict[str, list[float]]
    rows: int
    error: str = ""

    @property
    def ratio(self) -> float:
        """Return median seconds of ours over those of the bare DuckDB."""
        ours, bare = (np.median(self.seconds[side]) for side in SIDES)
        return float(ours / bare)


def measure_query(folder: Path, name: str, repeats: int) -> QueryTimes:
    """Time a query in a process of its own; if it fails, return the error, so that the others are still measured."""
    try:
        times: QueryTimes = run_in_process(_alternate_sides, folder, name, repeats)
    except Exception as error:
        return QueryTimes({}, 0, one_line(error))
    return times


def _alternate_sides(folder: Path, name: str, repeats: int) -> QueryTimes:
    """Time both sides in turns, after a run of each that is not counted and whose answers are compared."""
    tempfile.tempdir = str(folder)  # where a catalog spills to: removed with the folder, however this process ends
    text, store = queries.text(name), Store(folder)
    ours, bare = (_time_query(side, store, text)[1] for side in SIDES)
    if error := difference(ours, bare):
        return QueryTimes({}, ours.num_rows, error)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    while not is_enough(seconds, repeats):
        for side in SIDES[:: 1 if len(seconds["ours"]) % 2 == 0 else -1]:
            seconds[side].append(_time_query(side, store, text)[0])
    return QueryTimes(seconds, ours.num_rows)


def is_enough(seconds: dict[str, list[float]], repeats: int) -> bool:
    runs = len(seconds["ours"])
    return runs >= MAX_RUNS or (runs >= repeats and all(sum(times) >= ENOUGH_SECONDS for times in seconds.values()))


def _time_query(side: str, store: Store, text: str) -> tuple[float, pa.Table]:
    """Return the seconds of a query whose views are open, and its answer.

    Each time in a DuckDB of its own, so that neither side works in memory that the other one has filled.
    """

    def clock(call: Callable[[], pa.Table]) -> tuple[float, pa.Table]:
        start = time.perf_counter()
        answer = call()
        return time.perf_counter() - start, answer

    if side == "ours":
        catalog = open_catalog(store)
        catalog.sql(text)  # opens the views that it names
        return clock(lambda: catalog.sql(text).arrow())
    with _open_bare(store, Path(tempfile.gettempdir()) / "spill") as connection:
        connection.sql(text)
        return clock(lambda: connection.sql(text).to_arrow_table())


def difference(ours: pa.Table, bare: pa.Table) -> str:
    """Return what two answers, rows in order, differ in, or an empty text."""
    if ours.shape != bare.shape:
        return f"{ours.shape} rows and columns against {bare.shape}"
    different = []
    for name, a, b in zip(ours.column_names, ours.columns, bare.columns, strict=True):
        is_equal = a.type == b.type
        if is_equal and pa.types.is_floating(a.type):
            x, y = (pc.fill_null(column, 0.0).to_numpy() for column in (a, b))
            is_equal = np.allclose(x, y, rtol=RTOL, atol=ATOL, equal_nan=True) and a.is_null().equals(b.is_null())
        elif is_equal:
            is_equal = a.equals(b)
        if not is_equal:
            different.append(name)
    return f"other values in {', '.join(different)}" if different else ""


def _open_bare(store: Store, spill: Path) -> duckdb.DuckDBPyConnection:
    """Open the store as one would by hand: a list of files for each step, and its stage and key beside them."""
    connection = duckdb.connect()
    connection.execute(f"SET temp_directory='{spill}'")
    manifests = store.sealed()
    for name, schema in TABLES.items():
        scans = []
        for manifest in manifests:
            files = [file["file"] for file in manifest["files"] if table_of(file) == name and file["rows"]]
            if files:
                paths = ", ".join(f"'{manifest['folder']}/{file}'" for file in files)
                columns = f"*, '{manifest['stage']}' AS stage, '{manifest['key']}' AS key"
                scans.append(f"SELECT {columns} FROM read_parquet([{paths}])")
        if scans:
            connection.execute(f"CREATE VIEW {name} AS {' UNION ALL '.join(scans)}")
        else:
            fields = [pa.field("stage", pa.string()), pa.field("key", pa.string())]
            connection.register(name, pa.schema([*schema, *fields]).empty_table())
    for name, schema in LIVE.items():  # of steps that run: here, none does
        connection.register(name, schema.empty_table())
    connection.register("runs", run_rows(store.runs()))
    connection.register("steps", step_rows(manifests))
    return connection


def summarize(sizes: Sizes, results: Results) -> Summary:
    times: dict[str, QueryTimes] = {name: results["sql", name] for name in queries.names()}

    # Verdict on the slowest of the queries that take long enough to measure
    sound = {name: query for name, query in times.items() if not query.error}
    ratios = {name: query.ratio for name, query in sound.items() if np.median(query.seconds["bare"]) >= MIN_SECONDS}
    worst = max(ratios, key=lambda name: ratios[name], default="none takes that long")
    what = (
        f"{len(ratios)} of {len(times)} queries take {MIN_SECONDS} s or more: the worst ({worst}) against bare DuckDB"
    )
    verdict = Verdict.at_most(what, ratios.get(worst, 0.0), MAX_RATIO, sizes.prompts == FULL_SIZE)
    failures = [failure(name, query.error) for name, query in times.items() if query.error]
    if failures and verdict.met:
        verdict = replace(verdict, measured=f"{len(failures)} queries failed", met=False)

    rows: list[Row] = []
    for name, query in times.items():
        row = {"query": name, "rows": f"{query.rows:,}", "runs": "0", "ours": "-", "bare": "-", "ours / bare": "failed"}
        if not query.error:  # seconds of different answers cannot be compared
            row |= {side: spread(query.seconds[side], 3) for side in SIDES}
            row |= {"runs": str(len(query.seconds["ours"])), "ours / bare": f"{query.ratio:.2f}"}
        rows.append(row)
    size = f"{sizes.prompts * DRAWS:,} candidates, {results['sql', 'made'] / 1e9:.1f} GB of Parquet"
    return Summary([verdict], {f"shipped queries on {size}: seconds": rows}, failures)
