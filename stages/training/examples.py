"""The doorway of room 7: one row a prompt with its responses, their weights and reference log-probs, and its pairs.

What the optimizer will see is all in this one table: a method's data recipe ends here.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline import Bound, Finite, InputStep, StageContext, stage
from schemas import Candidates, Examples, Pairs, Prompts, Reference, Selections, WinnowError, token_digest
from schemas.tables import EXAMPLES
from stages.data.files import gives_demonstrations
from stages.data.rows import ById, Row, by_prompt, cutoff

Imitate = Literal["nothing", "demonstration", "selected", "best", "chosen"]
Desirable = Literal["nothing", "pairs", "rewards"]
NEEDS = {
    ("imitate", "selected"): "selections",
    ("imitate", "best"): "selections",
    ("imitate", "chosen"): "pairs",
    ("desirable", "pairs"): "pairs",
    ("desirable", "rewards"): "selections",
    ("labels", "soft"): "pairs",
}


def _has_what_it_reads(options: dict[str, Any], wired: Mapping[str, InputStep]) -> list[str]:
    optional = ("pairs", "selections", "reference", "mismatched")
    problems = [f"{name} needs candidates; wire them in `from`" for name in optional
                if name in wired and "candidates" not in wired]  # fmt: skip
    for (option, value), need in NEEDS.items():
        if options[option] == value and need not in wired:
            problems.append(f"{option}: {value} reads {need}; wire `{need}` in `from`")
    if options["imitate"] == "demonstration":
        problems += gives_demonstrations(options, wired)
    if options["threshold"] is not None and options["desirable"] != "rewards":
        problems.append("threshold parts rewards; set `desirable: rewards`, or unset it")
    if options["labels"] == "soft" and "pairs" in wired and wired["pairs"].stage == "preferences":
        problems.append("labels: soft reads the gap behind a pair, and people's preferences have none; set it to hard")
    if options["imitate"] == options["desirable"] == "nothing" and "pairs" not in wired:
        problems.append("neither pairs nor anything to imitate: there is nothing to learn from")
    elif "selections" in wired and options["imitate"] not in ("selected", "best") and options["desirable"] != "rewards":
        problems.append("selections are wired, and nothing reads them; set `imitate` or `desirable`, or unwire them")
    return problems + _lost_weights(options, wired)


def _lost_weights(options: dict[str, Any], wired: Mapping[str, InputStep]) -> list[str]:
    """What a selection weighs, and neither the pairs nor the imitation would carry on."""
    pairs = wired.get("pairs", InputStep(""))
    behind = (wired, pairs.inputs, pairs.inputs.get("comparisons", InputStep("")).inputs)
    rules = [tables["selections"].options.get("rule") for tables in behind if "selections" in tables]
    weighing = sorted({rule.name for rule in rules if isinstance(rule, Bound) and rule.metadata.get("weighs")})
    by = pairs.options.get("rule")
    if options["imitate"] == "selected" or (isinstance(by, Bound) and by.metadata.get("weighs")):
        return []
    return [f"nothing reads the weights of {rule}; set `imitate: selected`, or pair by all_pairs" for rule in weighing]


@stage(version=2, check=_has_what_it_reads)
def examples(
    prompts: Prompts,
    ctx: StageContext,
    candidates: Candidates | None = None,
    pairs: Pairs | None = None,
    selections: Selections | None = None,
    reference: Reference | None = None,
    mismatched: Candidates | None = None,
    *,
    split: Literal["train", "heldout"] = "train",
    imitate: Imitate = "nothing",
    desirable: Desirable = "nothing",
    threshold: Finite | None = None,
    labels: Literal["hard", "soft"] = "hard",
) -> Examples:
    """Join to training groups; rows that nothing reads are dropped.

    imitate: whose likelihood counts: a `demonstration` and the `best` or `chosen` with weight 1, the
    `selected` with the weights of their selection. desirable: unpaired labels, from `pairs` (chosen 1,
    rejected -1) or from the selected `rewards`, 1 above the `threshold` and -1 below it; by default it is their
    mean in the prompt, for the sign of a reward says only whether it beats one random draw. labels: what a pair
    says, 1 or the ranker's own probability (the sigmoid of its gap). Raises WinnowError if a reference log-prob
    was taken on other tokens than those to train on.
    """
    join = Join(candidates, pairs, selections, reference, mismatched, ctx)
    rows = []
    for prompt in prompts.sort_by("prompt_id").to_pylist():
        if prompt["split"] != split:
            continue
        group = join.group(prompt, imitate, desirable, threshold, labels)
        if group is None:
            ctx.reject("no reference log-prob", place="reference", prompt=prompt["prompt_id"], detail=prompt["text"])
        elif group["responses"]:
            rows.append(group)
        elif prompt["prompt_id"] in join.candidates or candidates is None:
            ctx.reject("nothing to learn from", place="prompts", prompt=prompt["prompt_id"], detail=prompt["text"])
    return pa.Table.from_pylist(rows, schema=EXAMPLES)


class Join:
    """The shard's tables by prompt."""

    def __init__(
        self, candidates: Any, pairs: Any, selections: Any, reference: Any, mismatched: Any, ctx: StageContext
    ) -> None:
        tables = (candidates, pairs, selections, reference, mismatched)
        self.candidates, self.pairs, self.selections, self.reference, self.mismatched = (
            {} if table is None else dict(by_prompt(table)) for table in tables
        )
        self.cached, self.ctx = reference is not None, ctx

    def group(
        self, prompt: Row, imitate: Imitate, desirable: Desirable, threshold: float | None, labels: str
    ) -> Row | None:
        """None if `reference` left out the whole prompt; where it lacks some of its responses, a wire is wrong."""
        name = prompt["prompt_id"]
        pairs, selected = self.pairs.get(name, []), self.selections.get(name, [])
        weights = _imitated(imitate, pairs, selected)
        signs = _voted(pairs) if desirable == "pairs" else {}
        if desirable == "rewards" and selected:
            signs = self._parted(name, selected, cutoff(selected, threshold))
        used = {*weights, *signs, *(pair[side] for pair in pairs for side in SIDES)}
        kept = [row for row in self.candidates.get(name, []) if row["candidate_id"] in used]
        scores = {row["candidate_id"]: row for row in self.reference.get(name, [])}
        if self.cached and kept and not scores:
            return None
        responses = [
            self._response(prompt, row, scores, weights.get(row["candidate_id"], 0.0), signs.get(row["candidate_id"]))
            for row in kept
        ]
        if imitate == "demonstration" and prompt["demonstration_ids"]:
            responses.append(_response("demonstration", prompt["demonstration_ids"], 1.0, None, None))
        place = ById((response["candidate_id"], n) for n, response in enumerate(responses))
        if responses:
            responses += [self._response(prompt, row, scores, 0.0, 0) for row in self.mismatched.get(name, [])]
        score = scores[kept[0]["candidate_id"]] if self.cached and kept else {}
        return {
            "prompt_id": name,
            "prompt_ids": prompt["token_ids"],
            "responses": responses,
            "pairs": [_pair(pair, place, labels) for pair in pairs],
            "ref_model": score.get("model"),
            "ref_dtype": score.get("dtype"),
        }

    def _parted(self, prompt: str, selected: list[Row], level: float) -> dict[str, int]:
        """Labels of rewards; one that is the level itself has none."""
        for row in selected:
            if row["reward"] == level:
                ids = dict(prompt=prompt, candidate=row["candidate_id"], detail=str(level))
                self.ctx.reject("neither above nor below", place="selections", **ids)
        return {row["candidate_id"]: 1 if row["reward"] > level else -1 for row in selected if row["reward"] != level}

    def _response(self, prompt: Row, row: Row, scores: dict[str, Row], weight: float, sign: int | None) -> Row:
        name, ids = row["candidate_id"], row["token_ids"]
        if not self.cached:
            return _response(name, ids, weight, None, sign)
        if name not in scores:
            raise WinnowError(f"examples: candidate {name} has no reference log-prob; wire `reference` to its scores")
        if scores[name]["tokens"] != token_digest(prompt["token_ids"], ids):
            raise WinnowError(
                f"examples: the reference of candidate {name} (prompt {prompt['prompt_id']}) was scored on other "
                "tokens than those to train on: another chat template, tokenizer or truncation; score it again"
            )
        return _response(name, ids, weight, scores[name]["logp"], sign)


