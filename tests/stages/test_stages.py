"""The rooms between sampling and training, and the last one: rewards, matches, pairs, examples, evaluation."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import InputStep
from pipeline.context import StageContext, WarmCache
from pipeline.registry import Bound, Entry, entry_of
from schemas import WinnowError, conform, token_digest
from schemas.tables import (
    CANDIDATES,
    COMPARISONS,
    EVALUATIONS,
    EXAMPLES,
    JUDGEMENTS,
    OUTCOMES,
    PAIRS,
    PROMPTS,
    REFERENCE,
    REWARDS,
    SELECTIONS,
)
from stages.evaluation.evaluate import evaluate
from stages.ranking.compare import compare, knock_out
from stages.ranking.judge import judge
from stages.ranking.rankers import ranker as rankers
from stages.ranking.reward import reward
from stages.selection.pair import pair, pair_rule
from stages.selection.rules import selection_rule
from stages.training.examples import examples

few = settings(deadline=None, max_examples=20)
PAIRWISE = rankers.bind("pairwise")


def space():
    return StageContext(Path("unused"), WarmCache(), lambda done, total, unit: None)


@pytest.fixture(scope="module")
def ranker(sharp):
    """An opinionated ranker."""
    return sharp


def prompts_of(names, split="train", **columns):
    rows = [
        dict(prompt_id=name, text=f"Ask {name}.", token_ids=[0, 5, 9], split=split)
        | dict(demonstration=None, demonstration_ids=None)
        | columns
        for name in names
    ]
    return pa.Table.from_pylist(rows, schema=PROMPTS)


def candidate(prompt, k, text=None, ids=None, **columns):
    text, ids = text or f"Reply {k} to {prompt}, boat {k * k}.", ids or [20 + k, 30 + k, 1]
    row = dict(prompt_id=prompt, candidate_id=f"{prompt}-{k}", k=k, token_ids=ids, text=text, logp=None, seed=None)
    return row | dict(logp_kind="none", n_tokens=len(ids), finish_reason="stop") | columns


def candidates_of(counts, **columns):
    rows = [candidate(prompt, k, **columns) for prompt, count in counts.items() for k in range(count)]
    return pa.Table.from_pylist(rows, schema=CANDIDATES)


def selections_of(rewards, draws=None):
    """{prompt: [reward of candidate k]}, drawn in the order 0, 1, ... or in `draws`."""
    rows = [
        dict(prompt_id=prompt, candidate_id=f"{prompt}-{k}", draw=(draws or range(99))[k], round=0, reward=float(value))
        | dict(weight=1.0, beta=1.0, acceptance=1.0, ess=1.0)
        for prompt, values in rewards.items()
        for k, value in enumerate(values)
    ]
    return pa.Table.from_pylist(rows, schema=SELECTIONS)


def rule(name):
    return Bound(pair_rule.entries[name], {})


# Room 3: reward


def test_a_reward_is_n_minus_1_calls_a_prompt_and_the_baseline_has_zero(ranker):
    """r(y_b) = 0 for one random y_b a prompt; every other has a row; equal texts keep a row each."""
    counts = {"a": 5, "b": 1, "c": 3}
    ctx = space()
    table = conform(reward(prompts_of(counts), candidates_of(counts), ctx, ranker, by=PAIRWISE), REWARDS).to_pylist()
    assert ctx.counters["ranker_calls"] == 4 + 0 + 2
    assert Counter(row["prompt_id"] for row in table) == counts
    for prompt in counts:
        mine = [row for row in table if row["prompt_id"] == prompt]
        (base,) = {row["baseline_id"] for row in mine}
        assert [row["reward"] for row in mine if row["candidate_id"] == base] == [0.0]
        for row in mine:
            if row["candidate_id"] != base:
                assert row["reward"] == pytest.approx((row["logit_ab"] + row["logit_ba"]) / 2)


def test_one_order_is_the_logit_with_the_baseline_read_first(ranker):
    """orders: one is logit_ab alone; `both` has the same logit_ab and another reward."""
    counts = {"a": 4}
    one, both = (
        reward(prompts_of(counts), candidates_of(counts), space(), ranker, by=PAIRWISE, orders=orders).to_pylist()
        for orders in ("one", "both")
    )
    for a, b in zip(one, both, strict=True):
        assert a["logit_ba"] is None
        if a["candidate_id"] != a["baseline_id"]:
            assert a["reward"] == a["logit_ab"] == b["logit_ab"] != b["reward"]


def test_the_sign_of_a_reward_is_that_of_beating_the_baseline(ranker):
    """r(y) = logit P(y beats y_b): what `judge` says of y as the candidate and y_b as the opponent of the same k."""
    counts = {"a": 6, "b": 6}
    prompts, candidates = prompts_of(counts), candidates_of(counts)
    rows = candidates.to_pylist()
    named = {row["candidate_id"]: row for row in rows}
    for row in reward(prompts, candidates, space(), ranker, by=PAIRWISE).to_pylist():
        ours, base = (named[row[name]] | {"k": 0} for name in ("candidate_id", "baseline_id"))
        sides = (pa.Table.from_pylist([side], schema=CANDIDATES) for side in (ours, base))
        (verdict,) = judge(prompts, *sides, space(), ranker, by=PAIRWISE).to_pylist()
        assert row["reward"] == pytest.approx(verdict["logit"], rel=0, abs=1e-4)


def test_the_baseline_is_a_hash_of_the_prompt_and_the_seed(ranker):
    """Other prompts do not move it; over seeds it is not always the first."""
    counts = {"a": 5, "b": 5}
    prompts, candidates = prompts_of(counts), candidates_of(counts)
    both = reward(prompts, candidates, space(), ranker, by=PAIRWISE).to_pylist()
    first = candidates.filter(pa.array([True] * 5 + [False] * 5))
    alone = reward(prompts, first, space(), ranker, by=PAIRWISE).to_pylist()
    assert alone == both[:5]
    bases = {
        row["baseline_id"]
        for seed in range(6)
        for row in reward(prompts, candidates, space(), ranker, by=PAIRWISE, orders="one", seed=seed).to_pylist()
    }
    assert len(bases) > 4


def test_a_comparison_too_long_for_the_ranker_is_left_out(ranker):
    """That candidate has no reward and a reject; the others go on."""
    rows = [candidate("a", k) for k in range(3)] + [candidate("a", 3, text="q " * 130)]
    ctx = space()
    for seed in range(9):
        table = pa.Table.from_pylist(rows, schema=CANDIDATES)
        made = reward(prompts_of("a"), table, ctx, ranker, by=PAIRWISE, seed=seed).to_pylist()
        if made[0]["baseline_id"] != "a-3":
            assert [row["candidate_id"] for row in made] == ["a-0", "a-1", "a-2"]
    assert {row["reason"] for row in ctx.rejects.to_pylist()} == {"does not fit the ranker"}


# Room 3 again: compare


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=17, unique=True))
def test_a_knock_out_finds_the_best_in_k_minus_1_calls(strengths):
    """prefer = s(left) - s(right) is transitive: k - 1 matches, the strongest never loses and ends alone.

    Everyone else loses exactly once. With k = 2^m the winner plays m = log2 k matches.
    """
    strength = {str(n): value for n, value in enumerate(strengths)}
    k, best = len(strength), max(strength, key=lambda name: strength[name])
    asked = []

    def prefer(pairs):
        asked.extend(pairs)
        return [strength[a] - strength[b] for a, b in pairs]

    matches = list(knock_out(list(strength), prefer))
    assert len(matches) == len(asked) == k - 1
    losers = [match["right_id"] if match["logit"] >= 0 else match["left_id"] for match in matches]
    assert sorted(losers) == sorted(set(strength) - {best})
    played = sum(best in (match["left_id"], match["right_id"]) for match in matches)
    assert played <= math.ceil(math.log2(k))
    if k & (k - 1) == 0:
        assert played == int(math.log2(k))


@pytest.mark.parametrize("k", range(1, 10))
def test_rounds_halve_the_field_and_the_odd_one_has_a_bye(k):
    """n -> ceil(n / 2): floor(n / 2) matches a round, and in the first one the odd last one does not play."""
    matches = list(knock_out([str(n) for n in range(k)], lambda pairs: [1.0] * len(pairs)))
    field, turn = k, 0
    while field > 1:
        assert sum(match["round"] == turn for match in matches) == field // 2
        field, turn = field - field // 2, turn + 1
    assert not any(match["round"] >= turn for match in matches)
    first = {name for match in matches if match["round"] == 0 for name in (match["left_id"], match["right_id"])}
    assert (str(k - 1) in first) == (k % 2 == 0)


@pytest.mark.parametrize("k", range(1, 10))
def test_compare_costs_k_halves_or_k_minus_1_calls(ranker, k):
    """first_round: floor(k / 2) neighbours in order of acceptance. tournament: k - 1, and its round 0 is that round."""
    prompts, candidates = prompts_of("a"), candidates_of({"a": k})
    draws = [(3 * n) % k for n in range(k)] if k % 3 else list(range(k))[::-1]
    kept = selections_of({"a": [0.0] * k}, draws)
    order = [f"a-{draws.index(n)}" for n in range(k)]
    made = {}
    for name, calls in (("first_round", k // 2), ("tournament", k - 1)):
        ctx = space()
        table = compare(prompts, candidates, ctx, kept, ranker, by=PAIRWISE, rule=name)
        made[name] = conform(table, COMPARISONS).to_pylist()
        assert len(made[name]) == ctx.counters["ranker_calls"] == calls
    first = made["first_round"]
    assert [(row["left_id"], row["right_id"]) for row in first] == list(zip(order[::2], order[1::2], strict=False))
    assert [row for row in made["tournament"] if row["round"] == 0] == first


def test_one_candidate_is_no_comparison(ranker):
    """A prompt with one, or with one that the ranker can read beside the others, is a reject; the others go on."""
    rows = [candidate("a", 0), candidate("b", 0), candidate("b", 1), candidate("c", 0),
            candidate("c", 1, text="q " * 130)]  # fmt: skip
    ctx = space()
    made = compare(prompts_of("abc"), pa.Table.from_pylist(rows, schema=CANDIDATES), ctx, None, ranker, by=PAIRWISE)
    assert made.column("prompt_id").to_pylist() == ["b"]
    found = [(row["prompt_id"], row["reason"], row["detail"]) for row in ctx.rejects.to_pylist()]
    assert found == [
        ("a", "one candidate", "of 1"),
        ("c", "does not fit the ranker", ""),
        ("c", "one candidate", "of 2"),
    ]


def test_a_selection_of_one_is_never_compared():
    """Refused at plan time, for k = 1 of any rule; a rule without k, or options that are wrong, say nothing."""
    check = entry_of(compare).metadata["signature"].check

    def said(options):
        return check({"by": PAIRWISE}, {"ranker": InputStep("model"), "selections": InputStep("select", options)})

    for kept in ({"name": "best_of"}, {"name": "plain", "k": 1}):
        (problem,) = said({"rule": selection_rule.bind(kept)})
        assert f"selections by {kept['name']} keep one candidate a prompt" in problem
    for kept in ({"name": "plain", "k": 2}, {"name": "everything"}):
        assert said({"rule": selection_rule.bind(kept)}) == []
    assert said({}) == []


def test_a_comparison_is_the_judges_logit(ranker):
    """logit P(left beats right), both orders averaged: antisymmetric, and equal to what `judge` says."""
    prompts = prompts_of("a")
    left, right = candidate("a", 0), candidate("a", 1)
    table = pa.Table.from_pylist([left, right], schema=CANDIDATES)
    here, there = (
        compare(prompts, table, space(), selections_of({"a": [0, 0]}, draws), ranker, by=PAIRWISE).to_pylist()[0]
        for draws in ([0, 1], [1, 0])
    )
    assert (here["left_id"], there["left_id"]) == ("a-0", "a-1")
    assert here["logit"] == pytest.approx(-there["logit"], rel=0, abs=1e-4)
    sides = (pa.Table.from_pylist([row | {"k": 0}], schema=CANDIDATES) for row in (left, right))
    (verdict,) = judge(prompts, *sides, space(), ranker, by=PAIRWISE).to_pylist()
    assert here["logit"] == pytest.approx(verdict["logit"], abs=1e-4)


# Room 5: pair


def matches_of(rows):
    return pa.Table.from_pylist(
        [dict(prompt_id="a", left_id=f"a-{i}", right_id=f"a-{j}", logit=float(g), round=0) for i, j, g in rows],
        schema=COMPARISONS,
    )


def test_matches_are_winner_and_loser_of_each_comparison():
    """logit > 0: left is chosen; < 0: right; the gap is |logit|."""
    ctx = space()
    made = pair(candidates_of({"a": 3}), ctx, None, matches_of([(0, 1, 2.5), (1, 2, -0.5)]), rule=rule("matches"))
    found = [
        (row["chosen_id"], row["rejected_id"], row["gap"], row["rule"]) for row in conform(made, PAIRS).to_pylist()
    ]
    assert found == [("a-0", "a-1", 2.5, "matches"), ("a-2", "a-1", 0.5, "matches")]
    assert len(ctx.rejects) == 0


def test_ties_and_equal_tokens_are_left_out_with_their_reason():
    """Neither has a better side. The pair between them stays."""
    rows = [candidate("a", 0), candidate("a", 1), candidate("a", 2, ids=[20, 30, 1])]
    ctx = space()
    table = matches_of([(0, 1, 0.0), (0, 2, 1.0), (1, 2, -2.0)])
    made = pair(pa.Table.from_pylist(rows, schema=CANDIDATES), ctx, None, table, rule=rule("matches")).to_pylist()
    assert [(row["chosen_id"], row["rejected_id"]) for row in made] == [("a-2", "a-1")]
    found = [(row["reason"], row["candidate_id"], row["detail"]) for row in ctx.rejects.to_pylist()]
    assert found == [("tie", "a-0", "a-1"), ("identical responses", "a-0", "a-2")]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9), st.randoms())
def test_rules_on_selections(rewards, rng):
    """neighbours: draws (0, 1), (2, 3), ...; best_vs_worst: one pair of max and min; the gap is r(w) - r(l) > 0."""
    draws = list(range(len(rewards)))
    rng.shuffle(draws)
    kept = selections_of({"a": rewards}, draws)
    order = [draws.index(n) for n in range(len(rewards))]
    pool = candidates_of({"a": len(rewards)})
    value = {f"a-{n}": each for n, each in enumerate(rewards)}
    for name in ("neighbours", "best_vs_worst"):
        ctx = space()
        made = pair(pool, ctx, kept, rule=rule(name)).to_pylist()
        for row in made:
            assert row["gap"] == value[row["chosen_id"]] - value[row["rejected_id"]] > 0
        if name == "neighbours":
            couples = {frozenset((f"a-{i}", f"a-{j}")) for i, j in zip(order[::2], order[1::2], strict=False)}
            assert {frozenset((row["chosen_id"], row["rejected_id"])) for row in made} <= couples
            assert len(made) + len(ctx.rejects) == max(1, len(rewards) // 2)
        elif max(rewards) > min(rewards):
            (row,) = made
            assert (value[row["chosen_id"]], value[row["rejected_id"]]) == (max(rewards), min(rewards))
        else:
            assert not made


def test_a_rule_is_refused_without_the_table_that_it_reads():
    """At plan time, by name; so is a table that it would ignore."""
    check = entry_of(pair).metadata["signature"].check
    assert (
        "unwire it" in check({"rule": rule("matches")}, dict.fromkeys(("comparisons", "selections"), InputStep("x")))[0]
    )
    assert check({"rule": rule("matches")}, {"comparisons": InputStep("compare")}) == []
    assert check({"rule": rule("matches")}, {}) == ["rule matches reads comparisons; wire `comparisons` in `from`"]
    assert check({"rule": rule("neighbours")}, {"comparisons": InputStep("compare")})


# The doorway: examples


def pairs_of(rows):
    return pa.Table.from_pylist(
        [
            dict(prompt_id="a", chosen_id=f"a-{i}", rejected_id=f"a-{j}", gap=1.0, weight=1.0, rule="matches")
            for i, j in rows
        ],
        schema=PAIRS,
    )


def scores_of(prompts, candidates):
    ids = dict(zip(prompts.column("prompt_id").to_pylist(), prompts.column("token_ids").to_pylist(), strict=True))
    rows = [
        dict(prompt_id=row["prompt_id"], candidate_id=row["candidate_id"], logp=-1.5 * row["k"], n_tokens=3)
        | dict(tokens=token_digest(ids[row["prompt_id"]], row["token_ids"]), model="weights", dtype="float32")
        for row in candidates.to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=REFERENCE)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)).filter(lambda p: p[0] != p[1]), min_size=1, max_size=9))
def test_indices_point_at_the_responses_of_the_pairs_and_unused_rows_are_dropped(rows):
    """responses[chosen].candidate_id is the pair's chosen_id; only responses in some pair are there, each once."""
    prompts, candidates = prompts_of("a"), candidates_of({"a": 7})
    made = examples(prompts, space(), candidates, pairs_of(rows), reference=scores_of(prompts, candidates))
    (group,) = conform(made, EXAMPLES).to_pylist()
    names = [response["candidate_id"] for response in group["responses"]]
    assert sorted(names) == sorted({f"a-{n}" for row in rows for n in row})
    assert [(names[p["chosen"]], names[p["rejected"]]) for p in group["pairs"]] == [
        (f"a-{i}", f"a-{j}") for i, j in rows
    ]
    for response in group["responses"]:
        k = int(response["candidate_id"][2:])
        assert response["token_ids"] == [20 + k, 30 + k, 1]
        assert response["ref_logp"] == -1.5 * k
        assert response["weight"] == 0.0
    assert (group["ref_model"], group["ref_dtype"]) == ("weights", "float32")


