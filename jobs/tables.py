"""Plans and stores for the terminal: trees of steps, and tables of runs and steps."""

from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
from rich.markup import escape
from rich.tree import Tree

from jobs import queries
from jobs.runs import latest_run
from pipeline.config.keys import differences
from pipeline.config.plan import Plan, Step
from pipeline.config.rounds import run_and_round, split_round, steps_of_round
from pipeline.registry import Bound, nearest
from pipeline.sql.catalog import Catalog, query
from pipeline.stage import signature_of
from pipeline.store.inventory import Inventory, followers_first
from pipeline.store.store import Store
from schemas import WinnowError

AGES = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
SIZES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
RUN_LIST = pa.schema(
    [(name, pa.string()) for name in ("run", "tags", "age", "finished", "size", "shared with other runs")]
)
STEP_LIST = pa.schema(
    [(name, pa.string()) for name in ("step", "stage", "key", "state", "rows", "size", "age", "adopted from")]
)


def plan_tree(plan: Plan, store: Store, options: bool = False, deleted: Collection[str] = ()) -> Tree:
    """Return the steps under their consumers, each once per run: name, key, `cached`, or `will run` and why.

    Steps that are not in the plan's part are `not run`; those with a key in `deleted` will run again.

    With `options`, also each option that is not the stage's default, and the file or --set that it comes from.
    """
    rounds = f", {len(plan.targets)} rounds" if len(plan.targets) > 1 else ""
    tree = Tree(f"[bold]{escape(plan.name)}[/]  ({len(plan.steps)} steps{rounds})")
    keys_to_run = {step.key for step in plan.steps_to_run}
    names_by_key: dict[str, str] = {}  # of the steps above: two rounds may share a step, which runs once

    def add(parent: Tree, step: Step, read_as: str = "") -> None:
        if name := names_by_key.get(step.key):
            read = "" if read_as in ("", split_round(step.name)[0]) else f"{read_as}: "
            parent.add(f"[dim]{escape(read + step.name + ('' if step.name == name else f' = {name}'))} (above)[/]")
            return
        names_by_key[step.key] = step.name
        stage = "" if split_round(step.name)[0] == step.entry.name else f" [dim]{step.entry.name}[/]"
        listed = "".join(f"\n  [dim]{escape(line)}[/]" for line in option_lines(step)) if options else ""
        status = step_status(step, plan.name, store)
        if step.key in deleted:
            status = "[yellow]will run again[/]: --force"
        elif step.key not in keys_to_run and store.folder(step).manifest is None:
            status = "[dim]not run by this command[/]"
        branch = parent.add(f"{escape(step.name)}{stage} [dim]{step.key}[/] {status}{listed}")
        for input_name, source in step.inputs.items():
            add(branch, source, input_name)

    for target in (*plan.targets, *plan.evaluations):
        add(tree, target)
    return tree


def option_lines(step: Step) -> list[str]:
    """Return `path: value (origin)` for each option of a step that a file or --set writes and that is not a default."""
    lines = []
    for path, origin in step.origins.items():
        value, default = _written_value(step, path)
        if value != default:
            lines.append(f"{path}: {value} ({origin.layer})")
    return lines


def overruled(plan: Plan) -> list[str]:
    """Return a line for each option in which a config or --set outranks the recipe, alike steps and rounds in one."""
    steps: dict[str, dict[str, None]] = {}  # by what is said of an option of theirs
    for step in plan.steps:
        for path, origin in step.origins.items():
            value = _written_value(step, path)[0]
            if origin.replaces is not None and value != origin.replaces:  # a name and its alias are one value
                line = f"{path}: {value} ({origin.layer}), not {origin.replaces} of the recipe"
                steps.setdefault(line, {})[split_round(step.name)[0]] = None
    return [
        f"{next(iter(names))}.{line}" if len(names) == 1 else f"{line}, in {len(names)} steps: {', '.join(names)}"
        for line, names in steps.items()
    ]


def _written_value(step: Step, path: str) -> tuple[Any, Any]:
    """Return the value at a dotted path of a step's options, and the default of the stage or function that has it."""
    value: Any = step.options
    default: Any = None
    model: Any = step.entry.options
    for name in path.split("."):
        if isinstance(value, Bound):
            model, value = value.entry.options, {"name": value.name, **value.options}
        field = model.model_fields.get(name) if model else None
        value = value.get(name) if isinstance(value, dict) else value
        default, model = (field.default if field else None), None
    if isinstance(value, Bound):
        value = value.name
    return value, default


