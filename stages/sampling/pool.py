"""Stages `pool` and `mismatch`: candidates of other origins (an earlier round, demonstrations, another prompt)."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import Columns, InputStep, StageContext, stage
from schemas import Candidates, Model, Prompts, Selections, candidate_id
from schemas.tables import CANDIDATES
from stages.data.files import check_demonstrations
from stages.data.rows import (
    Row,
    column_by_id,
    column_of,
    imported_candidate,
    in_order_of_prompts,
    positions_of,
    rows_by_prompt,
)
from stages.limits import context_length


def _check_pool(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    problems = check_demonstrations(options, inputs)
    if not inputs.keys() & {"candidates", "prompts"}:
        problems.append("nothing to merge: add `candidates` or `prompts` under `from`")
    return problems


@stage(version=3, check=_check_pool, by_prompt=lambda options: True)
def pool(
    ctx: StageContext,
    candidates: Candidates | None = None,
    prompts: Annotated[Prompts, Columns("prompt_id", "text", "demonstration", "demonstration_ids")] | None = None,
    earlier: Candidates | None = None,
) -> Candidates:
    """Merge `candidates`, those of an `earlier` round, and the demonstrations of `prompts`; each id once.

    Without candidates, they are the demonstrations of all prompts: the target texts of the data, to compare with.
    A demonstration has finish_reason `given`; if the policy drew the very same tokens, it is one more candidate.
    """
    rows = pa.concat_tables(
        [CANDIDATES.empty_table(), *(table for table in (candidates, earlier) if table is not None)]
    )
    ids = column_of(rows, "candidate_id")
    is_first = pc.index_in(ids, value_set=ids).to_numpy() == np.arange(len(ids))
    if not is_first.all():  # an id stands where it occurs first, with its last row, which is that of the earlier round
        rows = rows.take(pa.array(positions_of(ids, rows["candidate_id"])[is_first]))
    if prompts is not None:
        prompts = in_order_of_prompts(prompts)
        if candidates is not None:
            prompts = prompts.filter(pc.is_in(prompts["prompt_id"], value_set=column_of(rows, "prompt_id")))
        has_demonstration = pc.fill_null(pc.greater(pc.list_value_length(prompts["demonstration_ids"]), 0), False)
        lacking = prompts.filter(pc.invert(has_demonstration))
        text = column_of(lacking, "text")
        ctx.reject_rows(column_of(lacking, "prompt_id"), reason="no demonstration", place="prompts", detail=text)
        rows = pa.concat_tables([rows, _demonstrations(prompts.filter(has_demonstration), ids)])
    return in_order_of_prompts(rows)


def _demonstrations(prompts: pa.Table, used_ids: pa.Array) -> pa.Table:
    """Return the demonstrations of prompts as candidates, each under the first id of its tokens that is not used."""
    ids = [candidate_id(*content) for content in _id_contents(prompts)]
    copy, is_used = 0, pc.is_in(pa.array(ids, pa.string()), value_set=used_ids).to_numpy(False)
    while is_used.any():
        copy += 1
        mask = pa.array(is_used)
        other_ids = [candidate_id(*content, copy) for content in _id_contents(prompts.filter(mask))]
        for n, name in zip(np.flatnonzero(is_used), other_ids, strict=True):
            ids[n] = name
        is_used[is_used] = pc.is_in(pa.array(other_ids, pa.string()), value_set=used_ids).to_numpy(False)
    size, tokens = prompts.num_rows, column_of(prompts, "demonstration_ids")
    columns = {
        "prompt_id": column_of(prompts, "prompt_id"),
        "candidate_id": pa.array(ids, pa.string()),
        "k": pa.repeat(pa.scalar(0, pa.int32()), size),
        "token_ids": tokens,
        "text": column_of(prompts, "demonstration"),
        "logp_kind": pa.repeat("none", size),
        "n_tokens": pc.list_value_length(tokens),
        "finish_reason": pa.repeat("given", size),
    }
    arrays = [columns.get(field.name, pa.nulls(size, field.type)) for field in CANDIDATES]
    return pa.Table.from_arrays(arrays, schema=CANDIDATES)


def _id_contents(prompts: pa.Table) -> Iterator[tuple[str, list[int]]]:
    """Yield what the id of each demonstration is a hash of."""
    return zip(prompts["prompt_id"].to_pylist(), prompts["demonstration_ids"].to_pylist(), strict=True)


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
