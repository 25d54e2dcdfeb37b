"""Pairwise text-to-text ranker: which of two responses is better, as the next token, A or B.

`[CONTEXT] x [RESPONSE A] y1 [RESPONSE B] y2`, answer `A` or `B` (sec. 3.1 of arXiv:2309.06657). The text
is tokenised in pieces, here and nowhere else, so that training and scoring read the same ids and equal
prefixes have equal ids.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from schemas import Model
from stages.data.tokenizer import Tokenizer
from stages.limits import SCORING_TOKENS_PER_PASS, context_length
from stages.network.forward import forward_rows, next_logits
from stages.network.load import load_network
from stages.network.packing import PromptGroup
from stages.ranking.base import Ranker, Response

TextPair = tuple[str, str]
LABELS = ("A", "B")


class RankerPrompt:
    """Prompt of the ranker, from two texts to ids, with the ids of its answers in `labels`."""

    def __init__(self, model: Model) -> None:
        self.tokenizer = Tokenizer(model)
        self.labels = tuple(self.tokenizer.label(label) for label in LABELS)

    def can_read(self, text: str) -> bool:
        """Return whether no special token (as [RESPONSE B]) is written in the text: it would be a control token."""
        return not self.tokenizer.has_special_token(text)

    def ids(self, context: str, first: str, second: str) -> list[int]:
        pieces = (f"[CONTEXT] {context}", f" [RESPONSE A] {first}", f" [RESPONSE B] {second}")
        return self.tokenizer.with_bos([token for piece in pieces for token in self.tokenizer.encode(piece)])


class PairwiseRanker(Ranker):
    """Trained pairwise ranker in memory. budget: tokens in a forward pass."""

    def __init__(self, model: Model, dtype: str, budget: int = SCORING_TOKENS_PER_PASS) -> None:
        self.prompt = RankerPrompt(model)
        self.network = load_network(model)
        self.context = context_length(model.folder)
        self.dtype, self.budget = dtype, budget

    def close(self) -> None:
        """Free the network."""
        self.network.close()

    def read(self, context: str, response: Response) -> str | None:
        return response.text if self.prompt.can_read(context) and self.prompt.can_read(response.text) else None

    def fits(self, context: str, first: str, second: str) -> bool:
        return len(self.prompt.ids(context, first, second)) <= self.context

    def logits(self, context: str, pairs: Sequence[TextPair]) -> np.ndarray:
        """Return logit P(first beats second) of each pair, nats, float64 [N].

        The prefix that all pairs share (the context; and the baseline, if it is read first) goes through the
        network once. A batch holds pairs of one prompt only, so that a number does not depend on what else was scored.
        """

        def label_logits(network: PreTrainedModel, groups: Sequence[PromptGroup], dtype: str) -> Tensor:
            logits = next_logits(network, groups, dtype)
            return logits[:, a] - logits[:, b]

        a, b = self.prompt.labels
        rows = [self.prompt.ids(context, first, second) for first, second in pairs]
        shared = common_prefix_length(rows)
        split_rows = [(row[:shared], row[shared:]) for row in rows]
        return forward_rows(label_logits, self.network, split_rows, self.dtype, self.budget).astype(np.float64)


def common_prefix_length(rows: Sequence[list[int]]) -> int:
    """Return the length of the longest common prefix that leaves every row at least one token."""
    if not rows:
        return 0
    # In lexicographic order, a prefix of the least and the greatest row is one of all.
    low, high = min(rows), max(rows)
    longest = min(len(row) for row in rows) - 1
    return next((n for n in range(longest) if low[n] != high[n]), longest)
