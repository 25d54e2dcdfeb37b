"""Metrics of a training while it runs: a file in its step's folder, which SQL reads as `metrics_now`, and trackers."""

import json
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import IO, Any
from weakref import finalize

from pipeline import Bound
from pipeline.context import Mirror
from pipeline.registry import describe
from pipeline.store.storage import replace as replace_file
from pipeline.store.store import METRICS_NOW
from schemas import WinnowWarning
from stages.training.config import SPEED
from stages.training.trackers import TrackedTraining, TrackerRun

SEND_SECONDS = 15.0  # between two copies of the file to an object store


class LiveMetrics:
    """Metrics of a training for those who watch it. No result depends on them.

    It travels to every rank; the first one opens it. A run that resumes writes what its checkpoint has, and goes on
    from there: no row is there twice.
    """

    def __init__(self, mirror: Mirror, trackers: list[Bound], title: str, settings: Mapping[str, Any]) -> None:
        key, store = mirror.there.name, mirror.there.parent.parent
        self.mirror, self.trackers = mirror, trackers
        scalars = {
            name: value if isinstance(value, bool | int | float | None) else str(value)
            for name, value in settings.items()
        }
        self.training = TrackedTraining(title, key, store, scalars)
        self._is_open = False

    def open(self, history: list[dict[str, float]], rank: int) -> None:
        """Begin with what the last checkpoint has; do nothing, now and later, on any rank but the first."""
        if rank:
            return
        path = self.mirror.here / METRICS_NOW
        replace_file(path, "".join(map(_json_line, history)).encode())
        self._file: IO[str] = path.open("a", encoding="utf-8")
        self._entries, self._sent = len(history), time.monotonic()
        self._runs: dict[str, TrackerRun] = {}
        training = replace(self.training, last_step=int(history[-1]["step"]) if history else 0)
        for tracker in self.trackers:
            self._guard(tracker.name, self._start, tracker, training)
        self._is_open = True
        # Also where training is interrupted, and then at the end of the process at the latest.
        self._closing = finalize(self, _close, self._file, self._runs)

    def update(self, history: list[dict[str, float]]) -> None:
        """Write and log the entries that were added to the history since."""
        if not self._is_open:
            return
        for entry in history[self._entries :]:
            self._file.write(_json_line(entry))
            metrics = {name.removeprefix(SPEED): float(value) for name, value in entry.items() if name != "step"}
            for name, run in list(self._runs.items()):
                self._guard(name, run.log, metrics, int(entry["step"]))
        self._file.flush()
        self._entries = len(history)
        if self.mirror.here != self.mirror.there and time.monotonic() - self._sent > SEND_SECONDS:
            self._sent = time.monotonic()
            with suppress(OSError):  # the next copy has all rows
                self.mirror(METRICS_NOW)

    def close(self) -> None:
        """End the trackers' runs: the training is complete."""
        if not self._is_open:
            return
        for name, run in list(self._runs.items()):
            self._guard(name, run.finish, True)
        self._runs.clear()
        self._closing()
        self._is_open = False

    def _start(self, tracker: Bound, training: TrackedTraining) -> None:
        self._runs[tracker.name] = tracker(training)

    def _guard(self, name: str, call: Callable[..., None], *arguments: Any) -> None:
        """Call a tracker; one that fails is warned of once, and the training goes on without it."""
        try:
            call(*arguments)
        except (Exception, SystemExit) as error:
            self._runs.pop(name, None)
            message = f"track: {name} failed, and the training goes on without it: {describe(error)[:500]}"
            warnings.warn(message, WinnowWarning, stacklevel=3)


def _close(file: IO[str], runs: dict[str, TrackerRun]) -> None:
    file.close()
    for run in runs.values():
        with suppress(Exception):
            run.finish(complete=False)


def _json_line(entry: dict[str, float]) -> str:
    return json.dumps(entry) + "\n"
