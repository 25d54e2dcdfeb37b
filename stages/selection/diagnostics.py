"""Estimators of what cached candidates can support, before any training: agreement, tilt, best of n, length.

All read `RewardGroups` and arrays of one value per candidate, [N], and return columns of one number per prompt, [G]. A
measure is a function of sums of such columns (`ratio`, `correlation`): `Resamples` repeats them over prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from stages.selection.groups import Floats, RewardGroups
from stages.selection.scales import quantile

Measure = Callable[[Floats], Floats]  # of sums of columns, [..., C] -> [...]
CHUNK = 64  # resamples whose sums are computed at once
RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # last ranks from the top of a bin of the curve


# Agreement


def agreement(
    groups: RewardGroups, values: Floats, weights: Floats | None = None, edges: Sequence[float] = ()
) -> Floats:
    """Return [G, B, 2]: by how much the rewards order a prompt's pairs as `values` do, and the weight of all pairs.

    By the distance of their rewards, with `edges` as the B - 1 bounds. A pair counts with the product of its weights
    (by default 1) and, where the rewards are equal, half; pairs of equal values, or with a value that is nan, do not.
    """
    from stages.selection.kernels import pair_agreement

    weights = np.ones(len(groups.values)) if weights is None else weights
    return pair_agreement(groups.values, values, weights, groups.starts, np.asarray(edges, dtype=np.float64))


def distances(groups: RewardGroups, bins: int) -> list[float]:
    """Return bounds of the distance of a pair's rewards between bins of about equally many pairs, rounded.

    From each candidate's distance to the one three places further in its prompt, of the first million candidates.
    """
    size = int(groups.starts[groups.starts <= 10**6][-1])
    values = groups.values[: size or None]
    shifted = np.roll(values, -3)
    apart = np.abs(values - shifted)[: len(values) - 3][groups.position[: len(values)][3:] >= 3]
    bounds = np.quantile(apart, np.arange(1, bins) / bins) if len(apart) else np.zeros(0)
    rounded = [float(f"{bound:.2g}") for bound in bounds]
    return sorted({bound for bound in rounded if bound > 0})


# Tilt


@dataclass(frozen=True)
class Tilt:
    """The distribution exp(reward / beta) over each prompt's candidates: per prompt, [G]."""

    kl: Floats  # from the uniform one, nats
    reward: Floats  # mean
    ess: Floats  # effective sample size, candidates
    acceptance: Floats  # expected share that the first pass of Algorithm 1 accepts


def tilt(groups: RewardGroups, betas: Floats) -> Tilt:
    """Return the tilt of the candidates as they are, which is that of the policy only for many of them."""
    weight = np.exp(groups.exponent(betas))
    p = weight / groups.broadcast(groups.sum(weight))
    return Tilt(
        divergence(groups, p), groups.sum(p * groups.values), groups.effective_sample_size(weight), groups.mean(weight)
    )


def divergence(groups: RewardGroups, p: Floats) -> Floats:
    """Return the KL divergence of p [N] from the uniform distribution over a prompt's n candidates, nats, [G]."""
    return groups.sum(p * np.log(np.where(p > 0, p * groups.broadcast(groups.sizes), 1.0)))


def share_divergence(groups: RewardGroups, shares: Floats, number: Floats, repetitions: float) -> Floats:
    """Return `divergence` of shares that were estimated by repeating a rule, without the bias of chance, nats, [G].

    shares: of each candidate in what the rule keeps of its prompt, [N]. number: mean number of candidates that a
    repetition keeps, [G]. repetitions: infinite where the shares are exact. A candidate that is kept with probability
    f has a frequency whose variance f (1 - f) / repetitions alone adds (1 - f) / (2 number repetitions) to the
    divergence. nan where nothing was kept.
    """
    frequency = np.minimum(shares * groups.broadcast(number), 1.0)
    chance = groups.sum(np.where(shares > 0, 1.0 - frequency, 0.0)) / (
        2 * np.where(number > 0, number, 1.0) * repetitions
    )
    return np.where(number > 0, np.maximum(divergence(groups, shares) - chance, 0.0), np.nan)