SIDES = ("chosen_id", "rejected_id")


def _imitated(imitate: Imitate, pairs: list[Row], selected: list[Row]) -> dict[str, float]:
    """Likelihood weights by candidate id. `best`: the highest reward, the earliest draw on ties."""
    kept = sorted(selected, key=lambda row: (-row["reward"], row["draw"]))
    named: dict[str, dict[str, float]] = {
        "selected": {row["candidate_id"]: row["weight"] for row in kept},
        "best": {row["candidate_id"]: 1.0 for row in kept[:1]},
        "chosen": {pair["chosen_id"]: 1.0 for pair in pairs},
    }
    return named.get(imitate, {})


def _voted(pairs: list[Row]) -> dict[str, int]:
    """Labels of pairs; a response chosen as often as rejected has none."""
    votes: Counter[str] = Counter()
    for pair in pairs:
        votes.update({pair["chosen_id"]: 1, pair["rejected_id"]: -1})
    return {name: 1 if sum_ > 0 else -1 for name, sum_ in votes.items() if sum_}


def _pair(pair: Row, place: ById, labels: str) -> Row:
    certainty = 1 / (1 + np.exp(-pair["gap"])) if labels == "soft" and pair["gap"] is not None else 1.0
    return {
        "chosen": place[pair["chosen_id"]],
        "rejected": place[pair["rejected_id"]],
        "weight": pair["weight"],
        "label": certainty,
    }


def _response(name: str, ids: list[int], weight: float, ref: float | None, sign: int | None) -> Row:
    return {"candidate_id": name, "token_ids": ids, "weight": weight, "ref_logp": ref, "desirable": sign}
