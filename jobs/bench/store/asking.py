"""The queries that ship, over tens of millions of candidates, beside the same text given to a bare DuckDB."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from jobs import queries
from jobs.bench.page import spread
from jobs.bench.store import Sizes
from jobs.bench.store.parts import Found, Row, Task, Told, Verdict, apart
from jobs.bench.store.world import Part, Tables, a_row, seal, shares, step
from pipeline.catalog import open_catalog
from pipeline.plan import Step
from pipeline.store import Json, Store
from pipeline.views import run_rows, step_rows
from schemas import TABLES
from schemas.tables import EVALUATIONS, METRICS, OUTCOMES, SPEEDS
from stages.evaluate import METRICS as MEASURES

DRAWS = 64
HELDOUT, EVALUATED = 500, 4  # prompts, and responses of each
ASKED, SLOWER = 1_000_000, 1.2
LEAST = 0.05  # seconds; of a query that takes less, what is measured is the machine
SIDES = ("ours", "bare")


def tasks(sizes: Sizes, folder: Path) -> Iterator[Task]:
    rows = sizes.prompts * DRAWS / 1e6
    yield Task(("sql", "made"), 6 * rows, partial(_make, folder, sizes))
    for name in queries.names():
        yield Task(("sql", name), 2 + rows / 4, partial(apart, _both, folder, name, sizes.repeats))


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
        self._put("optimize", "optimize", _trained, objective="nll", lr=1e-6)
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
    import stages.rooms  # noqa: F401 - registers every stage

    store, world = Store(folder), World(sizes)
    for _, made, tables in world.steps:
        seal(store, made, tables)
    store.link_run("bench", [made for _, made, _ in world.steps])
    return sum(sum(manifest["bytes"].values()) for manifest in store.sealed())


@dataclass(frozen=True)
class Both:
    """Seconds of each repeat, by side; and whether the answers have the same shape."""

    seconds: dict[str, list[float]]
    rows: int
    same: bool


def _both(folder: Path, name: str, repeats: int) -> Both:
    """After a run of each that is not counted, the sides alternate."""
    text, store = queries.text(name), Store(folder)
    connection, catalog = _bare(store, folder / "spill"), open_catalog(store)
    ask = {"ours": lambda: catalog.sql(text).arrow(), "bare": lambda: connection.sql(text).to_arrow_table()}
    answers = {side: ask[side]() for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for repeat in range(repeats):
        for side in SIDES[:: 1 if repeat % 2 == 0 else -1]:
            start = time.perf_counter()
            ask[side]()
            seconds[side].append(time.perf_counter() - start)
    ours, bare = (answers[side] for side in SIDES)
    return Both(seconds, ours.num_rows, ours.num_rows == bare.num_rows and ours.num_columns == bare.num_columns)


def _bare(store: Store, spill: Path) -> duckdb.DuckDBPyConnection:
    """As one would write it by hand: a list of files for each step, and its stage and key beside them."""
    connection = duckdb.connect()
    connection.execute(f"SET temp_directory='{spill}'")
    manifests = store.sealed()
    for name in TABLES:
        files = (
            (made, [each for each in made["files"] if _table(each) == name and each["rows"]]) for made in manifests
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


def _table(file: Json) -> str:
    return str(file["file"]).rsplit("-", 1)[0]


def _scan(made: Json, files: list[Json]) -> str:
    names = ", ".join(f"'{made['folder']}/{file['file']}'" for file in files)
    return f"SELECT *, '{made['stage']}' AS stage, '{made['key']}' AS key FROM read_parquet([{names}])"


def told(sizes: Sizes, found: Found) -> Told:
    rows = [_row(name, found["sql", name]) for name in queries.names()]
    large = {name: _times(found["sql", name]) for name in queries.names() if _is_large(found["sql", name])}
    worst = max(large, key=lambda name: large[name], default="none takes that long")
    candidates = sizes.prompts * DRAWS
    what = f"{len(large)} queries of {LEAST} s or more: the worst ({worst}) against bare DuckDB"
    verdict = Verdict.most(what, large.get(worst, 0.0), SLOWER, sizes.prompts == ASKED)
    title = f"shipped queries on {candidates:,} candidates, {found['sql', 'made'] / 1e9:.1f} GB of Parquet: seconds"
    return Told([verdict], {title: rows})


def _is_large(both: Both) -> bool:
    return bool(np.median(both.seconds["bare"]) >= LEAST)


def _times(both: Both) -> float:
    """How much longer ours takes."""
    ours, bare = (np.median(both.seconds[side]) for side in SIDES)
    return float(ours / bare)


def _row(name: str, both: Both) -> Row:
    """Answers of different shapes would not be compared."""
    assert both.same, name
    times = {side: spread(both.seconds[side], 3) for side in SIDES}
    return {"query": name, "rows": f"{both.rows:,}"} | times | {"ours / bare": f"{_times(both):.2f}"}
