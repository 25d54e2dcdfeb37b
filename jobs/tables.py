"""Plans and stores for the terminal: trees of steps, and lists of runs."""

from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
from rich.markup import escape
from rich.tree import Tree

from pipeline.config.keys import differences
from pipeline.config.plan import Plan, Step
from pipeline.config.rounds import split
from pipeline.registry import nearest
from pipeline.stage import signature_of
from pipeline.store.inventory import Inventory, StoredStep, followers_first
from pipeline.store.store import Store
from schemas import WinnowError

AGES = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
SIZES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))

RUN_LIST = pa.schema([(name, pa.string()) for name in ("run", "age", "sealed", "size", "shared with other runs")])
STEP_LIST = pa.schema(
    [(name, pa.string()) for name in ("step", "stage", "key", "state", "rows", "size", "age", "adopted from")]
)


def plan_tree(plan: Plan, store: Store) -> Tree:
    """Steps under their consumers, round after round, each once, with key, what is cached, what will run and why."""
    rounds = f", {len(plan.targets)} rounds" if len(plan.targets) > 1 else ""
    tree = Tree(f"[bold]{escape(plan.name)}[/]  ({len(plan.steps)} steps{rounds})")
    shown: dict[str, str] = {}
    for target in plan.targets:
        _branch(tree, target, plan, store, shown)
    return tree


def _branch(tree: Tree, step: Step, plan: Plan, store: Store, shown: dict[str, str]) -> None:
    """`shown` is key to name: two rounds may make one thing, and it is made once."""
    if step.key in shown:
        same = shown[step.key]
        tree.add(f"[dim]{step.name}{'' if step.name == same else f' = {same}'} (above)[/]")
        return
    shown[step.key] = step.name
    stage = "" if split(step.name)[0] == step.entry.name else f" [dim]{step.entry.name}[/]"
    branch = tree.add(f"{step.name}{stage} [dim]{step.key}[/] {status(step, plan.name, store)}")
    for source in step.inputs.values():
        _branch(branch, source, plan, store, shown)


def status(step: Step, run: str, store: Store) -> str:
    manifest = store.folder(step).manifest
    if manifest:
        adopted = f", adopted from {escape(manifest['adopted']['from'])}" if "adopted" in manifest else ""
        return f"[green]cached[/] {rows(manifest):,} rows{adopted}"
    return f"[yellow]will run[/]: {why(step, run, store)}"


def rows(manifest: dict[str, Any]) -> int:
    return sum(n for name, n in manifest["rows"].items() if name != "rejects")


def why(step: Step, run: str, store: Store) -> str:
    """The fields that differ from what this step was when the run was last made, or how far it got."""
    missing = len(store.folder(step).missing(step.shards))
    if missing < step.shards and not signature_of(step.entry).unsharded:
        return f"{missing} of {step.shards} parts are missing"
    link = _before(step, run, store)
    old = store.manifest_at(link["stage"], link["key"]) if link else None
    if not old:
        return "never made"
    changes = differences(old["identity"], step.identity)
    return escape("; ".join(change for change in changes if change) or "its result was deleted")


def _before(step: Step, run: str, store: Store) -> dict[str, str] | None:
    """What the step was in this run, or in the run of the same recipe without overrides, or in any."""
    runs = store.runs()
    known = [runs.get(run, {}), runs.get(run.partition("[")[0], {}), *runs.values()]
    return next((links[step.name] for links in known if step.name in links), None)


def runs_of(store: Store) -> pa.Table:
    """A row a run: the age of its newest step, how many of its steps are sealed, its bytes, those that others reach."""
    contents = Inventory(store)
    keys = {run: {link["key"] for link in steps.values()} for run, steps in contents.runs.items()}
    return pa.Table.from_pylist([_run_row(contents, run, keys) for run in contents.runs], RUN_LIST)


def _run_row(contents: Inventory, run: str, keys: dict[str, set[str]]) -> dict[str, str]:
    own = [contents.made[key] for key in keys[run] if key in contents.made]
    others = {key for other, theirs in keys.items() if other != run for key in theirs}
    sealed = [made.manifest for made in own if made.manifest]
    return {
        "run": run,
        "age": age(max((manifest["made"] for manifest in sealed), default=None)),
        "sealed": f"{len(sealed)} of {len(keys[run])} steps",
        "size": size(sum(made.bytes for made in own)),
        "shared with other runs": size(sum(made.bytes for made in own if made.key in others)),
    }


def steps_of(store: Store, run: str) -> pa.Table:
    """A row a step of a run, inputs before what reads them. Raises WinnowError with the runs that there are."""
    contents = Inventory(store)
    if run not in contents.runs:
        raise WinnowError(f"no run {run!r} in {store.root}; {nearest(run, list(contents.runs))}")
    steps = contents.runs[run]
    made = {link["key"]: contents.made.get(link["key"]) for link in steps.values()}
    order = followers_first({key: each.inputs if each else None for key, each in made.items()})[::-1]
    shards = next((m.manifest["identity"]["shards"] for m in made.values() if m and m.manifest), None)
    listed = sorted(steps.items(), key=lambda item: order.index(item[1]["key"]))
    return pa.Table.from_pylist([_step_row(name, link, made[link["key"]], shards) for name, link in listed], STEP_LIST)


def _step_row(name: str, link: dict[str, str], made: StoredStep | None, shards: int | None) -> dict[str, str]:
    manifest = made.manifest if made else None
    known = {"step": name, "stage": link["stage"], "key": link["key"], "state": _state(made, shards)}
    if made:
        known["size"] = size(made.bytes)
    if manifest:
        known |= {"rows": f"{rows(manifest):,}", "age": age(manifest["made"])}
        known["adopted from"] = manifest.get("adopted", {}).get("from", "")
    return known


def _state(made: StoredStep | None, shards: int | None) -> str:
    if made is None:
        return "not made"
    if made.manifest:
        return "sealed"
    return f"{len(made.parts)}{f' of {shards}' if shards else ''} parts"


def age(made: str | None) -> str:
    """How long ago, in the largest unit that it is one of: `3 h`."""
    if made is None:
        return ""
    seconds = max(0, int((datetime.now(UTC) - datetime.fromisoformat(made)).total_seconds()))
    return next((f"{seconds // many} {unit}" for many, unit in AGES if seconds >= many), "now")


def size(bytes: int) -> str:
    return next((f"{bytes / many:,.1f} {unit}" for many, unit in SIZES if bytes >= many), f"{bytes} B")
