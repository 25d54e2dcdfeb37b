"""The sampling law of room 4, against Algorithm 1 of arXiv:2309.06657 written out in plain Python."""

import itertools
import math
import random
from collections import Counter
from pathlib import Path

import numba
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.context import StageContext, WarmCache
from schemas import conform
from schemas.tables import REWARDS, SELECTIONS
from stages.selection import kernels
from stages.selection.groups import RewardGroups
from stages.selection.rules import selection_rule
from stages.selection.scales import reward_scale
from stages.selection.select import select

DRAWS = 12_000
LEAST = 1e-3  # p-value; the seeds are fixed, so a test that passes always passes
finite = st.floats(-1e6, 1e6)
unhurried = settings(deadline=None, max_examples=60)  # the first call compiles


def algorithm_1(rewards, k, beta, rng):
    """Shuffle; then rounds over what is left, each with its own maximum, until k are accepted or none is left."""
    pool = list(range(len(rewards)))
    rng.shuffle(pool)
    accepted: list[int] = []
    while len(accepted) < k and pool:
        top = max(rewards[i] for i in pool)
        taken = []
        for i in pool:
            if rng.random() < math.exp((rewards[i] - top) / beta):
                taken.append(i)
                if len(accepted) + len(taken) == k:
                    break
        accepted += taken
        pool = [i for i in pool if i not in taken]
    return tuple(accepted)


def rejection_sample(values, starts, seeds, k, beta):
    """The compiled sampler at one temperature for all groups."""
    return kernels.algorithm_1_batch(values, starts, seeds, k, np.full(len(starts) - 1, float(beta)))


def ours(rewards, k, beta, draws=DRAWS, seed=0):
    """The compiled sampler on `draws` copies of one prompt, each with its own seed: [draws, k] of indices 0..n-1."""
    n = len(rewards)
    starts = np.arange(draws + 1) * n
    seeds = np.random.default_rng(seed).integers(2**63, size=draws, dtype=np.uint64)
    chosen, _ = rejection_sample(np.tile(np.asarray(rewards, float), draws), starts, seeds, k, beta)
    return np.where(chosen < 0, -1, chosen - starts[:-1, None])


def tail(statistic, freedom):
    """P(chi-square with that many degrees of freedom > statistic) = Q(freedom / 2, statistic / 2)."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def same_law(a: Counter, b: Counter):
    """p-value of the chi-square test that two samples have one law; rare outcomes are one class."""
    classes = [[a[key], b[key]] for key in a | b if a[key] + b[key] >= 20]
    rare = [sum(counts[key] for key in a | b if a[key] + b[key] < 20) for counts in (a, b)]
    table = np.array([*classes, *([rare] if sum(rare) else [])], float)
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    return tail(((table - expected) ** 2 / expected).sum(), len(table) - 1) if len(table) > 1 else 1.0


def follows(counts: Counter, law: dict):
    """p-value of the chi-square test that counts have the probabilities `law`, which are all positive."""
    assert set(counts) <= set(law)
    total = counts.total()
    return tail(sum((counts[key] - total * p) ** 2 / (total * p) for key, p in law.items()), len(law) - 1)


def test_the_tail_is_that_of_the_chi_square_tables():
    """P(chi2_1 > 3.841459) = P(chi2_10 > 18.307038) = 0.05; chi2_2 has the tail exp(-x / 2)."""
    assert tail(3.841459, 1) == pytest.approx(0.05, abs=1e-6)
    assert tail(18.307038, 10) == pytest.approx(0.05, abs=1e-6)
    assert tail(5.0, 2) == pytest.approx(math.exp(-2.5))


NORMALS = np.random.default_rng(7).normal(size=24).tolist()
POOLS = {
    "ties at the top": ([1.0, 1.0, 0.0, -1.0, 0.0], 2, 0.5),
    "ties below": ([1.0, 0.2, 0.2, 0.2], 3, 0.7),
    "duplicates": ([0.3] * 3 + [0.9] * 2, 2, 0.4),
    "all equal": ([-2.5] * 4, 3, 0.5),
    "1e3 apart": ([1000.0, 0.0, 999.5, -1000.0], 2, 0.5),
    "1e300": ([1e300, -1e300, 1e300, 0.0], 3, 0.5),
    "cold": ([0.0, 0.1, 0.2, 0.3], 2, 0.02),
    "warm": ([0.0, 1.0, 2.0, 3.0], 2, 1.0),
    "hot": ([0.0, 1.0, 2.0, 3.0, 4.0], 3, 2.0),
    "several rounds": ([0.0, 3.0, 6.0, 9.0], 3, 1.0),
}


@pytest.mark.parametrize("name", POOLS)
def test_ordered_draws_have_the_law_of_algorithm_1(name):
    """The whole ordered tuple of accepted indices: this sees the shuffle, the order, the rounds and each round's M."""
    rewards, k, beta = POOLS[name]
    rng = random.Random(name)
    plain = Counter(algorithm_1(rewards, k, beta, rng) for _ in range(DRAWS))
    compiled = Counter(map(tuple, ours(rewards, k, beta).tolist()))
    assert same_law(plain, compiled) > LEAST