@pytest.mark.parametrize(
    ("imitate", "weighted"),
    [
        ("nothing", set()),
        ("chosen", {"a-3"}),
        ("selected", {"a-0", "a-1", "a-2", "a-3"}),
        ("best", {"a-2"}),
        ("demonstration", {"demonstration"}),
    ],
)
def test_weights_go_to_what_is_imitated(imitate, weighted):
    """Pairs (3 over 0) are there besides; `best` is the highest reward, and on ties the earliest draw."""
    prompts = prompts_of("a", demonstration="Yes.", demonstration_ids=[8, 1])
    kept = selections_of({"a": [0.0, 2.0, 2.0, -1.0]}, draws=[3, 2, 1, 0])
    made = examples(prompts, space(), candidates_of({"a": 6}), pairs_of([(3, 0)]), kept, imitate=imitate)
    (group,) = made.to_pylist()
    found = {response["candidate_id"]: response["weight"] for response in group["responses"]}
    assert {name for name, weight in found.items() if weight} == weighted
    assert found.keys() == {"a-3", "a-0"} | weighted
    assert set(found.values()) <= {0.0, 1.0}


def test_examples_keep_to_their_split_and_say_what_has_nothing_to_teach():
    """A held-out prompt is in the held-out table only; a prompt with candidates and no pair is a reject."""
    prompts = pa.concat_tables([prompts_of("ab"), prompts_of("c", split="heldout")])
    candidates = candidates_of({"a": 2, "b": 2, "c": 2})
    both = pa.concat_tables([pairs_of([(0, 1)]), pa.Table.from_pylist([dict(prompt_id="c", chosen_id="c-0",
        rejected_id="c-1", gap=1.0, weight=1.0, rule="matches")], schema=PAIRS)])  # fmt: skip
    ctx = space()
    assert examples(prompts, ctx, candidates, both).column("prompt_id").to_pylist() == ["a"]
    assert [(row["prompt_id"], row["reason"]) for row in ctx.rejects.to_pylist()] == [("b", "nothing to learn from")]
    assert examples(prompts, space(), candidates, both, split="heldout").column("prompt_id").to_pylist() == ["c"]


