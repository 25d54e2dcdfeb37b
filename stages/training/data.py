"""What the trainer reads: one Group a prompt, checked against objective and model before a weight is loaded."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline import Bound
from schemas import Model, WinnowError
from stages.limits import check_ids, context_length


@dataclass(frozen=True)
class Group:
    """One prompt's training group: N responses, P pairs of indices into them, and rows read for KL alone."""

    prompt_id: str
    prompt: list[int]
    names: list[str]  # candidate ids, [N]
    responses: list[list[int]]  # [N]
    weight: list[float]  # [N]
    ref: list[float] | None  # [N]
    desirable: list[int] | None  # [N], 0 where there is no label
    pairs: list[tuple[int, int]]  # [P]
    pair_weight: list[float]  # [P]
    label: list[float]  # [P]
    mismatched: list[tuple[list[int], float]]  # other prompts' responses, and their reference log-prob

    @property
    def width(self) -> int:
        """Tokens of its longest row."""
        return len(self.prompt) + max(map(len, [*self.responses, *(ids for ids, _ in self.mismatched)]))

    @property
    def tokens_alone(self) -> int:
        """Tokens that it takes to read prompt and response again for each side of each pair, padding not counted."""
        sides = [self.responses[n] for pair in self.pairs for n in pair] or self.responses
        return sum(len(self.prompt) + len(ids) for ids in [*sides, *(ids for ids, _ in self.mismatched)])

    @property
    def tokens(self) -> int:
        """Its prompt once, and each of its responses."""
        return len(self.prompt) + sum(map(len, [*self.responses, *(ids for ids, _ in self.mismatched)]))

    @property
    def imitated(self) -> list[int]:
        """Lengths of the responses whose likelihood counts."""
        return [len(ids) for weight, ids in zip(self.weight, self.responses, strict=True) if weight > 0]

    @property
    def labelled(self) -> int:
        return sum(sign != 0 for sign in self.desirable or [])


def groups_of(
    examples: pa.Table, objective: Bound, nll_weight: float, init: Model, dtype: str, reference: str = "init"
) -> list[Group]:
    """Training groups in order of prompt id; refuses what cannot be trained on, before any weight is loaded.

    reference: `init` if the cached log-probs must be those of `init`, `other` if they may be any policy's.
    """
    from stages.network.load import is_reward_model

    rows = sorted(examples.to_pylist(), key=lambda row: (row["prompt_id"], row["prompt_ids"]))
    reads = objective.metadata["reads"]
    if is_reward_model(init) and (objective.metadata["per"] != "pairs" or nll_weight or not {*reads} <= {"label"}):
        raise WinnowError(f"objective {objective.name} reads log-probs, and a reward model gives scores; use `sigmoid`")
    groups = [_group(row, "ref" in reads) for row in rows]
    check_ids(init, "examples", [ids for group in groups for ids in (group.prompt, *group.responses)])
    longest = max((group.width for group in groups), default=0)
    if longest > context_length(init.folder):
        raise WinnowError(f"examples have rows of {longest} tokens, and the model takes {context_length(init.folder)}")
    if "ref" in reads:
        _check_reference(rows, init if reference == "init" else None, dtype)
    _check_fields(groups, objective, nll_weight)
    return groups


def _group(row: dict[str, Any], needs_reference: bool) -> Group:
    """Only what is shifted by a reference needs one; a response that is merely imitated may have none."""
    own = [each for each in row["responses"] if each["desirable"] != 0]
    other = [each for each in row["responses"] if each["desirable"] == 0]
    place = {each["candidate_id"]: n for n, each in enumerate(own)}
    names = [each["candidate_id"] for each in row["responses"]]
    pairs = [(place[names[pair["chosen"]]], place[names[pair["rejected"]]]) for pair in row["pairs"]]
    shifted = [own[n] for pair in pairs for n in pair] + [
        each for each in row["responses"] if each["desirable"] is not None
    ]
    if not row["prompt_ids"] or not all(each["token_ids"] for each in row["responses"]):
        raise WinnowError(
            f"examples: prompt {row['prompt_id']}: an empty prompt or response has no log-prob; leave it out"
        )
    if needs_reference and None in [each["ref_logp"] for each in shifted]:
        raise WinnowError("the objective reads a reference, and the examples have none; wire `reference` in `examples`")
    return Group(
        prompt_id=row["prompt_id"],
        prompt=row["prompt_ids"],
        names=list(place),
        responses=[each["token_ids"] for each in own],
        weight=[each["weight"] for each in own],
        ref=[each["ref_logp"] or 0.0 for each in own] if needs_reference else None,
        desirable=[each["desirable"] or 0 for each in own] if any(each["desirable"] for each in own) else None,
        pairs=pairs,
        pair_weight=[pair["weight"] for pair in row["pairs"]],
        label=[pair["label"] for pair in row["pairs"]],
        mismatched=[(each["token_ids"], each["ref_logp"] or 0.0) for each in other],
    )


def _check_fields(groups: list[Group], objective: Bound, nll_weight: float) -> None:
    """The table has what the loss is a function of, and nothing that it would silently ignore."""
    name, reads, per = objective.name, objective.metadata["reads"], objective.metadata["per"]
    if per == "pairs" and not any(group.pairs for group in groups):
        raise WinnowError(f"objective {name} reads pairs, and the examples have none; wire `pairs`")
    if (nll_weight or per == "likelihood") and not any(group.imitated for group in groups):
        raise WinnowError("nll reads responses with a weight, and the examples have none; set `imitate` in `examples`")
    if per == "rows" and not any(group.labelled for group in groups):
        raise WinnowError(f"objective {name} reads unpaired labels, and the examples have none; set `desirable`")
    if "kl" in reads and not any(group.mismatched for group in groups):
        raise WinnowError(f"objective {name} reads mismatched rows, and the examples have none; wire `mismatched`")
    if "label" not in reads and any(label != 1 for group in groups for label in group.label):
        raise WinnowError(f"objective {name} takes every label as certain; set `labels: hard` in `examples`")


def _check_reference(rows: list[dict[str, Any]], init: Model | None, dtype: str) -> None:
    cached = [row for row in rows if any(each["ref_logp"] is not None for each in row["responses"])]
    models = {row["ref_model"] for row in cached}
    other = sorted(str(model)[:12] for model in models - {init.digest}) if init else []
    if init and other:
        raise WinnowError(
            f"the cached reference was scored by weights {', '.join(other)}, and training starts from "
            f"{init.digest[:12]}: wire `reference.policy` and `optimize.init` to the same step, or set "
            "`optimize.reference: other`"
        )
    other = sorted(map(str, {row["ref_dtype"] for row in cached} - {dtype}))
    if other:
        raise WinnowError(
            f"the cached reference was scored in {', '.join(other)}, and training runs in {dtype}: "
            "set `dtype` of `reference` and `optimize` to the same"
        )
