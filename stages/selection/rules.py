"""Selection rules: which candidates of a prompt are kept, and with what weight. To add a rule, add a function here.

A rule gets the rewards of every prompt of the shard at once (`RewardGroups`) and returns the rows to keep
(`Selection`). Metadata: with `needs_spread` it gets no prompt whose rewards are all equal, unless all are labelled
right; with `right_only` no candidate that is labelled wrong; `check` reads the rule's options at plan time and returns
the problems; `weighs` marks rules whose weights must reach training.

The sampling loops, Algorithm 1 of RSO among them, are compiled and stand in kernels.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, NotRequired

import numpy as np

from pipeline import Bound, Finite, Range, Registry
from stages.data.rows import SMALLEST_WEIGHT
from stages.options import SmallCount
from stages.results import floats
from stages.selection.groups import Floats, Ints, RewardGroups, temperature
from stages.selection.normalisers import normaliser

selection_rule = Registry(
    "selection rule",
    "groups",
    needs_spread=NotRequired[bool],
    weighs=NotRequired[bool],
    right_only=NotRequired[bool],
    check=NotRequired[Callable[[dict[str, Any]], list[str]]],
)
PositiveOrInfinite = Annotated[float, Range(gt=0)]
NotNegativeOrInfinite = Annotated[float, Range(ge=0)]  # at an infinite temperature all rewards are alike
# Exactly one of these three must be set, see `_check_temperature`.
Beta = NotNegativeOrInfinite | None
Ess = Annotated[float, Range(gt=1, lt=float("inf"))] | None
Kl = Annotated[float, Range(gt=0, lt=float("inf"))] | None


@dataclass(frozen=True)
class Selection:
    """M selected rows, prompt by prompt in order of their draw, and per-prompt statistics, [G]."""

    index: Ints  # [M] rows of the groups
    draw: Ints  # [M] order within the prompt, from 0
    weight: Floats | float = 1.0  # [M] of the row's likelihood
    round: Ints | int = 0  # [M] pass of Algorithm 1
    beta: Floats | None = None  # [G] temperature
    acceptance: Floats | None = None  # [G] expected share accepted in the first pass
    ess: Floats | None = None  # [G] effective sample size of the weights, before any clip
    empty_reason: str = "no weight left"  # why a prompt without a selected row is rejected


def _check_temperature(options: dict[str, Any]) -> list[str]:
    """Return the problem if not exactly one of beta, ess and kl is set."""
    names = [name for name in ("beta", "ess", "kl") if options[name] is not None]
    if not names:
        return ["rule.beta: a temperature is required; set one of rule.beta, rule.ess, rule.kl"]
    if len(names) > 1:
        return [f"rule.{names[-1]}: rule.{names[0]} is set too; keep one of them and set the other to null"]
    return []


@selection_rule(check=_check_temperature)
def rejection_sample(
    groups: RewardGroups, *, k: SmallCount = 8, beta: Beta = None, ess: Ess = None, kl: Kl = None
) -> Selection:
    """Select k candidates by Algorithm 1 of arXiv:2309.06657, statistical rejection sampling (all, if fewer).

    Each pass accepts with probability exp((r - max) / beta), max over the candidates that remain. Exact limits:
    beta = 0 keeps the k best, ties at random; beta = infinity any k.
    """
    from stages.selection.kernels import algorithm_1_batch

    betas = temperature(groups, beta, ess, kl)
    weight = np.exp(groups.exponent(betas))
    chosen, rounds = algorithm_1_batch(groups.values, groups.starts, groups.seeds, k, betas)
    prompt, draw = np.nonzero(chosen >= 0)
    index, turn = chosen[prompt, draw], rounds[prompt, draw]
    acceptance, ess_reached = groups.mean(weight), groups.effective_sample_size(weight)
    return Selection(index, draw, round=turn, beta=betas, acceptance=acceptance, ess=ess_reached)


@selection_rule(check=_check_temperature)
def gumbel_top_k(
    groups: RewardGroups, *, k: SmallCount = 8, beta: Beta = None, ess: Ess = None, kl: Kl = None
) -> Selection:
    """Select the k largest r / beta + Gumbel noise: draws without replacement, each in proportion to exp(r / beta).

    Unlike Algorithm 1 it does not favour the estimated maximum. beta = 0 and infinity are exact.
    """
    from stages.selection.kernels import gumbel_top_k_batch

    betas = temperature(groups, beta, ess, kl)
    chosen = gumbel_top_k_batch(groups.values, groups.starts, groups.seeds, k, betas)
    prompt, draw = np.nonzero(chosen >= 0)
    weight = np.exp(groups.exponent(betas))
    return Selection(chosen[prompt, draw], draw, beta=betas, ess=groups.effective_sample_size(weight))


@selection_rule(version=2, right_only=True)
def best_of(groups: RewardGroups, *, k: SmallCount = 1) -> Selection:
    """Select the k best, best first; ties at random. Where rewards are labels, only right ones: the best may be wrong.

    A prompt without a right one is rejected.
    """
    limit = rejection_sample(groups, k=k, beta=0.0)
    return Selection(limit.index, limit.draw)


@selection_rule()
def plain(groups: RewardGroups, *, k: SmallCount = 8) -> Selection:
    """Select any k, in random order: samples of the policy that drew the candidates."""
    limit = rejection_sample(groups, k=k, beta=np.inf)
    return Selection(limit.index, limit.draw)


@selection_rule()
def everything(groups: RewardGroups) -> Selection:
    """Select all candidates."""
    return Selection(np.arange(len(groups.values)), groups.position)


@selection_rule()
def above(groups: RewardGroups, *, threshold: Finite) -> Selection:
    """Select rewards strictly above the threshold: the filter of ReST's Improve step (arXiv:2308.08998)."""
    is_above = groups.values > threshold
    return _select_weighted(groups, is_above.astype(np.float64), empty_reason="nothing above the threshold")


