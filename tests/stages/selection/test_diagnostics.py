"""Estimators of a diagnosis: against brute force on small groups, and on distributions whose answers are known."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.selection import diagnostics as measures
from stages.selection.groups import RewardGroups
from stages.selection.rules import selection_rule

# Reward and value of each candidate. Few different ones, so that they tie; prompts of one candidate too.
pairs = st.tuples(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), st.sampled_from([-2.0, 0.0, 1.0]))
prompts_of_candidates = st.lists(
    st.lists(
        st.tuples(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), st.sampled_from([-2.0, 0.0, 1.0])), min_size=1, max_size=7
    ),
    min_size=1,
    max_size=4,
)


def groups_of(rows):
    """Return the groups, and the second number of each candidate."""
    starts = np.cumsum([0, *map(len, rows)])
    flat = np.array([pair for row in rows for pair in row], dtype=np.float64).reshape(-1, 2)
    seeds = np.arange(len(rows), dtype=np.uint64)
    return RewardGroups(flat[:, 0].copy(), starts, seeds), flat[:, 1].copy()


def gaussian(prompts, candidates, seed=0):
    rng = np.random.default_rng(seed)
    starts = np.arange(prompts + 1) * candidates
    return RewardGroups(rng.normal(size=prompts * candidates), starts, np.arange(prompts, dtype=np.uint64))


# Agreement


@given(prompts_of_candidates, st.sampled_from([(), (0.75,), (0.25, 1.75)]), st.randoms(use_true_random=False))
def test_agreement_is_that_of_all_pairs(rows, edges, random):
    """Weighted; equal rewards are half, equal values nothing; by the distance of the rewards."""
    groups, values = groups_of(rows)
    weights = np.array([random.choice([0.0, 1.0, 2.5]) for _ in values])
    expected = np.zeros((len(rows), len(edges) + 1, 2))
    for g, (start, end) in enumerate(zip(groups.starts, groups.starts[1:], strict=False)):
        for i, j in combinations(range(start, end), 2):
            distance, difference = groups.values[i] - groups.values[j], values[i] - values[j]
            if difference:
                cell = expected[g, sum(abs(distance) >= edge for edge in edges)]
                weight = weights[i] * weights[j]
                cell += weight * np.array([0.5 if distance == 0 else distance * difference > 0, 1.0])
    assert measures.agreement(groups, values, weights, edges) == pytest.approx(expected)


def test_agreement_skips_candidates_without_a_value():
    groups, values = groups_of([[(0.0, 0.0), (1.0, 1.0), (2.0, np.nan)]])
    assert measures.agreement(groups, values).tolist() == [[[1.0, 1.0]]]


def test_distances_split_pairs_evenly():
    groups = gaussian(400, 16)
    edges = measures.distances(groups, 4)
    weight = measures.agreement(groups, np.random.default_rng(1).normal(size=6400), edges=edges)[..., 1].sum(axis=0)
    assert weight / weight.sum() == pytest.approx([0.25] * 4, abs=0.03)


# Best of n


@given(prompts_of_candidates)
def test_best_of_n_is_the_mean_over_all_subsets(rows):
    """Of the value of the best by reward, any of them where several are equal; nan where there are not n candidates."""
    groups, values = groups_of(rows)
    sizes = list(range(1, 8))
    result = measures.best_of_n(groups, values, sizes)
    for g, row in enumerate(rows):
        for column, size in enumerate(sizes):
            if size > len(row):
                assert np.isnan(result[g, column])
                continue
            subsets = combinations(row, size)
            bests = [[value for reward, value in subset if reward == max(subset)[0]] for subset in subsets]
            assert result[g, column] == pytest.approx(np.mean([np.mean(best) for best in bests]))


def test_best_of_n_of_many_candidates_is_exact():
    """The best of 64 of 64, and of 32: C(64, 32) is beyond a float's digits."""
    groups = gaussian(3, 64)
    result = measures.best_of_n(groups, groups.values, [1, 32, 64])
    ordered = np.sort(groups.values.reshape(3, 64), axis=1)
    weights = np.array([comb(i, 31) / comb(64, 32) for i in range(64)])
    assert result[:, 0] == pytest.approx(ordered.mean(axis=1))
    assert result[:, 1] == pytest.approx(ordered @ weights, rel=1e-9)
    assert result[:, 2] == pytest.approx(ordered[:, -1])


