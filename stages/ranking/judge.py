"""Stage `judge`: a policy's held-out responses against the baseline policy's, by the proxy ranker."""

from math import isnan
from typing import Annotated

import pyarrow as pa

from pipeline import Bound, StageContext, stage
from pipeline.costs import Cost
from schemas import Candidates, Judgements, Model, Prompts
from schemas.tables import JUDGEMENTS
from stages.data.rows import Row, RowsById, reject_not_finite, rows_by_prompt
from stages.ranking.base import ReadingPair, both_orders, fits_or_reject, read_candidates
from stages.ranking.memory import less_memory, ranker_need
from stages.ranking.rankers import open_ranker, ranker_for, reads_its_model
from stages.ranking.rankers import ranker as rankers
from stages.work import ranking_work


@stage(
    version=3,
    check=reads_its_model,
    given_by={"ranker": "by"},
    choose=ranker_for,
    cost=Cost(ranker_need, less_memory, ranking_work),
)
def judge(
    prompts: Prompts,
    candidates: Candidates,
    baseline: Candidates,
    ctx: StageContext,
    ranker: Model | None = None,
    *,
    by: Annotated[Bound, rankers] = "pairwise",  # type: ignore[assignment]
    special_tokens: bool = False,
) -> Judgements:
    """Compute logit P(candidate beats the baseline's response with the same k), both orders averaged.

    With `special_tokens`, text is read with the special tokens inside it. Where the ranker has no verdict, the logit
    is null: neither a win nor a tie.
    """
    opened = ctx.open_once(open_ranker, by, ranker)
    prompt_by_id = RowsById((row["prompt_id"], row) for row in prompts.to_pylist())
    opponents = {(row["prompt_id"], row["k"]): row for row in baseline.to_pylist()}
    rows: list[Row] = []
    for prompt, group in rows_by_prompt(candidates):
        context = prompt_by_id[prompt]["text"]
        baselines = [opponents[prompt, row["k"]] for row in group if (prompt, row["k"]) in opponents]
        readings, opponent_readings = (
            read_candidates(opened, prompt_by_id[prompt], side, special_tokens) for side in (group, baselines)
        )

        # Pairs of equal k that the ranker can read.
        matches: list[tuple[Row, Row]] = []
        pairs: list[ReadingPair] = []
        for row in group:
            ids = dict(place=f"k={row['k']}", prompt=prompt, candidate=row["candidate_id"])
            opponent = opponents.get((prompt, row["k"]))
            if opponent is None:
                ctx.reject("no baseline response with this k", **ids)
                continue
            pair = (readings[row["candidate_id"]], opponent_readings[opponent["candidate_id"]])
            if fits_or_reject(opened, context, pair, ctx, **ids):
                matches.append((row, opponent))
                pairs.append(pair)

        ctx.count(ranker_calls=len(matches))
        logits, *_ = both_orders(opened, context, pairs, "both")
        for (row, opponent), logit in zip(matches, logits.tolist(), strict=True):
            ids = dict(prompt_id=prompt, k=row["k"], candidate_id=row["candidate_id"])
            verdict = None if opened.abstains and isnan(logit) else logit
            rows.append(ids | dict(baseline_id=opponent["candidate_id"], logit=verdict))
    opened.finish_part(ctx)
    return reject_not_finite(pa.Table.from_pylist(rows, schema=JUDGEMENTS), "logit", ctx, place="judgements")
