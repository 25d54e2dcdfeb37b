"""One warm engine for several threads: their requests run in one batch, and each thread gets its own back."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from threading import Condition
from typing import Protocol

from stages.sampling.engines import Completion, DeadEngineError, Progress, Request, Sampling


class Core(Protocol):
    """An engine that is stepped by hand, by one thread at a time."""

    def add(self, name: str, request: Request, sampling: Sampling) -> None: ...

    def step(self) -> dict[str, Completion]:
        """Move every request inside on; what is done now leaves. Only called while there are some."""
        ...

    def abort(self, names: list[str]) -> None: ...


@dataclass(eq=False)
class Call:
    """What one thread asks for: the requests that wait outside, and by place what came of those that went in."""

    coming: deque[tuple[int, Request]]
    sampling: Sampling
    done: dict[int, Completion] = field(default_factory=dict)
    refused: Exception | None = None


class Batch:
    """Whichever caller finds the core at rest steps it for all; the others wait for the end of that step.

    The oldest call's requests go in first, and at most `window` are inside. So as one call runs out the next is
    in full swing: the core has work while a thread is busy with what came out of it.
    """

    def __init__(self, core: Core, window: int) -> None:
        self.core, self.window = core, window
        self.turn = Condition()  # guards what follows; the core itself belongs to the thread that set `stepping`
        self.stepping = False
        self.failure: BaseException | None = None
        self.calls: list[Call] = []
        self.left: list[Call] = []
        self.inside: dict[str, tuple[Call, int]] = {}
        self.names = map(str, count())

    def generate(self, requests: Sequence[Request], sampling: Sampling, progress: Progress) -> list[Completion]:
        """In the order of the requests. Raises DeadEngineError in every thread once a step has failed in one."""
        with self._joined(Call(deque(enumerate(requests)), sampling)) as call:
            while len(call.done) < len(requests):
                self._advance(call)
                progress(len(call.done))
        return [call.done[place] for place in range(len(requests))]

    @contextmanager
    def _joined(self, call: Call) -> Iterator[Call]:
        with self.turn:
            self.calls.append(call)
        try:
            yield call
        except BaseException:
            with self.turn:
                self.left.append(call)
            raise
        finally:
            with self.turn:
                self.calls.remove(call)

    def _advance(self, call: Call) -> None:
        """One step, by this thread or by the one that is at it, whose end wakes all: one of them makes the next."""
        with self.turn:
            if self.failure is not None:
                raise DeadEngineError(f"an earlier step of the engine failed: {self.failure!r}") from self.failure
            if call.refused is not None:
                raise call.refused
            if self.stepping:
                self.turn.wait()
                return
            self.stepping = True
        self._step()

    def _step(self) -> None:
        """Whatever breaks it off, an interrupt too, leaves the core half-way: nothing it says could be trusted then."""
        finished: dict[str, Completion] = {}
        failure: BaseException | None = None
        try:
            self._exchange()
            finished = self.core.step() if self.inside else {}
        except BaseException as error:
            failure = error
            raise
        finally:
            with self.turn:
                for name, completion in finished.items():
                    call, place = self.inside.pop(name)
                    call.done[place] = completion
                self.stepping, self.failure = False, failure
                self.turn.notify_all()

    def _exchange(self) -> None:
        """Out with the requests of threads that gave up, in with what waits."""
        with self.turn:
            orphans = [name for name, (call, _) in self.inside.items() if call in self.left] if self.left else []
            self.left.clear()
            if orphans:
                self.core.abort(orphans)
            for name in orphans:
                del self.inside[name]
            for call in self.calls:
                while call.coming and len(self.inside) < self.window:
                    self._admit(call, *call.coming.popleft())

    def _admit(self, call: Call, place: int, request: Request) -> None:
        name = next(self.names)
        try:
            self.core.add(name, request, call.sampling)
        except Exception as error:  # kept for the thread that asked, which need not be this one
            call.refused = error
            call.coming.clear()
        else:
            self.inside[name] = call, place
