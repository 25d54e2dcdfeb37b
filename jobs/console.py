"""What people see while a run works and when it ends."""

import json
import time
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pipeline.config.plan import Step

QUIET_SECONDS = 10.0


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.speed or task.finished_speed
        return Text(f"{speed:,.1f} {task.fields['unit']}/s" if speed else "")


@dataclass
class _Step:
    """A step at work as people see it."""

    task: TaskID
    parts: int
    finished: int
    begun: float
    started: float = field(default_factory=time.monotonic)
    told: float = field(default_factory=time.monotonic)
    done: float = 0.0
    total: float = 0.0
    unit: str = "parts"

    @property
    def pace(self) -> str:
        rate = (self.done - self.begun) / max(1e-9, time.monotonic() - self.started)
        done = f"{self.done:,.1f}".removesuffix(".0")
        pace = f", {rate:,.2f}/s, {(self.total - self.done) / rate:,.0f} s left" if rate else ""
        return f"{done}/{self.total:,.0f} {self.unit}{pace}"


class ProgressReporter:
    """A bar for each step at work, a line for each finished one; lines now and then where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
            _Rate(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.interrupted = False
        self.steps: dict[str, _Step] = {}

    def interrupt(self, *signal: Any) -> None:
        """On Ctrl-C. Raised again at the next report: an exception in a finalizer is swallowed by Python."""
        self.interrupted = True
        raise KeyboardInterrupt

    def _go_on(self) -> None:
        if self.interrupted:
            raise KeyboardInterrupt

    def _line(self, step: Step, text: str) -> None:
        self._go_on()
        self.console.print(f"  {step.name:<16} {text}", highlight=False)

    def step_cached(self, step: Step) -> None:
        self._line(step, f"[dim]cached {step.key}[/]")

    def step_waiting(self, step: Step, why: str) -> None:
        self._line(step, f"[yellow]waiting[/] {step.key}: {why}")

    def step_started(self, step: Step, done: int, total: int) -> None:
        again = f" ({done} of {total} parts are there)" if done else ""
        self._line(step, f"[cyan]running[/] {step.key}{again}")
        self.bar.start()
        task = self.bar.add_task(step.name, total=total, completed=done, unit="parts")
        self.steps[step.name] = _Step(task, total, done, float(done))

    def part_finished(self, step: Step) -> None:
        self._go_on()
        seen = self.steps[step.name]
        seen.finished += 1
        if seen.parts > 1:
            self._show(step.name, seen.finished, seen.parts, "parts")

    def progress(self, step: Step, done: float, total: float, unit: str) -> None:
        """A step of one part shows its own units; of many, how far the parts at work are."""
        self._go_on()
        seen = self.steps[step.name]
        if seen.parts > 1:
            self._show(step.name, min(seen.finished + done / total, seen.parts), seen.parts, "parts")
        else:
            self._show(step.name, done, total, unit)

    def _show(self, name: str, done: float, total: float, unit: str) -> None:
        seen = self.steps[name]
        seen.done, seen.total, seen.unit = done, total, unit
        self.bar.update(seen.task, completed=done, total=total, unit=unit)
        if not self.console.is_terminal and done < total and time.monotonic() - seen.told > QUIET_SECONDS:
            seen.told = time.monotonic()
            self.console.print(f"    {name}: {seen.pace}", highlight=False)

    def prompt_rejected(self, step: Step, prompt: str, words: str) -> None:
        self._line(step, f"[red]left out[/] prompt {prompt}: it killed its worker each time ({escape(words)})")

    def step_finished(self, step: Step, manifest: dict[str, Any]) -> None:
        self.bar.remove_task(self.steps.pop(step.name).task)
        self._line(step, f"[green]made[/] {_made(manifest)}")

    def close(self) -> None:
        self.bar.stop()


def _made(manifest: dict[str, Any]) -> str:
    rows = ", ".join(f"{n:,} {name}" for name, n in manifest["rows"].items() if name != "rejects")
    seconds = manifest["wall_seconds"]
    words = [rows, f"{seconds:,.1f} s"]
    words += [f"{n:,} {name.replace('_', ' ')} ({n / max(seconds, 1e-9):,.0f}/s)"
              for name, n in manifest["counters"].items()]  # fmt: skip
    left_out = ", ".join(f"{n:,} {reason}" for reason, n in sorted(manifest["rejects"].items()))
    return "; ".join(word for word in words if word) + (f"; [yellow]left out: {left_out}[/]" if left_out else "")


def as_table(answer: pa.Table, title: str | None = None) -> Table:
    """An Arrow table for the terminal; floats with four digits."""
    table = Table(title=title and escape(title), title_justify="left")
    for name in answer.column_names:
        table.add_column(escape(name))
    for row in answer.to_pylist():
        table.add_row(*(Text(_cell(value)) for value in row.values()))
    return table


def as_json(value: Any) -> str:
    """JSON of anything that SQL answers with; a date or an id is its text, and what JSON has no number for is null."""
    try:
        return json.dumps(value, ensure_ascii=False, default=_plain, allow_nan=False)
    except ValueError:
        plain = json.loads(json.dumps(value, default=_plain), parse_constant=lambda name: None)
        return json.dumps(plain, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """DuckDB's sums of integers are decimals."""
    if not isinstance(value, Decimal):
        return str(value)
    return float(value) if value.as_tuple().exponent else int(value)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
