"""Responses as a frozen policy sees them: what a preference head reads."""

from collections.abc import Sequence
from typing import Any, Literal

import pyarrow as pa

from pipeline import StageContext, stage
from schemas import Candidates, Features, Model, Prompts
from schemas.tables import FEATURES
from stages.data.rows import column_by
from stages.limits import BUDGET, check_ids

Ids = tuple[Sequence[int], Sequence[int]]


@stage(version=2)
def features(
    prompts: Prompts,
    candidates: Candidates,
    policy: Model,
    ctx: StageContext,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Features:
    """Mean over a response's tokens of the policy's last hidden states, after its final norm; fp32 [hidden].

    The prompt is in the context and not in the mean, and neither is padding (the code of arXiv:2605.23244
    counts both). Responses of equal tokens go through the network once.
    """
    from stages.network.forward import read_rows, response_means
    from stages.network.load import load_network

    prompt_ids = column_by(prompts, "prompt_id", "token_ids")
    rows = [row for row in candidates.to_pylist() if row["token_ids"] or _silent(row, ctx)]
    check_ids(policy, "candidates", [*prompt_ids.values(), *(row["token_ids"] for row in rows)])
    inputs = [(row["prompt_id"], tuple(row["token_ids"])) for row in rows]
    unique = list(dict.fromkeys(inputs))
    ctx.count(tokens=sum(len(prompt_ids[prompt]) + len(ids) for prompt, ids in unique))
    network = ctx.hold(load_network, policy)
    means = read_rows(response_means, network, [(prompt_ids[prompt], ids) for prompt, ids in unique], dtype, BUDGET)
    seen = dict(zip(unique, means, strict=True))
    made = [
        {"prompt_id": row["prompt_id"], "candidate_id": row["candidate_id"], "features": seen[name]}
        for row, name in zip(rows, inputs, strict=True)
    ]
    return pa.Table.from_pylist(made, schema=FEATURES)


def _silent(row: dict[str, Any], ctx: StageContext) -> bool:
    """A response without tokens has no mean: left out, and False."""
    ctx.reject("empty response", place="candidates", prompt=row["prompt_id"], candidate=row["candidate_id"])
    return False
