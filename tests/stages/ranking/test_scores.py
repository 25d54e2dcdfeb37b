"""Scores from many comparisons, and sums of several rankers: oracles, and the properties of both."""

import re
from itertools import combinations
from pathlib import Path

import choix
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline import InputStep
from pipeline.context import StageContext, WarmCache
from pipeline.registry import entry_of
from schemas import WinnowError, conform
from schemas.tables import COMPARISONS, REWARDS
from stages.ranking.combine import combine
from stages.ranking.score import score, score_method

few = settings(deadline=None, max_examples=40)
METHODS = ("least_squares", "bradley_terry")
small = st.integers(-40, 40).map(lambda n: n / 8)
mild = st.integers(-16, 16).map(lambda n: n / 8)  # a ridge of 1e-6 moves these by less than 1e-3


def new_context():
    return StageContext(Path("unused"), WarmCache(), lambda *progress: None)


def comparisons_of(rows, prompt="p"):
    matches = [
        dict(prompt_id=prompt, left_id=f"c{i}", right_id=f"c{j}", logit=float(logit), round=0) for i, j, logit in rows
    ]
    return pa.Table.from_pylist(matches, schema=COMPARISONS)


def scored(rows, name, ctx=None, **options):
    table = score(comparisons_of(rows), ctx or new_context(), method=score_method.bind({"name": name} | options))
    return {row["candidate_id"]: row["reward"] for row in conform(table, REWARDS).to_pylist()}


@st.composite
def connected(draw):
    """(i, j, logit) over n items: a random tree, and any more comparisons, also repeated ones."""
    n = draw(st.integers(2, 7))
    tree = [(draw(st.integers(0, j - 1)), j) for j in range(1, n)]
    couple = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda pair: pair[0] != pair[1])
    edges = tree + draw(st.lists(couple, max_size=12))
    return [(i, j, draw(small)) for i, j in edges]


@pytest.mark.parametrize("name", METHODS)
@few
@given(strengths=st.lists(mild, min_size=2, max_size=7), data=st.data())
def test_noiseless_comparisons_give_the_strengths_back(name, strengths, data):
    """g_ij = s_i - s_j on any connected graph: theta = s - mean(s). Bradley-Terry as its ridge goes to 0."""
    n = len(strengths)
    tree = [(data.draw(st.integers(0, j - 1)), j) for j in range(1, n)]
    others = data.draw(st.lists(st.sampled_from(list(combinations(range(n), 2))), max_size=9))
    rows = [(i, j, strengths[i] - strengths[j]) for i, j in tree + others]
    rewards = scored(rows, name, **({"ridge": 1e-6} if name == "bradley_terry" else {}))
    expected = np.array(strengths) - np.mean(strengths)
    assert [rewards[f"c{k}"] for k in range(n)] == pytest.approx(expected.tolist(), abs=1e-3)


@few
@given(connected())
def test_least_squares_is_numpys_least_squares(rows):
    """The minimum-norm solution of A theta = g, which has sum theta = 0; equal to 1e-8."""
    n = 1 + max(max(i, j) for i, j, _ in rows)
    matrix = np.zeros((len(rows), n))
    for m, (i, j, _) in enumerate(rows):
        matrix[m, i], matrix[m, j] = 1, -1
    expected = np.linalg.lstsq(matrix, np.array([logit for _, _, logit in rows]), rcond=None)[0]
    rewards = scored(rows, "least_squares")
    assert [rewards[f"c{k}"] for k in range(n)] == pytest.approx(expected.tolist(), abs=1e-8)


@few
@given(connected(), st.sampled_from([1e-3, 1e-2, 1.0]))
def test_bradley_terry_is_choix_on_hard_wins(rows, ridge):
    """A logit of +-60 is a win for certain in float64; choix's penalty is alpha |theta|^2, so alpha = ridge / 2.

    By BFGS: its default stops 1e-4 from the optimum where the ridge alone holds a score down (its gradient tells).
    """
    wins = [(i, j) if logit >= 0 else (j, i) for i, j, logit in rows]
    n = 1 + max(map(max, wins))
    expected = choix.opt_pairwise(n, wins, alpha=ridge / 2, tol=1e-12, method="BFGS")
    rewards = scored([(i, j, 60) for i, j in wins], "bradley_terry", ridge=ridge)
    assert [rewards[f"c{k}"] for k in range(n)] == pytest.approx((expected - expected.mean()).tolist(), abs=1e-4)