def test_a_reference_on_other_tokens_or_without_a_candidate_is_refused():
    """By digest of (prompt ids, response ids); the message names the candidate."""
    prompts, candidates = prompts_of("a"), candidates_of({"a": 2})
    scores = scores_of(prompts, candidates)
    other = pa.Table.from_pylist([candidate("a", 0, ids=[7, 7, 1]), candidate("a", 1)], schema=CANDIDATES)
    with pytest.raises(WinnowError, match=r"candidate a-0 .*other tokens"):
        examples(prompts, space(), other, pairs_of([(0, 1)]), reference=scores)
    with pytest.raises(WinnowError, match="candidate a-1 has no reference log-prob"):
        examples(prompts, space(), candidates, pairs_of([(0, 1)]), reference=scores.slice(0, 1))


def test_a_prompt_that_the_reference_left_out_is_left_out_with_its_reason():
    """As one that killed its worker there; the others go on."""
    prompts, candidates, ctx = prompts_of("ab"), candidates_of({"a": 2, "b": 2}), space()
    known = scores_of(prompts, candidates_of({"a": 2}))
    both = pa.concat_tables([pairs_of([(0, 1)]), pa.Table.from_pylist([dict(prompt_id="b", chosen_id="b-0",
        rejected_id="b-1", gap=1.0, weight=1.0, rule="matches")], schema=PAIRS)])  # fmt: skip
    assert examples(prompts, ctx, candidates, both, reference=known).column("prompt_id").to_pylist() == ["a"]
    assert [(row["prompt_id"], row["reason"]) for row in ctx.rejects.to_pylist()] == [("b", "no reference log-prob")]


