"""Selection rules, scales and weights, each against its closed form or a plain transcription."""

import itertools
import math
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline import InputStep
from pipeline.registry import entry_of
from schemas import WinnowError, conform
from schemas.tables import CANDIDATES, SELECTIONS
from stages.selection.groups import RewardGroups, temperature
from stages.selection.normalisers import empirical, gumbel, jackknife
from stages.selection.rules import selection_rule
from stages.selection.scales import reward_scale
from stages.selection.select import select
from tests.stages.selection.test_kernels import LEAST, follows, space, table

quick = settings(deadline=None, max_examples=60)  # the first call compiles
values = st.floats(-50, 50)
prompts = st.lists(st.lists(values, min_size=1, max_size=12), min_size=1, max_size=6)
RULES = {
    "rejection": {"name": "rejection_sample", "k": 3, "beta": 0.5},
    "rejection_ess": {"name": "rejection_sample", "k": 3, "ess": 2.5},
    "gumbel": {"name": "gumbel_top_k", "k": 3, "kl": 0.7},
    "best": {"name": "best_of", "k": 2},
    "plain": {"name": "plain", "k": 2},
    "everything": {"name": "everything"},
    "above": {"name": "above", "threshold": 0.5},
    "softmax": {"name": "softmax_weights", "beta": 1.0},
    "softmax_kl": {"name": "softmax_weights", "kl": 0.4, "clip": 3.0},
    "jackknife": {"name": "softmax_weights", "ess": 3.0, "normaliser": "jackknife"},
    "pooled": {"name": "softmax_weights", "beta": 1.0, "normaliser": "gumbel"},
    "advantage": {"name": "advantage_weights", "beta": 1.0},
    "chi_square": {"name": "chi_square", "beta": 0.5},
}


def groups_of(rewards):
    """Lists of rewards, one per prompt."""
    starts = np.cumsum([0, *map(len, rewards)])
    seeds = np.random.default_rng(5).integers(2**63, size=len(rewards), dtype=np.uint64)
    return RewardGroups(np.array([float(r) for group in rewards for r in group]), starts, seeds)


def select_by(rewards, name, **options):
    """A rule's own `Selection`."""
    return selection_rule.bind({"name": name} | options)(groups_of(rewards))


def weights(rewards, name, **options):
    """Each prompt's weights, 0 where a row is not selected."""
    selection = select_by(rewards, name, **options)
    flat = np.zeros(sum(map(len, rewards)))
    flat[selection.index] = selection.weight
    return np.split(flat, np.cumsum([len(group) for group in rewards])[:-1])


def selected(rewards, rule, scale="raw", ctx=None):
    """The stage on {prompt: rewards}, or on a table of them."""
    rows = table(rewards) if isinstance(rewards, dict) else rewards
    selections = select(rows, ctx or space(), rule=selection_rule.bind(rule), scale=reward_scale.bind(scale))
    return conform(selections, SELECTIONS)


def softmax(rewards, beta):
    w = [math.exp((r - max(rewards)) / beta) for r in rewards]
    return np.array(w) / math.fsum(w)


# Rules that keep k


def draws_of(rewards, name, draws=10_000, **options):
    """Ordered positions that a rule selects, over many copies of one prompt with a seed each."""
    index = select_by([rewards] * draws, name, **options).index
    return Counter(map(tuple, (index % len(rewards)).reshape(draws, -1).tolist()))


def test_gumbel_draws_are_without_replacement_in_proportion():
    """P(i) = p_i = exp(r_i / beta) / sum, also among ties; ordered pairs: P(i, j) = p_i p_j / (1 - p_i)."""
    rewards, beta = [0.0, 0.5, 1.0, -1.0, 1.0], 0.8
    p = softmax(rewards, beta)
    one = {(i,): p[i] for i in range(5)}
    two = {(i, j): p[i] * p[j] / (1 - p[i]) for i, j in itertools.permutations(range(5), 2)}
    assert sum(two.values()) == pytest.approx(1)
    assert follows(draws_of(rewards, "gumbel_top_k", k=1, beta=beta), one) > LEAST
    assert follows(draws_of(rewards, "gumbel_top_k", k=2, beta=beta), two) > LEAST