def test_subset_sizes_end_with_all():
    assert measures.subset_sizes(1) == [1]
    assert measures.subset_sizes(58) == [1, 2, 4, 8, 16, 32, 58]
    assert measures.subset_sizes(64) == [1, 2, 4, 8, 16, 32, 64]


# Tilt


@given(prompts_of_candidates, st.sampled_from([0.0, 0.3, 2.0, np.inf]))
def test_the_tilt_of_candidates_is_that_of_their_weights(rows, beta):
    groups, _ = groups_of(rows)
    tilt = measures.tilt(groups, np.full(len(rows), beta))
    for g, row in enumerate(rows):
        rewards = np.array([reward for reward, _ in row])
        best = rewards == rewards.max()
        weights = best.astype(float) if beta == 0 else np.exp((rewards - rewards.max()) / beta)
        p = weights / weights.sum()
        assert tilt.kl[g] == pytest.approx(sum(q * np.log(q * len(p)) for q in p if q > 0), abs=1e-12)
        assert tilt.reward[g] == pytest.approx(p @ rewards)
        assert tilt.ess[g] == pytest.approx(1 / (p @ p))
        assert tilt.acceptance[g] == pytest.approx(weights.mean())


def test_the_asked_tilt_of_gaussian_rewards_is_known():
    """exp(r / beta) moves N(0, 1) by 1 / (2 beta^2) nats, to the mean 1 / beta; the 64 candidates show less of it."""
    groups = gaussian(8000, 64)
    for beta, near in ((2.0, 0.01), (1.0, 0.02), (0.7, 0.05)):
        asked, of_n = measures.asked_tilt(groups, beta, seed=0)
        kl, reward = 1 / (2 * beta**2), 1 / beta
        assert asked.kl.mean() == pytest.approx(kl, rel=near)
        assert asked.reward.mean() == pytest.approx(reward, rel=near)
        assert of_n.kl.mean() < asked.kl.mean()
        assert kl - of_n.kl.mean() > 1.5 * abs(kl - asked.kl.mean())


