"""Stage `reference`: log-probs under a frozen policy, cached. The reference is a column, not a second network."""

import math
from contextlib import closing
from typing import Annotated, Literal

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import EXECUTION, StageContext, stage
from pipeline.costs import Cost
from schemas import Candidates, Model, Prompts, Reference, Selections, WinnowError, token_digest
from schemas.tables import REFERENCE
from stages.data.rows import column_by_id, mask_of
from stages.limits import SCORING_TOKENS_PER_PASS, check_ids
from stages.model_config import id_problems, input_problems
from stages.network.memory import policy_need
from stages.options import Positive
from stages.training.agreement import check_agreement, draw_of, record_agreement
from stages.work import scoring_work


@stage(
    version=4,
    check=lambda options, inputs: (
        input_problems(inputs, "policy", "vocabulary") + id_problems(inputs, "prompts", "policy")
    ),
    cost=Cost(policy_need, work=scoring_work),
)
def reference(
    prompts: Prompts,
    candidates: Candidates,
    policy: Model,
    ctx: StageContext,
    selections: Selections | None = None,
    mismatched: Candidates | None = None,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    engine_tolerance: Annotated[Positive, EXECUTION] = 1.0,
) -> Reference:
    """Score every candidate (or the selected ones) with the trainer's own forward pass: fp32 sums and token counts.

    `mismatched` candidates are scored as well, whatever was selected. One row per response, whatever pairs it will
    be in: neither another loss nor another pairing scores it again. Responses of equal tokens go through the network
    once. Of a response of several turns, the tokens of the assistant are summed alone.

    Draws of the same weights are compared with the engine's own log-probs, and the mean difference is in the step's
    summary. One that is above `engine_tolerance` times what rounding explains (stages/training/agreement.py) is
    refused: another file, rotary embedding, dtype or sampler drew them.
    """
    from stages.network.forward import forward_rows, logp_of
    from stages.network.load import load_network
    from stages.training.throughput import TokenCounter

    if selections is not None:
        candidates = candidates.filter(pc.is_in(candidates["candidate_id"], selections["candidate_id"]))
    prompt_ids = column_by_id(prompts, "prompt_id", "token_ids")
    tables = [candidates] if mismatched is None else [candidates, mismatched]
    columns = ["prompt_id", "candidate_id", "token_ids", "mask", "logp", "logp_kind", "model", "dtype"]
    rows = [row for table in tables for row in table.select(columns).to_pylist()]
    check_ids(policy, "candidates", [*prompt_ids.values(), *(row["token_ids"] for row in rows)])

    # Once per prompt and token ids, whatever number of candidates have them.
    network = ctx.open_once(load_network, policy, dtype)
    scored_as = [(row["prompt_id"], tuple(row["token_ids"]), mask_of(row)) for row in rows]
    unique = list(dict.fromkeys(scored_as))
    with closing(TokenCounter(network)) as counter:
        inputs = [(prompt_ids[prompt], ids, mask) for prompt, ids, mask in unique]
        scores = forward_rows(logp_of, network, inputs, dtype, SCORING_TOKENS_PER_PASS)
    ctx.count(tokens=counter.tokens)
    for (prompt, ids, _), score in zip(unique, scores.tolist(), strict=True):
        if not math.isfinite(score):
            raise WinnowError(
                f"reference: policy {policy.digest[:12]} gives a response of {len(ids)} tokens to prompt {prompt} the "
                f"log-prob {score}: its activations in {dtype} are not finite; set `dtype: float32`, or give another "
                "policy"
            )
    logp = dict(zip(unique, scores.tolist(), strict=True))
    compared = [
        (draw, logp[key], len(row["token_ids"]))
        for row, key in zip(rows, scored_as, strict=True)
        if (draw := draw_of(row)) and draw.model == policy.digest
    ]
    record_agreement(ctx, check_agreement(compared, dtype, engine_tolerance, policy.digest, "reference"))
    values = {
        "prompt_id": [row["prompt_id"] for row in rows],
        "candidate_id": [row["candidate_id"] for row in rows],
        "logp": [logp[key] for key in scored_as],
        "n_tokens": [len(row["token_ids"]) if row["mask"] is None else sum(row["mask"]) for row in rows],
        "tokens": [token_digest(prompt_ids[row["prompt_id"]], row["token_ids"], row["mask"]) for row in rows],
        "model": [policy.digest] * len(rows),
        "dtype": [dtype] * len(rows),
    }
    return pa.Table.from_pydict(values, schema=REFERENCE)
