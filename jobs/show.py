"""Plans and stores as trees for the terminal."""

from rich.markup import escape
from rich.tree import Tree

from pipeline.keys import differences
from pipeline.plan import Plan, Step
from pipeline.rounds import split
from pipeline.stage import shape_of
from pipeline.store import Store


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
        rows = sum(n for name, n in manifest["rows"].items() if name != "rejects")
        return f"[green]cached[/] {rows:,} rows"
    return f"[yellow]will run[/]: {why(step, run, store)}"


def why(step: Step, run: str, store: Store) -> str:
    """The fields that differ from what this step was when the run was last made, or how far it got."""
    missing = len(store.folder(step).missing(step.shards))
    if missing < step.shards and not shape_of(step.entry).whole:
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