@pytest.mark.parametrize("name", ["gumbel_top_k", "rejection_sample"])
def test_limits_of_the_temperature_are_exact(name):
    """beta = 0: the 5, then an ordered pair of the 1s; beta = infinity: any ordered pair, whatever the rewards."""
    law = {(0, *pair): 1 / 6 for pair in itertools.permutations((1, 2, 3), 2)}
    assert follows(draws_of([5.0, 1.0, 1.0, 1.0, 0.0], name, k=3, beta=0.0), law) > LEAST
    any_two = dict.fromkeys(itertools.permutations(range(5), 2), 1 / 20)
    assert follows(draws_of([5.0, -90.0, 1.0, 1.0, 1e80], name, k=2, beta=math.inf), any_two) > LEAST


@quick
@given(prompts, st.integers(1, 6))
def test_best_of_and_plain_are_the_limits_of_rejection_sampling(rewards, k):
    """best_of = beta 0, plain = beta infinity, row for row; they report no temperature."""
    for name, beta in [("best_of", 0.0), ("plain", math.inf)]:
        ours, limit = select_by(rewards, name, k=k), select_by(rewards, "rejection_sample", k=k, beta=beta)
        assert ours.index.tolist() == limit.index.tolist()
        assert ours.draw.tolist() == limit.draw.tolist()
        assert ours.beta is ours.acceptance is ours.ess is None


# Temperatures


def measured(rewards, beta):
    """ess = 1 / sum p^2 and KL from uniform = sum p log(n p) of p = softmax(r / beta)."""
    p = softmax(rewards, beta)
    return 1 / (p**2).sum(), math.fsum(x * math.log(len(p) * x) for x in p if x > 0)


@quick
@given(st.lists(st.integers(-400, 400), min_size=2, max_size=30, unique=True), st.floats(0.02, 0.98))
def test_temperatures_meet_their_target(rewards, part):
    """Any ess in (1, n) and any KL in (0, log n) is met to 1e-6, for rewards without ties; so on every scale of r."""
    n, rewards = len(rewards), [r / 100 for r in rewards]
    ess, kl = 1 + part * (n - 1), part * math.log(n)
    for scale in (1.0, 1e-30, 1e30):
        scaled = groups_of([[r * scale for r in rewards]])
        assert measured(rewards, temperature(scaled, None, ess, None)[0] / scale)[0] == pytest.approx(ess, abs=1e-6)
        assert measured(rewards, temperature(scaled, None, None, kl)[0] / scale)[1] == pytest.approx(kl, abs=1e-6)


@quick
@given(prompts, st.floats(1.01, 11), st.floats(1.01, 11), st.floats(0.01, 3), st.floats(0.01, 3))
def test_temperatures_are_monotone_in_their_target(rewards, ess, other, kl, less):
    """More candidates' worth of weight is hotter; more KL is colder."""
    groups = groups_of(rewards)
    low, high = sorted((ess, other))
    assert (temperature(groups, None, low, None) <= temperature(groups, None, high, None)).all()
    low, high = sorted((kl, less))
    assert (temperature(groups, None, None, high) <= temperature(groups, None, None, low)).all()


def test_temperatures_of_prompts_that_cannot_meet_the_target():
    """All equal, or n <= ess: infinite. Three ties for best have ess >= 3 and KL <= log(n / 3): 0 beyond."""
    rewards = [[2.0] * 9, [0.0, 1.0], [1.0, 1.0, 1.0, 0.0, -1.0, 0.5]]
    assert temperature(groups_of(rewards), None, 2.0, None).tolist() == [math.inf, math.inf, 0.0]
    assert temperature(groups_of(rewards), None, None, 0.7).tolist() == [math.inf, 0.0, 0.0]
    assert 0 < temperature(groups_of(rewards), None, None, 0.69)[2] < math.inf


