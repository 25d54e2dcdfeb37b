"""Interface of rankers: `Ranker` compares two responses, `Scorer` scores one alone."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from pipeline import StageContext

TextPair = tuple[str, str]


class Ranker(ABC):
    """Ranker of two responses to one prompt.

    symmetric: reading a pair in the other order gives the same answer, so it is read in one order only.
    """

    symmetric = False

    @abstractmethod
    def fits(self, context: str, first: str, second: str) -> bool:
        """Return whether the ranker can read prompt and responses together."""

    @abstractmethod
    def logits(self, context: str, pairs: Sequence[TextPair]) -> np.ndarray:
        """Return logit P(first beats second) of each pair, nats, float64 [N]."""


class Scorer(Ranker):
    """Ranker with a score for each response alone: the logit of a pair is the difference of its scores."""

    symmetric = True

    @abstractmethod
    def score(self, context: str, texts: Sequence[str]) -> np.ndarray:
        """Return one score per text, float64 [N]."""

    def fits(self, context: str, first: str, second: str) -> bool:
        return True

    def scores(self, context: str, texts: Sequence[str]) -> dict[str, float]:
        """Return scores by text. Equal texts are scored once, in sorted order, so that their order has no effect."""
        unique = sorted(set(texts))
        return dict(zip(unique, self.score(context, unique).tolist(), strict=True))

    def logits(self, context: str, pairs: Sequence[TextPair]) -> np.ndarray:
        score_by_text = self.scores(context, [text for pair in pairs for text in pair])
        return np.array([score_by_text[first] - score_by_text[second] for first, second in pairs], dtype=np.float64)


def fits_or_reject(
    ranker: Ranker, context: str, pair: TextPair, ctx: StageContext, *, place: str, prompt: str, candidate: str
) -> bool:
    """Return whether the ranker can read the pair; if not, record the candidate in the `rejects` table."""
    fits = ranker.fits(context, *pair)
    if not fits:
        ctx.reject("does not fit the ranker", place=place, prompt=prompt, candidate=candidate)
    return fits


def both_orders(
    ranker: Ranker, context: str, pairs: Sequence[TextPair], orders: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return logit P(first beats second): the mean of both orders, read as (first, second), and as (second, first).

    The second order is read only for `orders` "both" and a ranker that is not symmetric; else the last is None.
    """
    forward = ranker.logits(context, pairs)
    if orders == "one" or ranker.symmetric:
        return forward, forward, None
    backward = -ranker.logits(context, [(second, first) for first, second in pairs])
    # The mean of logits, not of probabilities: it cancels a position bias exactly.
    return (forward + backward) / 2, forward, backward
