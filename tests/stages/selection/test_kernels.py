"""Algorithm 1 of arXiv:2309.06657, compiled, against the same written out in plain Python."""

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
from schemas.tables import REWARDS
from stages.selection import kernels
from stages.selection.groups import RewardGroups
from stages.selection.rules import selection_rule
from stages.selection.scales import reward_scale
from stages.selection.select import select

DRAWS = 12_000
LEAST = 1e-3  # p-value; the seeds are fixed, so a test that passes always passes
finite = st.floats(-1e6, 1e6)
compiling = settings(deadline=None, max_examples=60)  # the first call compiles


def algorithm_1(rewards, k, beta, rng):
    """Shuffle; then passes over the remaining ones, each with its own maximum, until k are accepted or none is left."""
    pool = list(range(len(rewards)))
    rng.shuffle(pool)
    accepted: list[int] = []
    while len(accepted) < k and pool:
        max_reward = max(rewards[i] for i in pool)
        now = []
        for i in pool:
            if rng.random() < math.exp((rewards[i] - max_reward) / beta):
                now.append(i)
                if len(accepted) + len(now) == k:
                    break
        accepted += now
        pool = [i for i in pool if i not in now]
    return tuple(accepted)


def run_kernel(groups, seeds, k, beta):
    """The kernel at one temperature on lists of rewards: indices within the prompt [G, k], -1 beyond, and rounds."""
    starts = np.cumsum([0, *map(len, groups)])
    betas = np.full(len(groups), float(beta))
    rewards = np.concatenate([np.asarray(group, float) for group in groups])
    chosen, rounds = kernels.algorithm_1_batch(rewards, starts, np.asarray(seeds, np.uint64), k, betas)
    return np.where(chosen < 0, -1, chosen - starts[:-1, None]), rounds


def draws_of(rewards, k, beta, draws=DRAWS):
    """The kernel on copies of one prompt, each with its own seed: [draws, k]."""
    seeds = np.random.default_rng(0).integers(2**63, size=draws, dtype=np.uint64)
    return run_kernel([rewards] * draws, seeds, k, beta)[0]


def tail(statistic, freedom):
    """P(chi-square with that many degrees of freedom > statistic) = Q(freedom / 2, statistic / 2)."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def same_law(a: Counter, b: Counter):
    """p-value of the chi-square test that two samples have one distribution; rare outcomes are one class."""
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
    found = [tail(3.841459, 1), tail(18.307038, 10), tail(5.0, 2)]
    assert found == pytest.approx([0.05, 0.05, math.exp(-2.5)], abs=1e-6)


POOLS = {
    "ties at the top": ([1.0, 1.0, 0.0, -1.0, 0.0], 2, 0.5),
    "duplicates below and above": ([0.3] * 3 + [0.9] * 2, 2, 0.4),
    "all equal": ([-2.5] * 4, 3, 0.5),
    "1e300": ([1e300, -1e300, 1e300, 0.0], 3, 0.5),
    "cold": ([0.0, 0.1, 0.2, 0.3], 2, 0.02),
    "warm": ([0.0, 1.0, 2.0, 3.0, 4.0], 3, 2.0),
    "several rounds": ([0.0, 3.0, 6.0, 9.0], 3, 1.0),
}


@pytest.mark.parametrize("name", POOLS)
def test_ordered_draws_have_the_law_of_algorithm_1(name):
    """The whole ordered tuple of accepted indices depends on the shuffle, the order, the passes and each maximum."""
    rewards, k, beta = POOLS[name]
    rng = random.Random(name)
    plain = Counter(algorithm_1(rewards, k, beta, rng) for _ in range(DRAWS))
    assert same_law(plain, Counter(map(tuple, draws_of(rewards, k, beta).tolist()))) > LEAST


@pytest.mark.parametrize("beta", [0.1, 3.0])
def test_selected_indices_of_ordinary_normals_have_the_law_of_algorithm_1(beta):
    """24 candidates with r ~ N(0, 1), k = 6: how often each one is among the selected."""
    rng, normals = random.Random(11), np.random.default_rng(7).normal(size=24).tolist()
    plain = Counter(i for _ in range(6_000) for i in algorithm_1(normals, 6, beta, rng))
    assert same_law(plain, Counter(draws_of(normals, 6, beta, 6_000).ravel().tolist())) > LEAST


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
    assert follows(Counter(map(tuple, draws_of(rewards, 1, beta, 40_000).tolist())), law) > LEAST


@compiling
@given(
    st.lists(st.lists(finite, min_size=1, max_size=12), min_size=1, max_size=5),
    st.integers(1, 14),
    st.sampled_from([0.0, 1e-9, 0.05, 0.5, 10.0, math.inf]),
    st.integers(0, 2**62),
)
def test_every_draw_is_k_different_members_of_its_own_group(groups, k, beta, seed):
    """min(k, n) distinct indices, the same for the same seed; rounds start at 0, never fall, skip none.

    beta = 0: exactly the k largest rewards, best first, in round 0.
    """
    seeds = np.arange(len(groups), dtype=np.uint64) + np.uint64(seed)
    chosen, rounds = run_kernel(groups, seeds, k, beta)
    assert (chosen == run_kernel(groups, seeds, k, beta)[0]).all()
    for g, group in enumerate(groups):
        size = min(k, len(group))
        indices, turns = chosen[g, :size].tolist(), rounds[g, :size].tolist()
        assert len(set(indices)) == size
        assert set(indices) <= set(range(len(group)))
        assert (chosen[g, size:] == -1).all()
        assert turns[0] == 0
        assert all(after - before in (0, 1) for before, after in itertools.pairwise(turns))
        if beta == 0:
            assert [group[i] for i in indices] == sorted(group, reverse=True)[:k]
            assert set(turns) == {0}


def test_a_draw_depends_on_nothing_but_its_own_group_and_seed():
    """Other groups, their order, their number, and the number of threads do not change a group's draw."""
    rng = np.random.default_rng(3)
    groups = [rng.normal(size=rng.integers(1, 40)) for _ in range(60)]
    seeds = rng.integers(2**63, size=60, dtype=np.uint64)

    def draws(order):
        chosen, _ = run_kernel([groups[g] for g in order], seeds[order], 5, 0.4)
        return dict(zip(order.tolist(), chosen.tolist(), strict=True))

    together, threads = draws(np.arange(60)), numba.get_num_threads()
    assert draws(rng.permutation(60)) == together
    assert all(draws(np.array([g]))[g] == together[g] for g in (0, 17, 59))
    try:
        numba.set_num_threads(1)
        assert draws(np.arange(60)) == together
    finally:
        numba.set_num_threads(threads)


