"""Training groups, one per prompt, read from `examples` and checked before any weight is loaded, and their batches."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import Bound
from schemas import Model, WinnowError
from stages.limits import check_ids, context_length
from stages.network.packing import Ids, Mask, PromptGroup
from stages.training.agreement import Draw
from stages.training.checks import SCORES_ONLY, missing_data, trains_scores


@dataclass(frozen=True)
class TrainingGroup(PromptGroup):
    """Prompt with N responses, P pairs of indices into them, and mismatched rows, which only KTO's KL estimate uses.

    KTO's unpaired labels: a response is desirable (1), undesirable (-1), or has no label (0).
    """

    prompt_id: str
    names: list[str]  # candidate ids, [N]
    weight: list[float]  # [N] of the likelihood
    ref: list[float] | None  # [N]
    desirable: list[int] | None  # [N]
    pairs: list[tuple[int, int]]  # [P] chosen, rejected
    pair_weight: list[float]  # [P]
    label: list[float]  # [P]
    # Other prompts' responses, their reference log-prob, and which of their ids count.
    mismatched: list[tuple[list[int], float, list[bool] | None]]
    draws: list[Draw | None] = field(default_factory=list)  # [N] draws of `init` that no reference has compared

    @property
    def rows(self) -> list[tuple[Ids, Ids, Mask]]:
        """Return the prompt with each response and its mask."""
        return [(self.prompt, ids, mask) for ids, mask in self.masked_responses]

    @property
    def tokens(self) -> int:
        """Return the tokens of the prompt, once, and of every response."""
        return len(self.prompt) + sum(map(len, [*self.responses, *(ids for ids, _, _ in self.mismatched)]))

    @property
    def tokens_unshared(self) -> int:
        """Return the tokens of prompt and response for each side of each pair, without padding."""
        sides = [self.responses[n] for pair in self.pairs for n in pair] or self.responses
        return sum(len(self.prompt) + len(ids) for ids in [*sides, *(ids for ids, _, _ in self.mismatched)])

    @property
    def imitated(self) -> list[int]:
        """Return how many tokens of each response count whose likelihood does."""
        return [length for weight, length in zip(self.weight, self.counted, strict=True) if weight > 0]

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
    fields = objective.metadata["reads"]
    problems = []
    if is_reward_model(init) and not trains_scores(objective, nll_weight):
        problems.append(SCORES_ONLY.format(objective.name))
    empty = [
        row["prompt_id"] for row in rows if not all([row["prompt_ids"], *(r["token_ids"] for r in row["responses"])])
    ]
    if empty:
        problems.append(
            f"examples: prompt {empty[0]} ({len(empty)} such prompts): an empty prompt or response has no log-prob; "
            "remove it"
        )
    unmasked = [
        r["candidate_id"]
        for row in rows
        for r in row["responses"]
        if r["mask"] is not None and (len(r["mask"]) != len(r["token_ids"]) or not any(r["mask"]))
    ]
    if unmasked:
        problems.append(
            f"examples: candidate {unmasked[0]} ({len(unmasked)} such responses): its `mask` has no value per token "
            "id, or leaves out all of them; correct or remove it"
        )
    if problems:
        raise WinnowError(*problems)
    groups = [_training_group(row, "ref" in fields, init) for row in rows]
    check_ids(init, "examples", [ids for group in groups for ids in (group.prompt, *group.responses)])
    longest = max((len(row["prompt_ids"]) + len(r["token_ids"]) for row in rows for r in row["responses"]), default=0)
    if longest > (limit := context_length(init.folder)):
        problems.append(f"examples have rows of {longest} tokens, and the model takes {limit}")

    # What the loss is a function of must be in the table, and nothing that it would silently ignore. A response that
    # is merely imitated needs no reference.
    compared = [
        response
        for row in rows
        for n, response in enumerate(row["responses"])
        if response["desirable"] is not None or any(n in (pair["chosen"], pair["rejected"]) for pair in row["pairs"])
    ]
    present = {
        "reference": all(response["ref_logp"] is not None for response in compared),
        "pairs": any(group.pairs for group in groups),
        "desirable": any(group.labelled for group in groups),
        "mismatched": any(group.mismatched for group in groups),
        "imitate": any(group.imitated for group in groups),
    }
    soft_labels = any(label != 1 for group in groups for label in group.label)
    problems += missing_data(objective, nll_weight, present, soft_labels)

    # The cached log-probs must be those of `init`, in the training's arithmetic.
    if "ref" in fields:
        cached = [row for row in rows if any(response["ref_logp"] is not None for response in row["responses"])]
        models = {row["ref_model"] for row in cached} if reference == "init" else set()
        if others := sorted(str(model)[:12] for model in models - {init.digest}):
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
    if problems:
        raise WinnowError(*problems)
    return groups


def _training_group(row: dict[str, Any], needs_reference: bool, init: Model) -> TrainingGroup:
    responses = [response for response in row["responses"] if response["desirable"] != 0]
    mismatched = [response for response in row["responses"] if response["desirable"] == 0]
    index = {response["candidate_id"]: n for n, response in enumerate(responses)}
    names = [response["candidate_id"] for response in row["responses"]]
    labelled = any(response["desirable"] for response in responses)
    return TrainingGroup(
        prompt_id=row["prompt_id"],
        prompt=row["prompt_ids"],
        names=list(index),
        responses=[response["token_ids"] for response in responses],
        masks=[response["mask"] for response in responses] if any(r["mask"] for r in responses) else (),
        weight=[response["weight"] for response in responses],
        ref=[response["ref_logp"] or 0.0 for response in responses] if needs_reference else None,
        desirable=[response["desirable"] or 0 for response in responses] if labelled else None,
        pairs=[(index[names[pair["chosen"]]], index[names[pair["rejected"]]]) for pair in row["pairs"]],
        pair_weight=[pair["weight"] for pair in row["pairs"]],
        label=[pair["label"] for pair in row["pairs"]],
        mismatched=[(row["token_ids"], row["ref_logp"] or 0.0, row["mask"]) for row in mismatched],
        draws=[
            Draw(response["drawn_logp"], init.digest, response["drawn_dtype"])
            if response["drawn_by"] == init.digest and row["ref_model"] != init.digest
            else None
            for response in responses
        ],
    )


@dataclass
class BatchSampler:
    """Endless sequence of batches, from the seed alone: a resumed run, and every rank, draws the same.

    A batch is whole groups until they hold `batch_size` of what the objective counts.
    """

    groups: list[TrainingGroup]
    per: str  # what the objective counts: pairs, rows (with a label) or likelihood (responses that are imitated)
    batch_size: int
    seed: int
    index: int  # of the loss term in its run: terms draw their batches from different streams
    _batches: list[list[TrainingGroup]] = field(default_factory=list)
    _epochs: int = 0

    def steps(self, epochs: int) -> int:
        """Return the number of batches in so many epochs."""
        while self._epochs < epochs:
            self._draw_epoch()
        return len(self._batches)

    def __getitem__(self, n: int) -> list[TrainingGroup]:
        while len(self._batches) <= n:
            self._draw_epoch()
        return self._batches[n]

    def _draw_epoch(self) -> None:
        order = np.random.default_rng([self.seed, self._epochs, self.index]).permutation(len(self.groups))
        groups = [self.groups[n] for n in order]
        sizes = [
            len(group.pairs) if self.per == "pairs" else group.labelled if self.per == "rows" else len(group.imitated)
            for group in groups
        ]
        batch: list[TrainingGroup] = []
        size, remaining = 0, sum(sizes)
        for group, amount in zip(groups, sizes, strict=True):
            batch.append(group)
            size, remaining = size + amount, remaining - amount
            if size >= self.batch_size and remaining:
                self._batches.append(batch)
                batch, size = [], 0
        self._batches.append(batch)  # with the groups at the end that do not count, such as those only imitated
        self._epochs += 1
