"""Queue in front of one engine that several threads share: their requests run in one batch."""

from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from threading import Condition

from stages.sampling.engines import (
    Completion,
    DeadEngineError,
    Engine,
    EngineProgress,
    Request,
    Sampling,
    ignore_progress,
)


@dataclass(eq=False)
class GenerateCall:
    """State of one thread's `generate`: its requests not yet in the engine, and its completions by index."""

    waiting: deque[tuple[int, Request]]
    sampling: Sampling
    completions: dict[int, Completion] = field(default_factory=dict)
    error: Exception | None = None  # of a request that the engine would not add


class QueuedEngine(Engine):
    """Engine that several threads share: their requests run in one batch, without a thread of its own.

    A thread in `generate` that finds the engine idle makes a step for all; the others wait for the end of that step.
    Requests of the oldest call are added first, and at most `window` are in the engine. So the last requests of one
    call are batched with the first of the next, and the engine is busy while a thread is not. Subclasses define `add`,
    `step` and `abort`, which one thread at a time calls.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.condition = Condition()  # guards all below; the engine itself belongs to the thread that set `stepping`
        self.stepping = False
        self.failure: BaseException | None = None
        self.calls: list[GenerateCall] = []  # oldest first
        self.abandoned: list[GenerateCall] = []  # their thread gave up: an error, or an interrupt
        self.running: dict[str, tuple[GenerateCall, int]] = {}  # by request id: what is in the engine, and its index
        self.request_ids = map(str, count())

    @abstractmethod
    def add(self, request_id: str, request: Request, sampling: Sampling) -> None:
        """Start a request."""

    @abstractmethod
    def step(self) -> dict[str, Completion]:
        """Advance every running request; return the completions of finished ones, which leave the engine."""

    @abstractmethod
    def abort(self, request_ids: list[str]) -> None:
        """Remove running requests."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: EngineProgress = ignore_progress
    ) -> list[Completion]:
        """Return completions in the order of the requests.

        Raises what the engine raises for a request of this call. Once a step has failed in one thread, raises
        DeadEngineError in every other.
        """
        call = GenerateCall(deque(enumerate(requests)), sampling)
        with self.condition:
            self.calls.append(call)
        try:
            while len(call.completions) < len(requests):
                with self.condition:
                    if self.failure is not None:
                        raise DeadEngineError(f"an earlier step failed: {self.failure!r}") from self.failure
                    if call.error is not None:
                        raise call.error
                    my_turn = not self.stepping
                    if my_turn:
                        self.stepping = True
                    else:
                        self.condition.wait()  # the end of a step wakes all: one of them makes the next
                if my_turn:
                    self._step()
                progress(len(call.completions))
        finally:
            with self.condition:
                self.calls.remove(call)
                if len(call.completions) < len(requests):
                    # Only the thread that steps may touch the engine: the next one aborts what is still running.
                    self.abandoned.append(call)
        return [call.completions[index] for index in range(len(requests))]

    def _step(self) -> None:
        """Abort and add requests, then make one step for all calls. Only for the thread that set `stepping`."""
        finished: dict[str, Completion] = {}
        failure: BaseException | None = None
        try:
            with self.condition:
                # Abort what abandoned calls still have in the engine.
                orphans = [request_id for request_id, (call, _) in self.running.items() if call in self.abandoned]
                self.abandoned.clear()
                if orphans:
                    self.abort(orphans)
                for request_id in orphans:
                    del self.running[request_id]

                # Add waiting requests while the window has room.
                for call in self.calls:
                    while call.waiting and len(self.running) < self.window:
                        index, request = call.waiting.popleft()
                        request_id = next(self.request_ids)
                        try:
                            self.add(request_id, request, call.sampling)
                        except Exception as error:  # raised in the thread that asked, which need not be this one
                            call.error = error
                            call.waiting.clear()
                        else:
                            self.running[request_id] = call, index
            if self.running:
                finished = self.step()
        except BaseException as error:
            # An interrupt too leaves the engine in the middle of a step, so that nothing it returns later can be
            # trusted: no thread may go on with it.
            failure = error
            raise
        finally:
            with self.condition:
                for request_id, completion in finished.items():
                    call, index = self.running.pop(request_id)
                    call.completions[index] = completion
                self.stepping, self.failure = False, failure
                self.condition.notify_all()