def test_examples_that_nothing_feeds_are_refused_at_plan_time():
    """What `imitate` reads must be wired; pairs need their candidates; no pairs and nothing to imitate is nothing."""
    check = entry_of(examples).metadata["signature"].check
    plain: dict[str, Any] = {"imitate": "nothing", "desirable": "nothing", "threshold": None, "labels": "hard"}
    given = {"prompts": InputStep("prompts", {"demonstration": "answer"})}
    assert check(plain, given | dict.fromkeys(("pairs", "candidates"), InputStep("x"))) == []
    assert check(plain | {"imitate": "demonstration"}, given) == []
    cases: list[tuple[dict[str, Any], set[str], str]] = [
        ({}, {"candidates"}, "nothing to learn from"),
        ({"imitate": "best"}, {"pairs", "candidates"}, "wire `selections`"),
        ({"imitate": "chosen"}, {"candidates"}, "wire `pairs`"),
        ({"desirable": "rewards"}, {"candidates"}, "wire `selections`"),
        ({"desirable": "pairs"}, {"candidates"}, "wire `pairs`"),
        ({}, {"pairs"}, "pairs needs candidates"),
        ({"threshold": 0.0}, {"pairs", "candidates"}, "set `desirable: rewards`, or unset it"),
        ({"threshold": 0.0, "desirable": "pairs"}, {"pairs", "candidates"}, "set `desirable: rewards`"),
    ]
    for options, wired, word in cases:
        assert word in "\n".join(check(plain | options, given | dict.fromkeys(wired, InputStep("x"))))
    kept = given | dict.fromkeys(("selections", "candidates"), InputStep("x"))
    assert check(plain | {"desirable": "rewards", "threshold": 0.0}, kept) == []
    people = given | dict.fromkeys(("pairs", "candidates"), InputStep("preferences"))
    assert "people's preferences have none" in check(plain | {"labels": "soft"}, people)[0]
    assert check(plain | {"labels": "soft"}, people | {"pairs": InputStep("pair")}) == []


