"""Candidates of several origins as one table: the policy's own, an earlier round's, and demonstrations."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from pipeline import Wired, Workspace, stage
from schemas import Candidates, Model, Prompts, Selections, candidate_id
from schemas.tables import CANDIDATES
from stages.groups import Row, by_prompt, column_by
from stages.limits import context_length


def _has_demonstrations(options: dict[str, Any], wired: Mapping[str, Wired]) -> list[str]:
    if "prompts" in wired and wired["prompts"].options.get("demonstration", "") is None:
        return [f"prompts give their demonstrations here, and {wired['prompts'].stage} reads none; name its column"]
    return []


@stage(version=1, check=_has_demonstrations)
def pool(
    candidates: Candidates, ws: Workspace, prompts: Prompts | None = None, earlier: Candidates | None = None
) -> Candidates:
    """Each candidate once: those given, those of an `earlier` round, and the demonstrations of `prompts`.

    A demonstration has finish_reason `given`; where the policy drew the very same tokens, it is the draw.
    """
    rows = candidates.to_pylist() + ([] if earlier is None else earlier.to_pylist())
    drawn = {row["candidate_id"] for row in rows}
    own = {row["prompt_id"] for row in rows}
    for prompt in [] if prompts is None else prompts.to_pylist():
        if prompt["prompt_id"] not in own:
            continue
        if not prompt["demonstration_ids"]:
            ws.reject("no demonstration", place="prompts", prompt=prompt["prompt_id"], detail=prompt["text"])
            continue
        row = _given(prompt["prompt_id"], prompt["demonstration_ids"], prompt["demonstration"])
        if row["candidate_id"] in drawn:
            ws.reject("demonstration drawn by the policy", place="prompts", prompt=row["prompt_id"])
        else:
            rows.append(row)
    unique = {row["candidate_id"]: row for row in rows}
    ordered = sorted(unique.values(), key=lambda row: row["prompt_id"])
    return pa.Table.from_pylist(ordered, schema=CANDIDATES)


@stage(version=1)
def mismatch(candidates: Candidates, prompts: Prompts, policy: Model, ws: Workspace,
             selections: Selections | None = None) -> Candidates:  # fmt: skip
    """For each prompt a response of the next prompt of its shard, in order of ids: what KTO estimates its KL from.

    A prompt alone in its shard has no other to borrow from, and a response that the context has no room
    for is not borrowed: both are left out, with reason.
    """
    prompt_ids = column_by(prompts, "prompt_id", "token_ids")
    kept = None if selections is None else set(selections["candidate_id"].to_pylist())
    firsts = [
        (prompt, rows[0])
        for prompt, group in by_prompt(candidates)
        if (rows := [row for row in group if kept is None or row["candidate_id"] in kept])
    ]
    room = context_length(policy.folder)
    made: list[Row] = []
    for (prompt, _), (other, row) in zip(firsts, firsts[1:] + firsts[:1], strict=True):
        if prompt == other:
            ws.reject("no other prompt in its shard", place="candidates", prompt=prompt)
        elif len(prompt_ids[prompt]) + len(row["token_ids"]) > room:
            ws.reject("mismatched response too long", place="candidates", prompt=prompt, candidate=row["candidate_id"])
        else:
            made.append(_given(prompt, row["token_ids"], row["text"]))
    return pa.Table.from_pylist(made, schema=CANDIDATES)


def _given(prompt: str, ids: list[int], text: str) -> Row:
    return {
        "prompt_id": prompt,
        "candidate_id": candidate_id(prompt, ids, 0),
        "k": 0,
        "token_ids": ids,
        "text": text,
        "logp": None,
        "logp_kind": "none",
        "n_tokens": len(ids),
        "finish_reason": "given",
        "seed": None,
    }
