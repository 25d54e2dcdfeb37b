"""Scales on which a selection rule reads the rewards. To add a scale, add a function here.

A scale maps the rewards [N] of `RewardGroups`, prompt by prompt, to values [N] that never fall where the reward
rises. Metadata `needs_spread`: prompts whose rewards are all equal are rejected before, unless all are labelled right.
"""

import numpy as np

from pipeline import Registry
from stages.selection.groups import Floats, RewardGroups, divide

reward_scale = Registry("reward scale")


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
