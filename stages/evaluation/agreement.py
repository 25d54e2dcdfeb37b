"""Agreement of several votes on the same pair of responses: the share that agrees, and Krippendorff's alpha."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from stages.selection.groups import Floats, Ints

VALUES = (0.0, 0.5, 1.0)  # of a vote


@dataclass(frozen=True)
class Agreement:
    """Votes by pair of responses, those without an answer left out; pairs with fewer than two votes say nothing.

    counts: how many votes of a pair have each of VALUES, [pairs, 3]. prompt: the number of its prompt, [pairs].
    """

    counts: Floats
    prompt: Ints

    @classmethod
    def of(cls, votes: pa.Table) -> "Agreement | None":
        """Return the votes of a table; None if no pair has two, or all are one voter's."""
        by_pair: dict[tuple[str, str, str], list[float]] = {}
        voters = set()
        for row in votes.to_pylist():
            if row["vote"] is not None:
                by_pair.setdefault((row["prompt_id"], row["candidate_id"], row["baseline_id"]), []).append(row["vote"])
                voters.add(row["voter"])
        pairs = {ids: by_pair[ids] for ids in sorted(by_pair) if len(by_pair[ids]) > 1}
        if not pairs or len(voters) < 2:
            return None
        numbers = {name: n for n, name in enumerate(dict.fromkeys(prompt for prompt, _, _ in pairs))}
        counts = np.array([[values.count(value) for value in VALUES] for values in pairs.values()], dtype=np.float64)
        return cls(counts, np.array([numbers[prompt] for prompt, _, _ in pairs]))

    @property
    def prompts(self) -> int:
        return int(self.prompt.max()) + 1

    def figures(self, resamples: int, rng: np.random.Generator) -> dict[str, tuple[float, float, float]]:
        """Return `agreement` and `alpha`, each with the ends of its 95 % bootstrap interval over prompts.

        agreement is the share of equal votes among the pairs of votes on one pair of responses, averaged over these;
        alpha = 1 - observed / expected disagreement, of nominal values (Krippendorff 2011, Computing Krippendorff's
        Alpha-Reliability), which allows for missing votes. It is 1 where all votes are equal.
        """
        weights = rng.multinomial(self.prompts, np.full(self.prompts, 1 / self.prompts), resamples)[:, self.prompt]
        result = {}
        for name, figure in (("agreement", self._agreement), ("alpha", self._alpha)):
            low, high = np.percentile(figure(weights.astype(np.float64)), [2.5, 97.5])
            result[name] = (float(figure(np.ones((1, len(self.counts))))[0]), float(low), float(high))
        return result

    def _agreement(self, weights: Floats) -> Floats:
        """Return the share that agrees for each weighting of the pairs, [R, pairs] -> [R]."""
        votes = self.counts.sum(1)
        equal = (self.counts * (self.counts - 1)).sum(1) / (votes * (votes - 1))
        return weights @ equal / weights.sum(1)

    def _alpha(self, weights: Floats) -> Floats:
        """Return alpha for each weighting of the pairs, [R, pairs] -> [R]."""
        votes = self.counts.sum(1)
        unequal = (votes**2 - (self.counts**2).sum(1)) / (votes - 1)  # coincidences of different values
        totals = weights @ self.counts  # [R, 3]
        n = totals.sum(1)
        expected = n**2 - (totals**2).sum(1)
        ratio = np.divide((weights @ unequal) * (n - 1), expected, out=np.zeros_like(n), where=expected > 0)
        return 1 - ratio