@pytest.mark.parametrize(
    ("behind", "fine"),
    [
        (InputStep("prompts", {"demonstration": "answer"}), True),
        (InputStep("prompts", {"demonstration": None}), False),
        (InputStep("preferences", {"chosen": "chosen"}), False),
        (InputStep("own_candidates", {"reward": "score"}), False),
        (InputStep("prompts"), True),
        (None, True),
    ],
    ids=["named", "not named", "preferences", "own candidates", "options that did not validate", "not wired"],
)
def test_a_demonstration_that_the_data_set_has_not_is_refused_at_plan_time(behind, fine):
    """Whatever stage the prompts come from; what is wrong already (options, wires) is not said twice."""
    check = entry_of(examples).metadata["signature"].check
    options = {"imitate": "demonstration", "desirable": "nothing", "threshold": None, "labels": "hard"}
    problems = check(options, {"prompts": behind} if behind else {})
    assert problems == [] if fine else f"{behind.stage} gives none; wire it" in problems[0]


# Room 8: judge and evaluate


def test_judge_reads_pairs_of_equal_k(ranker):
    """Candidate k meets the baseline's k; a k that one side lacks is not judged; swapped sides negate the logit."""
    prompts = prompts_of("ab")
    ours = candidates_of({"a": 3, "b": 2})
    theirs = pa.Table.from_pylist(
        [candidate("a", k, text=f"No {k}.", candidate_id=f"base-a-{k}") for k in (0, 2)]
        + [candidate("b", 1, text="Um.", candidate_id="base-b-1")],
        schema=CANDIDATES,
    )
    ctx = space()
    made = conform(judge(prompts, ours, theirs, ctx, ranker, by=PAIRWISE), JUDGEMENTS).to_pylist()
    found = {(row["candidate_id"], row["baseline_id"]): row["logit"] for row in made}
    assert list(found) == [("a-0", "base-a-0"), ("a-2", "base-a-2"), ("b-1", "base-b-1")]
    assert ctx.counters["ranker_calls"] == 3
    swapped = judge(prompts, theirs, ours, space(), ranker, by=PAIRWISE).to_pylist()
    for row in swapped:
        assert row["logit"] == pytest.approx(-found[row["baseline_id"], row["candidate_id"]], rel=0, abs=1e-4)


