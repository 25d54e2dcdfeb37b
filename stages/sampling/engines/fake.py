"""Engine without a network, for dry runs and tests: random tokens, the same for the same prompt and seed."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from schemas import WinnowError, seed_for, token_digest
from stages.model_config import ModelConfig
from stages.sampling.engines import Completion, Engine, EngineProgress, Request, Sampling, ignore_progress

STOP_SHARE = 0.9  # of responses shorter than max_tokens


class FakeEngine(Engine):
    """Engine that needs neither torch nor weights, only the vocabulary size in the folder's config."""

    def __init__(self, folder: Path) -> None:
        vocabulary = ModelConfig(folder).vocabulary
        if vocabulary is None:
            raise WinnowError(f"engine fake: {folder / 'config.json'} has no vocab_size")
        self.vocabulary = vocabulary
        file = folder / "tokenizer.json"
        added = json.loads(file.read_text())["added_tokens"] if file.exists() else []
        self.special = {token["id"] for token in added if token["special"]}

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: EngineProgress = ignore_progress
    ) -> list[Completion]:
        """Draw 1 to max_tokens uniform tokens, then drop special ones; logp is under the uniform distribution.

        Of `sampling` it reads max_tokens and the first of stop_token_ids.
        """
        completions = []
        for request in requests:
            rng = np.random.default_rng(seed_for(request.seed, token_digest(request.prompt_ids, [])))
            ids = rng.integers(self.vocabulary, size=rng.integers(1, sampling.max_tokens + 1)).tolist()
            ids = [token for token in ids if token not in self.special.union(sampling.stop_token_ids)]
            stopped = len(ids) < sampling.max_tokens and bool(sampling.stop_token_ids) and rng.random() < STOP_SHARE
            if stopped:
                ids += sampling.stop_token_ids[:1]
            logp = -len(ids) * float(np.log(self.vocabulary))
            completions.append(Completion(ids, logp, "stop" if stopped else "length"))
        progress(len(completions))
        return completions