def test_exactly_one_temperature_is_required():
    """At plan time, with the option's path; a rule without a temperature has no such problem."""
    check = entry_of(select).metadata["signature"].check

    def problems(**options):
        return "\n".join(check({"rule": selection_rule.bind(options), "finished": False}, {}))

    for name in ("rejection_sample", "gumbel_top_k", "softmax_weights"):
        assert re.search("rule.beta: .* required; .* rule.beta, rule.ess, rule.kl", problems(name=name))
        assert re.search("rule.ess: rule.beta is set too; .* null", problems(name=name, beta=0.5, ess=3.0))
        assert problems(name=name, kl=0.5) == ""
    assert problems(name="everything") == problems(name="softmax_weights", beta=0.0) == ""
    no_limit = problems(name="softmax_weights", beta=0.0, normaliser="jackknife")
    assert "rule.beta: jackknife has no limit at 0" in no_limit
    assert "set rule.beta" in problems(name="softmax_weights", ess=2.0, normaliser="gumbel")
    for wrong in ({"ess": 1.0}, {"kl": 0.0}, {"beta": -1.0}, {"beta": math.nan}):
        with pytest.raises(WinnowError, match=next(iter(wrong))):
            selection_rule.bind({"name": "rejection_sample"} | wrong)


# Weights


@quick
@given(prompts, st.sampled_from([0.0, 1e-3, 0.5, 20.0, math.inf]))
def test_empirical_weights_are_the_softmax_with_mean_one(rewards, beta):
    """w = n softmax(r / beta): E w = 1 under the candidates, as for any ratio of two laws."""
    several = [group for group in rewards if len(group) > 1]
    assume(several)
    for group, weight in zip(several, weights(several, "softmax_weights", beta=beta), strict=True):
        assert weight.mean() == pytest.approx(1)
        if 0 < beta < math.inf:
            assert weight == pytest.approx(len(group) * softmax(group, beta), abs=1e-12)


def test_a_clip_is_the_largest_weight():
    """r = (0, 0, 0, log 9), beta = 1: weights (1, 1, 1, 9) / 3; with clip 2 the last is 2 and the others stay."""
    rewards = [[0.0, 0.0, 0.0, math.log(9)]]
    assert weights(rewards, "softmax_weights", beta=1.0)[0] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 3])
    assert weights(rewards, "softmax_weights", beta=1.0, clip=2.0)[0] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 2])


def log_mean_exp(x):
    top = max(x)
    return top + math.log(math.fsum(math.exp(value - top) for value in x) / len(x))


@quick
@given(st.lists(st.lists(values, min_size=2, max_size=9), min_size=1, max_size=4), st.floats(0.05, 30))
def test_the_jackknife_is_its_loop(rewards, beta):
    """log Z = N L_N - (N - 1) mean_j L_{N-1} without j, L the log of the mean of exp(r / beta)."""
    groups = groups_of(rewards)
    for group, log_z in zip(rewards, jackknife(groups, np.full(len(rewards), beta)), strict=True):
        x = [r / beta for r in group]
        without = [log_mean_exp(x[:j] + x[j + 1 :]) for j in range(len(x))]
        plain = len(x) * log_mean_exp(x) - (len(x) - 1) * math.fsum(without) / len(x)
        assert log_z + max(x) == pytest.approx(plain, rel=1e-9, abs=1e-8)


def test_the_jackknife_of_equal_exponents_is_exact():
    """beta = infinity: all weights 1. Three ties for best of five and beta -> 0: Z = 3 / 5 of exp(max / beta),

    N log(3/5) - (N - 1) (3 log(2/4) + 2 log(3/4)) / N.
    """
    groups = groups_of([[0.0, 3.0, -7.0], [1.0, 1.0, 1.0, 0.0, -2.0]])
    assert jackknife(groups, np.full(2, math.inf)).tolist() == [0.0, 0.0]
    limit = 5 * math.log(3 / 5) - 4 * (3 * math.log(2 / 4) + 2 * math.log(3 / 4)) / 5
    assert jackknife(groups, np.zeros(2)).tolist() == [math.inf, pytest.approx(limit)]


