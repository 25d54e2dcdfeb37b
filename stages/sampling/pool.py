"""Candidates of several origins as one table: the policy's own, an earlier round's, and demonstrations."""

from itertools import count

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import StageContext, stage
from schemas import Candidates, Model, Prompts, Selections, candidate_id
from schemas.tables import CANDIDATES
from stages.data.files import gives_demonstrations
from stages.data.rows import Row, by_prompt, column_by
from stages.limits import context_length


@stage(version=2, check=gives_demonstrations)
def pool(
    candidates: Candidates, ctx: StageContext, prompts: Prompts | None = None, earlier: Candidates | None = None
) -> Candidates:
    """Each candidate once: those given, those of an `earlier` round, and the demonstrations of `prompts`.

    A demonstration has finish_reason `given`; where the policy drew the very same tokens, it is one more candidate.
    """
    rows = candidates.to_pylist() + ([] if earlier is None else earlier.to_pylist())
    drawn = {row["candidate_id"] for row in rows}
    own = {row["prompt_id"] for row in rows}
    for prompt in [] if prompts is None else prompts.to_pylist():
        if prompt["prompt_id"] not in own:
            continue
        if not prompt["demonstration_ids"]:
            ctx.reject("no demonstration", place="prompts", prompt=prompt["prompt_id"], detail=prompt["text"])
            continue
        rows.append(_given(prompt["prompt_id"], prompt["demonstration_ids"], prompt["demonstration"], drawn))
    unique = {row["candidate_id"]: row for row in rows}
    ordered = sorted(unique.values(), key=lambda row: row["prompt_id"])
    return pa.Table.from_pylist(ordered, schema=CANDIDATES)


@stage(version=2)
def mismatch(candidates: Candidates, prompts: Prompts, policy: Model, ctx: StageContext,
             selections: Selections | None = None) -> Candidates:  # fmt: skip
    """For each kept response of a prompt one of the next prompt of its shard, in order of ids, while that has any.

    KTO estimates its KL from them, one a row of the batch (arXiv:2402.01306), and takes 0 where a batch has none. A
    prompt alone in its shard has no other to borrow from, and a response that the context has no room for is not
    borrowed: both are left out, with reason.
    """
    prompt_ids = column_by(prompts, "prompt_id", "token_ids")
    taken = set(candidates["candidate_id"].to_pylist())
    if selections is not None:
        candidates = candidates.filter(pc.is_in(candidates["candidate_id"], selections["candidate_id"]))
    groups = list(by_prompt(candidates))
    room = context_length(policy.folder)
    made: list[Row] = []
    for (prompt, own), (other, lent) in zip(groups, groups[1:] + groups[:1], strict=True):
        if prompt == other:
            ctx.reject("no other prompt in its shard", place="candidates", prompt=prompt)
            continue
        for _, row in zip(own, lent, strict=False):
            if len(prompt_ids[prompt]) + len(row["token_ids"]) > room:
                ids = dict(prompt=prompt, candidate=row["candidate_id"])
                ctx.reject("mismatched response too long", place="candidates", **ids)
                continue
            made.append(_given(prompt, row["token_ids"], row["text"], taken))
            taken.add(made[-1]["candidate_id"])
    return pa.Table.from_pylist(made, schema=CANDIDATES)


def _given(prompt: str, ids: list[int], text: str, taken: set[str]) -> Row:
    """A response that nobody drew; of equal tokens, the first copy whose id is not taken."""
    names = (candidate_id(prompt, ids, copy) for copy in count())
    return {
        "prompt_id": prompt,
        "candidate_id": next(name for name in names if name not in taken),
        "k": 0,
        "token_ids": ids,
        "text": text,
        "logp": None,
        "logp_kind": "none",
        "n_tokens": len(ids),
        "finish_reason": "given",
        "seed": None,
    }
