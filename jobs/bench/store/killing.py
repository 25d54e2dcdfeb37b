"""Runs killed at a random moment and run again: every one must end like one that nobody disturbed."""

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from jobs.bench.store import Sizes
from jobs.bench.store.parts import Found, Row, Task, Told, Verdict, apart, killed_apart
from jobs.bench.store.world import Quiet, corridor, make_policy, write_prompts
from pipeline.executors import InProcess
from pipeline.plan import Plan
from pipeline.run import run
from pipeline.store import Store

READY = ("jobs.recipes", "pyarrow.parquet", "stages.text", "stages.rejection", "transformers.generation")
PROMPTS, SHARDS, DRAWS = 400, 8, 16
ASKED = 100
EARLIER = 0.8  # of the moment, for another try, where the run had ended before
Parts = dict[Path, int]
Digests = dict[str, list[tuple[str, str]]]


@dataclass(frozen=True)
class Killed:
    """step: the first that was not sealed then; touched: finished parts that were made again."""

    step: str
    parts: int
    touched: int
    same: bool


def tasks(sizes: Sizes, folder: Path) -> Iterator[Task]:
    whole: list[tuple[float, Digests]] = []  # of an undisturbed run
    yield Task(("kills", "world"), 10, partial(apart, _world, folder))
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

    run(_plan(folder), Store(store), InProcess(), Quiet())


def _undisturbed(folder: Path) -> tuple[float, Digests]:
    """Seconds, of a second run: the first one compiles."""
    apart(_run, folder, folder / "first", ready=READY)
    start = time.perf_counter()
    apart(_run, folder, folder / "whole", ready=READY)
    return time.perf_counter() - start, _digests(folder, folder / "whole")


def _one(folder: Path, n: int, share: float, seconds: float, whole: Digests) -> Killed:
    root = folder / str(n)
    step = _killed(folder, root, share * seconds)
    parts = _parts(root)
    apart(_run, folder, root, ready=READY)
    after = _parts(root)
    touched = sum(after.get(part) != moment for part, moment in parts.items())
    made = Killed(step, len(parts), touched, _digests(folder, root) == whole)
    shutil.rmtree(root)
    return made


def _killed(folder: Path, root: Path, seconds: float) -> str:
    """The step that a run was at when it was killed; one that had ended by then is none, and is tried again."""
    while True:
        alive = killed_apart(seconds, _run, folder, root, ready=READY)
        unsealed = [step.name for step in _plan(folder).steps if Store(root).folder(step).manifest is None]
        if alive and unsealed:
            return unsealed[0]
        shutil.rmtree(root)
        seconds *= EARLIER


def _parts(root: Path) -> Parts:
    """Every finished part, and what tells whether it was written again."""
    return {part: part.stat().st_mtime_ns for part in root.glob("*/*/part-*.json")}


def _digests(folder: Path, root: Path) -> Digests:
    """Content of every file of every step, by its manifest."""
    store = Store(root)
    manifests = {step.name: store.folder(step).manifest or {"files": []} for step in _plan(folder).steps}
    return {name: [(each["file"], each["sha256"]) for each in found["files"]] for name, found in manifests.items()}


def told(sizes: Sizes, found: Found) -> Told:
    kills: list[Killed] = [found["kills", str(n)] for n in range(sizes.kills)]
    same, touched = sum(kill.same for kill in kills), sum(kill.touched for kill in kills)
    kept = same == sizes.kills and not touched
    what = "runs killed and run again that ended like an undisturbed one"
    verdict = Verdict(what, f"{same} of {sizes.kills}", f"all of {ASKED}", kept if sizes.kills >= ASKED else None)
    rows: list[Row] = [
        {"at work on": step, "kills": count, "finished parts then": _range(kills, step)}
        for step, count in Counter(kill.step for kill in kills).most_common()
    ]
    return Told([verdict], {f"kill -9 of {sizes.kills} runs at work; finished parts made again: {touched}": rows})


def _range(kills: list[Killed], step: str) -> str:
    parts = [kill.parts for kill in kills if kill.step == step]
    return f"{min(parts)} to {max(parts)}"
