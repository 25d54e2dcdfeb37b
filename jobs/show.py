"""Plans and stores as trees for the terminal."""

from rich.markup import escape
from rich.tree import Tree

from pipeline.keys import differences
from pipeline.plan import Plan, Step
from pipeline.stage import shape_of
from pipeline.store import Store


def plan_tree(plan: Plan, store: Store) -> Tree:
    """Steps under their consumers, each once, with key, what is cached, what will run and why."""
    tree = Tree(f"[bold]{escape(plan.name)}[/]  ({len(plan.steps)} steps)")
    _branch(tree, plan.target, plan, store, set())
    return tree


def _branch(tree: Tree, step: Step, plan: Plan, store: Store, shown: set[str]) -> None:
    if step.name in shown:
        tree.add(f"[dim]{step.name} (above)[/]")
        return
    shown.add(step.name)
    stage = "" if step.name == step.entry.name else f" [dim]{step.entry.name}[/]"
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
