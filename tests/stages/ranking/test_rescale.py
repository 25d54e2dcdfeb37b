"""Rewards from 0 to 1 over all prompts: a threshold says the same of each."""

import math

import pyarrow as pa

from schemas import conform
from schemas.tables import REWARDS
from stages.ranking.rescale import rescale
from stages.selection.rules import selection_rule
from stages.selection.select import select
from tests.material import context


def rewards_of(*rewards: float, threshold: float | None = None) -> pa.Table:
    """Return rewards of candidates a, b, ...: two to a prompt."""
    rows = [dict(prompt_id=f"p{n // 2}", candidate_id="abcdefgh"[n], reward=r) for n, r in enumerate(rewards)]
    return pa.Table.from_pylist([row | {"label_threshold": threshold} for row in rows], REWARDS)


def test_a_prompt_whose_responses_are_all_bad_has_none_above_the_threshold():
    """2, 4 | -1, 0 | 1, 3 over the data: 0.6, 1 | 0, 0.2 | 0.4, 0.8. By its own scale, each would keep one."""
    table = conform(rescale(rewards_of(2.0, 4.0, -1.0, 0.0, 1.0, 3.0), context()), REWARDS)
    assert table["reward"].to_pylist() == [0.6, 1.0, 0.0, 0.2, 0.4, 0.8]
    ctx = context()
    kept = select(table, ctx, rule=selection_rule.bind({"name": "above", "threshold": 0.7}))
    assert kept["candidate_id"].to_pylist() == ["b", "f"]
    assert [(row["prompt_id"], row["reason"]) for row in ctx.rejects.to_pylist()] == [
        ("p1", "nothing above the threshold")
    ]


def test_labels_keep_what_divides_them_and_equal_rewards_are_one():
    labels = rescale(rewards_of(-1.0, 1.0, threshold=0.0), context())
    assert (labels["reward"].to_pylist(), labels["label_threshold"].to_pylist()) == ([0.0, 1.0], [0.5, 0.5])
    equal = rescale(rewards_of(3.0, 3.0), context())
    assert (equal["reward"].to_pylist(), equal["label_threshold"].to_pylist()) == ([1.0, 1.0], [None, None])


def test_labels_that_are_all_equal_still_say_right_or_wrong():
    """Of a policy that gets nothing right, no response is to be imitated."""
    for label, reward in ((0.0, 0.0), (1.0, 1.0)):
        table = conform(rescale(rewards_of(label, label, threshold=0.5), context()), REWARDS)
        assert (table["reward"].to_pylist(), table["label_threshold"].to_pylist()) == ([reward] * 2, [0.5] * 2)


def test_a_reward_that_is_not_finite_is_rejected_and_scales_no_other():
    ctx = context()
    assert rescale(rewards_of(0.0, math.inf, 2.0, math.nan), ctx)["reward"].to_pylist() == [0.0, 1.0]
    assert ctx.rejects["candidate_id"].to_pylist() == ["b", "d"]