def judged(logits):
    """{prompt: [logit of k]}: prompts, candidates, baseline, judgements."""
    counts = {prompt: len(values) for prompt, values in logits.items()}
    ours, theirs = candidates_of(counts, logp_kind="exact"), candidates_of(counts)
    renamed = [row | {"candidate_id": "base-" + row["candidate_id"]} for row in theirs.to_pylist()]
    rows = [
        dict(prompt_id=prompt, k=k, candidate_id=f"{prompt}-{k}", baseline_id=f"base-{prompt}-{k}", logit=float(value))
        for prompt, values in logits.items()
        for k, value in enumerate(values)
    ]
    return (
        prompts_of(counts),
        ours,
        pa.Table.from_pylist(renamed, schema=CANDIDATES),
        pa.Table.from_pylist(rows, schema=JUDGEMENTS),
    )


def evaluated(*tables, **options):
    outcomes, metrics = evaluate(*tables, **({"resamples": 400} | options))
    conform(outcomes, OUTCOMES), conform(metrics, EVALUATIONS)
    return outcomes.to_pylist(), {row["metric"]: row for row in metrics.to_pylist()}


def test_a_tie_is_one_half_and_the_mean_is_over_prompts():
    """a: (1 + 1/2) / 2 = 3/4; b: 0. Over prompts: 3/8, although over rows it would be 1.5 / 3 = 1/2."""
    outcomes, metrics = evaluated(*judged({"a": [2.0, 0.0], "b": [-0.1]}))
    assert [row["proxy_win"] for row in outcomes] == [1.0, 0.5, 0.0]
    assert metrics["proxy_win"]["value"] == pytest.approx(3 / 8)
    assert metrics["proxy_win"]["n"] == 2
    assert "gold_win" not in metrics
    assert "kl" not in metrics