def normals(prompts, n, mean=0.0, sd=1.0):
    rng = np.random.default_rng(2)
    drawn = rng.normal(size=(prompts, n)) * np.reshape(sd, (-1, 1)) + np.reshape(mean, (-1, 1))
    return RewardGroups(drawn.ravel(), np.arange(prompts + 1) * n, np.zeros(prompts, np.uint64))


def value_of(groups, estimate, beta):
    """beta log Z of each prompt."""
    return beta * estimate(groups, np.full(len(groups.sizes), beta)) + groups.max(groups.values)


def test_estimates_of_log_z_have_the_known_bias():
    """r ~ N(0, 1): beta log Z = 1 / (2 beta). The plug-in falls short by what methods 9.2 has; the others by less."""
    for beta, n, plug_in in [(1.0, 4, 0.334), (1.0, 8, 0.410), (1.0, 64, 0.488), (0.5, 8, 0.70), (0.5, 64, 0.92)]:
        groups, truth = normals(4000, n), 1 / (2 * beta)
        means = [value_of(groups, estimate, beta).mean() for estimate in (empirical, gumbel, jackknife)]
        assert means[0] == pytest.approx(plug_in, abs=0.02)
        assert means[0] < means[1] < means[2] < truth + 0.01
        if beta == 1.0 and n >= 8:
            assert means[2] == pytest.approx(truth, abs=0.02)


@quick
@given(st.lists(st.lists(values, min_size=2, max_size=9), min_size=4, max_size=9), st.floats(1.0, 30))
def test_gumbel_regression_is_at_its_minimum(rewards, beta):
    """h = theta . (1, mean, var / (2 beta)) minimises mean(exp(z) - z - 1): mean(exp(z) - 1) f = 0 for each f,

    up to the ridge. exp(z) is the weight, so weights have mean 1 over the shard.
    """
    groups = groups_of(rewards)
    log_z = gumbel(groups, np.full(len(rewards), beta))
    weight = np.exp(groups.exponent(np.full(len(rewards), beta)) - groups.broadcast(log_z))
    assert weight.mean() == pytest.approx(1)
    mean = np.array([np.mean(group) for group in rewards])
    half = np.array([np.var(group, ddof=1) / (2 * beta) for group in rewards])
    ridge = 1e-5 * (1 + np.abs(log_z).max() + half.max() / beta)
    for feature in (mean, half):
        centred = feature - feature.mean()
        size = max(np.abs(centred).max(), 1e-9)
        assert np.mean((weight - 1) * groups.broadcast(centred / size)) == pytest.approx(0, abs=ridge)
    h = beta * log_z + groups.max(groups.values)
    design = np.stack([np.ones(len(mean)), mean, half], axis=1)
    fitted = design @ np.linalg.lstsq(design, h, rcond=None)[0]
    assert h == pytest.approx(fitted, rel=1e-5, abs=1e-5 * max(1, np.abs(h).max()))


def test_gumbel_regression_finds_the_value_of_gaussian_rewards():
    """r | x ~ N(m, s^2): beta log Z = m + s^2 / (2 beta), theta = (0, 1, 1); with less noise than the plug-in has."""
    rng = np.random.default_rng(9)
    mean, sd, beta = 3 * rng.normal(size=2000), rng.uniform(0.5, 1.5, size=2000), 1.0
    groups, truth = normals(2000, 128, mean, sd), mean + sd**2 / (2 * beta)
    ours, plug_in = (value_of(groups, estimate, beta) - truth for estimate in (gumbel, empirical))
    assert abs(ours.mean()) < 0.02
    assert ours.std() < plug_in.std()


def test_gumbel_regression_is_stable_far_from_the_mean():
    """Rewards 1e6 temperatures apart, equal rewards beside them, beta = infinity: finite weights with mean 1."""
    rewards = [[0.0, 1e6], [5.0, 5.0, 5.0], [-1e6, 0.0, 1e6, 3.0], [1e90, -1e90]]
    for beta in (1e-200, 1.0, 1e3, math.inf):
        weight = np.concatenate(weights(rewards, "softmax_weights", beta=beta, normaliser="gumbel"))
        assert np.isfinite(weight).all()
        assert weight.mean() == pytest.approx(1)


