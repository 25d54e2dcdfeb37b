"""The scale on which a selection reads its rewards. To add a scale, add a function here.

A scale maps the values [N] of the groups, prompt by prompt, to values [N] that never fall where the
reward rises. `needs` names what a prompt must have; one without it is left out, with the reason.
"""

import numpy as np

from pipeline import Registry
from stages.selection.groups import DIFFERENT, Floats, RewardGroups

reward_scale = Registry("reward scale")


@reward_scale()
def raw(groups: RewardGroups) -> Floats:
    """The reward as it came."""
    return groups.values


@reward_scale(needs=DIFFERENT)
def unit(groups: RewardGroups) -> Floats:
    """(r - min) / (max - min) of the prompt: 0 the worst, 1 the best. ReST's normalisation (arXiv:2308.08998)."""
    return (groups.values - groups.each(groups.min(groups.values))) / groups.each(groups.range)


@reward_scale(needs=DIFFERENT)
def standardized(groups: RewardGroups) -> Floats:
    """(r - mean) / sd of the prompt; sd divides by n."""
    values = unit(groups)  # first, so that no square is lost to underflow
    centred = values - groups.each(groups.mean(values))
    deviation = np.sqrt(groups.mean(centred**2))
    scores: Floats = centred / groups.each(deviation)
    return scores


@reward_scale()
def probability(groups: RewardGroups) -> Floats:
    """1 / (1 + exp(-r)): the reward is a logit, of beating the baseline."""
    wins: Floats = np.exp(-np.logaddexp(0.0, -groups.values))
    return wins


@reward_scale()
def quantile(groups: RewardGroups) -> Floats:
    """Mean rank of the equal rewards / n, in (0, 1]: the share of the prompt's rewards not above r, ties halved.

    Any increasing map of the rewards leaves it alone (QRPO, arXiv:2507.08068).
    """
    order = np.lexsort((groups.values, groups.each(np.arange(len(groups.sizes)))))
    ordered, first = groups.values[order], groups.place == 0
    new = first | (ordered != np.roll(ordered, 1))
    runs = np.append(np.flatnonzero(new), len(ordered))
    rank = np.repeat(groups.place[runs[:-1]] + (np.diff(runs) + 1) / 2, np.diff(runs))
    quantiles = np.empty(len(ordered))
    quantiles[order] = rank / groups.each(groups.sizes)
    return quantiles
