"""Room 8, first half: a policy's held-out responses beside the baseline policy's, by the proxy ranker."""

from typing import Annotated, Any

import numpy as np
import pyarrow as pa

from pipeline import Bound, StageContext, stage
from schemas import Candidates, Judgements, Model, Prompts
from schemas.tables import JUDGEMENTS
from stages.data.rows import Row, by_prompt, texts_of
from stages.ranking.rankers import Ranker, averaged, both_orders, open_ranker, reads_its_model
from stages.ranking.rankers import ranker as rankers


@stage(version=2, check=reads_its_model)
def judge(
    prompts: Prompts,
    candidates: Candidates,
    baseline: Candidates,
    ctx: StageContext,
    ranker: Model | None = None,
    *,
    by: Annotated[Bound, rankers] = "pairwise",  # type: ignore[assignment]
) -> Judgements:
    """logit P(candidate beats the baseline's response with the same k), both orders averaged."""
    opened = ctx.hold(open_ranker, by, ranker)
    contexts = texts_of(prompts, "prompt_id")
    opponents = {(row["prompt_id"], row["k"]): row for row in baseline.to_pylist()}
    rows: list[Row] = []
    for prompt, group in by_prompt(candidates):
        pairs = _pairs(opened, contexts[prompt], group, opponents, ctx)
        texts = [(row["text"], other["text"]) for row, other in pairs]
        ctx.count(ranker_calls=len(pairs))
        logits = averaged(*both_orders(opened, contexts[prompt], texts, "both"))
        for (row, other), logit in zip(pairs, logits.tolist(), strict=True):
            if np.isfinite(logit):
                ids = dict(prompt_id=prompt, k=row["k"], candidate_id=row["candidate_id"])
                rows.append(ids | dict(baseline_id=other["candidate_id"], logit=logit))
            else:
                ctx.reject("logit is not finite", place=f"k={row['k']}", prompt=prompt, candidate=row["candidate_id"])
    return pa.Table.from_pylist(rows, schema=JUDGEMENTS)


def _pairs(opened: Ranker, context: str, group: list[Row], opponents: dict[Any, Row], ctx: StageContext) -> list[Any]:
    """Each response with the baseline's of the same k; what cannot be compared is left out, with reason."""
    pairs = []
    for row in group:
        other = opponents.get((row["prompt_id"], row["k"]))
        ids = {"prompt": row["prompt_id"], "candidate": row["candidate_id"]}
        if other is None:
            ctx.reject("no baseline response with this k", place=f"k={row['k']}", **ids)
        elif not opened.fits(context, row["text"], other["text"]):
            ctx.reject("does not fit the ranker", place=f"k={row['k']}", **ids)
        else:
            pairs.append((row, other))
    return pairs
