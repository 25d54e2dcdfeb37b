"""What a stage gets besides its inputs and options. Nothing here is part of a key."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from threading import Lock, RLock
from typing import Any, NamedTuple, TypeAlias, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.resources import Resources
from pipeline.store.storage import Location, delete, send
from schemas import combine_chunks, conform
from schemas.tables import REJECTS

T = TypeVar("T")
Column: TypeAlias = pa.Array | Sequence[str | None] | str | None  # of rejects: a value per row, or one for all
DETAIL = 500  # characters of a reject's detail
ProgressCallback = Callable[..., None]  # called with the fields of a Progress


class Progress(NamedTuple):
    """How much is done, of how much in total, counted in `unit` (tokens, parts); of training, its latest metrics."""

    done: float
    total: float
    unit: str
    figures: Mapping[str, float] = {}  # read, never written


@dataclass
class WorkerClock:
    """Time of one worker, divided among the parts that run on it at once: their shares add up to its busy time."""

    _parts: int = 0
    _seconds_per_part: float = 0.0  # the integral of 1 / parts over time; a part's share is what it grows meanwhile
    _updated: float = 0.0
    _lock: Any = field(default_factory=Lock)

    @contextmanager
    def share(self) -> Iterator[Callable[[], float]]:
        """Measure what runs inside; yield a function that returns the seconds that were its share until now."""
        start = self._advance(1)
        try:
            yield lambda: self._advance(0) - start
        finally:
            self._advance(-1)

    def _advance(self, parts: int) -> float:
        with self._lock:
            now = time.perf_counter()
            if self._parts:
                self._seconds_per_part += (now - self._updated) / self._parts
            self._updated = now
            self._parts += parts
            return self._seconds_per_part


class WarmCache:
    """Resources that are slow to open (an engine, a network), kept open as long as a worker serves one step."""

    def __init__(self) -> None:
        self._held: dict[Any, Any] = {}
        self._lock = RLock()  # two parts that run at once want one engine
        self.clock = WorkerClock()

    def open_once(self, open_it: Callable[..., T], *args: Any) -> T:
        """Return `open_it(*args)`, called once for each function and arguments; args must be hashable."""
        key = (open_it.__module__, open_it.__qualname__, args)
        with self._lock:
            if key not in self._held:
                self._held[key] = open_it(*args)
        return self._held[key]

    def close(self) -> None:
        """Close all that is open and can be closed."""
        for resource in self._held.values():
            if hasattr(resource, "close"):
                resource.close()
        self._held.clear()


@dataclass(frozen=True)
class Mirror:
    """Copies of a stage's own files in its step's folder, if that is in an object store and not on this machine."""

    here: Path
    there: Location

    def __call__(self, name: str) -> None:
        """Copy a file or folder to the step's folder."""
        if not isinstance(self.there, Path):
            send(self.here / name, self.there / name)

    def drop(self, name: str) -> None:
        """Delete a file or folder, here and there."""
        for folder in {self.here, self.there}:
            delete(folder / name)


class StageContext:
    """Context that a stage may ask for: a folder, a cache, rejects, counters, progress, its worker's resources.

    Files that must survive this machine (a checkpoint) are in `folder`; call `mirror` with their names.
    """

    def __init__(
        self,
        folder: Path,
        cache: WarmCache,
        progress: ProgressCallback,
        resources: Resources = Resources(),  # noqa: B008 - frozen
        location: Location | None = None,
        title: str = "",
        earlier: Sequence[Callable[[pa.Schema], pa.Table]] = (),
    ) -> None:
        self.folder = folder
        # Each reads the table of a schema of a finished step whose rows are the stage's own, if it `goes_on`
        # (pipeline/stage.py): those of this part, and with pieces of more prompts. The one with most rows comes first.
        self.earlier = earlier
        self.title = title  # run and step, for people: `rso optimize@2`
        self.open_once = cache.open_once
        self.progress = progress
        self.resources = resources
        self.mirror = Mirror(folder, location or folder)
        self.counters: Counter[str] = Counter()
        self.measures: dict[str, dict[str, float]] = {}
        self._rejects: list[tuple[int, pa.Table]] = []
        self._rejected: list[dict[str, str | None]] = []  # rows after those tables

    def count(self, **amounts: int) -> None:
        """Add to the step's counters (tokens, ranker_calls), which its manifest records."""
        self.counters.update(amounts)

    def measure(self, name: str, *, total: float, count: float, largest: float) -> None:
        """Record a mean, `total` / `count`, and the largest of its values; parts are added up in the manifest."""
        self.measures[name] = {"total": total, "count": count, "largest": largest}

    def reject(
        self, reason: str, *, place: str, detail: str = "", prompt: str | None = None, candidate: str | None = None
    ) -> None:
        """Record a rejected row with its reason, and where it was: a row of table `rejects`."""
        row = dict(prompt_id=prompt, candidate_id=candidate, place=place, reason=reason, detail=detail[:DETAIL])
        self._rejected.append(row)

    def reject_rows(
        self,
        prompts: pa.Array,
        *,
        reason: Column,
        place: Column,
        detail: Column = "",
        candidates: Column = None,
        phase: int = 0,
    ) -> None:
        """Record rejected rows by columns, each an array or a list with a value per row, or one value for all.

        Those of a lower phase of the stage stand first, also where it is called for a part in pieces.
        """
        columns = [prompts, candidates, place, reason, detail]
        arrays = []
        for column in columns:
            if column is None or isinstance(column, str):
                arrays.append(pa.repeat(pa.scalar(column, pa.string()), len(prompts)))
            else:
                arrays.append(column if isinstance(column, pa.Array) else pa.array(column, pa.string()))
        arrays[-1] = pc.utf8_slice_codeunits(arrays[-1], 0, DETAIL)
        self._add_rejected()
        self._rejects.append((phase, conform(pa.Table.from_arrays(arrays, REJECTS.names), REJECTS)))

    def _add_rejected(self) -> None:
        self._rejects.append((0, pa.Table.from_pylist(self._rejected, schema=REJECTS)))
        self._rejected = []

    @property
    def rejects(self) -> pa.Table:
        """Return the rejected rows as table `rejects`."""
        self._add_rejected()
        tables = sorted(self._rejects, key=itemgetter(0))
        return combine_chunks(pa.concat_tables([table for _, table in tables]))
