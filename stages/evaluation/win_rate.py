"""Stage `win_rate`: what one judge of several says of a policy, under the judge's own name."""

import warnings
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import pyarrow as pa

from pipeline import Columns, StageContext, stage
from schemas import Candidates, Evaluations, Judgements, Votes, WinnowWarning, Wins
from schemas.tables import EVALUATIONS, WINS
from stages.data.rows import Row, column_by_id, rows_by_prompt
from stages.evaluation.agreement import Agreement
from stages.evaluation.evaluate import MANY_UNREAD, bootstrap_interval, group_by_candidate
from stages.evaluation.length_control import Match, length_controlled
from stages.options import Seed, SmallCount
from stages.ranking.judge import win_of

Responses = Columns("prompt_id", "k", "candidate_id", "n_tokens")
SHARES = {"win": "win", "ties": "ties", "undecided": "undecided", "unread": "unread"}  # metric -> column of `wins`


@stage(version=2, unsharded=True)
def win_rate(
    candidates: Annotated[Candidates, Responses],
    baseline: Annotated[Candidates, Responses],
    judgements: Judgements,
    ctx: StageContext,
    votes: Votes | None = None,
    *,
    judge: str,
    against: str = "sft",
    resamples: SmallCount = 2000,
    seed: Seed = 0,
) -> tuple[Wins, Evaluations]:
    """Compute the win rate of a policy by a judge, as `evaluate` does by the proxy, in metrics with the judge's name.

    NAME_win is the mean over prompts with its 95 % bootstrap interval, a tie counting one half, and NAME_win_lc that at
    equal length. NAME_ties, NAME_undecided and NAME_unread are shares of the comparisons: neither is better; no
    verdict, which counts in no win rate; a response that the judge cannot read, which loses to one that it can (of two,
    there is no verdict), and of which more than 20 % are warned of.
    Against another opponent than the SFT policy all end in _vs_ and its name. Where a judge has several `votes` on a
    pair, NAME_agreement is how often two of them agree, and NAME_alpha Krippendorff's alpha, which is 0 if they agree
    as often as by chance.
    """
    name = str(judge)
    by_candidate = group_by_candidate("win_rate", judgements, candidates, baseline)
    lengths = column_by_id(baseline, "candidate_id", "n_tokens")
    wins: list[Row] = []
    matches: list[Match] = []
    for row in (row for _, group in rows_by_prompt(candidates) for row in group):
        judged = by_candidate.get(row["candidate_id"], [])
        results = [(judgement, win_of(judgement)) for judgement in judged]
        decided = [win for _, win in results if win is not None]
        readable = [win for judgement, win in results if judgement["unread"] is None]
        counts = dict(ties=readable.count(0.5), undecided=readable.count(None), unread=len(judged) - len(readable))
        ids = {key: row[key] for key in ("prompt_id", "k", "candidate_id")}
        win = sum(decided) / len(decided) if decided else None
        wins.append(ids | counts | {"judge": name, "against": against, "win": win, "comparisons": len(judged)})
        matches += [
            Match(row["prompt_id"], win, row["n_tokens"] - lengths[judgement["baseline_id"]])
            for judgement, win in results
            if win is not None
        ]

    rng = np.random.default_rng(seed)
    suffix = "" if against == "sft" else f"_vs_{against}"
    evaluations: list[Row] = []

    def add(metric: str, value: float, low: float, high: float, n: int) -> None:
        evaluations.append({"metric": f"{name}_{metric}{suffix}", "value": value, "low": low, "high": high, "n": n})

    for metric, column in SHARES.items():
        if len(means := _prompt_means(wins, column)):
            low, high = bootstrap_interval(means, resamples, rng)
            add(metric, float(means.mean()), low, high, len(means))
            if metric == "unread" and means.mean() > MANY_UNREAD:
                warnings.warn(
                    f"win_rate: {100 * means.mean():.0f} % of the comparisons by {name} have a response that it cannot "
                    f"read, and say more of that than of which is better (`{name}_unread`): `winnow sql rejects` has "
                    "the reasons, such as a context that is too short (lower `max_tokens` of `sample`) or a special "
                    "token in the text",
                    WinnowWarning,
                    stacklevel=2,
                )
    if matches:
        value, (low, high) = length_controlled(matches, resamples, rng)
        n = len({match.prompt for match in matches})
        add("win_lc", value, low, high, n)
    if votes is not None and (agreement := Agreement.of(votes)) is not None:
        for metric, (value, low, high) in agreement.figures(resamples, rng).items():
            add(metric, value, low, high, agreement.prompts)
    ctx.count(undecided=sum(row["undecided"] for row in wins))
    return pa.Table.from_pylist(wins, WINS), pa.Table.from_pylist(evaluations, EVALUATIONS)


def _prompt_means(wins: Sequence[Row], column: str) -> np.ndarray:
    """Return per prompt, by id, the mean over its responses: of wins, or of a count's share of comparisons."""
    by_prompt: dict[str, list[float]] = {}
    for row in wins:
        if row["comparisons"]:
            value = row[column] if column == "win" else row[column] / row["comparisons"]
            if value is not None:
                by_prompt.setdefault(row["prompt_id"], []).append(value)
    return np.array([sum(by_prompt[prompt]) / len(by_prompt[prompt]) for prompt in sorted(by_prompt)])
