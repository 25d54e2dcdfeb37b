"""Stage `examples`: one row per prompt with its responses, their weights and reference log-probs, and its pairs.

What the optimizer will see is all in this one table: a method's data recipe ends here.
"""

from collections import Counter
from collections.abc import Mapping
from operator import itemgetter
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import Bound, Finite, InputStep, StageContext, stage
from pipeline.costs import Cost
from schemas import Candidates, Examples, Pairs, Prompts, Reference, Selections, WinnowError, token_digest
from schemas.tables import EXAMPLES
from stages.data.files import check_demonstrations
from stages.data.rows import ALL_WRONG, Row, RowsById, cutoff, equal_rewards, rows_by_prompt
from stages.options import Split, split_problems
from stages.training.agreement import drawn
from stages.work import examples_work

Imitate = Literal["nothing", "demonstration", "selected", "best", "chosen", "winner"]
Desirable = Literal["nothing", "pairs", "rewards"]
INPUT_READ_BY = {
    ("imitate", "selected"): "selections",
    ("imitate", "best"): "selections",
    ("imitate", "chosen"): "pairs",
    ("imitate", "winner"): "pairs",
    ("desirable", "pairs"): "pairs",
    ("desirable", "rewards"): "selections",
    ("labels", "soft"): "pairs",
}