@pytest.mark.parametrize("beta", [0.1, 0.5, 3.0])
def test_selected_indices_of_ordinary_normals_have_the_law_of_algorithm_1(beta):
    """24 candidates with r ~ N(0, 1), k = 6: how often each one is among the selected."""
    rng = random.Random(11)
    draws = 10_000
    plain = Counter(i for _ in range(draws) for i in algorithm_1(NORMALS, 6, beta, rng))
    compiled = Counter(ours(NORMALS, 6, beta, draws).ravel().tolist())
    assert same_law(plain, compiled) > LEAST


def test_the_first_draw_has_its_closed_form():
    """With w = exp((r - M) / beta), the first pass accepts i first with probability, over permutations s,

    P(i) = E_s[ w_i prod_{j before i in s} (1 - w_j) ], which sums to 1 because the maximum has w = 1.
    """
    rewards, beta = [0.0, 0.4, 1.0, 0.7], 0.6
    w = [math.exp((r - 1.0) / beta) for r in rewards]
    orders = list(itertools.permutations(range(4)))
    law = {
        (i,): sum(w[i] * math.prod(1 - w[j] for j in order[: order.index(i)]) for order in orders) / len(orders)
        for i in range(4)
    }
    assert sum(law.values()) == pytest.approx(1)
    assert follows(Counter(map(tuple, ours(rewards, 1, beta, 40_000).tolist())), law) > LEAST


def test_beta_zero_keeps_the_k_best_and_breaks_ties_uniformly():
    """r = (5, 1, 1, 1, 0), k = 3: the 5 first, then an ordered pair of the three 1s, each of 6 with 1/6."""
    counts = Counter(map(tuple, ours([5.0, 1.0, 1.0, 1.0, 0.0], 3, 0.0).tolist()))
    law = {(0, *pair): 1 / 6 for pair in itertools.permutations((1, 2, 3), 2)}
    assert follows(counts, law) > LEAST


def test_beta_infinite_is_sampling_without_replacement():
    """exp(0) accepts all, so the first k of the shuffle: each of the 5 * 4 ordered pairs with 1/20."""
    counts = Counter(map(tuple, ours([5.0, -1e3, 1.0, 1.0, 1e300], 2, math.inf).tolist()))
    assert follows(counts, dict.fromkeys(itertools.permutations(range(5), 2), 1 / 20)) > LEAST


@unhurried
@given(st.lists(finite, min_size=1, max_size=30), st.integers(1, 12), st.integers(0, 2**63))
def test_beta_zero_is_exactly_the_top_k(rewards, k, seed):
    """The rewards kept are the k largest, best first."""
    chosen, rounds = rejection_sample(
        np.array(rewards), np.array([0, len(rewards)]), np.array([seed], np.uint64), k, 0.0
    )
    kept = chosen[0][chosen[0] >= 0]
    assert [rewards[i] for i in kept] == sorted(rewards, reverse=True)[:k]
    assert set(rounds[0][: len(kept)]) <= {0}