@quick
@given(st.lists(values, min_size=1, max_size=12), st.floats(0.05, 30))
def test_advantage_weights_are_clipped_exponentials(rewards, beta):
    """w = min(20, exp((r - mean) / beta))."""
    mean = math.fsum(rewards) / len(rewards)
    plain = [math.exp(min((r - mean) / beta, math.log(20))) for r in rewards]
    assert weights([rewards], "advantage_weights", beta=beta)[0] == pytest.approx(plain, rel=1e-6, abs=1e-12)


@quick
@given(st.lists(values, min_size=1, max_size=12), st.floats(1e-3, 100))
def test_chi_square_weights_have_mean_one_above_their_lambda(rewards, beta):
    """w = max(r - lambda, 0) / beta with mean 1; lambda by brute force: the j best are in, lambda_j = their mean

    - n beta / j, and the right j is the one whose set is {r > lambda_j}.
    """
    n, ordered = len(rewards), sorted(rewards, reverse=True)
    levels = [(math.fsum(ordered[:j]) - n * beta) / j for j in range(1, n + 1)]
    level = max(levels)  # the others omit a row above them, or include one below
    plain = [max(r - level, 0) / beta for r in rewards]
    assert math.fsum(plain) / n == pytest.approx(1)
    weight = weights([rewards], "chi_square", beta=beta)[0]
    assert weight == pytest.approx(plain, rel=1e-6, abs=1e-6)
    assert weight.mean() == pytest.approx(1)


def test_limits_of_chi_square_weights():
    """beta = 0: n / m on the m best; infinity: all 1. Those of weight 0 are not selected."""
    rewards = [[1.0, 3.0, 3.0, 0.0]]
    assert select_by(rewards, "chi_square", beta=0.0).index.tolist() == [1, 2]
    assert weights(rewards, "chi_square", beta=0.0)[0].tolist() == [0.0, 2.0, 2.0, 0.0]
    assert weights(rewards, "chi_square", beta=math.inf)[0].tolist() == [1.0] * 4


def test_above_is_strict_and_a_prompt_with_nothing_above_is_rejected():
    """0.5 is not above 0.5. `everything` keeps that prompt too."""
    rewards, ctx = {"a": [0.5, 0.7, 0.9], "b": [0.5, 0.1]}, space()
    rows = selected(rewards, RULES["above"], ctx=ctx).to_pylist()
    assert [(row["candidate_id"], row["draw"], row["weight"]) for row in rows] == [("a001", 0, 1.0), ("a002", 1, 1.0)]
    (reject,) = ctx.rejects.to_pylist()
    assert (reject["prompt_id"], reject["reason"]) == ("b", "nothing above the threshold")
    assert len(selected(rewards, RULES["everything"])) == 5


# Scales


def scaled(rewards, name):
    return reward_scale.bind(name)(groups_of([rewards]))


@quick
@given(st.lists(st.integers(-500, 500), min_size=2, max_size=15), st.floats(0.01, 100), st.floats(-1000, 1000))
def test_scales_are_their_formulas_and_their_invariances(rewards, factor, shift):
    """unit, standardized and quantile are invariant to a positive factor and a shift; all keep the order of rewards."""
    assume(len(set(rewards)) > 1)
    r = np.array(rewards, float)
    formulas = {
        "raw": r,
        "unit": (r - r.min()) / (r.max() - r.min()),
        "standardized": (r - r.mean()) / r.std(),
        "probability": 1 / (1 + np.exp(-r)),
        "quantile": [(sum(x < y for x in r) + (sum(x == y for x in r) + 1) / 2) / len(r) for y in r],
    }
    assert formulas.keys() == reward_scale.entries.keys()
    order = np.argsort(r, kind="stable")
    for name, formula in formulas.items():
        values = scaled(rewards, name)
        assert values == pytest.approx(formula, rel=1e-12, abs=1e-12)
        assert (np.diff(values[order]) >= 0).all()
        if name in ("unit", "standardized", "quantile"):
            assert scaled(r * factor + shift, name) == pytest.approx(values, abs=1e-9)
    assert {*scaled(rewards, "unit")} >= {0.0, 1.0}


