"""What a stage may pull from its surroundings and is never identified by."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from schemas.tables import REJECTS

T = TypeVar("T")
Tell = Callable[[float, float, str], None]


class Warm:
    """Things that are dear to open (an engine, a network), kept for the life of a worker on one step."""

    def __init__(self) -> None:
        self._held: dict[Any, Any] = {}

    def hold(self, open_it: Callable[..., T], *args: Any) -> T:
        """Open once for these arguments; later calls get the same thing."""
        name = (open_it.__module__, open_it.__qualname__, args)
        if name not in self._held:
            self._held[name] = open_it(*args)
        held: T = self._held[name]
        return held

    def close(self) -> None:
        for thing in self._held.values():
            if hasattr(thing, "close"):
                thing.close()
        self._held.clear()


class Workspace:
    """Handed to a stage beside its inputs: a folder, warm things, rejects, counters, progress."""

    def __init__(self, folder: Path, warm: Warm, tell: Tell) -> None:
        self.folder = folder
        self.hold = warm.hold
        self.progress = tell
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
        """Keep a row that is left out, with its reason."""
        row = dict(prompt_id=prompt, candidate_id=candidate, place=place, reason=reason, detail=detail[:500])
        self._rejects.append(row)

    @property
    def rejects(self) -> pa.Table:
        return pa.Table.from_pylist(self._rejects, schema=REJECTS)
