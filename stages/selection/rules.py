"""Which candidates of a prompt are kept, and with what weight. To add a rule, add a function here.

A rule reads every prompt of the shard at once (`RewardGroups`) and says which rows it keeps (`Selection`). `needs`
names what a prompt must have; `check` reads the rule's options at plan time and returns what is wrong;
`weighs` says that the weights are the point of it.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from pipeline import Bound, Finite, Range, Registry
from stages.data.rows import LEAST
from stages.selection.groups import DIFFERENT, Flags, Floats, Ints, RewardGroups, temperature
from stages.selection.normalisers import normaliser

selection_rule = Registry("selection rule")
Count = Annotated[int, Range(gt=0)]
Positive = Annotated[float, Range(gt=0)]
NotNegative = Annotated[float, Range(ge=0)]
Beta = NotNegative | None  # exactly one of the three is given: `one_temperature`
Ess = Annotated[float, Range(gt=1, lt=float("inf"))] | None
Kl = Annotated[float, Range(gt=0, lt=float("inf"))] | None


@dataclass(frozen=True)
class Selection:
    """M rows, prompt by prompt in the order of their draw, and what is to be said of each prompt."""

    index: Ints  # [M] rows of the groups
    draw: Ints  # [M] order within the prompt, from 0
    weight: Floats | float = 1.0  # [M] of its likelihood
    round: Ints | int = 0  # [M] pass of Algorithm 1
    beta: Floats | None = None  # [G] temperature
    acceptance: Floats | None = None  # [G] expected share accepted in the first pass
    ess: Floats | None = None  # [G] effective sample size of the weights, before any clip
    empty: str = "no weight left"  # why a prompt has no row


def one_temperature(options: dict[str, Any]) -> list[str]:
    """What is wrong if not exactly one of beta, ess and kl is given."""
    given = [name for name in ("beta", "ess", "kl") if options[name] is not None]
    if len(given) == 1:
        return []
    if not given:
        return ["rule.beta: no temperature; give one of rule.beta, rule.ess, rule.kl"]
    return [f"rule.{given[-1]}: rule.{given[0]} is given too; give one of them and set the other to null"]


@selection_rule(check=one_temperature)
def rejection_sample(
    groups: RewardGroups, *, k: Count = 8, beta: Beta = None, ess: Ess = None, kl: Kl = None
) -> Selection:
    """Statistical rejection sampling: k of the candidates by Algorithm 1 of arXiv:2309.06657 (all, if fewer).

    Each pass accepts with probability exp((r - max) / beta), max over what is left. Exact limits: beta = 0 keeps
    the k best, ties at random; beta = infinity any k.
    """
    betas = temperature(groups, beta, ess, kl)
    weight = np.exp(groups.exponent(betas))
    index, draw, turn = _accepted(groups, k, betas)
    acceptance, effective = groups.mean(weight), groups.effective(weight)
    return Selection(index, draw, round=turn, beta=betas, acceptance=acceptance, ess=effective)


@selection_rule(check=one_temperature)
def gumbel_top_k(groups: RewardGroups, *, k: Count = 8, beta: Beta = None, ess: Ess = None, kl: Kl = None) -> Selection:
    """The k largest r / beta + Gumbel noise: draws without replacement, each in proportion to exp(r / beta).

    Without the estimated maximum that Algorithm 1 favours (methods 15.1a). beta = 0 and infinity are exact limits.
    """
    from stages.selection import kernels as rejection

    betas = temperature(groups, beta, ess, kl)
    chosen = rejection.gumbel_top_k(groups.values, groups.starts, groups.seeds, k, betas)
    prompt, draw = np.nonzero(chosen >= 0)
    return Selection(chosen[prompt, draw], draw, beta=betas, ess=groups.effective(np.exp(groups.exponent(betas))))


@selection_rule()
def best_of(groups: RewardGroups, *, k: Count = 1) -> Selection:
    """The k best, best first; ties at random."""
    index, draw, _ = _accepted(groups, k, np.zeros(len(groups.sizes)))
    return Selection(index, draw)


@selection_rule()
def plain(groups: RewardGroups, *, k: Count = 8) -> Selection:
    """Any k, in random order: samples of the policy that drew the candidates."""
    index, draw, _ = _accepted(groups, k, np.full(len(groups.sizes), np.inf))
    return Selection(index, draw)


@selection_rule()
def everything(groups: RewardGroups) -> Selection:
    """All candidates."""
    return Selection(np.arange(len(groups.values)), groups.place)


@selection_rule()
def above(groups: RewardGroups, *, threshold: Finite) -> Selection:
    """Those with a reward strictly above the threshold: the filter of ReST's Improve step (arXiv:2308.08998)."""
    return _those(groups, groups.values > threshold, empty="nothing above the threshold")


