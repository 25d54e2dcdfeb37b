"""An engine without a network: nonsense at once, the same for the same prompt and seed. For plumbing and tests."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from schemas import seed_for, token_digest
from stages.sampling.engines import Completion, Progress, Request, Sampling, ignore_progress

ENDS = 0.9  # share of responses that end by themselves


class FakeEngine:
    """Needs neither torch nor weights, only the number of ids in the folder's config."""

    def __init__(self, folder: Path) -> None:
        self.vocabulary: int = json.loads((folder / "config.json").read_text())["vocab_size"]

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress = ignore_progress
    ) -> list[Completion]:
        made = [self._completion(request, sampling) for request in requests]
        progress(len(made))
        return made

    def _completion(self, request: Request, sampling: Sampling) -> Completion:
        """Of 1 to max_tokens tokens, each of any id but those that stop; logp as if all were equally likely."""
        own = seed_for(request.seed, token_digest(request.prompt_ids, []))
        rng = np.random.default_rng(own)
        ids = rng.integers(self.vocabulary, size=rng.integers(1, sampling.max_tokens + 1)).tolist()
        ids = [token for token in ids if token not in sampling.stop]
        ends = len(ids) < sampling.max_tokens and rng.random() < ENDS
        ids += sampling.stop[:1] if ends else ()
        return Completion(ids, -len(ids) * float(np.log(self.vocabulary)), "stop" if ends else "length")

    def close(self) -> None: ...
