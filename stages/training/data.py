"""Training groups, one per prompt, read from `examples` and checked before any weight is loaded, and their batches."""

from collections import Counter
from collections.abc import Iterator
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

ROWS_AT_ONCE = 1000  # of a table that are Python's objects


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


class TrainingGroups:
    """Groups of a table of `examples`, in order of prompt id, each made from its row when it is asked for.

    Token ids stay in Arrow's memory, 4 bytes each: as lists of Python's numbers they take ten times that on every rank.
    counts: of each group, what an objective may count: pairs, rows (responses with a label) and likelihood (responses
    that are imitated).
    """

    def __init__(self, examples: pa.Table, needs_reference: bool, init: Model) -> None:
        self.examples, self.needs_reference, self.init = examples, needs_reference, init
        ids, prompts = examples["prompt_id"].to_pylist(), examples["prompt_ids"]
        repeated = {prompt_id for prompt_id, n in Counter(ids).items() if n > 1}
        keys = [(prompt_id, prompts[n].as_py() if prompt_id in repeated else []) for n, prompt_id in enumerate(ids)]
        self.order = sorted(range(len(ids)), key=keys.__getitem__)
        self.counts = {name: [0] * len(ids) for name in ("pairs", "rows", "likelihood")}

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, n: int) -> TrainingGroup:
        (row,) = self.examples.slice(self.order[n], 1).to_pylist()
        return self.group(row)

    def __iter__(self) -> Iterator[TrainingGroup]:
        return (self[n] for n in range(len(self)))

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield which group each row is, and the row, in the table's order; few at a time are Python's objects."""
        group_of = {row: n for n, row in enumerate(self.order)}
        for start in range(0, len(self.order), ROWS_AT_ONCE):
            for row, values in enumerate(self.examples.slice(start, ROWS_AT_ONCE).to_pylist(), start):
                yield group_of[row], values

    def group(self, row: dict[str, Any]) -> TrainingGroup:
        """Return the group of a row."""
        return _training_group(row, self.needs_reference, self.init)


def groups_of(
    examples: pa.Table, objective: Bound, nll_weight: float, init: Model, dtype: str, reference: str = "init"
) -> TrainingGroups:
    """Return the training groups in order of prompt id.

    reference: `init` if the cached log-probs must be those of `init`, `other` if they may be any policy's. Raises
    WinnowError with every reason for which these examples cannot train this objective, before a weight is loaded.
    """
    from stages.network.load import is_reward_model

    fields = objective.metadata["reads"]
    groups = TrainingGroups(examples, "ref" in fields, init)
    problems, longest, soft_labels = [], 0, False
    empty: list[tuple[int, str]] = []
    unmasked: list[tuple[int, str]] = []
    # What the loss is a function of must be in the table, and nothing that it would silently ignore. A response that
    # is merely imitated needs no reference.
    present = dict.fromkeys(("pairs", "desirable", "mismatched", "imitate"), False) | {"reference": True}
    cached: set[tuple[str | None, str | None]] = set()  # weights and arithmetic of the log-probs that are there
    for index, row in groups.rows():
        ids = [row["prompt_ids"], *(response["token_ids"] for response in row["responses"])]
        wrong = [
            (index, r["candidate_id"])
            for r in row["responses"]
            if r["mask"] is not None and (len(r["mask"]) != len(r["token_ids"]) or not any(r["mask"]))
        ]
        unmasked += wrong
        if not all(ids):
            empty.append((index, row["prompt_id"]))
        if wrong or not all(ids):
            continue
        group = groups.group(row)
        amounts = {"pairs": len(group.pairs), "rows": group.labelled, "likelihood": len(group.imitated)}
        for name, amount in amounts.items():
            groups.counts[name][index] = amount
        check_ids(init, "examples", [group.prompt, *group.responses])
        longest = max([longest, *(len(ids[0]) + len(response) for response in ids[1:])])
        in_pairs = {n for pair in row["pairs"] for n in (pair["chosen"], pair["rejected"])}
        for n, response in enumerate(row["responses"]):
            if response["desirable"] is not None or n in in_pairs:
                present["reference"] &= response["ref_logp"] is not None
            if response["ref_logp"] is not None:
                cached.add((row["ref_model"], row["ref_dtype"]))
        present["pairs"] |= bool(group.pairs)
        present["desirable"] |= bool(group.labelled)
        present["mismatched"] |= bool(group.mismatched)
        present["imitate"] |= bool(group.imitated)
        soft_labels |= any(label != 1 for label in group.label)

    if is_reward_model(init) and not trains_scores(objective, nll_weight):
        problems.append(SCORES_ONLY.format(objective.name))
    if empty:
        problems.append(
            f"examples: prompt {min(empty)[1]} ({len(empty)} such prompts): an empty prompt or response has no "
            "log-prob; remove it"
        )
    if unmasked:
        problems.append(
            f"examples: candidate {min(unmasked)[1]} ({len(unmasked)} such responses): its `mask` has no value per "
            "token id, or leaves out all of them; correct or remove it"
        )
    if problems:
        raise WinnowError(*problems)
    if longest > (limit := context_length(init.folder)):
        problems.append(f"examples have rows of {longest} tokens, and the model takes {limit}")
    problems += missing_data(objective, nll_weight, present, soft_labels)

    # The cached log-probs must be those of `init`, in the training's arithmetic.
    if "ref" in fields:
        models = {model for model, _ in cached} if reference == "init" else set()
        if others := sorted(str(model)[:12] for model in models - {init.digest}):
            problems.append(
                f"the cached reference was scored by weights {', '.join(others)}, and training starts from "
                f"{init.digest[:12]}: give `reference.policy` and `optimize.init` the same step, or set "
                "`optimize.reference: other`"
            )
        if others := sorted(map(str, {scored_in for _, scored_in in cached} - {dtype})):
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

    groups: TrainingGroups
    per: str  # what the objective counts: one of the `counts` of the groups
    batch_size: int
    seed: int
    index: int  # of the loss term in its run: terms draw their batches from different streams
    _batches: list[list[int]] = field(default_factory=list)
    _epochs: int = 0

    def steps(self, epochs: int) -> int:
        """Return the number of batches in so many epochs."""
        while self._epochs < epochs:
            self._draw_epoch()
        return len(self._batches)

    def __getitem__(self, n: int) -> list[TrainingGroup]:
        return [self.groups[index] for index in self.indices(n)]

    def indices(self, n: int) -> list[int]:
        """Return which groups batch n has."""
        while len(self._batches) <= n:
            self._draw_epoch()
        return self._batches[n]

    def _draw_epoch(self) -> None:
        order = np.random.default_rng([self.seed, self._epochs, self.index]).permutation(len(self.groups)).tolist()
        counts = self.groups.counts[self.per]
        batch: list[int] = []
        size, remaining = 0, sum(counts)
        for n in order:
            batch.append(n)
            size, remaining = size + counts[n], remaining - counts[n]
            if size >= self.batch_size and remaining:
                self._batches.append(batch)
                batch, size = [], 0
        self._batches.append(batch)  # with the groups at the end that do not count, such as those only imitated
        self._epochs += 1
