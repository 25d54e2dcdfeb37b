"""The seam to what generates text: token ids in, token ids out, one seed a request."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Request:
    """One draw: prompt ids and its own seed."""

    prompt_ids: Sequence[int]
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How all draws of a call are made; top_k = 0 means no cut. temperature > 0."""

    temperature: float
    top_k: int
    max_tokens: int
    stop: tuple[int, ...]  # any of these ids ends a response, and belongs to it

    @property
    def exact(self) -> bool:
        """Are draws from the policy itself, so that raw log-probs are those of the draw?"""
        return self.temperature == 1.0 and self.top_k == 0


@dataclass(frozen=True)
class Completion:
    """token_ids end with EOS if finish_reason is stop. logp is raw: before temperature and top-k."""

    token_ids: list[int]
    logp: float
    finish_reason: str


class Engine(Protocol):
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]: ...

    def close(self) -> None: ...


def open_engine(name: str, folder: Path, dtype: str) -> Engine:
    """vLLM and torch are only imported here: a recipe can be planned without them."""
    if name == "vllm":
        from stages.engines.vllm import VllmEngine

        return VllmEngine(folder, dtype)
    from stages.engines.transformers import TransformersEngine

    return TransformersEngine(folder, dtype)