@quick
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=15))
def test_quantiles_are_invariant_to_an_increasing_map(rewards):
    """(0, 1], mean (n + 1) / (2 n) whatever the ties; exp(r) has the quantiles of r."""
    quantiles = scaled(rewards, "quantile")
    assert quantiles.mean() == pytest.approx((len(rewards) + 1) / (2 * len(rewards)))
    assert 0 < quantiles.min() <= quantiles.max() <= 1
    assert quantiles.tolist() == scaled(np.exp(rewards), "quantile").tolist()


def test_a_rule_reads_the_scale_and_the_table_keeps_the_reward():
    """ReST: r in [0, 1] per prompt, strictly above 0.7. The column is the reward before scaling."""
    rewards = {"a": [10.0, 17.0, 18.0, 20.0], "b": [-1.0, -2.0]}
    rows = selected(rewards, {"name": "above", "threshold": 0.7}, "unit").to_pylist()
    assert [(row["candidate_id"], row["reward"]) for row in rows] == [("a002", 18.0), ("a003", 20.0), ("b000", -1.0)]


# The stage


rule_names = st.sampled_from(sorted(RULES))
scale_names = st.sampled_from(sorted(reward_scale.entries))


@settings(deadline=None, max_examples=150)
@given(
    rule_names,
    scale_names,
    st.dictionaries(st.sampled_from("abcdef"), st.lists(values, min_size=1, max_size=9), min_size=1),
    st.randoms(),
)
def test_neither_the_order_of_rows_nor_other_prompts_matter(name, scale, rewards, rng):
    """To the byte, on every scale; only the pooled normaliser reads the other prompts of the shard, as it states."""
    rows = table(rewards)
    order = list(range(len(rows)))
    rng.shuffle(order)
    together = selected(rows, RULES[name], scale)
    assert selected(rows.take(pa.array(order, pa.int64())), RULES[name], scale).equals(together)
    if name != "pooled":
        alone = [row for p in sorted(rewards) for row in selected({p: rewards[p]}, RULES[name], scale).to_pylist()]
        assert alone == together.to_pylist()


extreme = st.sampled_from(
    [0.0, -0.0, 1.0, 1.0 + 2**-52, 5e-324, -1e-300, 1e99, -1e99, 1e300, math.nan, -math.inf, -800.0]
)


@settings(deadline=None, max_examples=300)
@given(rule_names, scale_names, st.dictionaries(st.sampled_from("abc"), st.lists(extreme, min_size=1, max_size=5)))
def test_every_prompt_is_selected_or_rejected_and_nothing_is_nan(name, scale, rewards):
    """Whatever the rewards: finite positive weights, draws 0, 1, ..., and each prompt has either rows or a reason."""
    ctx = space()
    rows = selected(rewards, RULES[name], scale, ctx).to_pylist()
    rejects = ctx.rejects.to_pylist()
    for row in rows:
        assert 0 < row["weight"] < math.inf
        assert math.isfinite(row["reward"])
        assert not any(math.isnan(row[fact]) for fact in ("beta", "acceptance", "ess") if row[fact] is not None)
    for prompt, group in rewards.items():
        draws = [row["draw"] for row in rows if row["prompt_id"] == prompt]
        assert draws == list(range(len(draws)))
        candidates = [row["candidate_id"] for row in rejects if row["prompt_id"] == prompt]
        usable = sum(abs(r) < 1e100 for r in group)
        assert bool(draws) + candidates.count(None) == (1 if usable else 0)
        assert len(candidates) - candidates.count(None) == len(group) - usable


