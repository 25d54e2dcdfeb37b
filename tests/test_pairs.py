"""Data recipes of methods: pair rules beyond the paper's, pools, mismatched rows, labels and weights of examples."""

import math
from itertools import combinations
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.registry import Bound
from pipeline.workspace import Warm, Workspace
from schemas import WinnowError, conform
from schemas.tables import CANDIDATES, EXAMPLES, PAIRS
from stages.examples import examples
from stages.pair import pair, pair_rule
from stages.pool import mismatch, pool
from stages.reference import reference
from tests.test_rooms import candidate, candidates_of, pairs_of, prompts_of, selections_of

rewards_lists = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=9)


def space():
    return Workspace(Path("unused"), Warm(), lambda done, total, unit: None)


def rule(name, **options):
    entry = pair_rule.entries[name]
    return Bound(entry, entry.validate(options, name))


def table(rows):
    return pa.Table.from_pylist(rows, schema=CANDIDATES)


def pairs_by(name, rewards, ws=None, weights=None, logps=None, **options):
    """The rule on one prompt whose candidate k has rewards[k]: [(chosen k, rejected k, gap, weight)]."""
    rows = [candidate("a", k) | {"logp": logps[k] if logps else -1.0} for k in range(len(rewards))]
    kept = selections_of({"a": rewards}).to_pylist()
    for row, weight in zip(kept, weights or [1.0] * len(kept), strict=True):
        row["weight"] = weight
    kept = pa.Table.from_pylist(kept, schema=selections_of({}).schema)
    made = conform(pair(table(rows), ws or space(), kept, rule=rule(name, **options)), PAIRS).to_pylist()
    return [(int(row["chosen_id"][2:]), int(row["rejected_id"][2:]), row["gap"], row["weight"]) for row in made]


@given(rewards_lists)
def test_all_pairs_are_every_strict_preference_once(rewards):
    """{(i, j): r_i > r_j}, gap r_i - r_j; equal rewards say nothing, and a prompt without a pair is a reject."""
    ws = space()
    found = pairs_by("all_pairs", rewards, ws)
    expected = {
        (i, j) for i, j in ((i, j) for i in range(len(rewards)) for j in range(len(rewards))) if rewards[i] > rewards[j]
    }
    assert {(i, j) for i, j, _, _ in found} == expected
    assert len(found) == len(expected)
    assert all(gap == rewards[i] - rewards[j] and weight == 1 for i, j, gap, weight in found)
    assert [row["reason"] for row in ws.rejects.to_pylist()] == ([] if expected else ["no pair"])


@given(st.lists(st.tuples(st.integers(-3, 3).map(float), st.floats(0.1, 3)), min_size=2, max_size=7))
def test_a_pair_weighs_the_product_of_its_two(rows):
    """q_ij = w_i w_j: the chance that two independent draws from the weights are these two (up to 2)."""
    rewards, weights = zip(*rows, strict=True)
    for i, j, _, weight in pairs_by("all_pairs", list(rewards), weights=list(weights)):
        assert weight == pytest.approx(weights[i] * weights[j])


def test_mu_minus_2_sigma_is_not_the_very_worst():
    """Rewards 0 x 8, 4, -9: mean -0.5, sd 3.07, target -6.6: nearest is -9 (2.4 off), not 0 (6.6 off).

    With another -6 among them mean -1, sd 3.36, target -7.7: -9 is 1.3 off, -6 is 1.7. At one sigma, -4.4: -6.
    """
    assert [(i, j) for i, j, _, _ in pairs_by("mu_minus_2_sigma", [0.0] * 8 + [4.0, -9.0])] == [(8, 9)]
    more = [0.0] * 8 + [4.0, -9.0, -6.0]
    assert [(i, j) for i, j, _, _ in pairs_by("mu_minus_2_sigma", more)] == [(8, 9)]
    assert [(i, j) for i, j, _, _ in pairs_by("mu_minus_2_sigma", more, sigmas=1.0)] == [(8, 10)]


@given(
    st.lists(
        st.tuples(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0]), st.integers(-9, 0).map(float)), min_size=1, max_size=9
    )
)
def test_next_likelier_loser(rows):
    """For each r < 0: the r > 0 of greatest log p among those with log p below its own; none, then no pair."""
    rewards, logps = (list(side) for side in zip(*rows, strict=True))
    found = {(i, j) for i, j, _, _ in pairs_by("next_likelier_loser", rewards, logps=logps)}
    losers = {j for _, j in found}
    for j, (r, own) in enumerate(rows):
        below = [lp for reward, lp in rows if reward > 0 and lp < own]
        assert (j in losers) == (r < 0 and bool(below))
        assert all(logps[i] == max(below) and rewards[i] > 0 for i, k in found if k == j)


def test_next_likelier_loser_needs_log_probs():
    rows = table([candidate("a", k) | {"logp": None} for k in range(2)])
    with pytest.raises(WinnowError, match=r"candidates\.logp"):
        pair(rows, space(), selections_of({"a": [1.0, -1.0]}), rule=rule("next_likelier_loser"))


def test_spin_pairs_the_demonstration_with_every_own_sample():
    """Pooled: two draws and one demonstration make two pairs; a draw cut at max_tokens is left out on request."""
    prompts = prompts_of("ab", demonstration="Yes.", demonstration_ids=[8, 1])
    drawn = table([candidate("a", 0), candidate("a", 1) | {"finish_reason": "length"}, candidate("b", 0, ids=[8, 1])])
    ws = space()
    pooled = conform(pool(drawn, ws, prompts), CANDIDATES)
    shown = {row["candidate_id"] for row in pooled.to_pylist() if row["finish_reason"] == "given"}
    assert len(shown) == 2
    made = pair(pooled, ws, rule=rule("demonstration_vs_sample"), finished=True).to_pylist()
    assert [(row["chosen_id"] in shown, row["rejected_id"], row["gap"]) for row in made] == [(True, "a-0", None)]
    reasons = {(row["prompt_id"], row["reason"]) for row in ws.rejects.to_pylist()}
    assert reasons == {("a", "cut at max_tokens"), ("b", "identical responses")}
    assert len(pair(pooled, space(), rule=rule("demonstration_vs_sample"))) == 2