@few
@given(st.dictionaries(st.sampled_from("abcdefgh"), st.lists(st.integers(-2, 2), min_size=1, max_size=4), min_size=1))
def test_the_interval_contains_the_mean_and_swapping_sides_mirrors_the_rate(logits):
    """low <= mean <= high, all in [0, 1]; P(win) + P(win with sides swapped) = 1, ties included."""
    _, here = evaluated(*judged(logits))
    _, there = evaluated(*judged({prompt: [-value for value in values] for prompt, values in logits.items()}))
    row = here["proxy_win"]
    assert 0 <= row["low"] <= row["value"] + 1e-12
    assert row["value"] <= row["high"] + 1e-12 <= 1 + 1e-9
    assert row["value"] + there["proxy_win"]["value"] == pytest.approx(1)
    assert row["n"] == len(logits)


def test_the_interval_shrinks_with_prompts_and_has_the_width_of_theory():
    """Half of n prompts won: the 95 % interval is 2 * 1.96 sqrt(1 / 4n) wide: 0.392 at 25, 0.098 at 400 (to 20 %)."""
    for n in (25, 100, 400):
        _, metrics = evaluated(*judged({f"p{m:03}": [1.0 if m % 2 else -1.0] for m in range(n)}), resamples=2000)
        row = metrics["proxy_win"]
        assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * math.sqrt(0.25 / n), rel=0.2)


