"""Stage `features`: responses as a frozen policy represents them, the input of a preference head."""

from typing import Literal

import pyarrow as pa

from pipeline import StageContext, stage
from pipeline.costs import Cost
from schemas import Candidates, Features, Model, Prompts
from schemas.tables import FEATURES
from stages.data.rows import column_by_id, mask_of
from stages.limits import SCORING_TOKENS_PER_PASS, check_ids
from stages.model_config import id_problems, input_problems
from stages.network.memory import policy_need
from stages.work import scoring_work


@stage(
    version=2,
    check=lambda options, inputs: input_problems(inputs, "policy") + id_problems(inputs, "prompts", "policy"),
    cost=Cost(policy_need, work=scoring_work),
)
def features(
    prompts: Prompts,
    candidates: Candidates,
    policy: Model,
    ctx: StageContext,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Features:
    """Compute the mean over a response's tokens of the policy's last hidden states, after its final norm.

    float32 [hidden]. The prompt is in the context and not in the mean, and neither is padding (the code of
    arXiv:2605.23244 counts both), nor what the assistant did not write of a response of several turns. Responses of
    equal tokens go through the network once. Responses without tokens, which have no mean, are rejected.
    """
    from stages.network.forward import forward_rows, response_means
    from stages.network.load import load_network

    prompt_ids = column_by_id(prompts, "prompt_id", "token_ids")
    rows = []
    for row in candidates.to_pylist():
        if row["token_ids"]:
            rows.append(row)
        else:
            ctx.reject("empty response", place="candidates", prompt=row["prompt_id"], candidate=row["candidate_id"])
    check_ids(policy, "candidates", [*prompt_ids.values(), *(row["token_ids"] for row in rows)])

    responses = [(row["prompt_id"], tuple(row["token_ids"]), mask_of(row)) for row in rows]
    unique = list(dict.fromkeys(responses))
    ctx.count(tokens=sum(len(prompt_ids[prompt]) + len(token_ids) for prompt, token_ids, _ in unique))
    network = ctx.open_once(load_network, policy, dtype)
    sequences = [(prompt_ids[prompt], token_ids, mask) for prompt, token_ids, mask in unique]
    means = forward_rows(response_means, network, sequences, dtype, SCORING_TOKENS_PER_PASS)
    mean_by_response = dict(zip(unique, means, strict=True))
    vectors = [
        {"prompt_id": row["prompt_id"], "candidate_id": row["candidate_id"], "features": mean_by_response[response]}
        for row, response in zip(rows, responses, strict=True)
    ]
    return pa.Table.from_pylist(vectors, schema=FEATURES)
