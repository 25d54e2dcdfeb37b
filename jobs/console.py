"""Output to the terminal: the progress of a run, Arrow tables, JSON; what would control the terminal is escaped."""

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from types import MappingProxyType
from typing import Any

import pyarrow as pa
from rich.console import Console, RenderableType
from rich.errors import MarkupError
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pipeline.config.plan import Plan, Step
from pipeline.execution.progress import StepProgress
from pipeline.execution.schedule import Reporter
from schemas import WinnowError

WORK = ("tokens", "ranker_calls")  # counters whose rate says something
# C0 without tab and newline, DEL, C1, and what shows text in another order than it has.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# Metrics of training that are shown while it runs, in this order, by the names that the table `metrics` has.
FIGURES = {
    "loss": "loss", "imitation/loss": "imitation loss", "accuracy": "accuracy", "token_accuracy": "token accuracy",
    "margin": "margin", "grad_norm": "gradient norm", "kl": "KL", "validation/proxy_win": "validation proxy win",
}  # fmt: skip
MIN_COLUMN = 12  # characters of a long value by which rows can be told apart
QUIET_SECONDS = 10.0  # between two lines about a running step, without a terminal


def visible(text: str) -> str:
    r"""Return text in which each control character is written out, as in \x1b[31m; tabs and newlines stay.

    A sampled response or a file's name could otherwise move the cursor, hide text or rename the window.
    """
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1] if match[0] > "\xff" else f"\\x{ord(match[0]):02x}", text)


class VisibleConsole(Console):
    """Console that prints every string, markup included, as `visible` has it."""

    def render_str(self, text: str, **options: Any) -> Text:
        try:
            return super().render_str(visible(text), **options)
        except MarkupError:  # a closing tag in a text that is not ours
            return super().render_str(visible(text), **(options | {"markup": False}))


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.speed or task.finished_speed
        return Text(f"{speed:,.1f} {task.fields['unit']}/s" if speed else "")


