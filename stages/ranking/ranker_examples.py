"""Stage `ranker_examples`: preference pairs as examples for training the pairwise ranker by the usual loop."""

from typing import Literal

import pyarrow as pa

from pipeline import StageContext, stage
from schemas import Candidates, Examples, Model, Pairs, Prompts, seed_for
from schemas.tables import EXAMPLES
from stages.data.rows import Row, text_by_id
from stages.data.texts import conversation_of, reply_of_candidate
from stages.limits import context_length
from stages.options import Seed, Split, split_problems
from stages.ranking.base import PairFormat


@stage(version=4, check=lambda options, inputs: split_problems(options, inputs.get("prompts")))
def ranker_examples(
    prompts: Prompts,
    candidates: Candidates,
    pairs: Pairs,
    tokenizer: Model,
    ctx: StageContext,
    *,
    split: Split = "train",
    format: PairFormat | None = None,
    labels: Literal["both", "right"] = "both",
    seed: Seed = 0,
) -> Examples:
    """Write one group per pair: its texts in an order flipped at random by hash of the pair, and the label tokens.

    The format is that of the ranker `pairwise`, to which the same one must be given. labels: `both` are the right one
    and the wrong one as a pair, and the objective `sigmoid` on it is the loss on the two labels' logits alone, near
    ln 2 at the start; `right` is the right one alone, for the objective `nll` over the whole vocabulary, which in a
    model that has never answered with A or B starts at some 10 nats.
    """
    from stages.ranking.pairwise import RankerPrompt

    ranker_prompt = ctx.open_once(RankerPrompt, tokenizer, format)
    max_prompt_tokens = context_length(tokenizer.folder) - 1  # the answer is one token
    prompt_rows = {row["prompt_id"]: row for row in prompts.to_pylist() if row["split"] == split}
    texts = text_by_id(candidates, "candidate_id")
    replies = {row["candidate_id"]: reply_of_candidate(row) for row in candidates.to_pylist()}
    rows: list[Row] = []
    for pair in pairs.to_pylist():
        prompt, chosen, rejected = pair["prompt_id"], pair["chosen_id"], pair["rejected_id"]
        if prompt not in prompt_rows:
            continue
        text = prompt_rows[prompt]["text"]
        of_pair = dict(place="pairs", prompt=prompt)
        if not all(map(ranker_prompt.can_read, (text, texts[chosen], texts[rejected]))):
            ctx.reject("special token in the text", candidate=chosen, detail=rejected, **of_pair)
            continue
        flipped = seed_for(seed, prompt, chosen, rejected) % 2
        first, second = (rejected, chosen) if flipped else (chosen, rejected)
        try:
            responses = (replies[chosen], replies[rejected])
            context = ranker_prompt.context(text, conversation_of(prompt_rows[prompt]), *responses)
            ids = ranker_prompt.ids(context, texts[first], texts[second])
        except ValueError as error:
            ctx.reject(str(error), candidate=chosen, detail=rejected, **of_pair)
            continue
        if len(ids) > max_prompt_tokens:
            ctx.reject("comparison too long", detail=f"{len(ids)} tokens", **of_pair)
            continue
        right, wrong = ranker_prompt.labels[flipped], ranker_prompt.labels[1 - flipped]
        answers = [{"candidate_id": chosen, "token_ids": [right], "weight": 1.0}]
        label_pairs = []
        if labels == "both":
            answers.append({"candidate_id": rejected, "token_ids": [wrong], "weight": 0.0})
            label_pairs.append({"chosen": 0, "rejected": 1, "weight": pair["weight"], "label": 1.0})
        rows.append({"prompt_id": prompt, "prompt_ids": ids, "responses": answers, "pairs": label_pairs})
    return pa.Table.from_pylist(rows, schema=EXAMPLES)
