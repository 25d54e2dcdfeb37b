"""Room 8, first half: a policy's held-out responses beside the baseline policy's, by the proxy ranker."""

from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline import Workspace, stage
from schemas import Candidates, Judgements, Model, Prompts
from schemas.tables import JUDGEMENTS
from stages.groups import Row, by_prompt, texts_of
from stages.reward import BUDGET


@stage(version=1)
def judge(
    prompts: Prompts,
    candidates: Candidates,
    baseline: Candidates,
    ranker: Model,
    ws: Workspace,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Judgements:
    """logit P(candidate beats the baseline's response with the same k), both orders averaged."""
    from stages.rankers import PairwiseRanker, both_orders

    ranker_in_memory = ws.hold(PairwiseRanker, ranker, dtype, BUDGET)
    contexts = texts_of(prompts, "prompt_id")
    opponents = {(row["prompt_id"], row["k"]): row for row in baseline.to_pylist()}
    rows = []
    for prompt, group in by_prompt(candidates):
        pairs = _pairs(ranker_in_memory, contexts[prompt], group, opponents, ws)
        texts = [(row["text"], other["text"]) for row, other in pairs]
        forward, backward = both_orders(ranker_in_memory, contexts[prompt], texts, "both")
        ws.count(ranker_calls=len(pairs))
        for (row, other), logit in zip(pairs, (np.asarray(forward) + backward) / 2, strict=True):
            ids = dict(prompt_id=prompt, k=row["k"], candidate_id=row["candidate_id"])
            rows.append(ids | dict(baseline_id=other["candidate_id"], logit=float(logit)))
    return pa.Table.from_pylist(rows, schema=JUDGEMENTS)


def _pairs(judge: Any, context: str, group: list[Row], opponents: dict[Any, Row], ws: Workspace) -> list[Any]:
    """Each response with the baseline's of the same k; what cannot be compared is left out, with reason."""
    pairs = []
    for row in group:
        other = opponents.get((row["prompt_id"], row["k"]))
        ids = {"prompt": row["prompt_id"], "candidate": row["candidate_id"]}
        if other is None:
            ws.reject("no baseline response with this k", place=f"k={row['k']}", **ids)
        elif not judge.fits(context, row["text"], other["text"]):
            ws.reject("comparison too long", place=f"k={row['k']}", **ids)
        else:
            pairs.append((row, other))
    return pairs