def check_examples(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    """Return the reasons why an option has nothing to read, or an input nothing that reads it."""
    imitate, desirable = options["imitate"], options["desirable"]
    problems = [
        f"{name} needs candidates; add `candidates` under `from`"
        for name in ("pairs", "selections", "reference", "mismatched")
        if name in inputs and "candidates" not in inputs
    ]
    problems += split_problems(options, inputs.get("prompts"))
    for (option, value), needed in INPUT_READ_BY.items():
        if options[option] == value and needed not in inputs:
            problems.append(f"{option}: {value} reads {needed}; add `{needed}` under `from`")
    if imitate == "demonstration":
        problems += check_demonstrations(options, inputs)
    if options["threshold"] is not None and desirable != "rewards":
        problems.append("threshold divides rewards; set `desirable: rewards`, or unset it")
    if options["labels"] == "soft" and "pairs" in inputs and inputs["pairs"].stage == "preferences":
        problems.append("labels: soft reads the gap behind a pair, and people's preferences have none; set it to hard")
    if imitate == desirable == "nothing" and "pairs" not in inputs:
        problems.append("neither pairs nor anything to imitate: there is nothing to learn from")
    elif "selections" in inputs and imitate not in ("selected", "best") and desirable != "rewards":
        problems.append(
            "nothing reads selections; set `imitate` or `desirable`, or set `selections: null` under `from`"
        )

    # A selection's weights are lost unless the imitation or the rule that made the pairs carries them on.
    pairs = inputs.get("pairs", InputStep(""))
    rule_of_pairs = pairs.options.get("rule")
    if imitate != "selected" and not (isinstance(rule_of_pairs, Bound) and rule_of_pairs.metadata.get("weighs")):
        sources = (inputs, pairs.inputs, pairs.inputs.get("comparisons", InputStep("")).inputs)
        rules = [tables["selections"].options.get("rule") for tables in sources if "selections" in tables]
        weighing = sorted({rule.name for rule in rules if isinstance(rule, Bound) and rule.metadata.get("weighs")})
        problems += [
            f"nothing reads the weights of {rule}; set `imitate: selected`, or pair by all_pairs" for rule in weighing
        ]
    return problems


@stage(version=4, check=check_examples, cost=Cost(work=examples_work))
def examples(
    prompts: Prompts,
    ctx: StageContext,
    candidates: Candidates | None = None,
    pairs: Pairs | None = None,
    selections: Selections | None = None,
    reference: Reference | None = None,
    mismatched: Candidates | None = None,
    *,
    split: Split = "train",
    imitate: Imitate = "nothing",
    desirable: Desirable = "nothing",
    threshold: Finite | None = None,
    labels: Literal["hard", "soft"] = "hard",
) -> Examples:
    """Join all inputs by prompt to training groups; rows that nothing reads are dropped.

    imitate: whose likelihood counts: a `demonstration`, the `best` by reward, the `winner` of the pairs' tournament and
    those `chosen` in any pair with weight 1, the `selected` with the weights of their selection, but none of a prompt
    whose selected responses are all labelled wrong. desirable:
    unpaired labels, from `pairs` (chosen 1, rejected -1) or from the selected `rewards`, 1 above the `threshold` and -1
    below it; by default it is that of labels (0.5 of 0 and 1, 0 of -1 and 1), and of other rewards their mean per
    prompt, for the sign of a reward says only whether it beats one random draw. labels: what a pair says, 1 or the
    ranker's own probability (the sigmoid of its gap). Raises WinnowError if a reference log-prob is of other tokens
    than those to train on.
    """
    candidates_by_prompt, pairs_by_prompt, selections_by_prompt, reference_by_prompt, mismatched_by_prompt = (
        {} if table is None else dict(rows_by_prompt(table))
        for table in (candidates, pairs, selections, reference, mismatched)
    )
    groups = []
    # Sorted as rows: pyarrow sorts no table with a column of more than 2 GiB of text, as a part can have.
    of_split = prompts.filter(pc.equal(prompts["split"], split)).to_pylist()
    for prompt in sorted(of_split, key=itemgetter("prompt_id")):
        name = prompt["prompt_id"]
        pairs_here = pairs_by_prompt.get(name, [])
        selected = selections_by_prompt.get(name, [])

        # Which responses are imitated, labelled or paired; the others are not read.
        weights = _likelihood_weights(imitate, pairs_here, selected)
        if imitate in ("selected", "best") and selected and equal_rewards(selected) == ALL_WRONG:
            ctx.reject(ALL_WRONG, place="selections", prompt=name, detail=f"{len(selected)} selected, none imitated")
            weights = {}
        signs = _unpaired_labels(desirable, pairs_here, selected, threshold, ctx)
        used = {*weights, *signs, *(pair[side] for pair in pairs_here for side in ("chosen_id", "rejected_id"))}
        responses = [row for row in candidates_by_prompt.get(name, []) if row["candidate_id"] in used]
        scores = None
        if reference is not None:
            scores = {row["candidate_id"]: row for row in reference_by_prompt.get(name, [])}
            # A prompt that the reference lacks was rejected by that step; a response that it lacks is a wrong input.
            if responses and not scores:
                ctx.reject("no reference log-prob", place="reference", prompt=name, detail=prompt["text"])
                continue

        rows = [
            _response_row(prompt, row, scores, weights.get(row["candidate_id"], 0.0), signs.get(row["candidate_id"]))
            for row in responses
        ]
        if imitate == "demonstration" and prompt["demonstration_ids"]:
            demonstration = {"candidate_id": "demonstration", "token_ids": prompt["demonstration_ids"]}
            rows.append(_response_row(prompt, demonstration, None, 1.0, None))
        index = RowsById((row["candidate_id"], n) for n, row in enumerate(rows))
        if rows:
            rows += [_response_row(prompt, row, scores, 0.0, 0) for row in mismatched_by_prompt.get(name, [])]
        pair_rows = [
            {
                "chosen": index[pair["chosen_id"]],
                "rejected": index[pair["rejected_id"]],
                "weight": pair["weight"],
                "label": 1 / (1 + np.exp(-pair["gap"])) if labels == "soft" and pair["gap"] is not None else 1.0,
            }
            for pair in pairs_here
        ]
        if not rows:
            if name in candidates_by_prompt or candidates is None:
                ctx.reject("nothing to learn from", place="prompts", prompt=name, detail=prompt["text"])
            continue
        scored = scores[responses[0]["candidate_id"]] if scores and responses else {}
        groups.append({
            "prompt_id": name,
            "prompt_ids": prompt["token_ids"],
            "responses": rows,
            "pairs": pair_rows,
            "ref_model": scored.get("model"),
            "ref_dtype": scored.get("dtype"),
        })  # fmt: skip
    return pa.Table.from_pylist(groups, schema=EXAMPLES)


def _likelihood_weights(imitate: Imitate, pairs: list[Row], selected: list[Row]) -> dict[str, float]:
    """Return likelihood weights by candidate id.

    best: the highest reward, the earliest draw on ties. winner: what was chosen most often of all that were never
    rejected, which in a tournament is its winner, the first by id on ties.
    """
    if imitate == "selected":
        return {row["candidate_id"]: row["weight"] for row in selected}
    if imitate == "best":
        best = sorted(selected, key=lambda row: (-row["reward"], row["draw"]))[:1]
        return {row["candidate_id"]: 1.0 for row in best}
    chosen = Counter(pair["chosen_id"] for pair in pairs)
    if imitate == "winner":
        wins = {name: count for name, count in chosen.items() if all(pair["rejected_id"] != name for pair in pairs)}
        return {min(wins, key=lambda name: (-wins[name], name)): 1.0} if wins else {}
    return dict.fromkeys(chosen, 1.0) if imitate == "chosen" else {}


def _unpaired_labels(
    desirable: Desirable, pairs: list[Row], selected: list[Row], threshold: float | None, ctx: StageContext
) -> dict[str, int]:
    """Return 1 or -1 by candidate id; without a response chosen as often as rejected, or a reward at the threshold."""
    if desirable == "pairs":
        votes: Counter[str] = Counter()
        for pair in pairs:
            votes.update({pair["chosen_id"]: 1, pair["rejected_id"]: -1})
        return {name: 1 if total > 0 else -1 for name, total in votes.items() if total}
    if desirable == "nothing" or not selected:
        return {}
    level = cutoff(selected, threshold)
    for row in selected:
        if row["reward"] == level:
            ids = dict(prompt=row["prompt_id"], candidate=row["candidate_id"])
            ctx.reject("neither above nor below", place="selections", detail=str(level), **ids)
    return {row["candidate_id"]: 1 if row["reward"] > level else -1 for row in selected if row["reward"] != level}


def _response_row(
    prompt: Row, candidate: Row, scores: dict[str, Row] | None, weight: float, desirable: int | None
) -> Row:
    """Return a response of `examples`; raise WinnowError if its cached log-prob is missing or of other tokens."""
    name, ids, mask = candidate["candidate_id"], candidate["token_ids"], candidate.get("mask")
    if scores is not None and name not in scores:
        raise WinnowError(
            f"examples: candidate {name} has no reference log-prob; give `reference` the step that scored it"
        )
    if scores is not None and scores[name]["tokens"] != token_digest(prompt["token_ids"], ids, mask):
        raise WinnowError(
            f"examples: the reference of candidate {name} (prompt {prompt['prompt_id']}) was scored on other "
            "tokens than those to train on: another chat template, tokenizer, truncation or mask; score it again"
        )
    row = {"candidate_id": name, "token_ids": ids, "mask": mask, "weight": weight, "desirable": desirable}
    row["ref_logp"] = None if scores is None else scores[name]["logp"]
    if draw := drawn(candidate):
        row |= {"drawn_logp": draw.logp, "drawn_by": draw.model, "drawn_dtype": draw.dtype}
    return row
