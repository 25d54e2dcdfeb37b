"""The queries that ship, over tens of millions of candidates, beside the same text given to a bare DuckDB."""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs import queries
from pipeline.config.plan import Step
from pipeline.sql.catalog import open_catalog
from pipeline.sql.views import run_rows, step_rows
from pipeline.store.store import Json, Store, table_of
from schemas import TABLES
from schemas.tables import EVALUATIONS, METRICS, OUTCOMES, SPEEDS
from stages.evaluation.evaluate import METRICS as MEASURES
from tests.bench.page import spread
from tests.bench.store import Sizes
from tests.bench.store.model import Part, Tables, a_row, seal, shares, step
from tests.bench.store.parts import Found, Row, Task, Told, Verdict, apart, failure, one_line

DRAWS = 64
HELDOUT, EVALUATED = 500, 4  # prompts, and responses of each
ASKED, SLOWER = 1_000_000, 1.2
LEAST = 0.05  # seconds; of a query that takes less, what is measured is the machine
SIDES = ("ours", "bare")
WHOLE, MOST = 3.0, 15  # a query is repeated until each side has so many seconds, or runs
CLOSE, ZERO = 1e-9, 1e-12  # floats are alike within this share, or this: threads add up in any order
COSTS = {  # seconds of a run per million candidates, about, where it is long
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
    yield Task(("sql", "made"), 6 * rows, partial(apart, _make, folder, sizes))
    for name in queries.names():
        cost = 10 + 2 * (1 + sizes.repeats) * COSTS.get(name, 0.03) * rows
        yield Task(("sql", name), cost, partial(_asked, folder, name, sizes.repeats))


@dataclass
class World:
    """Steps of one run, and the tables of each part."""

    sizes: Sizes
    steps: list[tuple[str, Step, Callable[[int], Tables]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        counts = list(shares(self.sizes.prompts, self.sizes.parts))
        large = [Part(count, DRAWS, n) for n, count in enumerate(counts)]
        self._put("prompts", "prompts", lambda n: {"prompts": _prompts(large[n], n)})
        self._put("sample", "sample", lambda n: {"candidates": large[n].candidates()})
        self._put("reward", "reward", lambda n: {"rewards": large[n].rewards()}, by={"name": "brevity", "words": 1})
        self._put("select", "select", lambda n: {"selections": large[n].selections()}, rule="everything")
        self._put("compare", "compare", lambda n: {"comparisons": large[n].matches()["comparisons"]})
        self._put("pair", "pair", lambda n: {"pairs": large[n].matches()["pairs"]})
        self._put("reference", "reference", lambda n: {"reference": large[n].reference()})
        for seed, name in enumerate(("eval_sample", "eval_baseline"), 1):
            self._put(name, "sample", partial(_drawn, seed), seed=seed, split="heldout")
        self._put("optimize", "optimize", _trained, objective="nll", learning_rate=1e-6)
        self._put("evaluate", "evaluate", _evaluated)

    def _put(self, name: str, stage: str, tables: Callable[[int], Tables], **options: Any) -> None:
        parts = self.sizes.parts if name in LARGE else 1
        self.steps.append((name, step(stage, parts, name, **options), tables))


LARGE = ("prompts", "sample", "reward", "select", "compare", "pair", "reference")


def _prompts(part: Part, number: int) -> pa.Table:
    """With those held out in part 0."""
    heldout = _heldout(0).about_prompts("heldout")
    return pa.concat_tables([part.about_prompts(), heldout]) if number == 0 else part.about_prompts()


def _heldout(again: int) -> Part:
    return Part(HELDOUT, EVALUATED, 1_000_000, again)


def _drawn(again: int, part: int) -> Tables:
    return {"candidates": _heldout(again).candidates()}


def _trained(part: int) -> Tables:
    """A hundred steps of training."""
    metrics = [a_row(METRICS, step=n, metric=name, value=1 / n) for n in range(1, 101) for name in ("loss", "margin")]
    speeds = [a_row(SPEEDS, step=n, measure="tokens_per_second", value=1000.0) for n in range(1, 101)]
    return {"metrics": pa.concat_tables(metrics), "speeds": pa.concat_tables(speeds)}


def _evaluated(part: int) -> Tables:
    own, base = (_drawn(seed, 0)["candidates"] for seed in (1, 2))
    rng = np.random.default_rng(0)
    numbers = {name: rng.random(own.num_rows) for name in ("proxy_win", "gold_win", "gold", "gold_baseline", "kl")}
    columns = {name: own[name] for name in ("prompt_id", "k", "candidate_id", "n_tokens")}
    columns |= {name: pa.array(values) for name, values in numbers.items()} | {"baseline_id": base["candidate_id"]}
    outcomes = pa.table([columns[name] for name in OUTCOMES.names], schema=OUTCOMES)
    made = [a_row(EVALUATIONS, metric=name, value=0.5, low=0.4, high=0.6, n=HELDOUT) for name in MEASURES]
    return {"outcomes": outcomes, "evaluations": pa.concat_tables(made)}


def _make(folder: Path, sizes: Sizes) -> int:
    """Returns the bytes of the store."""
    import stages.all  # noqa: F401 - registers every stage

    store, world = Store(folder), World(sizes)
    for _, made, tables in world.steps:
        seal(store, made, tables)
    store.link_run("bench", [made for _, made, _ in world.steps])
    return sum(sum(manifest["bytes"].values()) for manifest in store.sealed())


@dataclass(frozen=True)
class Both:
    """Seconds of each repeat, by side; `wrong`: what the answers differ in, or how the query failed."""

    seconds: dict[str, list[float]]
    rows: int
    wrong: str = ""


def _asked(folder: Path, name: str, repeats: int) -> Both:
    """A query that fails is no reason not to ask the others."""
    try:
        both: Both = apart(_both, folder, name, repeats)
    except Exception as error:
        return Both({}, 0, one_line(error))
    return both


def _both(folder: Path, name: str, repeats: int) -> Both:
    """After a run of each that is not counted, whose answers are compared, the sides alternate."""
    tempfile.tempdir = str(folder)  # where a catalog spills to: gone with the folder, however this process ends
    text, store = queries.text(name), Store(folder)
    ours, bare = (_timed(side, store, text)[1] for side in SIDES)
    if differs := difference(ours, bare):
        return Both({}, ours.num_rows, differs)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    while not _enough(seconds, repeats):
        for side in SIDES[:: 1 if len(seconds["ours"]) % 2 == 0 else -1]:
            seconds[side].append(_timed(side, store, text)[0])
    return Both(seconds, ours.num_rows)


def _enough(seconds: dict[str, list[float]], least: int) -> bool:
    runs = len(seconds["ours"])
    return runs >= MOST or (runs >= least and all(sum(each) >= WHOLE for each in seconds.values()))


def _timed(side: str, store: Store, text: str) -> tuple[float, pa.Table]:
    """Seconds of the query, views open, and its answer.

    Each time in a DuckDB of its own, so that neither side works in memory that the other one has filled.
    """
    if side == "ours":
        catalog = open_catalog(store)
        catalog.sql(text)  # opens the views that it names
        return _clocked(lambda: catalog.sql(text).arrow())
    with _bare(store, Path(tempfile.gettempdir()) / "spill") as connection:
        connection.sql(text)
        return _clocked(lambda: connection.sql(text).to_arrow_table())


def _clocked(call: Callable[[], pa.Table]) -> tuple[float, pa.Table]:
    start = time.perf_counter()
    answer = call()
    return time.perf_counter() - start, answer


def difference(ours: pa.Table, bare: pa.Table) -> str:
    """What two answers in order differ in, or nothing."""
    if ours.shape != bare.shape:
        return f"{ours.shape} rows and columns against {bare.shape}"
    pairs = zip(ours.column_names, ours.columns, bare.columns, strict=True)
    differ = [name for name, own, other in pairs if not _alike(own, other)]
    return f"other values in {', '.join(differ)}" if differ else ""


def _alike(own: pa.ChunkedArray, other: pa.ChunkedArray) -> bool:
    if own.type != other.type:
        return False
    if not pa.types.is_floating(own.type):
        return bool(own.equals(other))
    a, b = (pc.fill_null(each, 0.0).to_numpy() for each in (own, other))
    same = np.allclose(a, b, rtol=CLOSE, atol=ZERO, equal_nan=True)
    return bool(same and own.is_null().equals(other.is_null()))


def _bare(store: Store, spill: Path) -> duckdb.DuckDBPyConnection:
    """As one would write it by hand: a list of files for each step, and its stage and key beside them."""
    connection = duckdb.connect()
    connection.execute(f"SET temp_directory='{spill}'")
    manifests = store.sealed()
    for name in TABLES:
        files = (
            (made, [each for each in made["files"] if table_of(each) == name and each["rows"]]) for made in manifests
        )
        scans = [_scan(made, own) for made, own in files if own]
        if scans:
            connection.execute(f"CREATE VIEW {name} AS {' UNION ALL '.join(scans)}")
        else:
            empty = TABLES[name].empty_table()
            empty = empty.append_column("stage", pa.array([], pa.string())).append_column(
                "key", pa.array([], pa.string())
            )
            connection.register(name, empty)
    connection.register("runs", run_rows(store.runs()))
    connection.register("steps", step_rows(manifests))
    return connection


def _scan(made: Json, files: list[Json]) -> str:
    names = ", ".join(f"'{made['folder']}/{file['file']}'" for file in files)
    return f"SELECT *, '{made['stage']}' AS stage, '{made['key']}' AS key FROM read_parquet([{names}])"


def told(sizes: Sizes, found: Found) -> Told:
    made: dict[str, Both] = {name: found["sql", name] for name in queries.names()}
    large = {name: _times(both) for name, both in made.items() if not both.wrong and _is_large(both)}
    worst = max(large, key=lambda name: large[name], default="none takes that long")
    what = f"{len(large)} of {len(made)} queries take {LEAST} s or more: the worst ({worst}) against bare DuckDB"
    verdict = Verdict.most(what, large.get(worst, 0.0), SLOWER, sizes.prompts == ASKED)
    failed = [failure(name, both.wrong) for name, both in made.items() if both.wrong]
    if failed and verdict.met:
        verdict = replace(verdict, found=f"{len(failed)} queries failed", met=False)
    stored = f"{sizes.prompts * DRAWS:,} candidates, {found['sql', 'made'] / 1e9:.1f} GB of Parquet"
    rows = {f"shipped queries on {stored}: seconds": [_row(name, both) for name, both in made.items()]}
    return Told([verdict], rows, failed)


def _is_large(both: Both) -> bool:
    return bool(np.median(both.seconds["bare"]) >= LEAST)


def _times(both: Both) -> float:
    """How much longer ours takes."""
    ours, bare = (np.median(both.seconds[side]) for side in SIDES)
    return float(ours / bare)


def _row(name: str, both: Both) -> Row:
    """Seconds of different answers would not be compared."""
    if both.wrong:
        return {"query": name, "rows": f"{both.rows:,}", "runs": "0", "ours": "-", "bare": "-", "ours / bare": "failed"}
    times = {side: spread(both.seconds[side], 3) for side in SIDES}
    runs = str(len(both.seconds["ours"]))
    return {"query": name, "rows": f"{both.rows:,}", "runs": runs} | times | {"ours / bare": f"{_times(both):.2f}"}