def test_a_pool_has_every_candidate_once_and_says_which_prompt_has_no_demonstration():
    """This round's and the last's; an equal id is one row; order by prompt."""
    now, before = candidates_of({"a": 2, "b": 1}), candidates_of({"a": 3})
    names = pool(now, space(), None, before).column("candidate_id").to_pylist()
    assert names == ["a-0", "a-1", "a-2", "b-0"]
    ws = space()
    assert pool(now, ws, prompts_of("ab")).num_rows == 3
    assert {row["reason"] for row in ws.rejects.to_pylist()} == {"no demonstration"}


@pytest.mark.parametrize("count", [1, 2, 5])
def test_mismatched_rows_are_other_prompts_responses(tiny, count):
    """One a prompt, the next prompt's first; a prompt alone has none, and says so."""
    names = "abcde"[:count]
    rows = table([candidate(name, k, ids=[20 + ord(name), 1]) for name in names for k in range(2)])
    ws = space()
    made = conform(mismatch(rows, prompts_of(names), tiny, ws), CANDIDATES).to_pylist()
    if count == 1:
        assert not made
        assert [row["reason"] for row in ws.rejects.to_pylist()] == ["no other prompt in its shard"]
        return
    own = {name: [20 + ord(name), 1] for name in names}
    assert [row["prompt_id"] for row in made] == list(names)
    assert [row["token_ids"] for row in made] == [own[name] for name in names[1:] + names[0]]


def test_labels_of_pairs_and_of_rewards():
    """pairs: +1 for the chosen, -1 for the rejected, none for one that is both. rewards: the sign; 0 says nothing."""
    prompts, pooled = prompts_of("a"), candidates_of({"a": 4})
    both = examples(prompts, space(), pooled, pairs_of([(0, 1), (1, 2)]), desirable="pairs").to_pylist()[0]
    assert {row["candidate_id"]: row["desirable"] for row in both["responses"]} == {"a-0": 1, "a-1": None, "a-2": -1}
    kept = selections_of({"a": [1.5, 0.0, -0.1, 2.0]})
    signs = conform(examples(prompts, space(), pooled, selections=kept, desirable="rewards"), EXAMPLES).to_pylist()[0]
    assert {row["candidate_id"]: row["desirable"] for row in signs["responses"]} == {"a-0": 1, "a-2": -1, "a-3": 1}


def test_mismatched_rows_stand_last_with_their_own_reference(tiny):
    """desirable 0, in no pair, scored under the prompt that they are read with."""
    prompts, pooled = prompts_of("ab"), table([candidate(name, 0, ids=[20 + ord(name), 1]) for name in "ab"])
    other = mismatch(pooled, prompts, tiny, space())
    scores = reference(prompts, pooled, tiny, space(), mismatched=other)
    kept = selections_of({"a": [1.0], "b": [-1.0]})
    made = examples(prompts, space(), pooled, None, kept, scores, other, desirable="rewards").to_pylist()
    assert [[row["desirable"] for row in group["responses"]] for group in made] == [[1, 0], [-1, 0]]
    values = {(row["prompt_id"], row["candidate_id"]): row["logp"] for row in scores.to_pylist()}
    for group in made:
        for row in group["responses"]:
            assert row["ref_logp"] == values[group["prompt_id"], row["candidate_id"]]


@given(st.floats(0, 30))
def test_soft_labels_are_the_rankers_own_probability(gap):
    """s(gap) >= 1/2; a label that people gave has no gap and stays 1."""
    rows = [row | {"gap": gap} for row in pairs_of([(0, 1)]).to_pylist()]
    made = examples(
        prompts_of("a"), space(), candidates_of({"a": 2}), pa.Table.from_pylist(rows, schema=PAIRS), labels="soft"
    )
    assert made.to_pylist()[0]["pairs"][0]["label"] == pytest.approx(1 / (1 + math.exp(-gap)), rel=1e-6)
    rows[0]["gap"] = None
    made = examples(
        prompts_of("a"), space(), candidates_of({"a": 2}), pa.Table.from_pylist(rows, schema=PAIRS), labels="soft"
    )
    assert made.to_pylist()[0]["pairs"][0]["label"] == 1.0


def test_likelihood_weights_are_those_of_the_selection():
    kept = selections_of({"a": [1.0, 0.0]}).to_pylist()
    for n, row in enumerate(kept):
        row["weight"] = 0.25 + n
    kept = pa.Table.from_pylist(kept, schema=selections_of({}).schema)
    made = examples(prompts_of("a"), space(), candidates_of({"a": 3}), selections=kept, imitate="selected").to_pylist()
    assert [row["weight"] for row in made[0]["responses"]] == [0.25, 1.25]


@pytest.mark.parametrize(
    "name", [name for name, entry in pair_rule.entries.items() if entry.facts["reads"] == "selections"]
)
@given(rewards=rewards_lists)
def test_no_rule_on_rewards_prefers_the_worse(name, rewards):
    """Whatever the rule: gap = r(chosen) - r(rejected) > 0, no pair twice, and one candidate makes none."""
    found = pairs_by(name, rewards)
    assert all(gap == rewards[i] - rewards[j] > 0 for i, j, gap, _ in found)
    assert len({(i, j) for i, j, _, _ in found}) == len(found) <= len(list(combinations(rewards, 2)))
