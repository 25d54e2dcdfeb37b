"""The seam to what generates text: token ids in, token ids out, one seed a request."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from schemas import WinnowError
from stages.head.relu import ReluHead

LogpKind = Literal["exact", "steered", "raw"]
Progress = Callable[[int], None]


class DeadEngineError(RuntimeError):
    """A step failed, so nothing more comes out of this engine; a fresh one in another process may succeed."""


def ignore_progress(done: int) -> None:
    """Progress that nobody listens to."""


@dataclass(frozen=True)
class Request:
    """One draw: prompt ids and its own seed."""

    prompt_ids: Sequence[int]
    seed: int


@dataclass(frozen=True)
class Steering:
    """At every `every`-th token, the `top` likeliest are scored by a head, 0 to 1, and `strength` times that is added.

    The head reads the features that `stages.head.features` makes, of the response so far with the token at its end.
    """

    head: ReluHead
    strength: float
    top: int
    every: int


@dataclass(frozen=True)
class Sampling:
    """How all draws of a call are made; top_k = 0 means no cut. temperature > 0. vLLM cannot steer."""

    temperature: float
    top_k: int
    max_tokens: int
    stop: tuple[int, ...]  # any of these ids ends a response, and belongs to it
    steering: Steering | None = None

    @property
    def uncut(self) -> bool:
        """Is the softmax drawn from as it is, so that a draw's log-prob can be that of its own law?"""
        return self.temperature == 1.0 and self.top_k == 0

    @property
    def logp_kind(self) -> LogpKind:
        """Of which law a completion's log-prob is: exact and steered are what was drawn from, raw is the policy's."""
        if not self.uncut:
            return "raw"
        return "exact" if self.steering is None else "steered"


@dataclass(frozen=True)
class Completion:
    """token_ids end with EOS if finish_reason is stop.

    logp is the policy's own, before temperature, top-k and steering; but of an uncut steered draw, the steered law's.
    """

    token_ids: list[int]
    logp: float
    finish_reason: str


class Engine(Protocol):
    """Threads may call `generate` at once."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress = ignore_progress
    ) -> list[Completion]:
        """One completion a request, in their order; `progress` hears now and then how many there are."""
        ...

    def close(self) -> None: ...


def open_engine(name: str, folder: Path, dtype: str, tensor_parallel: int = 1) -> Engine:
    """vLLM and torch are only imported here: a recipe can be planned without them. `fake` needs neither.

    tensor_parallel: the GPUs that share one vLLM; transformers has the whole model on one.
    """
    if name == "vllm":
        from stages.sampling.engines.vllm import VllmEngine

        return VllmEngine(folder, dtype, tensor_parallel)
    if name == "fake":
        from stages.sampling.engines.fake import FakeEngine

        return FakeEngine(folder)
    if tensor_parallel > 1:
        raise WinnowError(
            f"tensor_parallel: {tensor_parallel}, and the engine is transformers, which runs on one GPU; "
            "set `engine: vllm`, or tensor_parallel to 1 in the profile"
        )
    from stages.sampling.engines.transformers import TransformersEngine

    return TransformersEngine(folder, dtype)