class _FigureLines(Progress):
    """Bars with a line below each that has figures: beside a bar, 80 columns have no room for them."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            if figures := task.fields["figures"]:
                yield Text(f"    {figures}", no_wrap=True, overflow="ellipsis")


@dataclass
class StepBar:
    """Step with its bar and its progress."""

    task: TaskID
    progress: StepProgress
    last_line: float = field(default_factory=time.monotonic)


class ProgressReporter(Reporter):
    """Listener to a run that shows a bar per running step and a line per finished one.

    Without a terminal it prints a line about a running step now and then. Of several plans that run at once
    (`set_plans`), a step has the name of its run before its own, unless all of them have it.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.names: dict[str, str] = {}  # by key of a step, where that is not its own
        self.bar = _FigureLines(
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
            _Rate(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.interrupted = 0
        self.steps: dict[str, StepBar] = {}

    def set_plans(self, plans: Sequence[Plan]) -> None:
        """Name steps by these plans from here on."""
        keys = [{step.key for step in plan.steps} for plan in plans]
        of_all = set.intersection(*keys)
        self.names = {}
        for plan in plans:
            for step in plan.steps:
                if step.key not in of_all:
                    self.names.setdefault(step.key, f"{plan.name} {step.name}")

    def _name(self, step: Step) -> str:
        return self.names.get(step.key, step.name)

    def interrupt(self, number: int, frame: Any = None) -> None:
        """Handle a signal that ends the run, such as SIGINT or SIGTERM, and keep its number.

        It is raised again at the next report, because Python swallows exceptions in finalizers.
        """
        self.interrupted = number
        raise KeyboardInterrupt

    def _print(self, step: Step, text: str) -> None:
        self._raise_if_interrupted()
        self.console.print(f"  {escape(f'{self._name(step):<16}')} {text}", highlight=False)

    def _raise_if_interrupted(self) -> None:
        if self.interrupted:
            raise KeyboardInterrupt

    def step_cached(self, step: Step) -> None:
        self._print(step, f"[dim]cached {step.key}[/]")

    def step_waiting(self, step: Step, why: str) -> None:
        self._print(step, f"[yellow]waiting[/] {step.key}: {escape(why)}")

    def set_aside(self, step: Step, names: list[str]) -> None:
        first = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        self._print(step, f"[yellow]damaged, set aside and made again[/]: {escape(first)}")

    def step_started(self, step: Step, done: int, total: int) -> None:
        before = f" ({done} of {total} parts are finished)" if done else ""
        self._print(step, f"[cyan]running[/] {step.key}{before}")
        self.bar.start()
        task = self.bar.add_task(visible(self._name(step)), total=total, completed=done, unit="parts", figures="")
        self.steps[step.key] = StepBar(task, StepProgress(total, done))

    def part_finished(self, step: Step) -> None:
        self._raise_if_interrupted()
        if self.steps[step.key].progress.finish_part():
            self._show(step)

    def progress(
        self, step: Step, done: float, total: float, unit: str, figures: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        """Show the units of a step with one part, or of several parts how far the running ones are."""
        self._raise_if_interrupted()
        self.steps[step.key].progress.update(done, total, unit, figures)
        self._show(step)

    def _show(self, step: Step) -> None:
        running, now = self.steps[step.key], time.monotonic()
        progress = running.progress
        figures = figures_line(progress.figures)
        self.bar.update(
            running.task, completed=progress.done, total=progress.total, unit=progress.unit, figures=figures
        )
        if self.console.is_terminal or progress.done >= progress.total or now - running.last_line <= QUIET_SECONDS:
            return
        running.last_line = now
        pace = f", {progress.rate:,.2f}/s, {progress.seconds_left:,.0f} s left" if progress.rate else ""
        count = f"{progress.done:,.1f}".removesuffix(".0")
        line = (
            f"    {self._name(step)}: {count}/{progress.total:,.0f} {progress.unit}{pace}{figures and f'; {figures}'}"
        )
        self.console.print(line, highlight=False, markup=False)

    def prompt_rejected(self, step: Step, prompt: str, message: str) -> None:
        self._print(
            step, f"[red]rejected[/] prompt {escape(prompt)}: it killed its worker each time ({escape(message)})"
        )

    def step_finished(self, step: Step, manifest: dict[str, Any]) -> None:
        self.bar.remove_task(self.steps.pop(step.key).task)
        seconds = manifest["wall_seconds"]
        facts = [", ".join(f"{n:,} {escape(name)}" for name, n in manifest["rows"].items() if name != "rejects")]
        facts.append(f"{seconds:,.1f} s")
        for name, n in manifest["counters"].items():
            rate = f" ({n / max(seconds, 1e-9):,.0f}/s)" if name in WORK else ""
            facts += [f"{n:,} {name.replace('_', ' ')}{rate}"] if n else []
        facts += [f"{name.replace('_', ' ')} {mean['total'] / max(mean['count'], 1e-9):.1e} on average, "
                  f"{mean['largest']:.1e} at most" for name, mean in manifest.get("measures", {}).items()]  # fmt: skip
        if rejects := ", ".join(f"{n:,} {reason}" for reason, n in sorted(manifest["rejects"].items())):
            facts.append(f"[yellow]rejected: {escape(rejects)}[/]")
        self._print(step, f"[green]finished[/] {'; '.join(fact for fact in facts if fact)}")

    def step_failed(self, step: Step, error: WinnowError) -> None:
        self.bar.remove_task(self.steps.pop(step.key).task)
        self._print(step, f"[red]failed[/] {escape(error.problems[0])}; runs that do not need it go on")

    def step_ended(self, step: Step) -> None:
        self.bar.remove_task(self.steps.pop(step.key).task)
        self._print(step, f"[yellow]ended[/] {step.key}: what needs it has failed")

    def close(self) -> None:
        self.bar.stop()


def figures_line(figures: Mapping[str, float]) -> str:
    """Return what a training's latest metrics are, in a fixed order: `loss 0.6931, accuracy 0.5, margin 0`.

    The accuracy of tokens is shown where there are no pairs.
    """
    names = [name for name in FIGURES if name in figures and not (name == "token_accuracy" and "accuracy" in figures)]
    return ", ".join(f"{FIGURES[name]} {figures[name]:.4g}" for name in names)


def as_table(table: pa.Table, title: str | None = None) -> Table:
    """Return an Arrow table for the terminal; floats have four significant digits."""
    result = Table(title=title and escape(title), title_justify="left")
    for name in table.column_names:
        # Runs are told apart by the ends of their names, which a narrow terminal would cut.
        result.add_column(escape(name), overflow="fold" if name == "run" else "ellipsis")
    for row in table.to_pylist():
        result.add_row(*(_cell_text(value) for value in row.values()))
    return result


def as_result(table: pa.Table, width: int) -> Table:
    """Return the rows of a query side by side, or, where `width` characters cannot hold the columns, one below another.

    Rows below each other have a line per column, as in psql's expanded display: 27 columns of three characters say
    nothing. Long values are cut or folded in either.
    """
    rows = [[_cell_text(value) for value in row.values()] for row in table.to_pylist()]
    lengths = (max([len(name), *(row[n].cell_len for row in rows)]) for n, name in enumerate(table.column_names))
    if 1 + sum(3 + min(MIN_COLUMN, length) for length in lengths) <= width:
        return as_table(table)
    result = Table(show_header=False)
    result.add_column(no_wrap=True)
    result.add_column(overflow="fold")
    for row in rows:
        for name, cell in zip(table.column_names, row, strict=True):
            result.add_row(escape(name), cell)
        result.add_section()
    return result


def _cell_text(value: Any) -> Text:
    return Text(visible("" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)))


def as_json(value: Any) -> str:
    """Return JSON of any result of SQL: a date or an id is its text, a number that JSON does not have is null."""
    try:
        return json.dumps(value, ensure_ascii=False, default=_json_default, allow_nan=False)
    except ValueError:
        finite = json.loads(json.dumps(value, default=_json_default), parse_constant=lambda name: None)
        return json.dumps(finite, ensure_ascii=False)


def _json_default(value: Any) -> Any:
    """Return what JSON can hold. DuckDB's sums of integers are decimals."""
    if not isinstance(value, Decimal):
        return str(value)
    return float(value) if value.as_tuple().exponent else int(value)