def _check_softmax_weights(options: dict[str, Any]) -> list[str]:
    estimate: Bound = options["normaliser"]
    problems = _check_temperature(options)
    if estimate.metadata["pooled"] and options["beta"] is None:
        problems.append(f"rule.normaliser: {estimate.name} pools all prompts at one temperature; set rule.beta")
    if options["beta"] == 0 and not estimate.metadata["zero"]:
        problems.append(f"rule.beta: {estimate.name} has no limit at 0; set a number above 0")
    return problems


@selection_rule(version=3, weighs=True, needs_spread=True, check=_check_softmax_weights)
def softmax_weights(
    groups: RewardGroups,
    *,
    beta: Beta = None,
    ess: Ess = None,
    kl: Kl = None,
    normaliser: Annotated[Bound, normaliser] = "empirical",  # type: ignore[assignment]
    clip: PositiveOrInfinite = float("inf"),
) -> Selection:
    """Select all candidates with the weight exp(r / beta) / Z, at most `clip`; drop weights that are 0 in float32.

    Z = E exp(r / beta) is estimated by `normaliser` (normalisers.py): `empirical` weights have mean 1 per prompt;
    `jackknife` corrects Z for the number of candidates; `gumbel` fits log Z over all prompts of the shard, so that
    a prompt's weights depend on the shard's other prompts, and have mean 1 over the shard; `learned` is a function of
    the prompt, which stage `partition` fits over all prompts.

    This is the weight of SPR (successive policy re-weighting, OpenReview LglOy15bqe), whose text is not public: a
    reconstruction from its abstract and the identity pi_{t+1} = pi_t exp(r / beta) / Z, no claim about its formulas.
    """
    betas = temperature(groups, beta, ess, kl)
    exponent = groups.exponent(betas)
    log_z = floats(normaliser, normaliser(groups, betas), groups.sizes.shape, "one per prompt", finite=False)
    weight = np.exp(exponent - groups.broadcast(log_z))
    ess_before_clip = groups.effective_sample_size(np.exp(exponent))
    return _select_weighted(groups, np.minimum(weight, clip), beta=betas, ess=ess_before_clip)


@selection_rule(version=3, weighs=True, needs_spread=True)
def advantage_weights(groups: RewardGroups, *, beta: PositiveOrInfinite, clip: PositiveOrInfinite = 20.0) -> Selection:
    """Select all candidates with the weight min(clip, exp((r - mean) / beta)): AWR, arXiv:1910.00177."""
    betas = np.full(len(groups.sizes), beta)
    with np.errstate(over="ignore"):
        advantage = (groups.values - groups.broadcast(groups.mean(groups.values))) / beta
        weight = np.minimum(np.exp(advantage), clip)
    ess_before_clip = groups.effective_sample_size(np.exp(groups.exponent(betas)))
    return _select_weighted(groups, weight, beta=betas, ess=ess_before_clip)


