"""Interface of the engines that generate text: token ids in, token ids out, one seed per request."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline import Bound
from pipeline.processes import DeadProcessError
from schemas import WinnowError
from stages.head.relu import ReluHead

LogpKind = Literal["exact", "steered", "raw", "approximate"]
EngineProgress = Callable[[int], None]


class DeadEngineError(DeadProcessError):
    """Failure of a step that leaves the engine unusable; a new engine in another process may succeed."""


def ignore_progress(done: int) -> None:
    """Do nothing: the default progress callback."""


@dataclass(frozen=True)
class Request:
    """One draw: prompt ids and its own seed."""

    prompt_ids: Sequence[int]
    seed: int


@dataclass(frozen=True)
class Steering:
    """Guided decoding: at every `every`-th token, `strength` times a head's score is added to the `top` logits.

    The head scores the features that `stages.head.features` computes, of the response so far with each of the `top`
    likeliest tokens at its end; its scores are scaled to 0..1 over these tokens.
    """

    head: ReluHead
    strength: float
    top: int
    every: int


# The values with which the parameters of a draw leave it a draw of the policy. What ends a response (max_tokens, stop,
# stop_token_ids, ignore_eos) is not among them: the log-prob of what was drawn until then is the policy's.
POLICY_ITSELF = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "logit_bias": (), "bad_words": (), "min_tokens": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of all requests of a call, as vLLM's `SamplingParams` has them; only steering is not its.

    temperature > 0; top_k = 0 disables top-k. The order is vLLM's: bad_words, logit_bias, min_tokens, penalties,
    temperature, min_p, top_k, top_p.
    """

    temperature: float
    top_k: int
    max_tokens: int
    stop_token_ids: tuple[int, ...]  # any of these ids ends a response, and belongs to it; EOS is one of them
    steering: Steering | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # for ids in prompt or response
    presence_penalty: float = 0.0  # for ids in the response
    frequency_penalty: float = 0.0  # per time that the response has the id
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[str, ...] = ()
    min_tokens: int = 0  # before which nothing ends a response
    ignore_eos: bool = False  # EOS is not among stop_token_ids
    stop: tuple[str, ...] = ()  # a response that completes one of these texts ends with that token

    @property
    def logp_kind(self) -> LogpKind:
        """Return the distribution of `logp`: the sampling distribution (exact, steered) or the policy's (raw)."""
        if any(getattr(self, name) != value for name, value in POLICY_ITSELF.items()):
            return "raw"
        return "exact" if self.steering is None else "steered"


@dataclass(frozen=True)
class Completion:
    """Response to one request, which ended by an id (stop), a text (stop_string) or max_tokens (length).

    token_ids are all that were drawn: they end with that id, or with the token that completes the text, which may begin
    before it and go on after it. logp is theirs under the policy, before anything that changes its distribution; if
    `logp_kind` is steered, it is under the steered distribution.
    """

    token_ids: list[int]
    logp: float
    finish_reason: str


class Engine(ABC):
    """Generator of completions. Threads may call `generate` at once."""

    @abstractmethod
    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: EngineProgress = ignore_progress
    ) -> list[Completion]:
        """Return one completion per request, in their order; call `progress` now and then with the number done."""

    def close(self) -> None:  # noqa: B027 - optional
        """Free what outlives the object: nothing, by default."""


def open_engine(engine: str | Bound, folder: Path, dtype: str, tensor_parallel: int = 1, options: str = "{}") -> Engine:
    """Start the engine of this name, or with these options of its own, on the model in `folder`.

    vLLM and torch are only imported here: a recipe can be planned without them. `fake` needs neither.
    tensor_parallel: the GPUs that share one vLLM. Raises WinnowError if it is above 1 for transformers, which has
    the whole model on one GPU, or for a server. options: `engine_options` of vLLM as JSON, for arguments of `open_once`
    are hashable.
    """
    if isinstance(engine, Bound):
        if tensor_parallel > 1:
            raise WinnowError(
                f"tensor_parallel: {tensor_parallel}, but the engine {engine.name} has its GPUs elsewhere: set "
                "`tensor_parallel: 1` in the profile, and give the number to the server"
            )
        opened: Engine = engine(folder, dtype)
        return opened
    if engine == "vllm":
        from stages.sampling.engines.vllm import VllmEngine

        return VllmEngine(folder, dtype, tensor_parallel, json.loads(options))
    if engine == "fake":
        from stages.sampling.engines.fake import FakeEngine

        return FakeEngine(folder)
    if tensor_parallel > 1:
        raise WinnowError(
            f"tensor_parallel: {tensor_parallel}, but the engine transformers runs on one GPU: "
            "set `engine: vllm`, or `tensor_parallel: 1` in the profile"
        )
    from stages.sampling.engines.transformers import TransformersEngine

    return TransformersEngine(folder, dtype)
