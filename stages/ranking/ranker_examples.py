"""Preference pairs as training examples of the ranker: the answer is one token, trained by the same loop."""

from typing import Any, Literal

import pyarrow as pa

from pipeline import StageContext, stage
from schemas import Candidates, Examples, Model, Pairs, Prompts, seed_for
from schemas.tables import EXAMPLES
from stages.limits import context_length


@stage(version=1)
def ranker_examples(
    prompts: Prompts,
    candidates: Candidates,
    pairs: Pairs,
    tokenizer: Model,
    ctx: StageContext,
    *,
    split: Literal["train", "heldout"] = "train",
    seed: int = 0,
) -> Examples:
    """One group a pair: the two texts in an order flipped at random by hash of the pair, and the label token."""
    from stages.ranking.pairwise import RankerPrompt

    prompt = ctx.hold(RankerPrompt, tokenizer)
    room = context_length(tokenizer.folder) - 1
    contexts = {row["prompt_id"]: row["text"] for row in prompts.to_pylist() if row["split"] == split}
    texts = dict(zip(*(candidates.column(name).to_pylist() for name in ("candidate_id", "text")), strict=True))
    rows = []
    for pair in pairs.to_pylist():
        if pair["prompt_id"] not in contexts:
            continue
        flipped = seed_for(seed, pair["prompt_id"], pair["chosen_id"], pair["rejected_id"]) % 2
        names = [pair["chosen_id"], pair["rejected_id"]][:: -1 if flipped else 1]
        ids = prompt.ids(contexts[pair["prompt_id"]], *(texts[name] for name in names))
        if len(ids) > room:
            ctx.reject("comparison too long", place="pairs", prompt=pair["prompt_id"], detail=f"{len(ids)} tokens")
        else:
            rows.append(_example(pair, ids, prompt.labels[flipped]))
    return pa.Table.from_pylist(rows, schema=EXAMPLES)


def _example(pair: dict[str, Any], ids: list[int], label: int) -> dict[str, Any]:
    answer = {"candidate_id": pair["chosen_id"], "token_ids": [label], "weight": 1.0, "ref_logp": None}
    return {"prompt_id": pair["prompt_id"], "prompt_ids": ids, "responses": [answer], "pairs": []}
