"""Room 3: a reward for every candidate, from n - 1 comparisons a prompt, or from a score of its own."""

from collections.abc import Callable
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa

from pipeline import Bound, StageContext, stage
from schemas import Candidates, Model, Prompts, Rewards, seed_for
from schemas.tables import REWARDS
from stages.data.rows import Row, by_prompt, texts_of
from stages.ranking.rankers import Ranker, Scorer, averaged, both_orders, open_ranker, reads_its_model
from stages.ranking.rankers import ranker as rankers


@stage(version=2, check=reads_its_model)
def reward(
    prompts: Prompts,
    candidates: Candidates,
    ctx: StageContext,
    ranker: Model | None = None,
    *,
    by: Annotated[Bound, rankers] = "pairwise",  # type: ignore[assignment]
    orders: Literal["one", "both"] = "both",
    seed: int = 0,
) -> Rewards:
    """r(y) = logit P(y beats y_b), y_b a random candidate of the same prompt (sec. 3.2.1 of arXiv:2309.06657).

    The baseline is read first, so that prompt and baseline go through the network once for all
    comparisons. `both` also reads each pair the other way round and averages the logits, where the ranker
    has an opinion on positions. A reward model or a program scores each candidate alone: that score is the
    reward, and there is no baseline. A reward that is not finite is left out.
    """
    judge = ctx.hold(open_ranker, by, ranker)
    contexts = texts_of(prompts, "prompt_id")
    rows: list[Row] = []
    for prompt, group in by_prompt(candidates):
        if isinstance(judge, Scorer):
            made = _scored(judge, contexts[prompt], group, ctx)
        else:
            base = group[seed_for(seed, "baseline", prompt) % len(group)]
            made = _compared(judge, contexts[prompt], base, group, orders, ctx)
        rows += _finite(made, ctx)
    return pa.Table.from_pylist(rows, schema=REWARDS)


def _scored(judge: Scorer, context: str, group: list[Row], ctx: StageContext) -> list[Row]:
    """Each candidate alone; equal texts once."""
    fitting = _fitting(group, lambda text: judge.reads(context, text), ctx)
    scores = judge.scores(context, [row["text"] for row in fitting])
    ctx.count(ranker_calls=len(scores))
    return [_row(row, reward=scores[row["text"]]) for row in fitting]


def _compared(judge: Ranker, context: str, base: Row, group: list[Row], orders: str, ctx: StageContext) -> list[Row]:
    """Each candidate against the baseline, which has reward 0: it beats itself half of the time."""
    others = [row for row in group if row is not base]
    others = _fitting(others, lambda text: judge.fits(context, base["text"], text), ctx)
    forward, backward = both_orders(judge, context, [(base["text"], row["text"]) for row in others], orders)
    ctx.count(ranker_calls=len(others))
    columns = {
        "reward": -averaged(forward, backward),
        "logit_ab": None if judge.symmetric else -forward,
        "logit_ba": None if backward is None else -backward,
    }
    told = {name: column.tolist() for name, column in columns.items() if column is not None}
    rows = [_row(row, **{name: column[n] for name, column in told.items()}) for n, row in enumerate(others)]
    return [row | {"baseline_id": base["candidate_id"]} for row in [_row(base, reward=0.0), *rows]]


def _fitting(group: list[Row], fits: Callable[[str], bool], ctx: StageContext) -> list[Row]:
    """Those with a text that the ranker can read."""
    fitting = []
    for row in group:
        if fits(row["text"]):
            fitting.append(row)
        else:
            ids = dict(prompt=row["prompt_id"], candidate=row["candidate_id"])
            ctx.reject("does not fit the ranker", place="candidates", **ids)
    return fitting


def _row(candidate: Row, **numbers: float) -> Row:
    ids = {name: candidate[name] for name in ("prompt_id", "candidate_id")}
    return ids | {name: number + 0.0 for name, number in numbers.items()}  # + 0.0: no -0.0 in a table


def _finite(rows: list[Row], ctx: StageContext) -> list[Row]:
    """In order of candidate ids."""
    for row in rows:
        if not np.isfinite(row["reward"]):
            ids = dict(prompt=row["prompt_id"], candidate=row["candidate_id"])
            ctx.reject("reward is not finite", place="candidates", detail=str(row["reward"]), **ids)
    return sorted((row for row in rows if np.isfinite(row["reward"])), key=lambda row: str(row["candidate_id"]))
