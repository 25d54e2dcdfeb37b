"""Estimates of log Z = log E exp(reward / beta) of a prompt from its N sampled candidates (methods 9.2).

To add one, add a function here. It takes the groups and their temperatures [G], and returns log Z - max / beta,
[G]: relative to the largest exponent, so that nothing overflows. `zero`: it has a limit at beta = 0; `pooled`: it
reads all prompts together, at one temperature.
"""

import numpy as np

from pipeline import Registry
from stages.selection.groups import Floats, RewardGroups, ratio

normaliser = Registry("normaliser", "zero", "pooled")
FAR = 1e4
RIDGE = 1e-6  # only decides directions that the data leave open
STEPS, ENOUGH, SMALLEST = 100, 1e-18, 1e-9  # of Newton's method: at most, the gain that ends it, the step that does


@normaliser(zero=True, pooled=False)
def empirical(groups: RewardGroups, beta: Floats) -> Floats:
    """L_N = log of the mean of exp(reward / beta): biased downward (Jensen)."""
    log_mean: Floats = np.log(groups.mean(np.exp(groups.exponent(beta))))
    return log_mean


@normaliser(zero=False, pooled=False)
def jackknife(groups: RewardGroups, beta: Floats) -> Floats:
    """N L_N - (N - 1) mean L_{N-1}, over the N ways to leave one candidate out: free of the bias of order 1 / N.

    N of at least 2. Infinite at beta = 0, unless several are best.
    """
    n = groups.sizes
    left_out = _leave_one_out(groups, beta) - groups.each(np.log(n - 1.0))
    log_z: Floats = n * empirical(groups, beta) - (n - 1) * groups.mean(left_out)
    return log_z


def _leave_one_out(groups: RewardGroups, beta: Floats) -> Floats:
    """log of the sum of the others' exp(exponent), [N].

    Without the (first) best, the difference would cancel: there the rest is summed relative to the second best.
    """
    weight = np.exp(groups.exponent(beta))
    rows = np.arange(len(weight))
    best = np.minimum.reduceat(np.where(groups.gap == 0, rows, len(rows)), groups.starts[:-1])
    others = groups.gap.copy()
    others[best] = -np.inf
    second = groups.max(others)
    rest = np.exp(ratio(others - groups.each(second), groups.each(beta)))
    rest[best] = 0.0
    sums = groups.each(groups.sum(weight)) - weight
    sums[best] = groups.sum(rest)
    logs: Floats = np.log(sums)
    logs[best] += ratio(second, beta)
    return logs


@normaliser(zero=False, pooled=True)
def gumbel(groups: RewardGroups, beta: Floats) -> Floats:
    """Gumbel regression (XQL, arXiv:2301.02328): h(x) = beta log Z as one function of all the shard's prompts.

    h = theta . (1, mean, var / (2 beta)), theta the minimum of mean(exp(z) - z - 1), z = (reward - h) / beta, over
    all rows; exp(z) then has mean 1, and correlates with no feature. For Gaussian rewards theta is (0, 1, 1), to
    which a small ridge holds what the data leave open. One temperature for all; couples the shard's prompts.
    """
    # A reward FAR temperatures from the mean has all of its prompt's weight or none; variances stay where doubles
    # resolve a nat's small part.
    with np.errstate(over="ignore"):
        raw = (groups.values - groups.each(groups.mean(groups.values))) / groups.each(beta)
    centred = np.clip(raw, -FAR, FAR)
    half_variance = groups.sum(centred**2) / (2 * (groups.sizes - 1))
    top = groups.max(centred)
    log_sum = top + np.log(groups.sum(np.exp(centred - groups.each(top))))
    features = np.stack([_unit(groups.mean(groups.values)), _unit(half_variance)])
    log_mean = log_sum - np.log(len(centred)) - half_variance
    log_z: Floats = half_variance + _regression(log_mean, features, groups.sizes / len(centred)) - top
    return log_z


def _unit(x: Floats) -> Floats:
    """Centred, the largest deviation 1: theta moves along it in a step of the data's own size."""
    centred: Floats = x - x.mean()
    largest = np.abs(centred).max()
    return centred / largest if largest > 0 else centred


def _regression(log_mean: Floats, features: Floats, share: Floats) -> Floats:
    """The correction a + d . features that minimises mean(exp(z) - z) over the rows, z = z_0 - correction; [G].

    log_mean: log of each prompt's part of mean exp(z_0); features: [2, G]; share: its part of the rows. The best a is
    known, the log of mean exp(z); it leaves log mean exp(z) - mean z, convex in d and free of overflow. Damped Newton.
    """

    def loss(d: Floats) -> float:
        along = _dot(d, features)
        return _log_sum_exp(log_mean - along) + float((share * along).sum() + RIDGE / 2 * (d * d).sum())

    d = np.zeros(len(features))
    for _ in range(STEPS):
        slope, step = _newton(log_mean - _dot(d, features), features, share, d)
        gain, size = float((slope * step).sum()), 1.0
        while loss(d - size * step) > loss(d) - 0.1 * size * gain and size > SMALLEST:
            size /= 2
        if gain < ENOUGH or size <= SMALLEST:
            break
        d = d - size * step
    along = _dot(d, features)
    return along + _log_sum_exp(log_mean - along)


def _newton(logs: Floats, features: Floats, share: Floats, d: Floats) -> tuple[Floats, Floats]:
    """Gradient of the loss, and the Hessian's solution of it; the Hessian is a covariance under the weights exp(z)."""
    weight = np.exp(logs - _log_sum_exp(logs))
    mean = (weight * features).sum(axis=1)
    slope = (share * features).sum(axis=1) - mean + RIDGE * d
    centred = features - mean[:, None]
    hessian = (weight * centred[:, None] * centred).sum(axis=2) + RIDGE * np.eye(len(d))
    return slope, np.linalg.solve(hessian, slope)


def _dot(d: Floats, features: Floats) -> Floats:
    """d . features of each prompt, [G]; by numpy's own sums, whose bits do not depend on BLAS threads."""
    along: Floats = (d[:, None] * features).sum(axis=0)
    return along


def _log_sum_exp(x: Floats) -> float:
    return float(x.max() + np.log(np.exp(x - x.max()).sum()))
