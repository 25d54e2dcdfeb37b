"""Training groups, one per prompt, read from `examples` and checked against objective and model before any weight."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline import Bound
from schemas import Model, WinnowError
from stages.limits import check_ids, context_length


@dataclass(frozen=True)
class TrainingGroup:
    """Prompt with N responses, P pairs of indices into them, and rows that are read for the KL estimate alone."""

    prompt_id: str
    prompt: list[int]
    names: list[str]  # candidate ids, [N]
    responses: list[list[int]]  # [N]
    weight: list[float]  # [N]
    ref: list[float] | None  # [N]
    desirable: list[int] | None  # [N] 1 or -1, 0 where there is no label
    pairs: list[tuple[int, int]]  # [P] chosen, rejected
    pair_weight: list[float]  # [P]
    label: list[float]  # [P]
    mismatched: list[tuple[list[int], float]]  # other prompts' responses, and their reference log-prob

    @property
    def longest_row(self) -> int:
        """Return the tokens of the prompt with its longest response."""
        return len(self.prompt) + max(map(len, [*self.responses, *(ids for ids, _ in self.mismatched)]))

    @property
    def tokens(self) -> int:
        """Return the tokens of the prompt, once, and of every response."""
        return len(self.prompt) + sum(map(len, [*self.responses, *(ids for ids, _ in self.mismatched)]))

    @property
    def tokens_unshared(self) -> int:
        """Return the tokens of prompt and response, read again for each side of each pair, without padding."""
        sides = [self.responses[n] for pair in self.pairs for n in pair] or self.responses
        return sum(len(self.prompt) + len(ids) for ids in [*sides, *(ids for ids, _ in self.mismatched)])

    @property
    def imitated(self) -> list[int]:
        """Return the lengths of the responses whose likelihood counts."""
        return [len(ids) for weight, ids in zip(self.weight, self.responses, strict=True) if weight > 0]

    @property
    def labelled(self) -> int:
        """Return the number of responses with an unpaired label."""
        return sum(sign != 0 for sign in self.desirable or [])


def groups_of(
    examples: pa.Table, objective: Bound, nll_weight: float, init: Model, dtype: str, reference: str = "init"
) -> list[TrainingGroup]:
    """Return the training groups in order of prompt id.

    reference: `init` if the cached log-probs must be those of `init`, `other` if they may be any policy's. Raises
    WinnowError with every reason for which these examples cannot train this objective, before a weight is loaded.
    """
    from stages.network.load import is_reward_model

    rows = sorted(examples.to_pylist(), key=lambda row: (row["prompt_id"], row["prompt_ids"]))
    name, fields, per = objective.name, objective.metadata["reads"], objective.metadata["per"]
    problems = []
    if is_reward_model(init) and (per != "pairs" or nll_weight or not {*fields} <= {"label"}):
        problems.append(f"objective {name} reads log-probs, and a reward model gives scores; use `sigmoid`")
    empty = [
        row["prompt_id"] for row in rows if not all([row["prompt_ids"], *(r["token_ids"] for r in row["responses"])])
    ]
    if empty:
        problems.append(
            f"examples: prompt {empty[0]} ({len(empty)} such prompts): an empty prompt or response has no log-prob; "
            "remove it"
        )
    if problems:
        raise WinnowError(*problems)
    groups = [_training_group(row, "ref" in fields) for row in rows]
    check_ids(init, "examples", [ids for group in groups for ids in (group.prompt, *group.responses)])

    # What the loss is a function of must be in the table, and nothing that it would silently ignore.
    longest, limit = max((group.longest_row for group in groups), default=0), context_length(init.folder)
    if longest > limit:
        problems.append(f"examples have rows of {longest} tokens, and the model takes {limit}")
    if "ref" in fields:
        problems += _reference_problems(rows, init if reference == "init" else None, dtype)
    if per == "pairs" and not any(group.pairs for group in groups):
        problems.append(f"objective {name} reads pairs, and the examples have none; add `pairs` to their inputs")
    if (nll_weight or per == "likelihood") and not any(group.imitated for group in groups):
        problems.append("nll reads responses with a weight, and the examples have none; set `imitate` in `examples`")
    if per == "rows" and not any(group.labelled for group in groups):
        problems.append(f"objective {name} reads unpaired labels, and the examples have none; set `desirable`")
    if "kl" in fields and not any(group.mismatched for group in groups):
        problems.append(f"objective {name} reads mismatched rows, and the examples have none; add `mismatched`")
    if "label" not in fields and any(label != 1 for group in groups for label in group.label):
        problems.append(f"objective {name} takes every label as certain; set `labels: hard` in `examples`")
    if problems:
        raise WinnowError(*problems)
    return groups


def _training_group(row: dict[str, Any], needs_reference: bool) -> TrainingGroup:
    """Raise WinnowError if a log-prob that the loss compares with a reference has none.

    A response that is merely imitated needs none.
    """
    responses = [response for response in row["responses"] if response["desirable"] != 0]
    mismatched = [response for response in row["responses"] if response["desirable"] == 0]
    index = {response["candidate_id"]: n for n, response in enumerate(responses)}
    names = [response["candidate_id"] for response in row["responses"]]
    pairs = [(index[names[pair["chosen"]]], index[names[pair["rejected"]]]) for pair in row["pairs"]]
    compared = [responses[n] for pair in pairs for n in pair]
    compared += [response for response in row["responses"] if response["desirable"] is not None]
    if needs_reference and any(response["ref_logp"] is None for response in compared):
        raise WinnowError(
            "the objective reads a reference, and the examples have none; add `reference` to the inputs of `examples`"
        )
    labelled = any(response["desirable"] for response in responses)
    return TrainingGroup(
        prompt_id=row["prompt_id"],
        prompt=row["prompt_ids"],
        names=list(index),
        responses=[response["token_ids"] for response in responses],
        weight=[response["weight"] for response in responses],
        ref=[response["ref_logp"] or 0.0 for response in responses] if needs_reference else None,
        desirable=[response["desirable"] or 0 for response in responses] if labelled else None,
        pairs=pairs,
        pair_weight=[pair["weight"] for pair in row["pairs"]],
        label=[pair["label"] for pair in row["pairs"]],
        mismatched=[(response["token_ids"], response["ref_logp"] or 0.0) for response in mismatched],
    )


def _reference_problems(rows: list[dict[str, Any]], init: Model | None, dtype: str) -> list[str]:
    """Return why the cached log-probs are not those of `init` (of any policy, if None) in the training's arithmetic."""
    cached = [row for row in rows if any(response["ref_logp"] is not None for response in row["responses"])]
    problems = []
    models = {row["ref_model"] for row in cached}
    if init and (others := sorted(str(model)[:12] for model in models - {init.digest})):
        problems.append(
            f"the cached reference was scored by weights {', '.join(others)}, and training starts from "
            f"{init.digest[:12]}: give `reference.policy` and `optimize.init` the same step, or set "
            "`optimize.reference: other`"
        )
    if others := sorted(map(str, {row["ref_dtype"] for row in cached} - {dtype})):
        problems.append(
            f"the cached reference was scored in {', '.join(others)}, and training runs in {dtype}: "
            "set `dtype` of `reference` and `optimize` to the same"
        )
    return problems
