"""Show what a plan's steps will take: a table of those that will run, and lines about memory and rates."""

from collections.abc import Collection, Iterable

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from jobs.console import visible
from pipeline.config.estimates import StepCost
from pipeline.costs import GIB, Amount

MARKS = {"exactly": "", "estimated": "~ ", "at most": "≤ ", "at most about": "≲ "}
UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
DURATIONS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


def remaining_costs(costs: Iterable[StepCost], to_run: Collection[str]) -> list[StepCost]:
    """Return the costs of steps that will run, by their keys, and of which something is known, each result once."""
    by_key = {cost.step.key: cost for cost in reversed(list(costs)) if cost.step.key in to_run}
    return [
        cost
        for cost in reversed(by_key.values())
        if cost.need or cost.not_estimated or main_rows(cost).value is not None
    ]


def cost_table(costs: list[StepCost]) -> Table:
    """Return a row per step: rows, tokens or calls, network, memory of each device, and time on the devices."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("step")
    for name in ("rows", "tokens", "model", "GiB/device", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for cost in costs:
        need, work = cost.need, cost.work
        units = f"{as_short(work.units)}{' calls' if work.unit == 'calls' else ''}"
        model = f"{short(need.parameters)} {DTYPES.get(need.dtype, need.dtype)}" if need else ""
        of = f" of {cost.device.memory / GIB:.0f}" if cost.device.memory else ""
        memory = f"~ {need.total / GIB:.1f}{of}" if need else "not estimated" if cost.not_estimated else ""
        is_unknown = cost.seconds.value is None
        time = "" if need is None else "unknown" if is_unknown else as_duration(cost.seconds)
        cells = (as_count(main_rows(cost)), "" if work.units.value is None else units, model, memory, time)
        table.add_row(Text(visible(cost.step.name)), *cells)
    return table


def cost_lines(costs: list[StepCost]) -> list[str]:
    """Return lines below the table: its signs, memory by what it is for, and how rates are known or can be given."""
    marks = {amount.known for cost in costs for amount in (main_rows(cost), cost.work.units, cost.seconds)
             if amount.value is not None}  # fmt: skip
    names = {"at most": "≤ at most", "at most about": "≲ at most about", "estimated": "~ estimated"}
    lines = [", ".join(sign for mark, sign in names.items() if mark in marks or mark == "estimated")]
    by_parts: dict[str, list[str]] = {}
    for cost in costs:
        if cost.need:
            parts = ", ".join(f"{size / GIB:.1f} {name}" for name, size in cost.need.parts.items() if size >= GIB / 20)
            parts += f" ({cost.need.note})" if cost.need.note else ""
            by_parts.setdefault(parts, []).append(cost.step.name)
    lines += [f"{', '.join(steps)}: {parts}" for parts, steps in by_parts.items() if parts]
    for reason in dict.fromkeys(cost.not_estimated for cost in costs if cost.not_estimated):
        steps = ", ".join(cost.step.name for cost in costs if cost.not_estimated == reason)
        lines.append(f"{steps}: memory is not estimated, and nothing is refused for lack of it: {reason}")
    for source, what in (("measured", "measured in this store"), ("given", "of the profile")):
        rates = {
            cost.step.stage: f"{cost.step.stage} {short(cost.rate or 0)}/s" for cost in costs if cost.source == source
        }
        if rates:
            lines.append(f"rates per device, {what}: {', '.join(rates.values())}")
    if unknown := list(dict.fromkeys(cost.step.stage for cost in costs if cost.need and cost.rate is None)):
        in_calls = any(cost.step.stage == unknown[0] and cost.work.unit == "calls" for cost in costs)
        lines.append(
            f"time unknown: nothing finished here by {', '.join(unknown)} with such a network; give "
            f"`rates: {{{unknown[0]}: ...}}` in a profile ({'calls' if in_calls else 'tokens'} per second and device)"
        )
    lines += [
        f"{cost.step.name}: about as much memory as there is; {cost.need.total / GIB:.1f} of "
        f"{cost.device.memory / GIB:.1f} GiB, and the estimate may be off by 15 %"
        for cost in costs
        if cost.need and cost.device.memory and not cost.problem and cost.need.total > cost.device.memory
    ]
    return lines


def main_rows(cost: StepCost) -> Amount:
    """Return the rows of a step's first table, as far as they are known."""
    names = [schema.metadata[b"table"].decode() for schema in cost.step.signature.outputs]
    return cost.work.of(names[0]) if names and names[0] != "policies" else Amount(None)


def as_count(amount: Amount) -> str:
    return "" if amount.value is None else f"{MARKS[amount.known]}{amount.value:,.0f}"


def as_short(amount: Amount) -> str:
    return "" if amount.value is None else f"{MARKS[amount.known]}{short(amount.value)}"


def as_duration(seconds: Amount) -> str:
    """Return a time in the largest unit of which there is one, with its sign: `~ 2.5 h`."""
    value = seconds.value or 0.0
    size, unit = next(((size, unit) for size, unit in DURATIONS if value >= size), (1, "s"))
    return f"{MARKS[seconds.known]}{value / size:.1f} {unit}"


def short(value: float) -> str:
    """Return a number in three digits or so: 135M, 8.2B."""
    for size, unit in UNITS:
        if value >= size:
            return f"{value / size:.{0 if value >= 100 * size else 1}f}{unit}"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
