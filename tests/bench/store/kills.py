"""Runs killed at a random moment and run again: every one must end like an undisturbed run."""

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from unittest.mock import patch

import numpy as np

from pipeline.config.plan import Plan
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.store.store import Store, read_json
from tests.bench.store import Sizes
from tests.bench.store.model import make_policy, pipeline_plan, write_prompts
from tests.bench.store.parts import Results, Row, Summary, Task, Verdict, failure, kill_after, one_line, run_in_process
from tests.runs import Silent

PRELOAD = (
    "jobs.recipes",
    "pyarrow.parquet",
    "stages.data.tokenizer",
    "stages.selection.kernels",
    "transformers.generation",
)
PROMPTS, SHARDS, DRAWS = 400, 8, 16
FULL_SIZE = 100
EARLIER = 0.8  # of the time before the kill, for another try if the run had ended by then
PartFiles = dict[Path, list[tuple[str, int, int]]]
Digests = dict[str, list[tuple[str, str]]]


@dataclass(frozen=True)
class Kill:
    """Result of one kill.

    step: the first that was not sealed then; parts: those finished then; rewritten: those of them that were computed
    again. same: the run that went on ended like an undisturbed one; error: how it failed, if it did.
    """

    step: str
    parts: int
    rewritten: int
    same: bool
    error: str = ""


def tasks(sizes: Sizes, folder: Path) -> Iterator[Task]:
    undisturbed: list[tuple[float, Digests]] = []  # filled by the second task
    yield Task(("kills", "data_dir"), 10, partial(run_in_process, write_inputs, folder))
    yield Task(("kills", "undisturbed"), 10, lambda: undisturbed.append(_run_undisturbed(folder)))
    rng = np.random.default_rng(0)
    for n, share in enumerate(rng.uniform(size=sizes.kills)):
        call = lambda n=n, share=share: measure_kill(folder, n, share, *undisturbed[0])  # noqa: E731
        yield Task(("kills", str(n)), 3, call)


def write_inputs(folder: Path) -> None:
    make_policy(folder, 64, 1)
    write_prompts(folder, PROMPTS)


def plan(folder: Path) -> Plan:
    return pipeline_plan(folder, "examples", SHARDS, engine="fake", n=DRAWS, max_tokens=32)


def run_plan(folder: Path, store: Path) -> None:
    """Run the recipe, with parts that stay files of their own, as those of large tables do."""
    with patch("pipeline.store.store.SMALL_TABLE", 0):
        run(plan(folder), Store(store), LocalExecutor(), Silent())


def _run_undisturbed(folder: Path) -> tuple[float, Digests]:
    """Return seconds and digests of a second run: the first one compiles."""
    run_in_process(run_plan, folder, folder / "first", preload=PRELOAD)
    start = time.perf_counter()
    run_in_process(run_plan, folder, folder / "undisturbed", preload=PRELOAD)
    return time.perf_counter() - start, digests(folder, folder / "undisturbed")


def measure_kill(folder: Path, n: int, share: float, seconds: float, undisturbed: Digests) -> Kill:
    """Kill a run after this share of an undisturbed one's seconds, run it again, and compare."""
    root = folder / str(n)
    step = kill_run(folder, root, share * seconds)
    parts, rewritten, same, error = finished_parts(root), 0, False, ""
    try:
        run_in_process(run_plan, folder, root, preload=PRELOAD)
        rewritten, same = count_rewritten(parts, finished_parts(root)), digests(folder, root) == undisturbed
    except Exception as exception:
        error = one_line(exception)
    shutil.rmtree(root, ignore_errors=True)
    return Kill(step, len(parts), rewritten, same, error)


def kill_run(folder: Path, root: Path, seconds: float) -> str:
    """Kill a run after `seconds` and return its unfinished step; one that has ended by then is tried again, earlier."""
    while True:
        alive = kill_after(seconds, run_plan, folder, root, preload=PRELOAD)
        unfinished = [step.name for step in plan(folder).steps if Store(root).folder(step).manifest is None]
        if alive and unfinished:
            return unfinished[0]
        shutil.rmtree(root, ignore_errors=True)
        seconds *= EARLIER


def finished_parts(root: Path) -> PartFiles:
    """Return name, time and inode of each table file of every finished part, by the part's sidecar.

    They show whether a file was written again. A sidecar itself is written once and never again, its tables are not.
    """
    parts: PartFiles = {}
    for sidecar in root.glob("*/*/part-*.json"):
        record, parts[sidecar] = read_json(sidecar) or {"files": []}, []
        for file in (file for part in record.get("parts", [record]) for file in part["files"]):
            stat = (sidecar.parent / file["file"]).stat()
            parts[sidecar].append((file["file"], stat.st_mtime_ns, stat.st_ino))
    return parts


def count_rewritten(before: PartFiles, after: PartFiles) -> int:
    return sum(after.get(part) != files for part, files in before.items())


def digests(folder: Path, root: Path) -> Digests:
    """Return every step's files: name, by the manifest, and digest, by the bytes on disk."""
    digests_by_step: Digests = {}
    for step in plan(folder).steps:
        step_folder = Store(root).folder(step)
        files = [file["file"] for file in (step_folder.manifest or {"files": []})["files"]]
        digests_by_step[step.name] = [
            (file, sha256((step_folder.path / file).read_bytes()).hexdigest()) for file in files
        ]
    return digests_by_step


def summarize(sizes: Sizes, results: Results) -> Summary:
    kills: dict[int, Kill] = {n: results["kills", str(n)] for n in range(sizes.kills) if ("kills", str(n)) in results}
    same, rewritten = sum(kill.same for kill in kills.values()), sum(kill.rewritten for kill in kills.values())
    is_met = same == sizes.kills and not rewritten
    what = "runs killed and run again that ended like an undisturbed one"
    full_size = sizes.kills >= FULL_SIZE
    verdict = Verdict(what, f"{same} of {sizes.kills}", f"all of {FULL_SIZE}", is_met if full_size else None)
    rows: list[Row] = []
    for step, count in Counter(kill.step for kill in kills.values()).most_common():
        parts = [kill.parts for kill in kills.values() if kill.step == step]
        rows.append({"at work on": step, "kills": count, "finished parts then": f"{min(parts)} to {max(parts)}"})
    failures = []
    for n, kill in kills.items():
        if kill.error or not kill.same:
            failures.append(failure(f"kill {n}", kill.error or "ended otherwise than an undisturbed run"))
        elif kill.rewritten:
            failures.append(failure(f"kill {n}", f"{kill.rewritten} finished parts were made again"))
    title = f"kill -9 of {len(kills)} runs at work; finished parts made again: {rewritten}"
    return Summary([verdict], {title: rows}, failures)