@few
@given(st.integers(2, 6), st.data())
def test_bradley_terry_is_choix_on_soft_wins(n, data):
    """Everyone against everyone with soft counts P and 1 - P: the maximum likelihood of choix's spectral method."""
    rows = [(i, j, data.draw(mild)) for i, j in combinations(range(n), 2)]
    counts = np.zeros((n, n))
    for i, j, logit in rows:
        counts[i, j] = 1 / (1 + np.exp(-logit))
        counts[j, i] = 1 - counts[i, j]
    expected = choix.ilsr_pairwise_dense(counts, max_iter=10_000, tol=1e-10)
    rewards = scored(rows, "bradley_terry", ridge=1e-6)
    assert [rewards[f"c{k}"] for k in range(n)] == pytest.approx((expected - expected.mean()).tolist(), abs=1e-3)


@few
@given(connected(), st.sampled_from([1e-6, 1e-2, 3.0]))
def test_bradley_terry_is_where_its_gradient_vanishes(rows, ridge):
    """sum over comparisons of (s(theta_i - theta_j) - s(g_ij)) (e_i - e_j) + ridge theta = 0, and sum theta = 0."""
    rewards = scored(rows, "bradley_terry", ridge=ridge)
    gradient = {name: ridge * value for name, value in rewards.items()}
    for i, j, logit in rows:
        excess = 1 / (1 + np.exp(rewards[f"c{j}"] - rewards[f"c{i}"])) - 1 / (1 + np.exp(-logit))
        gradient[f"c{i}"] += excess
        gradient[f"c{j}"] -= excess
    assert max(map(abs, gradient.values())) < 1e-6
    assert abs(sum(rewards.values())) < 1e-6


@pytest.mark.parametrize("name", METHODS)
@few
@given(rows=connected(), order=st.randoms())
def test_sides_and_order_of_comparisons_do_not_matter(name, rows, order):
    """(i, j, g) says what (j, i, -g) says; all signs turned round, all rewards are."""
    rewards = scored(rows, name)
    mixed = [(j, i, -g) if order.random() < 0.5 else (i, j, g) for i, j, g in rows]
    order.shuffle(mixed)
    assert scored(mixed, name) == pytest.approx(rewards, abs=3e-8)
    against = scored([(i, j, -g) for i, j, g in rows], name)
    assert against == pytest.approx({candidate: -value for candidate, value in rewards.items()}, abs=3e-8)


@pytest.mark.parametrize("name", METHODS)
def test_the_unbeaten_are_finite(name):
    """c0 has won for certain; least squares takes the logit at its word, the ridge keeps Bradley-Terry near."""
    rewards = scored([(0, 1, 800.0), (0, 2, 800.0), (1, 2, 0.0)], name)
    assert all(np.isfinite(value) for value in rewards.values())
    assert rewards["c0"] > rewards["c1"] == pytest.approx(rewards["c2"])


@pytest.mark.parametrize("name", METHODS)
@few
@given(others=st.lists(small, min_size=1, max_size=5), between=st.booleans())
def test_duplicates_tie_exactly(name, others, between):
    """Two candidates with the same comparisons have the same reward to the last bit: a pair of them is a tie."""
    rows = [(k, n, g) for n, g in enumerate(others, 2) for k in (0, 1)] + [(0, 1, 0.0)] * between
    rewards = scored(rows, name)
    assert rewards["c0"] == rewards["c1"]


@pytest.mark.parametrize("name", METHODS)
def test_groups_never_compared_with_each_other_keep_the_largest(name):
    """{0, 1, 2} and {3, 4}: nothing says how they stand to each other. The three have sum 0, the two a reject."""
    ctx = new_context()
    rewards = scored([(3, 4, 1.0), (2, 1, 0.5), (0, 1, -1.0)], name, ctx)
    assert sorted(rewards) == ["c0", "c1", "c2"]
    assert sum(rewards.values()) == pytest.approx(0, abs=1e-7)
    assert rewards["c2"] > rewards["c1"] > rewards["c0"]
    rejects = [(row["candidate_id"], row["reason"]) for row in ctx.rejects.to_pylist()]
    assert rejects == [("c3", "not compared with the rest"), ("c4", "not compared with the rest")]
    assert sorted(scored([(3, 4, 1.0), (0, 1, 2.0)], name)) == ["c0", "c1"], "of equal size: the first id's"


