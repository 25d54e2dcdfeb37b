"""Two-valued rewards: problems with four solutions each, graded right or wrong, and what each method makes of them."""

from collections import Counter
from itertools import product

import pyarrow as pa
import pytest

from pipeline.store.fingerprints import DataPath
from schemas import conform
from schemas.tables import REWARDS, SELECTIONS
from stages.data.own_candidates import own_candidates
from stages.data.rows import label_threshold
from stages.ranking.rankers import ranker as rankers
from stages.ranking.reward import reward
from stages.selection.pair import pair
from stages.selection.rules import selection_rule
from stages.selection.select import select
from stages.training.examples import examples
from tests.stages.data.test_files import jsonl
from tests.stages.test_stages import candidate_table, candidates_of, context, prompts_of

# Every outcome of four solutions, three times, with seeds of their own: 6 problems of 48 have no wrong solution or no
# right one.
PROBLEMS = {
    f"{copy}{''.join(map(str, grades))}": [float(grade) for grade in grades]
    for copy in "abc"
    for grades in product((0, 1), repeat=4)
}
MIXED = {name for name, grades in PROBLEMS.items() if len(set(grades)) == 2}
RIGHT = {name for name, grades in PROBLEMS.items() if sum(grades) == 4}
WRONG = {name for name, grades in PROBLEMS.items() if not any(grades)}


def rewards_of(problems, threshold=0.5):
    rows = [
        dict(prompt_id=name, candidate_id=f"{name}-{k}", reward=grade, label_threshold=threshold)
        for name, grades in problems.items()
        for k, grade in enumerate(grades)
    ]
    return pa.Table.from_pylist(rows, REWARDS)


def selected(rule, scale="raw", threshold=0.5, ctx=None, problems=PROBLEMS):
    rule = selection_rule.bind(rule)
    return conform(select(rewards_of(problems, threshold), ctx or context(), rule=rule, scale=scale), SELECTIONS)


def prompts_in(table):
    return set(table.column("prompt_id").to_pylist())


def reasons(ctx):
    return Counter(row["reason"] for row in ctx.rejects.to_pylist())


def test_no_problem_that_can_teach_is_lost_by_pairs_of_neighbours():
    """Each of 42 mixed problems has a pair of right over wrong, min(right, wrong) of them at most two; the others are

    counted by name. In a fixed order of neighbours, 4 of 14 mixed outcomes would have had ties only or none at all.
    """
    ctx = context()
    selections = selected({"name": "rejection_sample", "k": 8, "beta": 0.5}, ctx=ctx)
    assert ctx.counters["prompts_with_all_candidates_kept"] == len(PROBLEMS)
    candidates = candidates_of(dict.fromkeys(PROBLEMS, 4))
    pairs = pair(candidates, ctx, selections, rule="neighbours")
    assert prompts_in(pairs) == MIXED
    assert set(pairs.column("gap").to_pylist()) == {1.0}
    n_pairs = Counter(pairs.column("prompt_id").to_pylist())
    assert all(n == min(sum(PROBLEMS[name]), 4 - sum(PROBLEMS[name])) for name, n in n_pairs.items())
    lost = reasons(ctx)
    assert (lost["all labelled right"], lost["all labelled wrong"]) == (len(RIGHT), len(WRONG))


@pytest.mark.parametrize("k", [1, 3])
def test_the_best_of_a_problem_is_never_a_wrong_solution(k):
    """RAFT imitates the best of n; where none is right it would imitate a wrong one, and with k above 1 in most."""
    ctx = context()
    rows = selected({"name": "best_of", "k": k}, ctx=ctx).to_pylist()
    assert {row["reward"] for row in rows} == {1.0}
    n_rows = Counter(row["prompt_id"] for row in rows)
    assert n_rows == {name: min(k, sum(grades)) for name, grades in PROBLEMS.items() if sum(grades)}
    assert reasons(ctx) == {"all labelled wrong": len(WRONG)}
    assert ctx.counters["prompts_with_all_candidates_kept"] == 0  # of four, the wrong ones included
    assert len(selected({"name": "best_of", "k": k}, threshold=None)) == k * len(PROBLEMS)  # rewards of any other kind


