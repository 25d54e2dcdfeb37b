"""What a stage may pull from its surroundings and is never identified by."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, RLock
from typing import Any, TypeVar

import pyarrow as pa

from pipeline.resources import Resources
from pipeline.store.storage import Location, delete, send
from schemas.tables import REJECTS

T = TypeVar("T")
ProgressCallback = Callable[[float, float, str], None]


class Clock:
    """Seconds of one worker: parts that are at work at once share them, so that those of all add up to its time."""

    def __init__(self) -> None:
        self._shares: dict[object, float] = {}
        self._dealing = Lock()
        self._dealt = time.perf_counter()

    @contextmanager
    def share(self) -> Iterator[Callable[[], float]]:
        """Of what is done inside: says how many seconds it has had."""
        me = object()
        with self._dealing:
            self._deal()[me] = 0.0
        try:
            yield lambda: self._share(me)
        finally:
            with self._dealing:
                del self._deal()[me]

    def _share(self, me: object) -> float:
        with self._dealing:
            return self._deal()[me]

    def _deal(self) -> dict[object, float]:
        now = time.perf_counter()
        for each in self._shares:
            self._shares[each] += (now - self._dealt) / len(self._shares)
        self._dealt = now
        return self._shares


class WarmCache:
    """Things that are dear to open (an engine, a network), kept for the life of a worker on one step."""

    def __init__(self) -> None:
        self._held: dict[Any, Any] = {}
        self._opening = RLock()  # two parts at once want one engine
        self.clock = Clock()

    def hold(self, open_it: Callable[..., T], *args: Any) -> T:
        """Open once for these arguments; later calls get the same thing."""
        name = (open_it.__module__, open_it.__qualname__, args)
        with self._opening:
            if name not in self._held:
                self._held[name] = open_it(*args)
        held: T = self._held[name]
        return held

    def close(self) -> None:
        for thing in self._held.values():
            if hasattr(thing, "close"):
                thing.close()
        self._held.clear()


@dataclass(frozen=True)
class Mirror:
    """Copies files and folders of a stage's own to where its step lies, if that is not this machine."""

    here: Path
    there: Location

    def __call__(self, name: str) -> None:
        if not isinstance(self.there, Path):
            send(self.here / name, self.there / name)

    def drop(self, name: str) -> None:
        """Delete it, here and there."""
        for place in {self.here, self.there}:
            delete(place / name)


class StageContext:
    """Handed to a stage beside its inputs: a folder, warm things, rejects, counters, progress, what its worker has.

    What must outlive this machine (a checkpoint) lies in `folder` and is told to `keep` by its name.
    """

    def __init__(
        self,
        folder: Path,
        warm: WarmCache,
        tell: ProgressCallback,
        resources: Resources = Resources(),  # noqa: B008 - frozen
        there: Location | None = None,
    ) -> None:
        self.folder = folder
        self.hold = warm.hold
        self.progress = tell
        self.resources = resources
        self.keep = Mirror(folder, there or folder)
        self.counters: Counter[str] = Counter()
        self._rejects: list[dict[str, str | None]] = []

    def count(self, **amounts: int) -> None:
        """Add to the step's counters (tokens, ranker_calls), which its manifest records."""
        self.counters.update(amounts)

    def reject(
        self,
        reason: str,
        *,
        place: str,
        detail: str = "",
        prompt: str | None = None,
        candidate: str | None = None,
    ) -> None:
        """Mirror a row that is left out, with its reason."""
        row = dict(prompt_id=prompt, candidate_id=candidate, place=place, reason=reason, detail=detail[:500])
        self._rejects.append(row)

    @property
    def rejects(self) -> pa.Table:
        return pa.Table.from_pylist(self._rejects, schema=REJECTS)
