"""Runs killed at a random moment and run again: every one must end like one that nobody disturbed."""

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np

from pipeline.config.plan import Plan
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.store.store import StepFolder, Store, read_json
from tests.bench.store import Sizes
from tests.bench.store.model import Quiet, corridor, make_policy, write_prompts
from tests.bench.store.parts import Found, Row, Task, Told, Verdict, apart, failure, killed_apart, one_line

READY = (
    "jobs.recipes",
    "pyarrow.parquet",
    "stages.data.tokenizer",
    "stages.selection.kernels",
    "transformers.generation",
)
PROMPTS, SHARDS, DRAWS = 400, 8, 16
ASKED = 100
EARLIER = 0.8  # of the moment, for another try, where the run had ended before
Parts = dict[Path, list[tuple[str, int, int]]]
Digests = dict[str, list[tuple[str, str]]]


@dataclass(frozen=True)
class Killed:
    """step: the first that was not sealed then; touched: finished parts that were made again.

    wrong: how the run that went on failed, if it did, which then is not the same as an undisturbed one.
    """

    step: str
    parts: int
    touched: int
    same: bool
    wrong: str = ""


def tasks(sizes: Sizes, folder: Path) -> Iterator[Task]:
    whole: list[tuple[float, Digests]] = []  # of an undisturbed run
    yield Task(("kills", "data_dir"), 10, partial(apart, _world, folder))
    yield Task(("kills", "undisturbed"), 10, lambda: whole.append(_undisturbed(folder)))
    rng = np.random.default_rng(0)
    for n, share in enumerate(rng.uniform(size=sizes.kills)):
        yield Task(("kills", str(n)), 3, lambda n=n, share=share: _one(folder, n, share, *whole[0]))  # type: ignore[misc]


def _world(folder: Path) -> None:
    make_policy(folder, 64, 1)
    write_prompts(folder, PROMPTS)


def _plan(folder: Path) -> Plan:
    return corridor(folder, "examples", SHARDS, engine="fake", n=DRAWS, max_tokens=32)


def _run(folder: Path, store: Path) -> None:
    import jobs.recipes  # noqa: F401 - registers every stage

    run(_plan(folder), Store(store), LocalExecutor(), Quiet())


def _undisturbed(folder: Path) -> tuple[float, Digests]:
    """Seconds, of a second run: the first one compiles."""
    apart(_run, folder, folder / "first", ready=READY)
    start = time.perf_counter()
    apart(_run, folder, folder / "whole", ready=READY)
    return time.perf_counter() - start, _digests(folder, folder / "whole")


def _one(folder: Path, n: int, share: float, seconds: float, whole: Digests) -> Killed:
    root = folder / str(n)
    step = _killed(folder, root, share * seconds)
    parts, touched, same, wrong = _parts(root), 0, False, ""
    try:
        apart(_run, folder, root, ready=READY)
        touched, same = _touched(parts, _parts(root)), _digests(folder, root) == whole
    except Exception as error:
        wrong = one_line(error)
    shutil.rmtree(root, ignore_errors=True)
    return Killed(step, len(parts), touched, same, wrong)


def _killed(folder: Path, root: Path, seconds: float) -> str:
    """The step that a run was at when it was killed; one that had ended by then is none, and is tried again."""
    while True:
        alive = killed_apart(seconds, _run, folder, root, ready=READY)
        unfinished = [step.name for step in _plan(folder).steps if Store(root).folder(step).manifest is None]
        if alive and unfinished:
            return unfinished[0]
        shutil.rmtree(root, ignore_errors=True)
        seconds *= EARLIER


def _parts(root: Path) -> Parts:
    """Every finished part by its sidecar, and what tells whether a table of it was written again."""
    return {sidecar: list(_stamps(sidecar)) for sidecar in root.glob("*/*/part-*.json")}


def _stamps(sidecar: Path) -> Iterator[tuple[str, int, int]]:
    """A sidecar itself is made once and never again: the tables that it lists are not."""
    record = read_json(sidecar) or {"files": []}
    for file in (file for part in record.get("parts", [record]) for file in part["files"]):
        found = (sidecar.parent / file["file"]).stat()
        yield file["file"], found.st_mtime_ns, found.st_ino


def _touched(before: Parts, after: Parts) -> int:
    return sum(after.get(part) != stamps for part, stamps in before.items())


def _digests(folder: Path, root: Path) -> Digests:
    """Of every file of every step: its name, by the manifest, and what it holds, by its bytes."""
    return {step.name: list(_contents(Store(root).folder(step))) for step in _plan(folder).steps}


def _contents(step: StepFolder) -> Iterator[tuple[str, str]]:
    for file in (step.manifest or {"files": []})["files"]:
        yield file["file"], sha256((step.path / file["file"]).read_bytes()).hexdigest()


def told(sizes: Sizes, found: Found) -> Told:
    done = {n: found["kills", str(n)] for n in range(sizes.kills) if ("kills", str(n)) in found}
    kills: list[Killed] = list(done.values())
    same, touched = sum(kill.same for kill in kills), sum(kill.touched for kill in kills)
    kept = same == sizes.kills and not touched
    what = "runs killed and run again that ended like an undisturbed one"
    verdict = Verdict(what, f"{same} of {sizes.kills}", f"all of {ASKED}", kept if sizes.kills >= ASKED else None)
    rows: list[Row] = [
        {"at work on": step, "kills": count, "finished parts then": _range(kills, step)}
        for step, count in Counter(kill.step for kill in kills).most_common()
    ]
    title = f"kill -9 of {len(kills)} runs at work; finished parts made again: {touched}"
    return Told([verdict], {title: rows}, [failure(f"kill {n}", _why(kill)) for n, kill in done.items() if _why(kill)])


def _why(kill: Killed) -> str:
    if kill.wrong or not kill.same:
        return kill.wrong or "ended otherwise than an undisturbed run"
    return f"{kill.touched} finished parts were made again" if kill.touched else ""


def _range(kills: list[Killed], step: str) -> str:
    parts = [kill.parts for kill in kills if kill.step == step]
    return f"{min(parts)} to {max(parts)}"