@unhurried
@given(
    st.lists(st.lists(finite, min_size=1, max_size=12), min_size=1, max_size=5),
    st.integers(1, 14),
    st.sampled_from([0.0, 1e-9, 0.05, 0.5, 10.0, math.inf]),
    st.integers(0, 2**62),
)
def test_every_draw_is_k_different_members_of_its_own_group(groups, k, beta, seed):
    """min(k, n) distinct indices of the group; k >= n keeps all; rounds start at 0, never fall, skip none."""
    values = np.array([r for group in groups for r in group])
    starts = np.cumsum([0, *map(len, groups)])
    seeds = np.arange(len(groups), dtype=np.uint64) + np.uint64(seed)
    chosen, rounds = rejection_sample(values, starts, seeds, k, beta)
    again, _ = rejection_sample(values, starts, seeds, k, beta)
    assert (chosen == again).all()
    for g, group in enumerate(groups):
        size = min(k, len(group))
        kept, turns = chosen[g, :size], rounds[g, :size].tolist()
        assert len(set(kept.tolist())) == size
        assert ((kept >= starts[g]) & (kept < starts[g + 1])).all()
        assert (chosen[g, size:] == -1).all()
        assert turns[0] == 0
        assert all(after - before in (0, 1) for before, after in itertools.pairwise(turns))


def test_a_draw_depends_on_nothing_but_its_own_group_and_seed():
    """Other groups, their order, their number, and the number of threads leave a group's draw alone."""
    rng = np.random.default_rng(3)
    groups = [rng.normal(size=rng.integers(1, 40)) for _ in range(60)]
    seeds = rng.integers(2**63, size=60, dtype=np.uint64)

    def draws(order):
        starts = np.cumsum([0, *(len(groups[g]) for g in order)])
        chosen, _ = rejection_sample(np.concatenate([groups[g] for g in order]), starts, seeds[order], 5, 0.4)
        return {g: [i - starts[n] for i in chosen[n] if i >= 0] for n, g in enumerate(order)}

    whole = draws(np.arange(60))
    assert draws(rng.permutation(60)) == whole
    for g in (0, 17, 59):
        assert draws(np.array([g]))[g] == whole[g]
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        assert draws(np.arange(60)) == whole
    finally:
        numba.set_num_threads(before)


def tilt(values, starts, beta):
    """Acceptance and ess of each group, as the rule reports them."""
    seeds = np.zeros(len(starts) - 1, np.uint64)
    kept = selection_rule.bind({"name": "rejection_sample", "beta": beta})(RewardGroups(values, starts, seeds))
    return kept.acceptance, kept.ess


@unhurried
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=20), st.floats(0.05, 20))
def test_acceptance_and_ess_are_their_formulas(rewards, beta):
    """w = exp((r - M) / beta): acceptance = mean w, ess = (sum w)^2 / sum w^2 in [1, n]; r + c changes neither."""
    starts = np.array([0, len(rewards)])
    w = [math.exp((r - max(rewards)) / beta) for r in rewards]
    acceptance, ess = tilt(np.array(rewards), starts, beta)
    assert acceptance[0] == pytest.approx(math.fsum(w) / len(w))
    assert ess[0] == pytest.approx(math.fsum(w) ** 2 / math.fsum(x * x for x in w))
    assert 1 - 1e-9 <= ess[0] <= len(w) + 1e-9
    moved = tilt(np.array(rewards) + 8.0, starts, beta)
    assert [part[0] for part in moved] == pytest.approx([acceptance[0], ess[0]])


