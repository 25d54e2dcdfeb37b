"""Pair rules over the rows of many prompts at once: what pair.py states for one prompt, as columns.

A batch rule gets `PairRows` and the options of its rule, and returns `PairBatch`: the same pairs in the same order as
the rule yields prompt by prompt, with the same numbers to the last bit. tests/stages/selection/test_pair_batches.py
compares the two. A rule without a batch rule, such as a user's, is called once per prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from schemas import WinnowError
from stages.data.rows import Floats, Ints, column_of, cutoffs, numbers_of

NO_LOGP = (
    "next_likelier_loser reads the policy's own candidates.logp, and these candidates have none; sample them "
    "with an engine, and without a head"
)


@dataclass(frozen=True)
class PairRows:
    """Rows of G prompts with N rows in total, prompt by prompt, each prompt's in the order of its table."""

    starts: Ints  # [G + 1]; prompt g has the rows starts[g] to starts[g + 1]
    table: pa.Table  # what the rule reads, with the `candidate_columns` of the rule's candidates
    positions: Mapping[str, Ints]  # of its columns of candidates' ids: the rows of `candidates`, [N]

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return a column of numbers, [N], nan where there is none."""
        return numbers_of(self.table, name)

    def has(self, name: str, text: str) -> NDArray[np.bool_]:
        """Return whether a column of text has this one, [N]."""
        return pc.equal(column_of(self.table, name), text).to_numpy(zero_copy_only=False)

    @cached_property
    def prompt(self) -> Ints:
        """Return the number of each row's prompt, [N]."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))


class PairBatch(NamedTuple):
    """P pairs, prompt by prompt: prompt, rows of the candidates, and `Preference`'s gap (None: all unknown), weight."""

    prompt: Ints
    chosen: Ints
    rejected: Ints
    gap: Floats | None
    weight: Floats


def by_reward(rows: PairRows, first: Ints, second: Ints, weight: Floats | None = None) -> PairBatch:
    """Return pairs of rows, of which the one with the higher reward is chosen, and of equal ones the first."""
    reward = rows["reward"]
    first_wins = reward[first] >= reward[second]
    winner, loser = np.where(first_wins, first, second), np.where(first_wins, second, first)
    chosen, rejected = (rows.positions["candidate_id"][side] for side in (winner, loser))
    weight = np.ones(len(first)) if weight is None else weight
    return PairBatch(rows.prompt[first], chosen, rejected, reward[winner] - reward[loser], weight)


def matches(rows: PairRows) -> PairBatch:
    logit, left, right = rows["logit"], rows.positions["left_id"], rows.positions["right_id"]
    chosen, rejected = np.where(logit < 0, right, left), np.where(logit < 0, left, right)
    return PairBatch(rows.prompt, chosen, rejected, np.abs(logit), np.ones(len(logit)))


def neighbours(rows: PairRows) -> PairBatch:
    from stages.selection.kernels import neighbour_pairs

    order = np.lexsort((rows["draw"], rows.prompt))
    first, second = neighbour_pairs(rows["reward"][order], rows.starts)
    return by_reward(rows, order[first], order[second])


def best_vs_worst(rows: PairRows) -> PairBatch:
    order = np.lexsort((-rows["reward"], rows.prompt))
    has_two = np.diff(rows.starts) > 1
    return by_reward(rows, order[rows.starts[:-1][has_two]], order[rows.starts[1:][has_two] - 1])


def mu_minus_2_sigma(rows: PairRows, *, sigmas: float = 2.0) -> PairBatch:
    best, nearest = [], []
    # Prompts of one size as a matrix: numpy sums its rows as it sums one prompt, to the last bit.
    for grid in _prompts_of_one_size(rows.starts):
        if grid.shape[1] > 1:
            rewards = rows["reward"][grid]
            target = rewards.mean(axis=1) - sigmas * rewards.std(axis=1)
            numbers = np.arange(len(grid))
            best.append(grid[numbers, rewards.argmax(axis=1)])
            nearest.append(grid[numbers, np.abs(rewards - target[:, None]).argmin(axis=1)])
    return by_reward(rows, *_in_order_of_prompts(rows, best, nearest))


def all_pairs(rows: PairRows) -> PairBatch:
    first, second = [], []
    for grid in _prompts_of_one_size(rows.starts):
        a, b = np.triu_indices(grid.shape[1], 1)  # in the order of itertools.combinations
        first.append(grid[:, a].ravel())
        second.append(grid[:, b].ravel())
    a, b = _in_order_of_prompts(rows, first, second)
    differ = rows["reward"][a] != rows["reward"][b]
    a, b = a[differ], b[differ]
    return by_reward(rows, a, b, rows["weight"][a] * rows["weight"][b])


def next_likelier_loser(rows: PairRows, *, threshold: float | None = None) -> PairBatch:
    from stages.selection.kernels import likelier_losers

    if rows.has("logp_kind", "steered").any() or np.isnan(rows["logp"]).any():
        raise WinnowError(NO_LOGP)
    levels = cutoffs(rows["reward"], rows.starts, rows["label_threshold"], threshold)
    return by_reward(rows, *likelier_losers(rows["reward"], rows["logp"], levels, rows.starts))


def demonstration_vs_sample(rows: PairRows) -> PairBatch:
    is_given, firsts = rows.has("finish_reason", "given"), rows.starts[:-1]
    # The samples of all prompts in one array, where each demonstration's begin and how many there are.
    samples, n_samples = np.flatnonzero(~is_given), np.add.reduceat(~is_given, firsts, dtype=np.int64)
    begins = np.cumsum(n_samples) - n_samples
    demonstrations = np.flatnonzero(is_given)
    prompt = rows.prompt[demonstrations]
    counts = n_samples[prompt]
    position = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    rejected = samples[np.repeat(begins[prompt], counts) + position]
    chosen = np.repeat(demonstrations, counts)
    candidate = rows.positions["candidate_id"]
    return PairBatch(rows.prompt[chosen], candidate[chosen], candidate[rejected], None, np.ones(len(chosen)))


def _prompts_of_one_size(starts: Ints) -> list[Ints]:
    """Return a matrix of rows, [prompts, size], of each number of rows that a prompt has."""
    sizes = np.diff(starts)
    return [starts[:-1][sizes == size, None] + np.arange(size) for size in np.unique(sizes)]


def _in_order_of_prompts(rows: PairRows, first: list[Ints], second: list[Ints]) -> tuple[Ints, Ints]:
    """Return both rows of each pair, prompt by prompt; those of a prompt stay in their order."""
    if not first:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    order = np.argsort(rows.prompt[np.concatenate(first)], kind="stable")
    return np.concatenate(first)[order], np.concatenate(second)[order]