def test_an_interval_is_the_same_every_time_and_moves_with_the_seed():
    """The resamples come from the seed."""
    tables = judged({f"p{m}": [float(m % 3) - 1] for m in range(30)})
    assert evaluated(*tables) == evaluated(*tables)
    low, other = (evaluated(*tables, seed=seed, resamples=20)[1]["proxy_win"]["low"] for seed in (0, 5))
    assert low != other


@pytest.mark.parametrize(("kind", "known"), [("exact", True), ("raw", False), ("none", False)])
def test_kl_is_there_only_where_the_draws_are_the_policys_own(kind, known):
    """E_policy[log p - log p_base] is KL; under temperature or top-k the mean is of another law: null."""
    prompts, ours, theirs, judgements = judged({"a": [1.0, 1.0], "b": [1.0]})
    rows = [row | {"logp_kind": kind} for row in ours.to_pylist()]
    ours = pa.Table.from_pylist(rows, schema=CANDIDATES)

    def logp(shift):
        scores = [
            dict(prompt_id=row["prompt_id"], candidate_id=row["candidate_id"], logp=-10.0 + shift * (1 + row["k"]))
            | dict(n_tokens=3, tokens="t", model="m", dtype="float32")
            for row in rows
        ]
        return pa.Table.from_pylist(scores, schema=REFERENCE)

    outcomes, metrics = evaluated(prompts, ours, theirs, judgements, logp(1.0), logp(0.5))
    assert [row["kl"] for row in outcomes] == ([0.5, 1.0, 0.5] if known else [None] * 3)
    assert ("kl" in metrics) == known
    if known:
        assert metrics["kl"]["value"] == pytest.approx((0.75 + 0.5) / 2)


def test_gold_reads_the_texts_of_both_sides():
    """gold = length of the text: ours against the baseline's; equal is one half; the policy's own mean beside it."""
    prompts, ours, theirs, judgements = judged({"a": [1.0], "b": [1.0]})
    rows = theirs.to_pylist()
    rows[0]["text"] += " and more"
    gold = Bound(Entry("length", lambda prompt, response: float(len(response)), {}), {})
    tables = prompts, ours, pa.Table.from_pylist(rows, schema=CANDIDATES), judgements
    outcomes, metrics = evaluated(*tables, gold=gold)
    assert [row["gold_win"] for row in outcomes] == [0.0, 0.5]
    assert metrics["gold_win"]["value"] == 0.25
    assert metrics["gold_baseline"]["value"] - metrics["gold"]["value"] == pytest.approx(len(" and more") / 2)
    assert metrics["n_tokens"]["value"] == 3.0
