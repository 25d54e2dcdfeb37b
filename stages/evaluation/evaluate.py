"""Room 8, second half: win rates with intervals, KL, length; and the gold reward, which no other stage may read."""

from collections import defaultdict
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import Bound, Range, Registry, stage
from schemas import Candidates, Evaluations, Judgements, Outcomes, Prompts, Reference
from schemas.tables import EVALUATIONS, OUTCOMES
from stages.data.rows import column_by, texts_of

gold_reward = Registry("gold reward")
Gold = Annotated[Bound, gold_reward]
METRICS = ("proxy_win", "gold_win", "gold", "gold_baseline", "kl", "n_tokens")


@stage(version=1, unsharded=True)
def evaluate(
    prompts: Prompts,
    candidates: Candidates,
    baseline: Candidates,
    judgements: Judgements,
    policy_logp: Reference | None = None,
    baseline_logp: Reference | None = None,
    *,
    gold: Gold | None = None,
    resamples: Annotated[int, Range(gt=0)] = 2000,
    seed: int = 0,
) -> tuple[Outcomes, Evaluations]:
    """Per response: did it beat the baseline's by the proxy and by gold (a tie is one half), log-ratio, length.

    Per policy: means over prompts with 95 % percentile bootstrap intervals over prompts. The mean of
    log p - log p_baseline estimates KL without bias only where p is the law of the draws: that of the policy,
    as `policy_logp` scored it (logp_kind exact), or of the policy with a head, from the draw itself (steered,
    for which `policy_logp` is not read). It is null otherwise.
    """
    join = Sides(prompts, candidates, baseline, policy_logp, baseline_logp)
    outcomes = [join.outcome(row, gold) for row in judgements.to_pylist()]
    rng = np.random.default_rng(seed)
    rows = [row for name in METRICS if (row := _summary(name, outcomes, resamples, rng))]
    return pa.Table.from_pylist(outcomes, OUTCOMES), pa.Table.from_pylist(rows, EVALUATIONS)


class Sides:
    """Everything known about the two responses of a judgement."""

    def __init__(
        self, prompts: pa.Table, candidates: pa.Table, baseline: pa.Table, logp: Any, baseline_logp: Any
    ) -> None:
        self.prompts = texts_of(prompts, "prompt_id")
        self.texts = texts_of(pa.concat_tables([baseline, candidates]), "candidate_id")
        self.lengths = column_by(candidates, "candidate_id", "n_tokens")
        laws = {"exact": logp, "steered": candidates}  # by logp_kind: where the law of the draws is to be read
        kinds = set(candidates.column("logp_kind").to_pylist())
        law = laws.get(kinds.pop()) if len(kinds) == 1 else None
        self.logp, self.baseline_logp = (
            {} if table is None else column_by(table, "candidate_id", "logp") for table in (law, baseline_logp)
        )

    def outcome(self, row: dict[str, Any], gold: Bound | None) -> dict[str, Any]:
        ours, theirs = row["candidate_id"], row["baseline_id"]
        result = {
            **{name: row[name] for name in ("prompt_id", "k", "candidate_id", "baseline_id")},
            "proxy_win": _win(row["logit"]),
            "n_tokens": self.lengths[ours],
            "kl": self._log_ratio(ours),
        }
        if gold is not None:
            text = self.prompts[row["prompt_id"]]
            values = gold(text, self.texts[ours]), gold(text, self.texts[theirs])
            result |= dict(gold=values[0], gold_baseline=values[1], gold_win=_win(values[0] - values[1]))
        return result

    def _log_ratio(self, candidate: str) -> float | None:
        if candidate not in self.logp or candidate not in self.baseline_logp:
            return None
        return float(self.logp[candidate] - self.baseline_logp[candidate])


def _win(margin: float) -> float:
    return 0.5 if margin == 0 else float(margin > 0)


def _summary(
    name: str, outcomes: list[dict[str, Any]], resamples: int, rng: np.random.Generator
) -> dict[str, Any] | None:
    """Mean over prompts of each prompt's mean, and its bootstrap interval; None if no row has the metric."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in outcomes:
        if row.get(name) is not None:
            values[row["prompt_id"]].append(row[name])
    if not values:
        return None
    means = np.array([np.mean(values[prompt]) for prompt in sorted(values)])
    low, high = bootstrap_interval(means, resamples, rng)
    return dict(metric=name, value=float(means.mean()), low=low, high=high, n=len(means))


def bootstrap_interval(values: NDArray[np.float64], resamples: int, rng: np.random.Generator) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of values [N], N > 0."""
    draws = [rng.choice(values, len(values)).mean() for _ in range(resamples)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
