"""`winnow run` as a whole command where everything is sealed, on a store with many other steps."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import pyarrow as pa

from jobs.recipes import plan_named
from pipeline.config.plan import Plan, Step
from pipeline.store.store import Store, write_json
from schemas.tables import EVALUATIONS
from stages.evaluation.evaluate import METRICS
from tests.bench.page import spread
from tests.bench.store import Sizes
from tests.bench.store.model import Tables, a_row, make_policy, seal, write_prompts
from tests.bench.store.parts import Found, Row, Task, Told, Verdict, apart

RECIPE = "rso"
REPEATS = 5
ASKED, PARTS, SECONDS = 1000, 64, 3.0
CASES = {
    "nothing but Python and its imports": ["-c", "import jobs.__main__"],
    "winnow plan": ["-m", "jobs", "plan"],
    "winnow run": ["-m", "jobs", "run"],
}


@dataclass(frozen=True)
class Made:
    steps: int
    runs: int
    files: int


def tasks(sizes: Sizes, folder: Path) -> Iterator[Task]:
    yield Task(("rerun", "data_dir"), 10, partial(apart, _world, folder, sizes.parts))
    yield Task(("rerun", "store"), sizes.steps * sizes.parts / 3000, partial(_store, folder, sizes))
    for repeat in range(REPEATS):
        for name in CASES:
            yield Task(("rerun", name, str(repeat)), 2, partial(_timed, folder, name))


def _world(folder: Path, parts: int) -> None:
    make_policy(folder, 64, 1)
    write_prompts(folder, 100)
    paths = {name: {"with": {"path": f"./{file}"}} for name, file in FILES.items()}
    (folder / "demo.yaml").write_text(json.dumps({"shards": parts} | paths))


FILES = {"sft": "policy", "ranker": "policy", "prompts": "prompts.jsonl"}


def _store(folder: Path, sizes: Sizes) -> Made:
    """Runs of the recipe that differ in how they sample, until there are as many steps; the first is the one rerun."""
    store = Store(folder / "store")
    made: dict[str, Step] = {}
    for number in count():
        plan = _plan(folder, number)
        for step in plan.steps:
            if step.key not in made:
                _seal(store, made, step)
        store.link_run(plan.name, plan.steps)
        if len(made) >= sizes.steps:
            files = sum(len(names) for _, _, names in os.walk(folder / "store"))
            return Made(len(made), number + 1, files)
    raise AssertionError


def _plan(folder: Path, number: int) -> Plan:
    sets = [f"sample.seed={number}"] if number else []
    return plan_named(RECIPE, [folder / "demo.yaml"], sets)


def _seal(store: Store, made: dict[str, Step], step: Step) -> None:
    """The first step of a stage is written, the others are links to its files with a manifest of their own."""
    first = next((each for each in made.values() if each.entry is step.entry), None)
    made[step.key] = step
    if first is None:
        seal(store, step, lambda part: _tables(step, part))
        return
    source, target = (Path(str(store.folder(each).path)) for each in (first, step))
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.name != "manifest.json":
            os.link(file, target / file.name)
    write_json(
        target / "manifest.json", (store.folder(first).manifest or {}) | {"key": step.key, "identity": step.identity}
    )


def _tables(step: Step, part: int) -> Tables:
    """A row in each part; of what belongs to no prompt, in part 0."""
    return {
        schema.metadata[b"table"].decode(): _rows(schema)
        if part == 0 or "prompt_id" in schema.names
        else schema.empty_table()
        for schema in step.signature.outputs
    }


def _rows(schema: pa.Schema) -> pa.Table:
    if schema is not EVALUATIONS:
        return a_row(schema)
    return pa.concat_tables([a_row(schema, metric=metric, value=0.5, n=100) for metric in METRICS])


def _timed(folder: Path, name: str) -> float:
    words = (
        [RECIPE, "--config", str(folder / "demo.yaml"), "--store", str(folder / "store")] if "-m" in CASES[name] else []
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *CASES[name], *words], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    if "running" in done.stdout:
        raise AssertionError(f"it was to be a rerun of what is sealed, and it ran:\n{done.stdout}")
    return seconds


def told(sizes: Sizes, found: Found) -> Told:
    seconds = {name: [found["rerun", name, str(repeat)] for repeat in range(REPEATS)] for name in CASES}
    whole = sorted(seconds["winnow run"])[REPEATS // 2]
    made: Made = found["rerun", "store"]
    asked = made.steps >= ASKED and sizes.parts >= PARTS
    verdict = Verdict.most(f"a rerun among {made.steps:,} steps of {sizes.parts} parts: seconds", whole, SECONDS, asked)
    title = f"a rerun of {RECIPE}: {made.steps:,} steps, {made.runs} runs, {made.files:,} files"
    rows: list[Row] = [{"command": name, "seconds": spread(each)} for name, each in seconds.items()]
    return Told([verdict], {title: rows})