@pytest.mark.parametrize("beta", [0.0, 0.5, math.inf])
def test_limits_of_acceptance_and_ess(beta):
    """All equal: 1 and n at any beta. r = (2, 2, 0, 2), beta = 0: three ties, so 3/4 and 3; beta = inf: 1 and 4."""
    acceptance, ess = tilt(np.array([7.0] * 5 + [2.0, 2.0, 0.0, 2.0]), np.array([0, 5, 9]), beta)
    assert (acceptance[0], ess[0]) == (1.0, 5.0)
    if beta == 0:
        assert (acceptance[1], ess[1]) == (0.75, 3.0)
    if beta == math.inf:
        assert (acceptance[1], ess[1]) == (1.0, 4.0)


def table(rewards: dict[str, list[float]]):
    rows = [
        {"prompt_id": prompt, "candidate_id": f"{prompt}{n:03}", "reward": value}
        for prompt, values in rewards.items()
        for n, value in enumerate(values)
    ]
    return pa.Table.from_pylist(rows, schema=REWARDS)


def space():
    return StageContext(Path("unused"), WarmCache(), lambda done, total, unit: None)


def sampled(rows, ctx, seed=0, **options):
    """Room 4 by Algorithm 1 on the rewards as they are."""
    rule = selection_rule.bind({"name": "rejection_sample", "beta": 0.5} | options)
    return select(rows, ctx, rule=rule, scale=reward_scale.bind("raw"), seed=seed)


def test_select_leaves_out_rewards_that_are_not_finite():
    """Each with its reason and ids; the prompt goes on with the others; a prompt without any other has no row."""
    ctx = space()
    made = sampled(table({"a": [0.0, math.nan, 1.0, math.inf], "b": [-math.inf]}), ctx, k=4, beta=0.5)
    assert sorted(made.column("candidate_id").to_pylist()) == ["a000", "a002"]
    rejects = ctx.rejects.to_pylist()
    assert {row["candidate_id"]: row["detail"] for row in rejects} == {"a001": "nan", "a003": "inf", "b000": "-inf"}
    assert {row["reason"] for row in rejects} == {"reward is not finite"}


def test_select_keeps_the_multiplicity_of_equal_responses():
    """Seven copies of one response (equal reward) beside a worse one: with k = 8 all eight are kept, each once."""
    made = sampled(table({"a": [1.0] * 7 + [-3.0]}), space(), k=8, beta=0.5)
    assert len(set(made.column("candidate_id").to_pylist())) == 8


def test_select_draws_copies_by_their_number():
    """1 of 9 equal candidates stands out only by id: over 2,000 prompts each of the 9 is drawn with 1/9."""
    made = sampled(table({f"p{n:04}": [0.5] * 9 for n in range(2000)}), space(), k=1, beta=0.3)
    counts = Counter(name[-3:] for name in made.column("candidate_id").to_pylist())
    assert follows(counts, {f"{n:03}": 1 / 9 for n in range(9)}) > LEAST


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.sampled_from("abcdef"), st.lists(st.floats(-5, 5), min_size=1, max_size=9)), st.randoms())
def test_select_is_one_law_a_prompt_whatever_rows_stand_around_it(rewards, rng):
    """The schema holds; draws are 0..k-1; neither the rows' order nor the other prompts of the shard matter."""
    rows = table(rewards)
    made = conform(sampled(rows, space(), k=3, beta=0.5), SELECTIONS)
    order = list(range(len(rows)))
    rng.shuffle(order)
    again = sampled(rows.take(pa.array(order, pa.int64())), space(), k=3, beta=0.5)
    assert conform(again, SELECTIONS).equals(made)
    for prompt, values in rewards.items():
        alone = sampled(table({prompt: values}), space(), k=3, beta=0.5).to_pylist()
        assert alone == [row for row in made.to_pylist() if row["prompt_id"] == prompt]
        assert [row["draw"] for row in alone] == list(range(min(3, len(values))))


def test_the_seed_moves_the_draw():
    """40 prompts of 20 equal candidates: two seeds agree on all first draws with probability 20^-40."""
    rows = table({f"p{n:02}": [0.0] * 20 for n in range(40)})
    assert not sampled(rows, space(), k=1, seed=0).equals(sampled(rows, space(), k=1, seed=1))