def test_prompts_are_solved_apart():
    """The comparisons of one prompt do not change the rewards of another."""
    a, b = [(0, 1, 1.0), (1, 2, 2.0)], [(0, 1, -3.0)]
    both = pa.concat_tables([comparisons_of(a, "a"), comparisons_of(b, "b")])
    rows = score(both, new_context(), method=score_method.bind("least_squares")).to_pylist()
    assert [row["reward"] for row in rows] == [
        *scored(a, "least_squares").values(),
        *scored(b, "least_squares").values(),
    ]
    assert [row["prompt_id"] for row in rows] == ["a"] * 3 + ["b"] * 2


def test_a_ridge_of_zero_is_rejected():
    with pytest.raises(WinnowError, match="ridge"):
        score_method.bind({"name": "bradley_terry", "ridge": 0.0})


# Sums of several rankers


def rewards_of(values, prompt="p"):
    rows = [dict(prompt_id=prompt, candidate_id=name, reward=float(value)) for name, value in values.items()]
    return pa.Table.from_pylist(rows, schema=REWARDS)


numbers = st.floats(-100, 100)
names = st.sampled_from([f"c{n}" for n in range(5)])
values_of = st.dictionaries(names, numbers, min_size=1)


@given(st.lists(values_of, min_size=1, max_size=4), st.lists(numbers, min_size=4, max_size=4), st.randoms())
def test_a_sum_is_weighted_and_lists_its_addends(parts, weights, order):
    """reward = sum_m w_m r_m over the candidates that all rankers have, with each r_m; the others are rejects."""
    inputs = dict(zip(("first", "second", "third", "fourth"), parts, strict=False))
    by_name = dict(zip(inputs, weights, strict=False))
    common = set.intersection(*(set(part) for part in parts))
    assume(common)
    shuffled = {name: list(part.items()) for name, part in inputs.items()}
    for part in shuffled.values():
        order.shuffle(part)
    ctx = new_context()
    table = combine(ctx=ctx, weights=by_name, **{name: rewards_of(dict(part)) for name, part in shuffled.items()})
    rows = conform(table, REWARDS).to_pylist()
    assert [row["candidate_id"] for row in rows] == sorted(common)
    for row in rows:
        assert dict(row["components"]) == {name: part[row["candidate_id"]] for name, part in inputs.items()}
        expected = sum(by_name[name] * value for name, value in dict(row["components"]).items())
        assert row["reward"] == pytest.approx(expected, abs=1e-9)
    assert {row["candidate_id"] for row in ctx.rejects.to_pylist()} == set().union(*parts) - common


def test_a_candidate_that_a_ranker_lacks_or_cannot_number_is_rejected():
    ctx = new_context()
    second = rewards_of({"c0": 1, "c2": float("nan")})
    table = combine(rewards_of({"c0": 2, "c1": 5, "c2": 1}), ctx, second, weights={"first": 1.0, "second": -0.5})
    assert [(row["candidate_id"], row["reward"]) for row in table.to_pylist()] == [("c0", 1.5)]
    rejects = [(row["candidate_id"], row["reason"], row["detail"]) for row in ctx.rejects.to_pylist()]
    assert rejects[0] == ("c1", "no reward from every ranker", "none from second")
    assert rejects[1][:2] == ("c2", "reward is not finite")


def test_one_candidate_id_under_two_prompts_is_two_candidates():
    both = pa.concat_tables([rewards_of({"c0": 1}, "a"), rewards_of({"c0": 2}, "b")])
    rows = combine(both, new_context(), both, weights={"first": 1.0, "second": 1.0}).to_pylist()
    assert [(row["prompt_id"], row["reward"]) for row in rows] == [("a", 2.0), ("b", 4.0)]


def test_weights_name_exactly_the_inputs():
    """At plan time: a weight without its ranker, or a ranker without its weight, would change the reward silently."""
    check = entry_of(combine).metadata["signature"].check
    inputs = {"first": InputStep("reward"), "second": InputStep("score")}
    assert check({"weights": {"first": 1.0, "second": 0.5}}, inputs) == []
    for weights, facts in (
        ({"first": 1.0}, "second.*no weight.*`weights.second`"),
        ({"first": 1.0, "second": 1.0, "thrid": 1.0}, r"weights\.thrid: no such input.*first, second"),
        ({"first": float("inf"), "second": 1.0}, r"weights\.first: must be finite \(got inf\)"),
    ):
        (problem,) = check({"weights": weights}, inputs)
        assert re.search(facts, problem)
