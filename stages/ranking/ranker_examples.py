"""Stage `ranker_examples`: preference pairs as examples for training a ranker by the usual loop."""

from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa

from pipeline import InputStep, StageContext, stage
from schemas import Candidates, Examples, Model, Pairs, Prompts, seed_for
from schemas.tables import EXAMPLES
from stages.data.formats import IDENTICAL
from stages.data.rows import Row, text_by_id
from stages.data.texts import conversation_of, reply_of_candidate, shared_prefix_length
from stages.limits import context_length
from stages.model_config import ModelConfig, planned_output
from stages.options import Seed, Split, split_problems
from stages.ranking.base import CANNOT_READ, TOO_LONG, PairFormat, response_of


def _check_ranker_examples(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    problems = split_problems(options, inputs.get("prompts"))
    if "tokenizer" in inputs and planned_output(inputs["tokenizer"]) == "score":
        unread = {"labels": options["labels"] == "right", "format": options["format"] is not None}
        problems += [
            f"{name}: {options[name]}, and `tokenizer` is a reward model, which reads each response alone and answers "
            "with a score; unset it"
            for name, is_set in unread.items()
            if is_set
        ]
    return problems


@stage(version=5, check=_check_ranker_examples)
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
    """Write one group per pair, as the ranker whose tokenizer is given reads it.

    A language model reads both texts, in an order flipped at random by hash of the pair, and answers with a label
    token. The format is that of the ranker `pairwise`, to which the same one must be given. labels: `both` are the
    right one and the wrong one as a pair, and the objective `sigmoid` on it is the loss on the two labels' logits
    alone, near ln 2 at the start; `right` is the right one alone, for the objective `nll` over the whole vocabulary,
    which in a model that has never answered with A or B starts at some 10 nats.

    A reward model reads the prompt with each response as its own template renders them, and the objective `sigmoid` on
    its scores is Bradley-Terry's (arXiv:2203.02155, equation 1). What both begin with is the prompt of the group. The
    score is trained where the ranker `pointwise` reads it: at the end of the last turn, or behind what the template
    writes after that.
    """
    if ModelConfig(tokenizer.folder).output == "score":
        return pa.Table.from_pylist(_score_groups(prompts, candidates, pairs, tokenizer, split, ctx), schema=EXAMPLES)
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


def _score_groups(
    prompts: Prompts, candidates: Candidates, pairs: Pairs, tokenizer: Model, split: Split, ctx: StageContext
) -> list[Row]:
    """Return a group per pair for a reward model, whose responses are the ids in which the two conversations differ."""
    from stages.ranking.pointwise import RewardModelReader

    reader = ctx.open_once(RewardModelReader, tokenizer)
    prompt_rows = {row["prompt_id"]: row for row in prompts.to_pylist() if row["split"] == split}
    candidate_rows = {row["candidate_id"]: row for row in candidates.to_pylist()}
    groups: list[Row] = []
    for pair in pairs.to_pylist():
        prompt, names = prompt_rows.get(pair["prompt_id"]), (pair["chosen_id"], pair["rejected_id"])
        if prompt is None:
            continue
        conversations: list[tuple[int, ...]] = []
        for name in names:
            of_response = dict(place="pairs", prompt=pair["prompt_id"], candidate=name)
            try:
                before, response = reader.read(prompt["text"], response_of(prompt, candidate_rows[name]))
            except ValueError as error:
                ctx.reject(f"{CANNOT_READ}{error}", **of_response)
                break
            if len(before) + len(response) > reader.context:
                ctx.reject(TOO_LONG, detail=f"{len(before) + len(response)} tokens", **of_response)
                break
            conversations.append(before + response)
        if len(conversations) < len(names):
            continue
        chosen, rejected = conversations
        if chosen == rejected:
            ctx.reject(IDENTICAL, place="pairs", prompt=pair["prompt_id"], candidate=names[0], detail=names[1])
            continue
        start = min(shared_prefix_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
        responses = [
            {"candidate_id": name, "token_ids": ids[start:], "weight": weight}
            for name, ids, weight in zip(names, conversations, (1.0, 0.0), strict=True)
        ]
        labels = [{"chosen": 0, "rejected": 1, "weight": pair["weight"], "label": 1.0}]
        groups.append(
            {"prompt_id": pair["prompt_id"], "prompt_ids": chosen[:start], "responses": responses, "pairs": labels}
        )
    return groups
