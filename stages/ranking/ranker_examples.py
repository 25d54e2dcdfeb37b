"""Stage `ranker_examples`: preference pairs as examples for training the pairwise ranker by the usual loop."""

from typing import Literal

import pyarrow as pa

from pipeline import StageContext, stage
from schemas import Candidates, Examples, Model, Pairs, Prompts, seed_for
from schemas.tables import EXAMPLES
from stages.data.rows import Row, text_by_id
from stages.limits import context_length
from stages.options import Seed, split_problems


@stage(version=2, check=lambda options, inputs: split_problems(options, inputs.get("prompts")))
def ranker_examples(
    prompts: Prompts,
    candidates: Candidates,
    pairs: Pairs,
    tokenizer: Model,
    ctx: StageContext,
    *,
    split: Literal["train", "heldout"] = "train",
    seed: Seed = 0,
) -> Examples:
    """Write one group per pair: its texts in an order flipped at random by hash of the pair, and the label token."""
    from stages.ranking.pairwise import RankerPrompt

    ranker_prompt = ctx.open_once(RankerPrompt, tokenizer)
    max_prompt_tokens = context_length(tokenizer.folder) - 1  # the answer is one token
    contexts = {row["prompt_id"]: row["text"] for row in prompts.to_pylist() if row["split"] == split}
    texts = text_by_id(candidates, "candidate_id")
    rows: list[Row] = []
    for pair in pairs.to_pylist():
        prompt, chosen, rejected = pair["prompt_id"], pair["chosen_id"], pair["rejected_id"]
        if prompt not in contexts:
            continue
        if not all(map(ranker_prompt.can_read, (contexts[prompt], texts[chosen], texts[rejected]))):
            ctx.reject("special token in the text", place="pairs", prompt=prompt, candidate=chosen, detail=rejected)
            continue
        flipped = seed_for(seed, prompt, chosen, rejected) % 2
        first, second = (rejected, chosen) if flipped else (chosen, rejected)
        ids = ranker_prompt.ids(contexts[prompt], texts[first], texts[second])
        if len(ids) > max_prompt_tokens:
            ctx.reject("comparison too long", place="pairs", prompt=prompt, detail=f"{len(ids)} tokens")
            continue
        label = ranker_prompt.labels[flipped]
        answer = {"candidate_id": chosen, "token_ids": [label], "weight": 1.0, "ref_logp": None}
        rows.append({"prompt_id": prompt, "prompt_ids": ids, "responses": [answer], "pairs": []})
    return pa.Table.from_pylist(rows, schema=EXAMPLES)