def test_prompts_that_a_scale_or_a_rule_cannot_use_are_rejected():
    """One candidate, or equal rewards: with the reason and the place; other prompts are selected."""
    rewards = {"a": [1.0, 1.0, 1.0], "b": [2.0], "c": [0.0, 1.0]}
    weighting = [("softmax", "raw"), ("jackknife", "raw"), ("pooled", "raw"), ("advantage", "raw")]
    weighting += [("chi_square", "raw"), ("softmax", "quantile"), ("chi_square", "quantile")]
    for rule, scale in [("everything", "unit"), ("everything", "standardized"), ("pooled", "unit"), *weighting]:
        ctx = space()
        assert {*selected(rewards, RULES[rule], scale, ctx).column("prompt_id").to_pylist()} == {"c"}
        place = RULES[rule]["name"] if (rule, scale) in weighting else scale
        rejects = [(row["prompt_id"], row["place"], row["reason"]) for row in ctx.rejects.to_pylist()]
        assert rejects == [(prompt, place, "one candidate, or all rewards equal") for prompt in "ab"]


def test_prompts_that_the_jackknife_leaves_no_weight():
    """KL beyond log n requires beta = 0; without the best candidate the others' Z is 0, and so log Z = infinity."""
    ctx = space()
    rule = {"name": "softmax_weights", "kl": 5.0, "normaliser": "jackknife"}
    assert len(selected({"a": [0.0, 1.0]}, rule, ctx=ctx)) == 0
    assert [row["reason"] for row in ctx.rejects.to_pylist()] == ["no weight left"]


def test_no_selected_weight_is_zero_in_float32():
    """`examples` keeps weights as float32, whose least number is 1.4e-45: 3 exp(-104) is one, 3 exp(-106) is not."""
    selection = select_by([[0.0, -104.0, -106.0]], "softmax_weights", beta=1.0)
    assert selection.index.tolist() == [0, 1]
    assert (selection.weight.astype(np.float32) > 0).all()


def test_columns_that_a_rule_does_not_have_are_null():
    """acceptance is Algorithm 1's; beta and ess go with a temperature."""
    for name, rule in RULES.items():
        row = selected({"a": [0.0, 1.0, 2.0, 1.5]}, rule).to_pylist()[0]
        assert (row["acceptance"] is not None) == (rule["name"] == "rejection_sample")
        assert (row["beta"] is not None) == (name not in ("best", "plain", "everything", "above"))
        assert (row["ess"] is None) == (row["beta"] is None)


def test_cut_responses_are_no_candidates_of_a_selection_on_request():
    """Before the rule: the best is the best of what ended, and a prompt whose responses were all cut has none."""
    rewards = {"a": [0.0, 1.0, 2.0], "b": [1.0]}
    cut = {"a002", "b000"}
    rows = [
        row | dict(k=0, token_ids=[5], text="x", logp_kind="none", n_tokens=1)
        | dict(finish_reason="length" if row["candidate_id"] in cut else "stop")
        for row in table(rewards).select(["prompt_id", "candidate_id"]).to_pylist()
    ]  # fmt: skip
    candidates, ctx = pa.Table.from_pylist(rows, CANDIDATES), space()
    rule = selection_rule.bind("best_of")
    selections = select(table(rewards), ctx, candidates, rule=rule, finished=True)
    assert selections.column("candidate_id").to_pylist() == ["a001"]
    assert [(row["candidate_id"], row["reason"]) for row in ctx.rejects.to_pylist()] == [
        (name, "cut at max_tokens") for name in sorted(cut)
    ]
    with pytest.raises(WinnowError, match="candidates` lacks"):
        select(table(rewards), space(), candidates.slice(1), rule=rule, finished=True)
    check = entry_of(select).metadata["signature"].check
    step = {"candidates": InputStep("sample")}
    assert check({"rule": rule, "finished": True}, step) == check({"rule": rule, "finished": False}, {}) == []
    (missing,), (unread,) = check({"rule": rule, "finished": True}, {}), check({"rule": rule, "finished": False}, step)
    assert "add `candidates`" in missing
    assert "finished: true" in unread
