"""The pairwise text-to-text ranker: which of two responses is better, as the next token, A or B.

`[CONTEXT] x [RESPONSE A] y1 [RESPONSE B] y2`, answer `A` or `B` (sec. 3.1 of arXiv:2309.06657). The text
is tokenised in pieces, here and nowhere else, so that training and scoring read the same ids and equal
beginnings are equal ids.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from schemas import Model
from stages.limits import context_length
from stages.policy import autocast, by_tokens, load_network
from stages.text import Tokenizer

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
        lengths = [len(row) for row in rows]  # the prefix is copied for every row of a batch
        result = np.zeros(len(rows))
        prefix = self._prefix(rows[0][:shared]) if rows else None
        for batch in by_tokens(lengths, self.budget):
            result[batch] = self._suffixes(prefix, shared, [rows[n][shared:] for n in batch])
        return result

    def _prefix(self, ids: list[int]) -> Any:
        cache = DynamicCache(config=self.network.config)
        device = self.network.device
        with torch.inference_mode(), autocast(self.dtype, device):
            self.network(
                input_ids=torch.tensor([ids], device=device),
                past_key_values=cache,
                logits_to_keep=1,
            )
        return cache

    def _suffixes(self, prefix: Any, shared: int, rows: list[list[int]]) -> np.ndarray:
        """Padded on the left, so that the label is predicted at the last position of every row."""
        device = self.network.device
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
        real = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        mask = torch.cat([real.new_ones(len(rows), shared), real], dim=1)
        cache = copy.deepcopy(prefix)
        cache.batch_repeat_interleave(len(rows))
        with torch.inference_mode(), autocast(self.dtype, device):
            logits = self.network(
                input_ids=ids,
                attention_mask=mask,
                position_ids=shared + (real.cumsum(1) - 1).clamp(min=0),
                past_key_values=cache,
                logits_to_keep=1,
            ).logits
        a, b = self.prompt.labels
        scores = logits[:, -1].double()
        result: np.ndarray = (scores[:, a] - scores[:, b]).cpu().numpy()
        return result

    def close(self) -> None:
        del self.network


def _common_prefix(rows: Sequence[list[int]]) -> int:
    """Length of the longest common beginning that leaves every row at least one token."""
    if not rows:
        return 0
    low, high = min(rows), max(rows)
    most = min(len(row) for row in rows) - 1
    return next((n for n in range(most) if low[n] != high[n]), most)
