"""Scales on which a selection rule reads the rewards. To add a scale, add a function here.

A scale maps the rewards [N] of `RewardGroups`, prompt by prompt, to values [N] that never fall where the reward
rises. Metadata `needs_spread`: prompts whose rewards are all equal are rejected before, unless all are labelled right.
"""

from dataclasses import replace
from typing import NotRequired

import numpy as np

from pipeline import Bound, Registry
from stages.results import floats
from stages.selection.groups import Floats, RewardGroups, divide

TOLERANCE = 1e-9  # of the largest value: what a scale may fall by rounding

reward_scale = Registry("reward scale", "groups", needs_spread=NotRequired[bool])


@reward_scale()
def raw(groups: RewardGroups) -> Floats:
    """Return the rewards unchanged."""
    return groups.values


@reward_scale(needs_spread=True, version=2)
def unit(groups: RewardGroups) -> Floats:
    """Return (r - min) / (max - min) per prompt: 0 worst, 1 best. ReST's normalisation (arXiv:2308.08998).

    Where all are labelled right, all are best.
    """
    above_min = groups.values - groups.broadcast(groups.min(groups.values))
    scale = groups.broadcast(groups.range)
    return np.divide(above_min, scale, out=np.ones_like(above_min), where=scale > 0)


@reward_scale(needs_spread=True, version=2)
def standardized(groups: RewardGroups) -> Floats:
    """Return (r - mean) / sd per prompt; the sd divides by n. 0 where all are labelled right."""
    values = unit(groups)  # first, so that no square underflows
    centred = values - groups.broadcast(groups.mean(values))
    sd = np.sqrt(groups.mean(centred**2))
    return divide(centred, groups.broadcast(sd))


@reward_scale()
def probability(groups: RewardGroups) -> Floats:
    """Return 1 / (1 + exp(-r)), for a reward that is the logit of beating the baseline."""
    return np.exp(-np.logaddexp(0.0, -groups.values))


@reward_scale()
def quantile(groups: RewardGroups) -> Floats:
    """Return mean rank / n per prompt, in (0, 1]: the share of rewards not above r, where ties count half.

    Any increasing map of the rewards leaves it unchanged (QRPO, arXiv:2507.08068).
    """
    order = np.lexsort((groups.values, groups.broadcast(np.arange(len(groups.sizes)))))
    ordered = groups.values[order]
    # Runs of equal rewards; a prompt's first candidate always begins one.
    begins_run = (groups.position == 0) | (ordered != np.roll(ordered, 1))
    run_starts = np.append(np.flatnonzero(begins_run), len(ordered))
    run_lengths = np.diff(run_starts)
    mean_rank = np.repeat(groups.position[run_starts[:-1]] + (run_lengths + 1) / 2, run_lengths)
    quantiles = np.empty(len(ordered))
    quantiles[order] = mean_rank / groups.broadcast(groups.sizes)
    return quantiles


def scaled(scale: Bound, groups: RewardGroups) -> RewardGroups:
    """Return the groups with their rewards on a scale.

    Raise WinnowError unless its values are finite, one per candidate, and never fall where the reward rises.
    """
    result = scale(groups)
    if result is groups.values:
        return groups
    values = floats(scale, result, groups.values.shape, "one per candidate")
    order = np.lexsort((values, groups.values, groups.broadcast(np.arange(len(groups.sizes)))))
    rises = (np.diff(groups.values[order]) > 0) & (groups.position[1:] > 0)  # `order` keeps prompts where they are
    falls = rises & (np.diff(values[order]) < -TOLERANCE * np.abs(values).max(initial=0))
    if falls.any():
        first = np.flatnonzero(falls)[0]
        rewards, fallen = groups.values[order][first : first + 2].tolist(), values[order][first : first + 2].tolist()
        raise scale.wrong_result(fallen, f"values that never fall where the reward rises, here from {rewards}")
    return replace(groups, values=values)