def halves(groups: RewardGroups, seed: int) -> tuple[RewardGroups, RewardGroups]:
    """Return two random halves of each prompt's candidates; the odd one is in neither, and a single one in both."""
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random(len(groups.values)), groups.broadcast(np.arange(len(groups.sizes)))))
    size = np.maximum(groups.sizes // 2, 1)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(size)])
    rank = groups.position  # `order` keeps the prompts where they are
    first = rank < groups.broadcast(size)
    second = (rank >= groups.broadcast(groups.sizes - size)) & (rank < groups.sizes.max())
    return tuple(  # type: ignore[return-value]
        replace(groups, values=groups.values[order[mask]], starts=starts) for mask in (first, second)
    )


def asked_tilt(groups: RewardGroups, beta: float, seed: int) -> tuple[Tilt, Tilt]:
    """Return the tilt that beta asks of the policy, as far as n candidates show it, and the tilt of the n as they are.

    With x_n of all and x_n/2 of half of the candidates, 2 x_n - x_n/2 has no bias of order 1 / n: a jackknife with
    halves. Where few candidates carry the weight, the bias has other orders too, and the result is still too small.
    """
    betas = np.full(len(groups.sizes), beta)
    full = tilt(groups, betas)
    parts = [tilt(half, betas) for half in halves(groups, seed)]
    kl, reward = (
        2 * getattr(full, name) - (getattr(parts[0], name) + getattr(parts[1], name)) / 2 for name in ("kl", "reward")
    )
    return replace(full, kl=kl, reward=reward), full


# Best of n


def best_of_n(groups: RewardGroups, values: Floats, sizes: Sequence[int]) -> Floats:
    """Return [G, S]: expected value of the best by reward of m candidates, for each m of sizes; nan where m > n.

    Over all subsets of the prompt's n candidates, so that it has no bias: of the rewards in order, the i-th is the best
    of m with probability C(i - 1, m - 1) / C(n, m). Among equal rewards the best is any.
    """
    from scipy.special import gammaln

    order = np.lexsort((groups.values, groups.broadcast(np.arange(len(groups.sizes)))))
    rewards, ordered = groups.values[order], values[order]
    begins = (groups.position == 0) | (rewards != np.roll(rewards, 1))
    runs = np.append(np.flatnonzero(begins), len(rewards))
    means = np.add.reduceat(ordered, runs[:-1]) / np.diff(runs)
    ordered = np.repeat(means, np.diff(runs))
    i, n = groups.position + 1.0, groups.broadcast(groups.sizes).astype(np.float64)
    result = np.full((len(groups.sizes), len(sizes)), np.nan)
    for column, m in enumerate(sizes):
        possible = (i >= m) & (n >= m)
        log_p = np.full(len(i), -np.inf)
        j, total = i[possible], n[possible]
        log_p[possible] = gammaln(j) - gammaln(j - m + 1) + np.log(m) - gammaln(total + 1) + gammaln(total - m + 1)
        expected = groups.sum(np.exp(log_p) * np.where(possible, ordered, 0.0))
        result[:, column] = np.where(groups.sizes >= m, expected, np.nan)
    return result


def subset_sizes(n: int) -> list[int]:
    """Return 1, 2, 4, ... up to n, and n."""
    sizes = [2**power for power in range(n.bit_length()) if 2**power <= n]
    return sizes if sizes[-1] == n else [*sizes, n]


# Prediction


def curve_prediction(groups: RewardGroups, values: Floats, shares: Sequence[Floats], seed: int) -> list[Floats]:
    """Return, for each rule's shares [N], the value that it is expected to keep, [G], from other prompts' values alone.

    The prompts are halved at random. In each half, the mean value by rank of the reward (from the top, as if all
    prompts had the median number of candidates) is a curve, which the rule's shares read in the other half. nan
    where the rule keeps nothing.
    """
    size = float(np.median(groups.sizes))
    rank = (1.0 - quantile(groups)) * size + 0.5  # mean rank / n is at least 1 / (2 n) below
    bins = np.searchsorted(np.asarray(RANKS, dtype=np.float64), rank)
    half = np.random.default_rng(seed).permutation(len(groups.sizes)) % 2
    by_candidate = groups.broadcast(half)
    curves = []
    for number in (0, 1):
        mine = (by_candidate == number) & ~np.isnan(values)
        count = np.bincount(bins[mine], minlength=len(RANKS) + 1)
        total = np.bincount(bins[mine], values[mine], minlength=len(RANKS) + 1)
        overall = total.sum() / max(count.sum(), 1)
        curves.append(np.where(count > 0, total / np.maximum(count, 1), overall))
    expected = np.where(by_candidate == 0, curves[1][bins], curves[0][bins])
    return [np.where(groups.sum(share) > 0, groups.sum(share * expected), np.nan) for share in shares]


# Intervals


def ratio(sums: Floats) -> Floats:
    """Return the first of two sums over the second; nan where that is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] != 0, sums[..., 0] / sums[..., 1], np.nan)


def correlation(sums: Floats) -> Floats:
    """Return the correlation from sums of squares: of x y, x x and y y; nan where one does not vary."""
    product = sums[..., 1] * sums[..., 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(product > 0, sums[..., 0] / np.sqrt(product), np.nan)


def means(per_prompt: Floats) -> Floats:
    """Return columns of which `ratio` is the mean over the prompts that are not nan: [G] -> [G, 2]."""
    valid = ~np.isnan(per_prompt)
    return np.stack([np.where(valid, per_prompt, 0.0), valid.astype(np.float64)], axis=1)


def squares(groups: RewardGroups, x: Floats, y: Floats) -> Floats:
    """Return columns for `correlation` of x and y within prompts, [G, 3]: sums of products of deviations."""
    valid = ~(np.isnan(x) | np.isnan(y))
    count = np.maximum(groups.sum(valid.astype(np.float64)), 1.0)
    deviations = []
    for values in (x, y):
        values = np.where(valid, values, 0.0)
        deviations.append(np.where(valid, values - groups.broadcast(groups.sum(values) / count), 0.0))
    a, b = deviations
    return np.stack([groups.sum(a * b), groups.sum(a * a), groups.sum(b * b)], axis=1)


@dataclass(frozen=True)
class Estimate:
    """Measure over all prompts with its 95 % percentile bootstrap interval over prompts."""

    value: float
    low: float
    high: float


class Resamples:
    """Bootstrap over prompts: the same resamples for all measures, so that differences of measures are paired."""

    def __init__(self, prompts: int, resamples: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.counts: NDArray[np.uint8] = np.stack([
            np.bincount(rng.integers(0, prompts, prompts), minlength=prompts).astype(np.uint8)
            for _ in range(resamples)
        ])  # fmt: skip

    def values(self, columns: Floats, measure: Measure = ratio) -> Floats:
        """Return the measure in each resample of the prompts, from columns [G, C]."""
        chunks = [self.counts[n : n + CHUNK].astype(np.float64) @ columns for n in range(0, len(self.counts), CHUNK)]
        return measure(np.concatenate(chunks))

    def estimate(self, columns: Floats, measure: Measure = ratio) -> Estimate:
        """Return the measure of columns [G, C] with its interval; nan if it has no value."""
        value = float(measure(columns.sum(axis=0)))
        resampled = self.values(columns, measure)
        numbers = resampled[~np.isnan(resampled)]
        low, high = np.percentile(numbers, [2.5, 97.5]).tolist() if len(numbers) else (np.nan, np.nan)
        return Estimate(value, low, high)

    def mean(self, per_prompt: Floats) -> Estimate:
        """Return the mean over the prompts that are not nan, [G]."""
        return self.estimate(means(per_prompt))
