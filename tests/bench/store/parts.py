"""What a part of the benchmark is: tasks to do one after the other, and what they came to."""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import active_children, get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Protocol

from tests.bench.store import Sizes

Row = dict[str, Any]
Key = tuple[str, ...]
Found = dict[Key, Any]


@dataclass(frozen=True)
class Task:
    """`cost`: seconds, about; only for the time left."""

    key: Key
    cost: float
    call: Callable[[], Any]


@dataclass(frozen=True)
class Verdict:
    """A promise, what was found, and whether it is kept: None where it was measured at another size."""

    what: str
    found: str
    promised: str
    met: bool | None

    @classmethod
    def most(cls, what: str, found: float, promised: float, asked: bool) -> "Verdict":
        return cls(what, f"{found:,.3g}", f"at most {promised:,.3g}", found <= promised if asked else None)

    @classmethod
    def least(cls, what: str, found: float, promised: float, asked: bool) -> "Verdict":
        return cls(what, f"{found:,.3g}", f"at least {promised:,.3g}", found >= promised if asked else None)

    @property
    def row(self) -> Row:
        met = {True: "yes", False: "no", None: "at another size"}[self.met]
        return {"what": self.what, "found": self.found, "promised": self.promised, "met": met}


@dataclass
class Told:
    """What a part came to; `failed`: what went wrong in it, and did not end it."""

    verdicts: list[Verdict] = field(default_factory=list)
    tables: dict[str, list[Row]] = field(default_factory=dict)
    failed: list[Row] = field(default_factory=list)


def failure(at: str, what: str) -> Row:
    return {"at": at, "what failed": what}


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


class Measures(Protocol):
    """A part: what it does in a folder of its own, and what came of it (of other parts, too, if they ran)."""

    def tasks(self, sizes: Sizes, folder: Path) -> Iterator[Task]: ...
    def told(self, sizes: Sizes, found: Found) -> Told: ...


def apart(function: Callable[..., Any], *args: Any, ready: tuple[str, ...] = ()) -> Any:
    """What a function returns in a process of its own, which is new, or forked off one that has imported `ready`."""
    with ProcessPoolExecutor(1, mp_context=_context(ready)) as pool:
        return pool.submit(function, *args).result()


def killed_apart(seconds: float, function: Callable[..., Any], *args: Any, ready: tuple[str, ...]) -> bool:
    """Let it run for so long in a process of its own, then kill -9; False if it had ended before."""
    process = _context(ready).Process(target=function, args=args)  # type: ignore[attr-defined]
    process.start()
    process.join(seconds)
    alive = process.is_alive()
    if alive:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return bool(alive)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the processes apart and raises SystemExit, so that whatever was begun is cleaned up."""

    def end(*told: Any) -> None:
        for child in active_children():
            child.terminate()
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _context(ready: tuple[str, ...]) -> BaseContext:
    if not ready:
        return get_context("spawn")
    server = get_context("forkserver")
    server.set_forkserver_preload(list(ready))
    return server
