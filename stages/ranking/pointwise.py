"""The pointwise reward model: one score a response, so that P(a beats b) is the logistic of a difference."""

from collections.abc import Sequence

import numpy as np

from schemas import Model
from stages.data.tokenizer import Tokenizer
from stages.limits import context_length
from stages.network.forward import Row, completion_scores, read_rows
from stages.network.load import load_network
from stages.ranking.rankers import Scorer


class PointwiseRanker(Scorer):
    """A reward model in memory; it reads a prompt and a response as the ids that it was trained on."""

    def __init__(self, model: Model, dtype: str, budget: int) -> None:
        self.tokenizer = Tokenizer(model)
        self.network = load_network(model)
        self.context = context_length(model.folder)
        self.dtype, self.budget = dtype, budget

    def reads(self, context: str, text: str) -> bool:
        """Not a text with a special token of the model written out, either: it would read a control token."""
        try:
            prompt, response = self._row(context, text)
        except ValueError:
            return False
        return len(prompt) + len(response) <= self.context

    def _row(self, context: str, text: str) -> Row:
        return self.tokenizer.prompt_ids(context), self.tokenizer.response_ids(text, self.context)[0]

    def score(self, context: str, texts: Sequence[str]) -> np.ndarray:
        rows = [self._row(context, text) for text in texts]
        return read_rows(completion_scores, self.network, rows, self.dtype, self.budget).astype(np.float64)

    def close(self) -> None:
        del self.network
