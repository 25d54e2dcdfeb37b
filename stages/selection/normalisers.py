"""Estimates of log Z = log E exp(reward / beta) of a prompt from its N sampled candidates.

To add one, add a function here. It takes the groups and their temperatures [G] and returns log Z - max / beta, [G]:
relative to the largest exponent, so that nothing overflows. Metadata: `zero`, it has a limit at beta = 0; `pooled`,
it reads all prompts together, at one temperature; `learned`, it reads what stage `partition` has learned, at its beta.
"""

from typing import NotRequired

import numpy as np

from pipeline import Registry
from schemas import WinnowError
from stages.selection.groups import Floats, RewardGroups, divide

normaliser = Registry("normaliser", "groups", "beta", zero=bool, pooled=bool, learned=NotRequired[bool])
MAX_EXPONENT = 1e4
RIDGE = 1e-6  # only decides directions that the data leave open
MAX_STEPS, MIN_GAIN, MIN_STEP_SIZE = 100, 1e-18, 1e-9  # of Newton's method


@normaliser(zero=True, pooled=False)
def empirical(groups: RewardGroups, beta: Floats) -> Floats:
    """Return L_N = log of the mean of exp(reward / beta): biased downward (Jensen)."""
    return np.log(groups.mean(np.exp(groups.exponent(beta))))


@normaliser(version=2, zero=False, pooled=False)
def jackknife(groups: RewardGroups, beta: Floats) -> Floats:
    """Return N L_N - (N - 1) mean L_{N-1} over the N leave-one-out samples: free of the bias of order 1 / N.

    L_N itself for N = 1. Infinite at beta = 0, unless several candidates are best.
    """
    n = groups.sizes
    weight = np.exp(groups.exponent(beta))
    # Log of the sum of the others' weights, [N]. Without the (first) best candidate the difference sum - weight would
    # cancel: there the others are summed relative to the second best.
    rows = np.arange(len(weight))
    best = np.minimum.reduceat(np.where(groups.below_max == 0, rows, len(rows)), groups.starts[:-1])
    others = groups.below_max.copy()
    others[best] = -np.inf
    second = groups.max(others)
    with np.errstate(divide="ignore", invalid="ignore"):  # N = 1 has no others
        others_weight = np.exp(divide(others - groups.broadcast(second), groups.broadcast(beta)))
        others_weight[best] = 0.0
        sums = groups.broadcast(groups.sum(weight)) - weight
        sums[best] = groups.sum(others_weight)
        log_sums: Floats = np.log(sums)
        log_sums[best] += divide(second, beta)

        leave_one_out = log_sums - groups.broadcast(np.log(n - 1.0))
        estimate = n * empirical(groups, beta) - (n - 1) * groups.mean(leave_one_out)
    return np.where(n > 1, estimate, empirical(groups, beta))


@normaliser(version=3, zero=False, pooled=True)
def gumbel(groups: RewardGroups, beta: Floats) -> Floats:
    """Fit log Z by Gumbel regression (XQL, arXiv:2301.02328): h(x) = beta log Z as one function of all prompts.

    h = theta . (1, mean, var / (2 beta)), where theta minimises mean(exp(z) - z - 1), z = (reward - h) / beta, over
    all rows; exp(z) then has mean 1 and correlates with no feature. For Gaussian rewards theta is (0, 1, 1), to
    which a small ridge holds what the data leave open. One temperature for all; couples the shard's prompts.
    """
    # A reward MAX_EXPONENT temperatures from the mean already has all of its prompt's weight or none; the clip keeps
    # variances where doubles resolve a small part of a nat.
    with np.errstate(over="ignore"):
        raw = (groups.values - groups.broadcast(groups.mean(groups.values))) / groups.broadcast(beta)
    centred = np.clip(raw, -MAX_EXPONENT, MAX_EXPONENT)
    half_variance = groups.sum(centred**2) / (2 * np.maximum(groups.sizes - 1, 1))
    top = groups.max(centred)
    log_sum = top + np.log(groups.sum(np.exp(centred - groups.broadcast(top))))
    # Features centred, with largest deviation 1, so that theta moves along them in steps of the data's own size
    features = np.stack([groups.mean(groups.values), half_variance])
    features -= features.mean(axis=1, keepdims=True)
    largest = np.abs(features).max(axis=1, keepdims=True)
    features /= np.where(largest > 0, largest, 1.0)
    log_mean = log_sum - np.log(len(centred)) - half_variance
    return half_variance + _fit_correction(log_mean, features, groups.sizes / len(centred)) - top


@normaliser(zero=False, pooled=False, learned=True)
def learned(groups: RewardGroups, beta: Floats) -> Floats:
    """Return log Z as stage `partition` has learned it, as a function of the prompt and over all prompts.

    Unlike the others it reads nothing of the rewards that it normalises; weights have mean 1 over all prompts together.
    Raises WinnowError where there is no such step, as in `winnow diagnose`.
    """
    if groups.log_z is None:
        raise WinnowError("normaliser learned: it is read in stage select alone, with a step `partition` under `from`")
    return groups.log_z - divide(groups.max(groups.values), beta)


def _fit_correction(log_mean: Floats, features: Floats, share: Floats) -> Floats:
    """Return the correction a + d . features, [G], that minimises mean(exp(z) - z) over the rows, z = z_0 - correction.

    log_mean: log of each prompt's part of mean exp(z_0); features: [2, G]; share: each prompt's part of the rows. The
    best a is known, log mean exp(z). What is left, log mean exp(z) - mean z, is convex in d and does not overflow.

    Damped Newton of our own: scipy's trust-exact accepts no step whose gain is below the rounding of the loss, and so
    ends up to 1e-6 from the minimum; far from the mean it is not there after 300 steps.
    """
    from scipy.special import logsumexp

    def project(d: Floats) -> Floats:
        # d . features of each prompt, [G], by numpy's own sums, whose bits do not depend on BLAS threads
        return (d[:, None] * features).sum(axis=0)

    def loss(d: Floats) -> float:
        along = project(d)
        return float(logsumexp(log_mean - along) + (share * along).sum() + RIDGE / 2 * (d * d).sum())

    d = np.zeros(len(features))
    for _ in range(MAX_STEPS):
        # The Hessian is the covariance of the features under the weights exp(z).
        logs = log_mean - project(d)
        weight = np.exp(logs - logsumexp(logs))
        mean = (weight * features).sum(axis=1)
        gradient = (share * features).sum(axis=1) - mean + RIDGE * d
        centred = features - mean[:, None]
        hessian = (weight * centred[:, None] * centred).sum(axis=2) + RIDGE * np.eye(len(d))
        step = np.linalg.solve(hessian, gradient)
        # Halve the step until the loss falls by a tenth of what the gradient promises.
        gain, size = float((gradient * step).sum()), 1.0
        while loss(d - size * step) > loss(d) - 0.1 * size * gain and size > MIN_STEP_SIZE:
            size /= 2
        if gain < MIN_GAIN or size <= MIN_STEP_SIZE:
            break
        d = d - size * step
    along = project(d)
    return along + logsumexp(log_mean - along)
