"""Stage `judge`: a policy's held-out responses against the baseline policy's, by the proxy ranker."""

from typing import Annotated

import pyarrow as pa

from pipeline import Bound, StageContext, stage
from schemas import Candidates, Judgements, Model, Prompts
from schemas.tables import JUDGEMENTS
from stages.data.rows import Row, reject_not_finite, rows_by_prompt, text_by_id
from stages.ranking.base import both_orders, fits_or_reject
from stages.ranking.rankers import open_ranker, reads_its_model
from stages.ranking.rankers import ranker as rankers


@stage(version=2, check=reads_its_model, given_by={"ranker": "by"})
def judge(
    prompts: Prompts,
    candidates: Candidates,
    baseline: Candidates,
    ctx: StageContext,
    ranker: Model | None = None,
    *,
    by: Annotated[Bound, rankers] = "pairwise",  # type: ignore[assignment]
) -> Judgements:
    """Compute logit P(candidate beats the baseline's response with the same k), both orders averaged."""
    opened = ctx.open_once(open_ranker, by, ranker)
    contexts = text_by_id(prompts, "prompt_id")
    opponents = {(row["prompt_id"], row["k"]): row for row in baseline.to_pylist()}
    rows: list[Row] = []
    for prompt, group in rows_by_prompt(candidates):
        context = contexts[prompt]

        # Pairs of equal k that the ranker can read.
        matches: list[tuple[Row, Row]] = []
        for row in group:
            ids = dict(place=f"k={row['k']}", prompt=prompt, candidate=row["candidate_id"])
            opponent = opponents.get((prompt, row["k"]))
            if opponent is None:
                ctx.reject("no baseline response with this k", **ids)
            elif fits_or_reject(opened, context, (row["text"], opponent["text"]), ctx, **ids):
                matches.append((row, opponent))

        ctx.count(ranker_calls=len(matches))
        text_pairs = [(row["text"], opponent["text"]) for row, opponent in matches]
        logits, *_ = both_orders(opened, context, text_pairs, "both")
        for (row, opponent), logit in zip(matches, logits.tolist(), strict=True):
            ids = dict(prompt_id=prompt, k=row["k"], candidate_id=row["candidate_id"])
            rows.append(ids | dict(baseline_id=opponent["candidate_id"], logit=logit))
    return reject_not_finite(pa.Table.from_pylist(rows, schema=JUDGEMENTS), "logit", ctx, place="judgements")
