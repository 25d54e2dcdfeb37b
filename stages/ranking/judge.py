"""Stage `judge`: a policy's held-out responses against the baseline policy's, by the proxy ranker."""

from itertools import product
from math import isnan
from typing import Annotated, Literal

import pyarrow as pa

from pipeline import Bound, StageContext, stage
from pipeline.costs import Cost
from schemas import Candidates, Judgements, Model, Prompts
from schemas.tables import JUDGEMENTS
from stages.data.rows import Row, RowsById, reject_not_finite, rows_by_prompt
from stages.ranking.base import ReadingPair, Unreadable, both_orders, read_candidates, reads_per_pair
from stages.ranking.memory import less_memory, ranker_device_problem, ranker_need
from stages.ranking.rankers import open_ranker, ranker_for, reads_its_model
from stages.ranking.rankers import ranker as rankers
from stages.work import judging_work


@stage(
    version=4,
    check=reads_its_model,
    given_by={"ranker": "by"},
    choose=ranker_for,
    cost=Cost(ranker_need, less_memory, judging_work, ranker_device_problem),
)
def judge(
    prompts: Prompts,
    candidates: Candidates,
    baseline: Candidates,
    ctx: StageContext,
    ranker: Model | None = None,
    *,
    by: Annotated[Bound, rankers] = "pairwise",  # type: ignore[assignment]
    matches: Literal["all", "same_k"] = "all",
    special_tokens: bool = False,
) -> Judgements:
    """Compute logit P(candidate beats a baseline response to the same prompt), both orders averaged.

    matches: every response against every one of the baseline, a U-statistic of both samples, with the smallest standard
    error that unbiased use of the draws has (Hoeffding 1948), or only against the one with the same k, which asks the
    ranker less often by the number of draws. With `special_tokens`, text is read with the special tokens inside it. The
    logit is null where the ranker has no verdict, which is neither a win nor a tie, and where it cannot read a
    response: `unread` then says whose; of two that do not fit its context together, the longer.
    """
    opened = ctx.open_once(open_ranker, by, ranker)
    prompt_by_id = RowsById((row["prompt_id"], row) for row in prompts.to_pylist())
    baseline_by_prompt = dict(rows_by_prompt(baseline))
    rows: list[Row] = []
    for prompt, group in rows_by_prompt(candidates):
        context, opponents = prompt_by_id[prompt]["text"], baseline_by_prompt.get(prompt, [])
        if not opponents:
            ctx.reject("no baseline response", place="baseline", prompt=prompt, detail=f"{len(group)} responses")
        readings, opponent_readings = (
            read_candidates(opened, prompt_by_id[prompt], side, special_tokens) for side in (group, opponents)
        )
        met: list[tuple[Row, ReadingPair]] = []
        for row, opponent in product(group, opponents):
            if matches == "same_k" and row["k"] != opponent["k"]:
                continue
            pair = (readings[row["candidate_id"]], opponent_readings[opponent["candidate_id"]])
            judgement = dict(prompt_id=prompt, k=row["k"], candidate_id=row["candidate_id"])
            judgement |= dict(baseline_id=opponent["candidate_id"], logit=None, unread=None)
            rows.append(judgement)
            unreadable = [isinstance(reading, Unreadable) for reading in pair]
            if any(unreadable):
                judgement["unread"] = "both" if all(unreadable) else "baseline" if unreadable[1] else "candidate"
            elif opened.fits(context, *pair):
                met.append((judgement, pair))
            else:
                judgement["unread"] = "baseline" if opponent["n_tokens"] > row["n_tokens"] else "candidate"

        ctx.count(ranker_calls=len(met) * reads_per_pair(opened, "both"))
        logits, *_ = both_orders(opened, context, [pair for _, pair in met], "both")
        for (judgement, _), logit in zip(met, logits.tolist(), strict=True):
            judgement["logit"] = None if opened.abstains and isnan(logit) else logit
    ctx.count(unread_responses=sum(row["unread"] is not None for row in rows))
    opened.finish_part(ctx)
    return reject_not_finite(pa.Table.from_pylist(rows, schema=JUDGEMENTS), "logit", ctx, place="judgements")