def step_status(step: Step, run: str, store: Store) -> str:
    """Return `cached` with rows and origin, or `will run` with the reason, in rich's markup."""
    folder = store.folder(step).divided()
    if manifest := folder.manifest:
        adopted = f", adopted from {escape(manifest['adopted']['from'])}" if "adopted" in manifest else ""
        rows = f"{row_count(manifest):,} rows" if step.signature.outputs else "a model"
        return f"[green]cached[/] {rows}{adopted}"
    missing = len(folder.missing())
    if missing < folder.parts and not signature_of(step.entry).unsharded:
        reason = f"{missing} of {folder.parts} parts are missing"
    else:
        # The step as this run last had it, else the run whose name with a number this one has, else the latest run
        # of the same recipe without overrides, else any run.
        runs = store.runs()
        names = [run.rpartition("-")[0], run.partition("[")[0], run.partition(" ")[0]]  # rso-2, rso[n=8], rso seed=1
        earlier = [latest_run(name, list(runs)) for name in names]
        candidates = [runs.get(run, {}), *(runs[name] for name in earlier if name), *runs.values()]
        link = next((steps[step.name] for steps in candidates if step.name in steps), None)
        before = store.at(link["stage"], link["key"]).manifest if link else None
        if before:
            changes = [change for change in differences(before["identity"], step.identity) if change]
            reason = escape("; ".join(changes) or "its result was deleted")
        else:
            reason = "never run"
    if sources := store.earlier(step):
        reason += f"; takes what {', '.join(f'{step.stage} {folder.path.name}' for folder in sources)} has of it"
    return f"[yellow]will run[/]: {reason}"


def row_count(manifest: dict[str, Any]) -> int:
    """Return the rows of all tables of a step except rejects."""
    return sum(n for name, n in manifest["rows"].items() if name != "rejects")


def tags_text(tags: dict[str, str]) -> str:
    """Return the tags of a run as --tag takes them."""
    return ", ".join(f"{name}={value}" if value else name for name, value in sorted(tags.items()))


def has_tag(tags: dict[str, str], word: str) -> bool:
    """Return whether a run has a tag, with its value if the word has one."""
    name, separator, value = word.partition("=")
    return name in tags and (not separator or tags[name] == value)


def runs_table(store: Store, tags: Sequence[str] = ()) -> pa.Table:
    """Return a row per run that has these tags: age of its newest step, finished steps, bytes, and shared ones.

    Raise WinnowError if no run has them.
    """
    run_tags = store.tags()
    inventory = Inventory(store)
    keys = {run: {link["key"] for link in steps.values()} for run, steps in inventory.runs.items()}
    rows = []
    for run, run_keys in keys.items():
        if not all(has_tag(run_tags.get(run, {}), word) for word in tags):
            continue
        steps = [inventory.steps[key] for key in run_keys if key in inventory.steps]
        other_keys = {key for other, others in keys.items() if other != run for key in others}
        finished = [step.manifest for step in steps if step.manifest]
        rows.append({
            "run": run,
            "tags": tags_text(run_tags.get(run, {})),
            "age": format_age(max((manifest["made"] for manifest in finished), default=None)),
            "finished": f"{len(finished)} of {len(run_keys)} steps",
            "size": format_size(sum(step.bytes for step in steps)),
            "shared with other runs": format_size(sum(step.bytes for step in steps if step.key in other_keys)),
        })  # fmt: skip
    if tags and not rows:
        names = sorted({tags_text({name: value}) for of_run in run_tags.values() for name, value in of_run.items()})
        raise WinnowError(f"--tag {' --tag '.join(tags)}: no run has it; there are {', '.join(names) or 'none'}")
    table = pa.Table.from_pylist(rows, RUN_LIST)
    return table if run_tags else table.drop_columns("tags")


