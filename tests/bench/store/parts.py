"""Interface of a part of the benchmark: tasks that run one after the other, and a summary of their results."""

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
Results = dict[Key, Any]  # results of tasks by their key


@dataclass(frozen=True)
class Task:
    """Call to measure. `cost` is an estimate of its seconds, which only the forecast of the remaining time uses."""

    key: Key
    cost: float
    call: Callable[[], Any]


@dataclass(frozen=True)
class Verdict:
    """Target, the value measured, and whether it is met: None if it was measured at another size than the target's."""

    what: str
    measured: str
    promised: str
    met: bool | None

    @classmethod
    def at_most(cls, what: str, value: float, bound: float, full_size: bool) -> "Verdict":
        return cls(what, f"{value:,.3g}", f"at most {bound:,.3g}", value <= bound if full_size else None)

    @classmethod
    def at_least(cls, what: str, value: float, bound: float, full_size: bool) -> "Verdict":
        return cls(what, f"{value:,.3g}", f"at least {bound:,.3g}", value >= bound if full_size else None)

    @property
    def row(self) -> Row:
        met = {True: "yes", False: "no", None: "at another size"}[self.met]
        return {"what": self.what, "found": self.measured, "promised": self.promised, "met": met}


@dataclass
class Summary:
    """Verdicts and tables of a part, and failures that did not end it."""

    verdicts: list[Verdict] = field(default_factory=list)
    tables: dict[str, list[Row]] = field(default_factory=dict)
    failures: list[Row] = field(default_factory=list)


def failure(at: str, what: str) -> Row:
    return {"at": at, "what failed": what}


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


class BenchmarkPart(Protocol):
    """Module of a part: its tasks in a folder of its own, and their summary, which may read other parts' results."""

    def tasks(self, sizes: Sizes, folder: Path) -> Iterator[Task]: ...
    def summarize(self, sizes: Sizes, results: Results) -> Summary: ...


def run_in_process(function: Callable[..., Any], *args: Any, preload: tuple[str, ...] = ()) -> Any:
    """Return the function's result from a process of its own: a new one, or a fork of one that imported `preload`."""
    with ProcessPoolExecutor(1, mp_context=_process_context(preload)) as pool:
        return pool.submit(function, *args).result()


def kill_after(seconds: float, function: Callable[..., Any], *args: Any, preload: tuple[str, ...]) -> bool:
    """Run the function in a process of its own and kill it (-9) after `seconds`; return False if it ended before."""
    process = _process_context(preload).Process(target=function, args=args)  # type: ignore[attr-defined]
    process.start()
    process.join(seconds)
    alive = process.is_alive()
    if alive:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return bool(alive)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Make SIGTERM end the child processes and raise SystemExit, so that temporary folders are removed."""

    def end(*_: Any) -> None:
        for child in active_children():
            child.terminate()
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _process_context(preload: tuple[str, ...]) -> BaseContext:
    if not preload:
        return get_context("spawn")
    server = get_context("forkserver")
    server.set_forkserver_preload(list(preload))
    return server
