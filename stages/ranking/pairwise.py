"""The pairwise text-to-text ranker: which of two responses is better, as the next token, A or B.

`[CONTEXT] x [RESPONSE A] y1 [RESPONSE B] y2`, answer `A` or `B` (sec. 3.1 of arXiv:2309.06657). The text
is tokenised in pieces, here and nowhere else, so that training and scoring read the same ids and equal
beginnings are equal ids.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from schemas import Model
from stages.data.tokenizer import Tokenizer
from stages.limits import context_length
from stages.network.forward import next_logits, read_rows
from stages.network.load import load_network
from stages.network.packing import PromptResponses

LABELS = ("A", "B")


class RankerPrompt:
    """Texts to the ranker's ids."""

    def __init__(self, model: Model) -> None:
        self.tokenizer = Tokenizer(model)
        self.labels = tuple(self.tokenizer.label(label) for label in LABELS)

    def ids(self, context: str, first: str, second: str) -> list[int]:
        encode = self.tokenizer.encode
        pieces = (f"[CONTEXT] {context}", f" [RESPONSE A] {first}", f" [RESPONSE B] {second}")
        return self.tokenizer.with_bos([token for piece in pieces for token in encode(piece)])


class PairwiseRanker:
    """A trained ranker in memory."""

    symmetric = False

    def __init__(self, model: Model, dtype: str, budget: int) -> None:
        self.prompt = RankerPrompt(model)
        self.network = load_network(model)
        self.context = context_length(model.folder)
        self.dtype, self.budget = dtype, budget

    def fits(self, context: str, first: str, second: str) -> bool:
        return len(self.prompt.ids(context, first, second)) <= self.context

    def logits(self, context: str, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """logit P(first beats second) of each pair, nats, float64 [N].

        What the pairs begin with in common (the context; and the baseline, where it is read first) goes
        through the network once. A batch holds pairs of one prompt only, so that a number does not
        depend on what else was scored.
        """
        rows = [self.prompt.ids(context, first, second) for first, second in pairs]
        shared = _common_prefix(rows)
        split = [(row[:shared], row[shared:]) for row in rows]
        return read_rows(self._label_logits, self.network, split, self.dtype, self.budget).astype(np.float64)

    def _label_logits(self, network: PreTrainedModel, groups: Sequence[PromptResponses], dtype: str) -> Tensor:
        a, b = self.prompt.labels
        logits = next_logits(network, groups, dtype)
        return logits[:, a] - logits[:, b]

    def close(self) -> None:
        del self.network


def _common_prefix(rows: Sequence[list[int]]) -> int:
    """Length of the longest common beginning that leaves every row at least one token."""
    if not rows:
        return 0
    low, high = min(rows), max(rows)
    most = min(len(row) for row in rows) - 1
    return next((n for n in range(most) if low[n] != high[n]), most)