def steps_table(store: Store, run: str) -> pa.Table:
    """Return a row per step of a run, or of one round (`raft@2`), inputs before their consumers.

    Raise WinnowError for an unknown run or round.
    """
    inventory = Inventory(store)
    run, round = run_and_round(run, inventory.runs)
    if run not in inventory.runs:
        raise WinnowError(f"no run {run!r} in {store.root}; {nearest(run, list(inventory.runs))}")
    links = steps_of_round(run, inventory.runs[run], round)
    steps = {link["key"]: inventory.steps.get(link["key"]) for link in links.values()}
    order = followers_first({key: step.inputs if step else None for key, step in steps.items()})[::-1]
    rows = []
    for name, link in sorted(links.items(), key=lambda item: order.index(item[1]["key"])):
        step = steps[link["key"]]
        row = {"step": name, "stage": link["stage"], "key": link["key"], "state": "not run"}
        if step:
            parts = f"{len(step.parts)} of {step.folder.divided().parts} parts"
            row |= {"state": "finished" if step.manifest else parts, "size": format_size(step.bytes)}
        if step and (manifest := step.manifest):
            row |= {"rows": f"{row_count(manifest):,}", "age": format_age(manifest["made"])}
            row["adopted from"] = manifest.get("adopted", {}).get("from", "")
        rows.append(row)
    return pa.Table.from_pylist(rows, STEP_LIST)


def leaderboard_table(leaderboard: pa.Table) -> pa.Table:
    """Return a leaderboard for people: rates in percent, each number with its interval in one cell.

    It is that of the query, or of jobs/methods.py, which has a column `seeds` where a method has several.
    """

    def cell(row: dict[str, Any], name: str, factor: float, digits: int, unit: str = "") -> str | None:
        if row[name] is None:
            return None
        value, low, high = (f"{factor * row[column]:.{digits}f}" for column in (name, f"{name}_low", f"{name}_high"))
        return f"{value}{unit} [{low}, {high}]"

    # The win rate at other temperatures: by gold, and by the proxy where a run has none by gold, as with a judge of
    # that name, which judges draws at temperature 1 alone.
    board = leaderboard.to_pylist()
    other_wins = []
    for suffix in ("as_sampled", "greedy"):
        gold, proxy = f"gold_win_{suffix}", f"proxy_win_{suffix}"
        other_wins += [gold] if any(row[gold] is not None for row in board) else []
        other_wins += [proxy] if any(row[gold] is None and row[proxy] is not None for row in board) else []
    rows = []
    for row in board:
        cells = {"run": row["run"]}
        cells |= {name: cell(row, name, 100, 1, " %") for name in ("gold_win", "proxy_win")}
        cells |= {name: cell(row, name, 100, 1, " %") for name in other_wins}
        cells["gold_reward"] = cell(row, "gold_reward", 1, 2)
        plain = {name: None if row[name] is None else f"{row[name]:.1f}" for name in ("kl_nats", "tokens")}
        seconds = {name: f"{row[name]:.1f}" for name in ("seconds", "own_seconds")}
        counts = {name: str(row[name]) for name in ("prompts", "seeds") if name in row}
        rows.append(cells | plain | counts | seconds)
    return pa.table({name: [row[name] for row in rows] for name in rows[0]}) if rows else leaderboard


def judges_rows(catalog: Catalog) -> list[dict[str, Any]]:
    """Return query `judges` for people, each rate with its interval in one cell; nothing where no config has judges.

    Columns that no judge has are left out.
    """
    if not query(catalog, "SELECT 1 FROM wins LIMIT 1").num_rows:
        return []
    rows = query(catalog, queries.text("judges")).to_pylist()
    if not rows:
        return []
    cells_of_rows = []
    for row in rows:
        if row["win"] is None:
            rate = "no verdict"
        else:
            rate = "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * row[name] for name in ("win", "win_low", "win_high")))
        cells = {name: row[name] for name in ("judge", "against", "run")} | {"win": rate}
        cells["win_lc"] = None if row["win_lc"] is None else f"{100 * row['win_lc']:.1f} %"
        cells |= {name: row[name] for name in ("prompts", "comparisons", "ties", "undecided", "unread")}
        cells |= {name: row[name] and round(row[name], 3) for name in ("agreement", "alpha")}
        cells_of_rows.append(cells)
    names = [name for name in cells_of_rows[0] if any(cells[name] is not None for cells in cells_of_rows)]
    return [{name: cells[name] for name in names} for cells in cells_of_rows]


def format_age(moment: str | None) -> str:
    """Return how long ago, in the largest unit that fits: `3 h`."""
    if moment is None:
        return ""
    seconds = max(0, int((datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()))
    return next((f"{seconds // length} {unit}" for length, unit in AGES if seconds >= length), "now")


def format_size(size: int) -> str:
    """Return bytes in the largest unit that fits: `1.5 MiB`."""
    return next((f"{size / length:,.1f} {unit}" for length, unit in SIZES if size >= length), f"{size} B")
