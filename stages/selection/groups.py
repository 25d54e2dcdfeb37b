"""Each prompt's rewards as one flat array, and the law exp(reward / beta) over them.

Every number of a prompt is a function of that prompt alone, to the last bit: sums go prompt by prompt
(reduceat), never as differences of running totals over the shard.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
Kind = TypeVar("Kind", bound=np.generic)

COLDEST, HOTTEST, HALVINGS = -40.0, 20.0, 52  # log of beta / (max - min): beyond these nothing moves in 53 bits


def ratio(gap: Floats, beta: Floats) -> Floats:
    """gap / beta, where 0 / 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(gap == 0, 0.0, gap / beta)


@dataclass(frozen=True)
class RewardGroups:
    """Finite rewards, prompt by prompt: G prompts, N candidates, each prompt with at least one."""

    values: Floats  # [N]
    starts: Ints  # [G + 1] prompt g has the rows starts[g] to starts[g + 1]
    seeds: NDArray[np.uint64]  # [G]

    @cached_property
    def sizes(self) -> Ints:
        return np.diff(self.starts)

    def each(self, x: NDArray[Kind]) -> NDArray[Kind]:
        """A prompt's value beside each of its rows, [G] -> [N]."""
        return np.repeat(x, self.sizes)

    def max(self, x: Floats) -> Floats:
        """Of each prompt, [N] -> [G]; so are min, sum and mean."""
        return np.maximum.reduceat(x, self.starts[:-1])

    def min(self, x: Floats) -> Floats:
        return np.minimum.reduceat(x, self.starts[:-1])

    def sum(self, x: Floats) -> Floats:
        return np.add.reduceat(x, self.starts[:-1])

    def mean(self, x: Floats) -> Floats:
        return self.sum(x) / self.sizes

    @cached_property
    def range(self) -> Floats:
        """max - min, [G]."""
        return self.max(self.values) - self.min(self.values)

    @cached_property
    def gap(self) -> Floats:
        """reward - max of its prompt, [N]; not above 0."""
        return self.values - self.each(self.max(self.values))

    @cached_property
    def place(self) -> Ints:
        """Position within the prompt, from 0, [N]."""
        return np.arange(len(self.values)) - self.each(self.starts[:-1])

    def exponent(self, beta: Floats) -> Floats:
        """gap / beta, [N]; exact at beta = 0 (0 for the best, -inf for others) and at infinity (0 for all)."""
        return ratio(self.gap, self.each(beta))

    def only(self, which: Flags) -> "RewardGroups":
        """The prompts in `which`, [G]."""
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.sizes[which])])
        return RewardGroups(self.values[self.each(which)], starts, self.seeds[which])

    def effective(self, weight: Floats) -> Floats:
        """Effective sample size (sum w)^2 / sum w^2, in candidates, [N] -> [G]."""
        return self.sum(weight) ** 2 / self.sum(weight**2)

    def divergence(self, weight: Floats) -> Floats:
        """KL from uniform of p = w / sum w: sum p log(n p), nats, [N] -> [G]."""
        p = weight / self.each(self.sum(weight))
        return self.sum(p * np.log(np.where(p > 0, p * self.each(self.sizes), 1.0)))


@dataclass(frozen=True)
class Need:
    """What a scale or a rule asks of a prompt; one that does not meet it is left out for this reason."""

    reason: str
    met: Callable[[RewardGroups], Flags]


DIFFERENT = Need("one candidate, or all rewards equal", lambda groups: groups.range > 0)


def temperature(groups: RewardGroups, beta: float | None, ess: float | None, kl: float | None) -> Floats:
    """Each prompt's beta, [G]: the one given, or where exp(reward / beta) has this ess or this kl (methods 15.2).

    Infinite where all rewards are equal, and where a prompt has no more candidates than `ess`; 0 where even the
    best alone (or the ties for best) do not reach the target. Bisection on log beta: ess rises with it, kl falls.
    """
    if beta is not None:
        return np.full(len(groups.sizes), beta)
    if ess is not None:
        betas = _solve(groups, lambda weight: groups.effective(weight) < ess)
        return np.where(groups.sizes <= ess, np.inf, betas)
    if kl is not None:
        return _solve(groups, lambda weight: groups.divergence(weight) > kl)
    raise ValueError("a temperature is beta, ess or kl: none is given")


def _solve(groups: RewardGroups, too_cold: Callable[[Floats], Flags]) -> Floats:
    def cold_at(log_beta: Floats) -> Flags:
        return too_cold(np.exp(groups.exponent(np.exp(log_beta) * groups.range)))

    low, high = (np.full(len(groups.sizes), edge) for edge in (COLDEST, HOTTEST))
    reached = cold_at(low)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        cold = cold_at(middle)
        low, high = np.where(cold, middle, low), np.where(cold, high, middle)
    betas = np.where(reached, np.exp(high) * groups.range, 0.0)
    return np.where(groups.range > 0, betas, np.inf)
