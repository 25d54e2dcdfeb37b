"""`winnow run` as a whole command where everything is sealed, on a store with many other steps."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa

from jobs.recipes import plan_named
from pipeline.config.plan import Step
from pipeline.store.manifests import encode_sealed
from pipeline.store.storage import replace
from pipeline.store.store import Store
from schemas import table_name
from schemas.tables import EVALUATIONS
from stages.evaluation.evaluate import METRICS
from tests.bench.page import spread
from tests.bench.store import Sizes
from tests.bench.store.model import Tables, make_policy, one_row, seal_step, write_prompts
from tests.bench.store.parts import Results, Row, Summary, Task, Verdict, run_in_process

RECIPE = "rso"
REPEATS = 5
FULL_STEPS, FULL_PARTS, MAX_SECONDS = 1000, 64, 1.0  # above the start of Python and its imports
COMMANDS = {
    "nothing but Python and its imports": ["-c", "import jobs.__main__"],
    "winnow plan": ["-m", "jobs", "plan"],
    "winnow run": ["-m", "jobs", "run"],
}
FILES = {"sft": "policy", "ranker": "policy", "prompts": "prompts.jsonl"}  # by step


@dataclass(frozen=True)
class StoreSize:
    steps: int
    runs: int
    files: int


def tasks(sizes: Sizes, folder: Path) -> Iterator[Task]:
    yield Task(("rerun", "data_dir"), 10, partial(run_in_process, write_inputs, folder, sizes.parts))
    yield Task(("rerun", "store"), sizes.steps * sizes.parts / 3000, partial(write_store, folder, sizes))
    for repeat in range(REPEATS):
        for name in COMMANDS:
            yield Task(("rerun", name, str(repeat)), 2, partial(time_command, folder, name))


def write_inputs(folder: Path, parts: int) -> None:
    make_policy(folder, 64, 1)
    write_prompts(folder, 100)
    steps = {name: {"with": {"path": f"./{file}"}} for name, file in FILES.items()}
    (folder / "demo.yaml").write_text(json.dumps({"shards": parts} | steps))


def write_store(folder: Path, sizes: Sizes) -> StoreSize:
    """Write runs of the recipe that differ in how they sample, until the steps are enough; the first is run again."""
    store = Store(folder / "store")
    steps: dict[str, Step] = {}  # by key
    for number in count():
        plan = plan_named(RECIPE, [folder / "demo.yaml"], [f"sample.seed={number}"] if number else [])
        for step in plan.steps:
            if step.key not in steps:
                first = next((other for other in steps.values() if other.entry is step.entry), None)
                if first is None:
                    # A file per part, as of large tables; those of a stage that is called once for all are small.
                    with nullcontext() if step.signature.unsharded else patch("pipeline.store.store.SMALL_TABLE", 0):
                        seal_step(store, step, partial(_step_tables, step))
                else:
                    _link_step(store, first, step)
                steps[step.key] = step
        store.link_run(plan.name, plan.steps)
        if len(steps) >= sizes.steps:
            files = sum(len(names) for _, _, names in os.walk(folder / "store"))
            return StoreSize(len(steps), number + 1, files)
    raise AssertionError


def _link_step(store: Store, first: Step, step: Step) -> None:
    """Write a finished step of hard links to the files of `first`, of the same stage, and a manifest of its own."""
    source, target = (Path(str(store.folder(item).path)) for item in (first, step))
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.name != "manifest.json":
            os.link(file, target / file.name)
    manifest = store.folder(first).manifest or {}
    content = manifest | {"key": step.key, "identity": step.identity}
    replace(target / "manifest.json", encode_sealed(content), durable=False)


def _step_tables(step: Step, part: int) -> Tables:
    """Return tables of one row per part; those that belong to no prompt have rows in part 0 only."""
    tables: Tables = {}
    for schema in step.signature.outputs:
        if part > 0 and "prompt_id" not in schema.names:
            table = schema.empty_table()
        elif schema is EVALUATIONS:
            table = pa.concat_tables([one_row(schema, metric=metric, value=0.5, n=100) for metric in METRICS])
        else:
            table = one_row(schema)
        tables[table_name(schema)] = table
    return tables


def time_command(folder: Path, name: str) -> float:
    """Return the command's seconds. Raises AssertionError if it ran a step."""
    command = [sys.executable, *COMMANDS[name]]
    if "-m" in command:
        command += [RECIPE, "--config", str(folder / "demo.yaml"), "--store", str(folder / "store")]
    start = time.perf_counter()
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    if "running" in process.stdout:
        raise AssertionError(f"every step is sealed, and the command ran one:\n{process.stdout}")
    return seconds


def summarize(sizes: Sizes, results: Results) -> Summary:
    seconds = {name: [results["rerun", name, str(repeat)] for repeat in range(REPEATS)] for name in COMMANDS}
    medians = {name: sorted(times)[REPEATS // 2] for name, times in seconds.items()}
    median = medians["winnow run"] - medians["nothing but Python and its imports"]
    size: StoreSize = results["rerun", "store"]
    full_size = size.steps >= FULL_STEPS and sizes.parts >= FULL_PARTS
    what = f"a rerun among {size.steps:,} steps of {sizes.parts} parts: seconds above Python and its imports"
    title = f"a rerun of {RECIPE}: {size.steps:,} steps, {size.runs} runs, {size.files:,} files"
    rows: list[Row] = [{"command": name, "seconds": spread(times)} for name, times in seconds.items()]
    return Summary([Verdict.at_most(what, median, MAX_SECONDS, full_size)], {title: rows})
