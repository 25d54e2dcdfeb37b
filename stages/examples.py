"""The doorway of room 7: one row a prompt with its responses, their weights and reference log-probs, and its pairs.

What the optimizer will see is all in this one table: a method's data recipe ends here.
"""

from typing import Any, Literal

import pyarrow as pa

from pipeline import Workspace, stage
from schemas import Candidates, Examples, Pairs, Prompts, Reference, Selections, WinnowError, token_digest
from schemas.tables import EXAMPLES
from stages.groups import Row, by_prompt

Imitate = Literal["nothing", "demonstration", "selected", "best", "chosen"]
NEEDS = {"selected": "selections", "best": "selections", "chosen": "pairs"}


def _has_what_it_reads(options: dict[str, Any], wired: frozenset[str]) -> list[str]:
    imitate = options["imitate"]
    problems = [f"{name} needs candidates; wire them in `from`" for name in ("pairs", "selections", "reference")
                if name in wired and "candidates" not in wired]  # fmt: skip
    need = NEEDS.get(imitate)
    if need and need not in wired:
        problems.append(f"imitate: {imitate} reads {need}; wire `{need}` in `from`")
    if imitate == "nothing" and "pairs" not in wired:
        problems.append("neither pairs nor anything to imitate: there is nothing to learn from")
    return problems


@stage(version=1, check=_has_what_it_reads)
def examples(
    prompts: Prompts,
    ws: Workspace,
    candidates: Candidates | None = None,
    pairs: Pairs | None = None,
    selections: Selections | None = None,
    reference: Reference | None = None,
    *,
    split: Literal["train", "heldout"] = "train",
    imitate: Imitate = "nothing",
) -> Examples:
    """Join to training groups. Likelihood weight 1 goes to what `imitate` names; rows that nothing reads are dropped.

    Raises WinnowError if a reference log-prob was taken on other tokens than those to train on.
    """
    join = Join(candidates, pairs, selections, reference)
    rows = []
    for prompt in prompts.sort_by("prompt_id").to_pylist():
        if prompt["split"] != split:
            continue
        group = join.group(prompt, imitate)
        if group["responses"]:
            rows.append(group)
        elif prompt["prompt_id"] in join.candidates or candidates is None:
            ws.reject("nothing to learn from", place="prompts", prompt=prompt["prompt_id"], detail=prompt["text"])
    return pa.Table.from_pylist(rows, schema=EXAMPLES)


class Join:
    """The shard's tables by prompt."""

    def __init__(self, candidates: Any, pairs: Any, selections: Any, reference: Any) -> None:
        self.candidates, self.pairs, self.selections, self.reference = (
            {} if table is None else dict(by_prompt(table)) for table in (candidates, pairs, selections, reference)
        )
        self.cached = reference is not None

    def group(self, prompt: Row, imitate: Imitate) -> Row:
        name = prompt["prompt_id"]
        pairs = self.pairs.get(name, [])
        weights = self._imitated(name, imitate, pairs)
        used = weights | {pair[side]: weights.get(pair[side], 0.0) for pair in pairs for side in SIDES}
        kept = [row for row in self.candidates.get(name, []) if row["candidate_id"] in used]
        scores = {row["candidate_id"]: row for row in self.reference.get(name, [])}
        responses = [self._response(prompt, row, used[row["candidate_id"]], scores) for row in kept]
        if imitate == "demonstration" and prompt["demonstration_ids"]:
            responses.append(_response("demonstration", prompt["demonstration_ids"], 1.0, None))
        place = {response["candidate_id"]: n for n, response in enumerate(responses)}
        score = scores[kept[0]["candidate_id"]] if self.cached and kept else {}
        return {
            "prompt_id": name,
            "prompt_ids": prompt["token_ids"],
            "responses": responses,
            "pairs": [{"chosen": place[p["chosen_id"]], "rejected": place[p["rejected_id"]]} for p in pairs],
            "ref_model": score.get("model"),
            "ref_dtype": score.get("dtype"),
        }

    def _imitated(self, prompt: str, imitate: Imitate, pairs: list[Row]) -> dict[str, float]:
        """Candidate ids with likelihood weight. `best`: the highest reward, the earliest draw on ties."""
        kept = sorted(self.selections.get(prompt, []), key=lambda row: (-row["reward"], row["draw"]))
        named = {
            "selected": [row["candidate_id"] for row in kept],
            "best": [row["candidate_id"] for row in kept[:1]],
            "chosen": [pair["chosen_id"] for pair in pairs],
        }
        return dict.fromkeys(named.get(imitate, []), 1.0)

    def _response(self, prompt: Row, row: Row, weight: float, scores: dict[str, Row]) -> Row:
        name, ids = row["candidate_id"], row["token_ids"]
        if not self.cached:
            return _response(name, ids, weight, None)
        if name not in scores:
            raise WinnowError(f"examples: candidate {name} has no reference log-prob; wire `reference` to its scores")
        if scores[name]["tokens"] != token_digest(prompt["token_ids"], ids):
            raise WinnowError(
                f"examples: the reference of candidate {name} (prompt {prompt['prompt_id']}) was scored on other "
                "tokens than those to train on: another chat template, tokenizer or truncation; score it again"
            )
        return _response(name, ids, weight, scores[name]["logp"])


SIDES = ("chosen_id", "rejected_id")


def _response(name: str, ids: list[int], weight: float, ref: float | None) -> Row:
    return {"candidate_id": name, "token_ids": ids, "weight": weight, "ref_logp": ref}