@selection_rule(version=3, weighs=True, needs_spread=True)
def chi_square(groups: RewardGroups, *, beta: NotNegativeOrInfinite) -> Selection:
    """Select positive weights max(r - lambda, 0) / beta, with lambda such that their mean is 1 per prompt.

    The optimum under chi-square regularisation, which trusts high rewards less than exp does (arXiv:2503.21878).
    beta = 0: only the best.
    """
    betas = np.full(len(groups.sizes), beta)
    x = groups.exponent(betas)  # reward / beta, the largest of each prompt 0
    # Over the rows with x > level, sum(x - level) = n. From level = -n, below which no solution lies, the set of these
    # rows only shrinks: each pass solves for the level exactly and drops the rows that are not above it.
    positive = x > -groups.broadcast(groups.sizes)
    while True:
        total, count = groups.sum(np.where(positive, x, 0.0)), groups.sum(positive.astype(float))
        level = groups.broadcast((total - groups.sizes) / count)
        remaining = positive & (x > level)
        if (remaining == positive).all():
            break
        positive = remaining
    weight = np.where(positive, x - level, 0.0)
    return _select_weighted(groups, weight, beta=betas, ess=groups.effective_sample_size(weight))


def _select_weighted(groups: RewardGroups, weight: Floats, **fields: Any) -> Selection:
    """Return the rows whose weight training, in float32, can tell from 0, in the order of the candidates' ids."""
    mask = weight > SMALLEST_WEIGHT
    n_before: Ints = np.cumsum(mask) - mask
    draw: Ints = n_before - groups.broadcast(n_before[groups.starts[:-1]])
    return Selection(np.flatnonzero(mask), draw[mask], weight=weight[mask], **fields)


def check_selection(rule: Bound, selection: Any, groups: RewardGroups) -> Selection:
    """Return what a rule selects of the groups; raise WinnowError if it cannot be a selection of them.

    Its rows exist, once each, prompt by prompt and there in order of their draw; its weights are finite and not
    negative; its statistics are one per prompt.
    """
    if not isinstance(selection, Selection):
        raise rule.wrong_result(selection, "a Selection")

    def integers(field: str, expected: str) -> Ints:
        array = np.asarray(getattr(selection, field))
        if array.dtype.kind not in "iu" or array.shape not in {index.shape, () if field == "round" else index.shape}:
            raise rule.wrong_result(array, f"`{field}` as integers, {expected}")
        if (array < 0).any():
            raise rule.wrong_result(int(array.min()), f"`{field}` not below 0")
        return array

    index = np.asarray(selection.index)
    if index.ndim != 1:
        raise rule.wrong_result(index, "`index` as one row of the groups per selected candidate")
    index = integers("index", "rows of the groups")
    if (index >= len(groups.values)).any():
        raise rule.wrong_result(int(index.max()), f"`index` below {len(groups.values)}, the number of candidates")
    counts = np.bincount(index)
    if (counts > 1).any():
        raise rule.wrong_result(int(counts.argmax()), "every row in `index` once")
    draw = integers("draw", "one per selected row")
    integers("round", "one per selected row, or one for all")
    prompt = groups.broadcast(np.arange(len(groups.sizes)))[index]
    falls = (np.diff(prompt) < 0) | ((np.diff(prompt) == 0) & (np.diff(draw) <= 0))
    if falls.any():
        row = int(index[1:][falls][0])
        raise rule.wrong_result(row, "`index` prompt by prompt, and there in order of rising `draw`")
    weight = floats(rule, selection.weight, np.shape(selection.weight) and index.shape, "`weight` per selected row")
    if (weight < 0).any():
        raise rule.wrong_result(float(weight.min()), "`weight` not below 0")
    for field in ("beta", "acceptance", "ess"):
        if (statistic := getattr(selection, field)) is not None:
            floats(rule, statistic, groups.sizes.shape, f"`{field}` per prompt", finite=False)
    return selection