@pytest.mark.parametrize("imitate", ["selected", "best"])
def test_nothing_is_imitated_of_a_problem_without_a_right_solution(imitate):
    """Whatever selected them; the problem is counted."""
    ctx = context()
    problems = {name: PROBLEMS[name] for name in [*WRONG, *RIGHT]}
    selections = selected({"name": "everything"}, problems=problems)
    tables = candidates_of(dict.fromkeys(problems, 4)), None, selections
    groups = examples(prompts_of(problems), ctx, *tables, imitate=imitate)
    assert prompts_in(groups) == RIGHT
    assert reasons(ctx)["all labelled wrong"] == len(WRONG)


@pytest.mark.parametrize(
    ("rule", "scale"),
    [
        ({"name": "softmax_weights", "beta": 1.0}, "standardized"),
        ({"name": "softmax_weights", "ess": 2.0, "normaliser": "jackknife"}, "raw"),
        ({"name": "softmax_weights", "beta": 1.0, "normaliser": "gumbel"}, "raw"),
        ({"name": "advantage_weights", "beta": 1.0}, "raw"),
        ({"name": "chi_square", "beta": 0.5}, "raw"),
        ({"name": "above", "threshold": 0.7}, "unit"),
    ],
)
def test_weights_keep_a_problem_whose_solutions_are_all_right(rule, scale):
    """All of them, with equal weights; a problem without a right one is rejected. So is one right solution alone."""
    ctx, problems = context(), PROBLEMS | {"one": [1.0], "none": [0.0]}
    rows = selected(rule, scale, ctx=ctx, problems=problems).to_pylist()
    assert {row["prompt_id"] for row in rows} == MIXED | RIGHT | {"one"}
    weights = {(row["prompt_id"], row["weight"]) for row in rows if row["prompt_id"] in {*RIGHT, "one"}}
    assert len(weights) == len(RIGHT) + 1
    assert reasons(ctx) == {"all labelled wrong": len(WRONG) + 1}
    if rule.get("normaliser") != "gumbel":
        assert {weight for _, weight in weights} == {1.0}
    others = selected(rule, scale, threshold=None, problems=problems)  # equal rewards of any other kind say nothing
    assert prompts_in(others) == MIXED


@pytest.mark.parametrize(("values", "threshold"), [((0, 1), 0.5), ((False, True), 0.5), ((-1, 1), 0.0), ((0, 2), None)])
def test_labels_that_are_given_have_their_own_threshold(values, threshold, tiny, ctx, tmp_path):
    """One response per prompt, half of them right: 1 above 0.5 (or 0), -1 below. The mean of one reward is itself."""
    rows = [dict(prompt=f"Ask {n}.", response=f"boat {n}", grade=values[n % 2]) for n in range(6)]
    tables = own_candidates(tiny, ctx, path=DataPath(str(jsonl(tmp_path, rows))), reward="grade")
    prompts, candidates, rewards = tables
    assert set(rewards.column("label_threshold").to_pylist()) == {threshold}
    selections = select(rewards, ctx, rule=selection_rule.bind("everything"))
    groups = examples(prompts, ctx, candidates, selections=selections, desirable="rewards").to_pylist()
    reward_by_id = dict(zip(rewards["candidate_id"].to_pylist(), rewards["reward"].to_pylist(), strict=True))
    labels = {
        row["candidate_id"]: row["desirable"]
        for group in groups for row in group["responses"]
    }  # fmt: skip
    expected = {name: 1 if value == values[1] else -1 for name, value in reward_by_id.items()}
    assert labels == (expected if threshold is not None else {})


def test_labels_are_two_values_and_nothing_else():
    assert label_threshold([0.0, 1.0, 1.0]) == label_threshold([1.0]) == 0.5
    assert label_threshold([-1.0, 1.0]) == label_threshold([-1.0]) == 0.0
    assert label_threshold([0.0, 0.5, 1.0]) is label_threshold([1.0, 2.0]) is label_threshold([]) is None


def test_a_program_says_that_its_scores_are_labels(ctx):
    """`pattern` does, and `brevity` does not."""
    tables = prompts_of("a"), candidate_table(candidates_of({"a": 2}).to_pylist()), ctx
    for by, threshold in (({"name": "pattern", "regex": "boat"}, 0.5), ({"name": "brevity", "words": 1}, None)):
        table = reward(*tables, by=rankers.bind(by))
        assert table.column("label_threshold").to_pylist() == [threshold] * 2
