"""Pointwise reward model: one score per response, so that P(a beats b) is the logistic of a difference."""

from collections.abc import Sequence

import numpy as np

from schemas import Model
from stages.data.tokenizer import Tokenizer
from stages.limits import SCORING_TOKENS_PER_PASS, context_length
from stages.network.forward import completion_scores, forward_rows
from stages.network.load import load_network
from stages.ranking.base import Scorer


class PointwiseRanker(Scorer):
    """Reward model in memory, which reads a prompt and a response as the ids that it was trained on."""

    def __init__(self, model: Model, dtype: str, budget: int = SCORING_TOKENS_PER_PASS) -> None:
        self.tokenizer = Tokenizer(model)
        self.network = load_network(model)
        self.context = context_length(model.folder)
        self.dtype, self.budget = dtype, budget

    def ids(self, context: str, text: str) -> tuple[list[int], list[int]]:
        """Return prompt and response ids; raise ValueError if a text has a special token of the model written out."""
        return self.tokenizer.prompt_ids(context), self.tokenizer.response_ids(context, text)

    def fits(self, context: str, first: str, second: str) -> bool:
        """Return whether both are short enough, and free of special tokens, which would read as control tokens."""
        try:
            return all(sum(map(len, self.ids(context, text))) <= self.context for text in {first, second})
        except ValueError:
            return False

    def score(self, context: str, texts: Sequence[str]) -> np.ndarray:
        rows = [self.ids(context, text) for text in texts]
        return forward_rows(completion_scores, self.network, rows, self.dtype, self.budget).astype(np.float64)