def acceptance_and_ess(values, starts, beta):
    groups = RewardGroups(np.array(values), np.array(starts), np.zeros(len(starts) - 1, np.uint64))
    selection = selection_rule.bind({"name": "rejection_sample", "beta": beta})(groups)
    return [tuple(pair) for pair in zip(selection.acceptance.tolist(), selection.ess.tolist(), strict=True)]


@compiling
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=20), st.floats(0.05, 20))
def test_acceptance_and_ess_are_their_formulas(rewards, beta):
    """w = exp((r - M) / beta): acceptance = mean w, ess = (sum w)^2 / sum w^2 in [1, n]; r + c changes neither."""
    w = [math.exp((r - max(rewards)) / beta) for r in rewards]
    ((acceptance, ess),) = acceptance_and_ess(rewards, [0, len(rewards)], beta)
    assert acceptance == pytest.approx(math.fsum(w) / len(w))
    assert ess == pytest.approx(math.fsum(w) ** 2 / math.fsum(x * x for x in w))
    assert 1 - 1e-9 <= ess <= len(w) + 1e-9
    shifted = acceptance_and_ess([r + 8.0 for r in rewards], [0, len(rewards)], beta)
    assert shifted[0] == pytest.approx((acceptance, ess))


def test_limits_of_acceptance_and_ess():
    """All equal: 1 and n at any beta. r = (2, 2, 0, 2), beta = 0: three ties, so 3/4 and 3; beta = inf: 1 and 4."""
    for beta, expected in [(0.0, (0.75, 3.0)), (math.inf, (1.0, 4.0))]:
        assert acceptance_and_ess([7.0] * 5 + [2.0, 2.0, 0.0, 2.0], [0, 5, 9], beta) == [(1.0, 5.0), expected]
    assert acceptance_and_ess([7.0] * 5, [0, 5], 0.5) == [(1.0, 5.0)]


def table(rewards: dict[str, list[float]]):
    rows = [
        {"prompt_id": prompt, "candidate_id": f"{prompt}{n:03}", "reward": value}
        for prompt, values in rewards.items()
        for n, value in enumerate(values)
    ]
    return pa.Table.from_pylist(rows, schema=REWARDS)


def space():
    return StageContext(Path("unused"), WarmCache(), lambda *progress: None)


def sampled(rewards, k, seed=0, ctx=None):
    """Stage `select` by Algorithm 1 on the rewards as they are: candidate ids."""
    rule = selection_rule.bind({"name": "rejection_sample", "beta": 0.5, "k": k})
    rows = select(table(rewards), ctx or space(), rule=rule, scale=reward_scale.bind("raw"), seed=seed)
    return rows.column("candidate_id").to_pylist()


def test_select_rejects_rewards_that_are_not_finite():
    """Each with its reason and ids; the prompt keeps its others; a prompt without any other has no row."""
    ctx = space()
    assert sorted(sampled({"a": [0.0, math.nan, 1.0, math.inf], "b": [-math.inf]}, 4, ctx=ctx)) == ["a000", "a002"]
    rejects = ctx.rejects.to_pylist()
    assert {row["candidate_id"]: row["detail"] for row in rejects} == {"a001": "nan", "a003": "inf", "b000": "-inf"}
    assert {row["reason"] for row in rejects} == {"reward is not finite"}


def test_select_keeps_the_multiplicity_of_equal_responses():
    """k = 8: seven equal rewards and a worse one are all kept, once each. k = 1: each of 9 equal ones with 1/9."""
    assert len(set(sampled({"a": [1.0] * 7 + [-3.0]}, 8))) == 8
    counts = Counter(name[-3:] for name in sampled({f"p{n:04}": [0.5] * 9 for n in range(2000)}, 1))
    assert follows(counts, {f"{n:03}": 1 / 9 for n in range(9)}) > LEAST


def test_the_seed_changes_the_draw():
    """40 prompts of 20 equal candidates: two seeds agree on all first draws with probability 20^-40."""
    rewards = {f"p{n:02}": [0.0] * 20 for n in range(40)}
    assert sampled(rewards, 1, seed=0) != sampled(rewards, 1, seed=1)


@pytest.mark.parametrize(("rewards", "beta"), [([math.nan, 1.0, 2.0], 1.0), ([0.0, 1.0], math.nan)], ids=str)
def test_what_is_not_a_number_ends(rewards, beta):
    """A pass that accepts nothing would be repeated for ever; groups of such rewards cannot be made."""
    chosen, _ = run_kernel([rewards], [1], 2, beta)
    assert (chosen == -1).any()
    if math.isnan(sum(rewards)):
        with pytest.raises(ValueError, match="finite"):
            RewardGroups(np.array(rewards), np.array([0, 3]), np.array([1], np.uint64))