@given(prompts_of_candidates)
def test_halves_have_no_candidate_in_common(rows):
    """Each has half of a prompt's candidates, and a single one is in both."""
    groups, _ = groups_of(rows)
    numbered = RewardGroups(np.arange(len(groups.values), dtype=np.float64), groups.starts, groups.seeds)
    halves = measures.halves(numbered, 0)
    for g, row in enumerate(rows):
        first, second = (set(half.values[half.starts[g] : half.starts[g + 1]]) for half in halves)
        assert first | second <= set(range(groups.starts[g], groups.starts[g + 1]))
        assert len(first) == len(second) == max(len(row) // 2, 1)
        assert not first & second or len(row) == 1


def test_the_tilt_of_what_is_kept_has_no_bias_of_chance():
    """Of plain samples it is 0 and of the 8 best of 64 log(64 / 8), though each was only repeated a few times."""
    prompts, candidates, k, repetitions = 300, 64, 8, 24
    groups = gaussian(prompts, candidates)
    shares = {"plain": np.zeros(prompts * candidates), "best_of": np.zeros(prompts * candidates)}
    for name, share in shares.items():
        rule = selection_rule.bind(dict(name=name, k=k))
        for seed in range(repetitions):
            seeds = np.arange(prompts, dtype=np.uint64) + np.uint64(1000 * seed)
            share[rule(RewardGroups(groups.values, groups.starts, seeds)).index] += 1 / (k * repetitions)
    number = np.full(prompts, float(k))
    plain = measures.share_divergence(groups, shares["plain"], number, repetitions).mean()
    assert plain == pytest.approx(0.0, abs=0.03)
    assert measures.divergence(groups, shares["plain"]).mean() > 0.1
    best = measures.share_divergence(groups, shares["best_of"], number, repetitions)
    assert best == pytest.approx(np.full(prompts, np.log(8.0)))
    nothing = measures.share_divergence(groups, 0 * shares["plain"], 0 * number, np.inf)
    assert np.isnan(nothing).all()


# Prediction


def test_the_prediction_reads_no_value_of_its_own_prompt():
    rng = np.random.default_rng(2)
    groups = gaussian(40, 16)
    gold = groups.values + rng.normal(size=len(groups.values))
    shares = [np.full(len(gold), 1 / 16), (groups.below_max == 0).astype(float)]
    before = measures.curve_prediction(groups, gold, shares, seed=0)
    gold[groups.starts[7] : groups.starts[8]] += 100.0
    after = measures.curve_prediction(groups, gold, shares, seed=0)
    for one, other in zip(before, after, strict=True):
        assert one[7] == other[7]
        assert (one != other).any()


def test_the_prediction_finds_what_a_rule_keeps_by_gold():
    """Where gold is the reward with noise, or against it: of all candidates, of the best, and of the eight best."""
    groups = gaussian(3000, 32)
    position = np.argsort(np.argsort(-groups.values.reshape(-1, 32), axis=1), axis=1).ravel()
    shares = [np.full(len(groups.values), 1 / 32), (position == 0) * 1.0, (position < 8) / 8]
    for sign in (1.0, -1.0):
        gold = sign * groups.values + np.random.default_rng(3).normal(size=len(groups.values))
        predicted = [values.mean() for values in measures.curve_prediction(groups, gold, shares, seed=0)]
        kept = [groups.sum(share * gold).mean() for share in shares]
        assert predicted == pytest.approx(kept, abs=0.06)


def test_the_prediction_of_a_rule_that_keeps_nothing_is_nan():
    groups = gaussian(4, 8)
    (predicted,) = measures.curve_prediction(groups, groups.values, [np.zeros(32)], seed=0)
    assert np.isnan(predicted).all()


# Intervals


def test_the_correlation_is_within_prompts():
    """Means of prompts do not count, nor do candidates without a value."""
    rng = np.random.default_rng(4)
    groups = gaussian(50, 12)
    y = 0.5 * groups.values + rng.normal(size=600) + groups.broadcast(100 * rng.normal(size=50))
    y[::7] = np.nan
    columns = measures.squares(groups, groups.values, y)
    x_parts, y_parts = [], []
    for start, end in zip(groups.starts, groups.starts[1:], strict=False):
        known = ~np.isnan(y[start:end])
        x_parts.append(groups.values[start:end][known] - groups.values[start:end][known].mean())
        y_parts.append(y[start:end][known] - y[start:end][known].mean())
    expected = np.corrcoef(np.concatenate(x_parts), np.concatenate(y_parts))[0, 1]
    assert measures.correlation(columns.sum(axis=0)) == pytest.approx(expected)


def test_intervals_of_means_have_the_width_of_the_standard_error():
    """Over prompts that have a value; the same resamples serve every measure."""
    values = np.random.default_rng(5).normal(3.0, 2.0, 400)
    values[:100] = np.nan
    resamples = measures.Resamples(400, 1000, 0)
    estimate = resamples.mean(values)
    assert estimate.value == pytest.approx(np.nanmean(values))
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * np.nanstd(values) / np.sqrt(300), rel=0.1)
    assert resamples.mean(2 * values) == measures.Estimate(*(2 * value for value in estimate.__dict__.values()))


def test_a_measure_without_a_value_is_nan():
    estimate = measures.Resamples(3, 50, 0).mean(np.full(3, np.nan))
    assert np.isnan([estimate.value, estimate.low, estimate.high]).all()