def _normaliser_agrees(options: dict[str, Any]) -> list[str]:
    estimate: Bound = options["normaliser"]
    problems = one_temperature(options)
    if estimate.metadata["pooled"] and options["beta"] is None:
        problems.append(f"rule.normaliser: {estimate.name} reads all prompts at one temperature; give rule.beta")
    if options["beta"] == 0 and not estimate.metadata["zero"]:
        problems.append(f"rule.beta: {estimate.name} has no limit at 0; give a number above 0")
    return problems


@selection_rule(version=3, weighs=True, needs=DIFFERENT, check=_normaliser_agrees)
def softmax_weights(
    groups: RewardGroups,
    *,
    beta: Beta = None,
    ess: Ess = None,
    kl: Kl = None,
    normaliser: Annotated[Bound, normaliser] = "empirical",  # type: ignore[assignment]
    clip: Positive = float("inf"),
) -> Selection:
    """All candidates, with the weight exp(r / beta) / Z, at most `clip`; those whose weight is 0 to a float32 are not.

    Z = E exp(r / beta) by `normaliser` (normalisers.py): `empirical` weights have mean 1 in each prompt,
    `jackknife` corrects Z for the number of candidates; `gumbel` fits log Z over all prompts of the shard, so there
    a prompt's weights depend on the shard's others, and have mean 1 over the shard.

    This is the weight of SPR (successive policy re-weighting, OpenReview LglOy15bqe), whose text is not public: a
    reconstruction from its abstract and the identity pi_{t+1} = pi_t exp(r / beta) / Z, no claim about its formulas.
    """
    betas = temperature(groups, beta, ess, kl)
    exponent = groups.exponent(betas)
    weight = np.exp(exponent - groups.each(normaliser(groups, betas)))
    return _weighted(groups, np.minimum(weight, clip), betas, groups.effective(np.exp(exponent)))


@selection_rule(version=3, weighs=True, needs=DIFFERENT)
def advantage_weights(groups: RewardGroups, *, beta: Positive, clip: Positive = 20.0) -> Selection:
    """All candidates, with the weight min(clip, exp((r - mean) / beta)): AWR, arXiv:1910.00177."""
    betas = np.full(len(groups.sizes), beta)
    with np.errstate(over="ignore"):
        advantage = (groups.values - groups.each(groups.mean(groups.values))) / beta
        weight = np.minimum(np.exp(advantage), clip)
    return _weighted(groups, weight, betas, groups.effective(np.exp(groups.exponent(betas))))


@selection_rule(version=3, weighs=True, needs=DIFFERENT)
def chi_square(groups: RewardGroups, *, beta: NotNegative) -> Selection:
    """Those with a positive weight max(r - lambda, 0) / beta, lambda such that its mean is 1 in each prompt.

    The chi-square-regularised optimum, which trusts high rewards less than exp does (arXiv:2503.21878). beta = 0:
    only the best.
    """
    betas = np.full(len(groups.sizes), beta)
    weight = _truncated(groups, groups.exponent(betas))
    return _weighted(groups, weight, betas, groups.effective(weight))


def _truncated(groups: RewardGroups, x: Floats) -> Floats:
    """max(x - lambda, 0) with mean 1 in each prompt, [N]; the largest x of a prompt is 0.

    Over the rows above lambda, sum(x - lambda) = n. From lambda = -n, which no solution is below, the set of these
    rows only shrinks; each pass solves for lambda exactly and drops what falls to it.
    """
    above = x > -groups.each(groups.sizes)
    while True:
        total, count = groups.sum(np.where(above, x, 0.0)), groups.sum(above.astype(float))
        level = groups.each((total - groups.sizes) / count)
        fewer = above & (x > level)
        if (fewer == above).all():
            return np.where(above, x - level, 0.0)
        above = fewer


def _accepted(groups: RewardGroups, k: int, betas: Floats) -> tuple[Ints, Ints, Ints]:
    """Index, draw and round of what Algorithm 1 accepts."""
    from stages.selection import kernels as rejection

    chosen, rounds = rejection.rejection_sample(groups.values, groups.starts, groups.seeds, k, betas)
    prompt, draw = np.nonzero(chosen >= 0)
    return chosen[prompt, draw], draw, rounds[prompt, draw]


def _those(groups: RewardGroups, which: Flags, **facts: Any) -> Selection:
    """The rows of `which`, [N], in the order of the candidates' ids."""
    before: Ints = np.cumsum(which) - which
    return Selection(np.flatnonzero(which), (before - groups.each(before[groups.starts[:-1]]))[which], **facts)


def _weighted(groups: RewardGroups, weight: Floats, betas: Floats, ess: Floats) -> Selection:
    """The rows whose weight training can tell from 0."""
    counts = weight > LEAST
    return _those(groups, counts, weight=weight[counts], beta=betas, ess=ess)
