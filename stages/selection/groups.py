"""Rewards of many prompts as flat arrays, and the distribution exp(reward / beta) over each prompt's candidates.

Each result for a prompt depends on that prompt alone, to the last bit: sums run prompt by prompt (reduceat), not as
differences of running totals over the shard, whose rounding would depend on the prompts before.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Scalar = TypeVar("Scalar", bound=np.generic)

# Bounds of log(beta / (max - min)), beyond which no weight changes in 53 bits, and the number of bisections.
LOG_BETA_MIN, LOG_BETA_MAX, BISECTIONS = -40.0, 20.0, 52


def divide(difference: Floats, beta: Floats) -> Floats:
    """Return difference / beta, with 0 / 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(difference == 0, 0.0, difference / beta)


@dataclass(frozen=True)
class RewardGroups:
    """Finite rewards of G prompts with N candidates in total; every prompt has at least one.

    Arrays [N] hold one value per candidate, arrays [G] one value per prompt.
    """

    values: Floats  # [N]
    starts: Ints  # [G + 1]; prompt g has the rows starts[g] to starts[g + 1]
    seeds: NDArray[np.uint64]  # [G]
    log_z: Floats | None = None  # [G] log E exp(reward / beta) as stage `partition` learned it

    def __post_init__(self) -> None:
        if not np.isfinite(self.values).all():
            raise ValueError("rewards of groups must be finite")  # with NaN, Algorithm 1 accepts nothing

    @cached_property
    def sizes(self) -> Ints:
        """Return the number of candidates per prompt, [G]."""
        return np.diff(self.starts)

    def broadcast(self, per_prompt: NDArray[Scalar]) -> NDArray[Scalar]:
        """Repeat each prompt's value for each of its candidates, [G] -> [N]."""
        return np.repeat(per_prompt, self.sizes)

    def max(self, x: Floats) -> Floats:
        """Return the maximum per prompt, [N] -> [G]."""
        return np.maximum.reduceat(x, self.starts[:-1])

    def min(self, x: Floats) -> Floats:
        """Return the minimum per prompt, [N] -> [G]."""
        return np.minimum.reduceat(x, self.starts[:-1])

    def sum(self, x: Floats) -> Floats:
        """Return the sum per prompt, [N] -> [G]."""
        return np.add.reduceat(x, self.starts[:-1])

    def mean(self, x: Floats) -> Floats:
        """Return the mean per prompt, [N] -> [G]."""
        return self.sum(x) / self.sizes

    @cached_property
    def range(self) -> Floats:
        """Return max - min of the rewards per prompt, [G]."""
        return self.max(self.values) - self.min(self.values)

    @cached_property
    def below_max(self) -> Floats:
        """Return reward - max of its prompt, [N]; never above 0."""
        return self.values - self.broadcast(self.max(self.values))

    @cached_property
    def position(self) -> Ints:
        """Return each candidate's position within its prompt, from 0, [N]."""
        return np.arange(len(self.values)) - self.broadcast(self.starts[:-1])

    def exponent(self, beta: Floats) -> Floats:
        """Return (reward - max) / beta, [G] -> [N]; exact at beta 0 (0 for the best, else -inf) and infinity (0)."""
        return divide(self.below_max, self.broadcast(beta))

    def effective_sample_size(self, weight: Floats) -> Floats:
        """Return (sum w)^2 / sum w^2 per prompt, in candidates, [N] -> [G]."""
        return self.sum(weight) ** 2 / self.sum(weight**2)


def temperature(groups: RewardGroups, beta: float | None, ess: float | None, kl: float | None) -> Floats:
    """Return each prompt's beta, [G]: `beta` itself, or the one that gives exp(reward / beta) this `ess` or `kl`.

    Methods 15.2. Infinite where all rewards are equal, and where a prompt has no more candidates than `ess`; 0 where
    even the best alone (or the ties for best) do not reach the target. Raises ValueError if all three are None.
    """
    if beta is not None:
        return np.full(len(groups.sizes), beta)

    def is_too_cold(log_beta: Floats) -> Mask:
        weight = np.exp(groups.exponent(np.exp(log_beta) * groups.range))
        if ess is not None:
            return groups.effective_sample_size(weight) < ess
        if kl is None:
            raise ValueError("a temperature needs one of beta, ess and kl")
        # KL from the uniform distribution over the prompt's n candidates: sum p log(n p), in nats
        p = weight / groups.broadcast(groups.sum(weight))
        return groups.sum(p * np.log(np.where(p > 0, p * groups.broadcast(groups.sizes), 1.0))) > kl

    # Bisection on log(beta / range) for all prompts at once: ess rises with beta, KL falls.
    low, high = (np.full(len(groups.sizes), bound) for bound in (LOG_BETA_MIN, LOG_BETA_MAX))
    is_reachable = is_too_cold(low)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        too_cold = is_too_cold(middle)
        low, high = np.where(too_cold, middle, low), np.where(too_cold, high, middle)
    betas = np.where(is_reachable, np.exp(high) * groups.range, 0.0)
    betas = np.where(groups.range > 0, betas, np.inf)
    return betas if ess is None else np.where(groups.sizes <= ess, np.inf, betas)
