"""What people see while a run works and when it ends."""

import json
import time
from decimal import Decimal
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pipeline.plan import Step

QUIET_SECONDS = 10.0


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.speed or task.finished_speed
        return Text(f"{speed:,.1f} {task.fields['unit']}/s" if speed else "")


class Watcher:
    """A bar for the step at work, a line for each finished one; plain lines now and then where there is no terminal."""

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
        self.name, self.interrupted = "", False
        self.parts, self.finished = 1, 0
        self.begun, self.done, self.total, self.unit_name = 0.0, 0.0, 0.0, "parts"
        self.told = self.started = time.monotonic()

    def interrupt(self, *signal: Any) -> None:
        """On Ctrl-C. Raised again at the next report: an exception in a finalizer is swallowed by Python."""
        self.interrupted = True
        raise KeyboardInterrupt

    def _go_on(self) -> None:
        if self.interrupted:
            raise KeyboardInterrupt

    def cached(self, step: Step) -> None:
        self._go_on()
        self.console.print(f"  [dim]{step.name:<16} cached {step.key}[/]", highlight=False)

    def begin(self, step: Step, done: int, total: int) -> None:
        self._go_on()
        self.name, self.started, self.told = step.name, time.monotonic(), time.monotonic()
        self.parts, self.finished, self.begun = total, done, float(done)
        self.bar.start()
        self.task = self.bar.add_task(step.name, total=total, completed=done, unit="parts")
        again = f" ({done} of {total} parts are there)" if done else ""
        self.console.print(f"  {step.name:<16} [cyan]running[/] {step.key}{again}", highlight=False)

    def unit(self, rows: int) -> None:
        self._go_on()
        self.finished += 1
        if self.parts > 1:
            self._show(self.finished, self.parts, "parts")

    def tell(self, done: float, total: float, unit: str) -> None:
        """A step of one part shows its own units; of many, how far the part at work is."""
        self._go_on()
        if self.parts > 1:
            self._show(self.finished + done / total, self.parts, "parts")
        else:
            self._show(done, total, unit)

    def _show(self, done: float, total: float, unit: str) -> None:
        self.done, self.total, self.unit_name = done, total, unit
        self.bar.update(self.task, completed=done, total=total, unit=unit)
        if not self.console.is_terminal and done < total and time.monotonic() - self.told > QUIET_SECONDS:
            self.told = time.monotonic()
            self.console.print(f"    {self.name}: {self._pace()}", highlight=False)

    def _pace(self) -> str:
        rate = (self.done - self.begun) / max(1e-9, time.monotonic() - self.started)
        left = (self.total - self.done) / rate if rate else 0.0
        return f"{self.done:,.1f}/{self.total:,.0f} {self.unit_name}, {rate:,.2f}/s, {left:,.0f} s left"

    def sealed(self, step: Step, manifest: dict[str, Any]) -> None:
        self.bar.remove_task(self.task)
        self.console.print(f"  {step.name:<16} [green]made[/] {_made(manifest)}", highlight=False)

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
    """JSON of anything that SQL answers with; a date or an id is its text."""
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    """DuckDB's sums of integers are decimals."""
    if not isinstance(value, Decimal):
        return str(value)
    return float(value) if value.as_tuple().exponent else int(value)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
