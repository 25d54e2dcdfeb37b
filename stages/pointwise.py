"""The pointwise reward model: one score a response, so that P(a beats b) is the logistic of a difference."""

from collections.abc import Sequence

import numpy as np
import torch

from schemas import Model
from stages.limits import context_length
from stages.policy import Row, by_tokens, completion_scores, load_network
from stages.text import Tokenizer


class PointwiseRanker:
    """A reward model in memory; it reads a prompt and a response as the ids that it was trained on."""

    symmetric = True

    def __init__(self, model: Model, dtype: str, budget: int) -> None:
        self.tokenizer = Tokenizer(model)
        self.network = load_network(model)
        self.context = context_length(model.folder)
        self.dtype, self.budget = dtype, budget

    def fits(self, context: str, first: str, second: str) -> bool:
        """Not either, if a text has a special token of the model written out: it would read a control token."""
        try:
            rows = [self._row(context, text) for text in (first, second)]
        except ValueError:
            return False
        return all(len(prompt) + len(response) <= self.context for prompt, response in rows)

    def logits(self, context: str, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """s(first) - s(second) of each pair, float64 [N]. Equal texts go through the network once.

        Texts are read in an order of their own, so that the order of the pairs changes no bit.
        """
        texts = sorted({text for pair in pairs for text in pair})
        scores = dict(zip(texts, self._scores([self._row(context, text) for text in texts]).tolist(), strict=True))
        return np.array([scores[first] - scores[second] for first, second in pairs], dtype=np.float64)

    def _row(self, context: str, text: str) -> Row:
        return self.tokenizer.prompt_ids(context), self.tokenizer.response_ids(text, self.context)[0]

    @torch.inference_mode()
    def _scores(self, rows: Sequence[Row]) -> np.ndarray:
        scores = np.zeros(len(rows))
        for batch in by_tokens([len(prompt) + len(response) for prompt, response in rows], self.budget):
            scores[batch] = completion_scores(self.network, [rows[n] for n in batch], self.dtype).cpu().numpy()
        return scores

    def close(self) -> None:
        del self.network
