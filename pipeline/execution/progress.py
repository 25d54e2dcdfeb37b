"""Progress of a running step: its rate, the time that is left, and the file in its folder that says so to others."""

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

from pipeline.store.storage import delete
from pipeline.store.store import PROGRESS, StepFolder, write_json

FEW_PARTS = 2  # of which no estimate is made
WRITE_SECONDS, SEND_SECONDS = 1.0, 15.0  # between two writes of the file, on a disk and to an object store


@dataclass
class StepProgress:
    """Progress of a running step: its finished parts, or the units of the one call that computes it.

    `initial` of them were done before the rate is measured: before the first work ends, workers wait and engines start.
    """

    parts: int
    finished_parts: int
    unit: str = "parts"
    figures: Mapping[str, float] = field(default_factory=dict)
    _initial: float = 0.0
    _measured_from: float | None = None

    def __post_init__(self) -> None:
        self._initial = self.done = float(self.finished_parts)
        self.total = float(self.parts)

    def finish_part(self) -> bool:
        """Count a part as finished; return whether that is what the step's progress is counted in."""
        self.finished_parts += 1
        if self.parts > 1:
            self._update(self.finished_parts, self.parts, "parts")
        return self.parts > 1

    def update(self, done: float, total: float, unit: str, figures: Mapping[str, float] = MappingProxyType({})) -> None:
        """Count the units of a step with one part, or of several parts how far the running ones are."""
        self.figures = figures
        if self.parts > 1:
            self._update(min(self.finished_parts + done / total, self.parts), self.parts, "parts")
        else:
            self._update(done, total, unit)

    def _update(self, done: float, total: float, unit: str) -> None:
        self.done, self.total, self.unit = done, total, unit
        if self._measured_from is None and done > self._initial:
            self._measured_from, self._initial = time.monotonic(), done

    @property
    def rate(self) -> float | None:
        """Return units per second, or None while too few are done."""
        advanced = self.done - self._initial
        if self._measured_from is None or advanced <= (FEW_PARTS if self.unit == "parts" else 0):
            return None
        return advanced / max(1e-9, time.monotonic() - self._measured_from)

    @property
    def seconds_left(self) -> float | None:
        """Return the time that the rest takes at this rate, or None while there is none."""
        return (self.total - self.done) / self.rate if self.rate else None


class ProgressFile:
    """File in the folder of a running step with its progress, for `winnow status` and SQL; no result depends on it."""

    def __init__(self, folder: StepFolder) -> None:
        self.path = folder.path / PROGRESS
        self.interval = WRITE_SECONDS if isinstance(folder.path, Path) else SEND_SECONDS
        self.started = _now()
        self._written: float | None = None

    def write(self, progress: StepProgress) -> None:
        """Write the progress, unless that was done a moment ago."""
        if self._written is not None and time.monotonic() - self._written < self.interval:
            return
        content = {
            "done": progress.done,
            "total": progress.total,
            "unit": progress.unit,
            "rate": progress.rate,
            "seconds_left": progress.seconds_left,
            "started": self.started,
            "updated": _now(),
            "process": f"{socket.gethostname()}:{os.getpid()}",
        }
        with suppress(OSError):  # a full disk ends the step itself
            write_json(self.path, content, durable=False)
        self._written = time.monotonic()

    def delete(self) -> None:
        """Delete the file: the step does not run any more."""
        with suppress(OSError):
            delete(self.path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
