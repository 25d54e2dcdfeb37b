"""Stages `pool` and `mismatch`: candidates of other origins (an earlier round, demonstrations, another prompt)."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import InputStep, StageContext, stage
from schemas import Candidates, Model, Prompts, Selections
from schemas.tables import CANDIDATES
from stages.data.files import check_demonstrations
from stages.data.rows import Row, column_by_id, imported_candidate, rows_by_prompt
from stages.limits import context_length


def _check_pool(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    problems = check_demonstrations(options, inputs)
    if not inputs.keys() & {"candidates", "prompts"}:
        problems.append("nothing to merge: add `candidates` or `prompts` under `from`")
    return problems


@stage(version=3, check=_check_pool)
def pool(
    ctx: StageContext,
    candidates: Candidates | None = None,
    prompts: Prompts | None = None,
    earlier: Candidates | None = None,
) -> Candidates:
    """Merge `candidates`, those of an `earlier` round, and the demonstrations of `prompts`; each id once.

    Without candidates, they are the demonstrations of all prompts: the target texts of the data, to compare with.
    A demonstration has finish_reason `given`; if the policy drew the very same tokens, it is one more candidate.
    """
    rows = [row for table in (candidates, earlier) if table is not None for row in table.to_pylist()]
    sampled_ids = {row["candidate_id"] for row in rows}
    sampled_prompts = {row["prompt_id"] for row in rows}
    for prompt in [] if prompts is None else prompts.to_pylist():
        if candidates is not None and prompt["prompt_id"] not in sampled_prompts:
            continue
        if prompt["demonstration_ids"]:
            demonstration = prompt["demonstration_ids"], prompt["demonstration"]
            rows.append(imported_candidate(prompt["prompt_id"], *demonstration, sampled_ids))
        else:
            ctx.reject("no demonstration", place="prompts", prompt=prompt["prompt_id"], detail=prompt["text"])
    unique = {row["candidate_id"]: row for row in rows}
    ordered = sorted(unique.values(), key=lambda row: row["prompt_id"])
    return pa.Table.from_pylist(ordered, schema=CANDIDATES)


@stage(version=4, unsharded=True)
def mismatch(candidates: Candidates, prompts: Prompts, policy: Model, ctx: StageContext,
             selections: Selections | None = None) -> Candidates:  # fmt: skip
    """Pair each prompt with responses of the next prompt in order of ids, at most as many as its own.

    KTO estimates its KL from them, one per row of the batch (arXiv:2402.01306), and takes 0 if a batch has none.
    Rejected are a prompt without another, and a response that is too long for the context after this prompt. All
    prompts are read at once: the next one of the same shard would make the estimate depend on their number.
    """
    prompt_ids = column_by_id(prompts, "prompt_id", "token_ids")
    used_ids = set(candidates["candidate_id"].to_pylist())
    if selections is not None:
        candidates = candidates.filter(pc.is_in(candidates["candidate_id"], selections["candidate_id"]))
    groups = list(rows_by_prompt(candidates))
    max_tokens = context_length(policy.folder)
    rows: list[Row] = []
    for (prompt, responses), (other_prompt, other_responses) in zip(groups, groups[1:] + groups[:1], strict=True):
        if prompt == other_prompt:
            ctx.reject("no other prompt", place="candidates", prompt=prompt)
            continue
        for _, other in zip(responses, other_responses, strict=False):
            if len(prompt_ids[prompt]) + len(other["token_ids"]) > max_tokens:
                ids = dict(prompt=prompt, candidate=other["candidate_id"])
                ctx.reject("mismatched response too long", place="candidates", **ids)
                continue
            turns = dict(mask=other["mask"], chat=other["chat"])
            rows.append(imported_candidate(prompt, other["token_ids"], other["text"], used_ids, **turns))
            used_ids.add(rows[-1]["candidate_id"])
    return pa.Table.from_pylist(rows, schema=CANDIDATES)
