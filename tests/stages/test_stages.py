"""Stages between sampling and training, and evaluation: rewards, comparisons, pairs, examples, judgements, metrics."""

import math
import warnings
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import InputStep
from pipeline.context import StageContext, WarmCache
from pipeline.registry import Bound, Entry, entry_of
from schemas import WinnowError, WinnowWarning, conform, token_digest
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
from stages.evaluation.length_control import Match, length_controlled
from stages.evaluation.win_rate import win_rate
from stages.ranking.base import Ranker, Scorer
from stages.ranking.compare import compare, matches_of
from stages.ranking.judge import judge
from stages.ranking.rankers import ranker as rankers
from stages.ranking.reward import reward
from stages.selection.pair import pair, pair_rule
from stages.selection.rules import selection_rule
from stages.training.examples import examples

few = settings(deadline=None, max_examples=20)
PAIRWISE = rankers.bind("pairwise")
LONG = "q " * 130  # too long for the ranker


def context():
    return StageContext(Path("unused"), WarmCache(), lambda *progress: None)


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
    return candidate_table(candidate(prompt, k, **columns) for prompt, count in counts.items() for k in range(count))


def candidate_table(rows):
    return pa.Table.from_pylist(list(rows), schema=CANDIDATES)


def selections_of(rewards, draws=None):
    """{prompt: [reward of candidate k]}, drawn in the order 0, 1, ... or in `draws`."""
    rows = [
        dict(prompt_id=prompt, candidate_id=f"{prompt}-{k}", draw=(draws or range(99))[k], round=0, reward=float(value))
        | dict(weight=1.0, beta=1.0, acceptance=1.0, ess=1.0)
        for prompt, values in rewards.items()
        for k, value in enumerate(values)
    ]
    return pa.Table.from_pylist(rows, schema=SELECTIONS)


def pairs_of(sides, prompt="a"):
    """[(k of the chosen, k of the rejected)]."""
    common = dict(prompt_id=prompt, gap=1.0, weight=1.0, rule="matches")
    rows = [common | dict(chosen_id=f"{prompt}-{i}", rejected_id=f"{prompt}-{j}") for i, j in sides]
    return pa.Table.from_pylist(rows, schema=PAIRS)


def check_of(stage):
    return entry_of(stage).metadata["signature"].check


# reward


def test_a_reward_is_n_minus_1_calls_per_prompt_and_the_baseline_has_zero(ranker):
    """r(y_b) = 0 for one random y_b per prompt; every other has a row; equal texts have a row each."""
    counts, ctx = {"a": 5, "b": 1, "c": 3}, context()
    rows = conform(reward(prompts_of(counts), candidates_of(counts), ctx, ranker, by=PAIRWISE), REWARDS).to_pylist()
    assert ctx.counters["ranker_calls"] == 2 * (4 + 0 + 2)
    assert Counter(row["prompt_id"] for row in rows) == counts
    assert len({(row["prompt_id"], row["baseline_id"]) for row in rows}) == 3
    for row in rows:
        if row["candidate_id"] == row["baseline_id"]:
            assert row["reward"] == 0.0
        else:
            assert row["reward"] == pytest.approx((row["logit_ab"] + row["logit_ba"]) / 2)


def test_one_order_is_the_logit_with_the_baseline_read_first(ranker):
    """orders: one is logit_ab alone; `both` has the same logit_ab and another reward."""
    counts = {"a": 4}
    one, both = (
        reward(prompts_of(counts), candidates_of(counts), context(), ranker, by=PAIRWISE, orders=orders).to_pylist()
        for orders in ("one", "both")
    )
    for a, b in zip(one, both, strict=True):
        assert a["logit_ba"] is None
        if a["candidate_id"] != a["baseline_id"]:
            assert a["reward"] == a["logit_ab"] == b["logit_ab"] != b["reward"]


def test_the_sign_of_a_reward_is_that_of_beating_the_baseline(ranker):
    """r(y) = logit P(y beats y_b): the logit of `judge` where y meets the opponent y_b of the same k."""
    counts = {"a": 6, "b": 6}
    prompts, candidates = prompts_of(counts), candidates_of(counts)
    by_id = {row["candidate_id"]: row for row in candidates.to_pylist()}
    for row in reward(prompts, candidates, context(), ranker, by=PAIRWISE).to_pylist():
        sides = (candidate_table([by_id[row[name]] | {"k": 0}]) for name in ("candidate_id", "baseline_id"))
        (verdict,) = judge(prompts, *sides, context(), ranker, by=PAIRWISE).to_pylist()
        assert row["reward"] == pytest.approx(verdict["logit"], rel=0, abs=1e-4)


def test_the_baseline_is_a_hash_of_the_prompt_and_the_seed(ranker):
    """Other prompts do not change it; over seeds it is not always the first."""
    counts = {"a": 5, "b": 5}
    prompts, candidates = prompts_of(counts), candidates_of(counts)
    both = reward(prompts, candidates, context(), ranker, by=PAIRWISE).to_pylist()
    assert reward(prompts, candidates.slice(0, 5), context(), ranker, by=PAIRWISE).to_pylist() == both[:5]
    baselines = {
        row["baseline_id"]
        for seed in range(6)
        for row in reward(prompts, candidates, context(), ranker, by=PAIRWISE, orders="one", seed=seed).to_pylist()
    }
    assert len(baselines) > 4


def test_a_comparison_too_long_for_the_ranker_is_rejected(ranker):
    """That candidate has no reward and a reject; the others go on."""
    table, ctx = candidate_table([*(candidate("a", k) for k in range(3)), candidate("a", 3, text=LONG)]), context()
    for seed in range(9):
        rows = reward(prompts_of("a"), table, ctx, ranker, by=PAIRWISE, seed=seed).to_pylist()
        if rows[0]["baseline_id"] != "a-3":
            assert [row["candidate_id"] for row in rows] == ["a-0", "a-1", "a-2"]
    assert {row["reason"] for row in ctx.rejects.to_pylist()} == {"does not fit the ranker"}


# compare


def play(rule, players, prefer):
    """Return the matches of players of whom `prefer` knows the logits."""
    rounds = matches_of(rule, players)
    try:
        pairs = next(rounds)
        while True:
            pairs = rounds.send(prefer(pairs))
    except StopIteration as end:
        return end.value


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=17, unique=True))
def test_a_knock_out_finds_the_best_in_k_minus_1_calls(strengths):
    """prefer = s(left) - s(right) is transitive: k - 1 matches, the strongest never loses and ends alone.

    Everyone else loses exactly once. A round halves the field, n -> ceil(n / 2), by floor(n / 2) matches; in the first
    one an odd last candidate has a bye. With k = 2^m the winner plays m = log2 k matches, with any other k at most
    one less than there are rounds: nobody has two byes.
    """
    strength = {str(n): value for n, value in enumerate(strengths)}
    k, best = len(strength), max(strength, key=lambda name: strength[name])
    calls = []

    def prefer(pairs):
        calls.extend(pairs)
        return [strength[a] - strength[b] for a, b in pairs]

    matches = play("tournament", list(strength), prefer)
    assert len(matches) == len(calls) == k - 1
    losers = [match["right_id"] if match["logit"] >= 0 else match["left_id"] for match in matches]
    assert sorted(losers) == sorted(set(strength) - {best})
    played = sum(best in (match["left_id"], match["right_id"]) for match in matches)
    assert math.ceil(math.log2(k)) - 1 <= played <= math.ceil(math.log2(k))
    if k & (k - 1) == 0:
        assert played == int(math.log2(k))
    field, rounds = k, []
    while field > 1:
        rounds.append(field // 2)
        field -= field // 2
    assert [sum(match["round"] == n for match in matches) for n in range(len(rounds))] == rounds
    first = {name for match in matches if match["round"] == 0 for name in (match["left_id"], match["right_id"])}
    assert (str(k - 1) in first) == (k % 2 == 0)


@pytest.mark.parametrize("k", [1, 2, 5, 8, 9])
def test_compare_costs_k_halves_or_k_minus_1_calls(ranker, k):
    """first_round: floor(k / 2) neighbours in order of acceptance, and the last of an odd number is a reject.

    tournament: k - 1, and its round 0 is that round.
    """
    draws = [(3 * n) % k for n in range(k)] if k % 3 else list(range(k))[::-1]
    order = [f"a-{draws.index(n)}" for n in range(k)]
    rows = {}
    for name, calls in (("first_round", k // 2), ("tournament", k - 1)):
        ctx, selections = context(), selections_of({"a": [0.0] * k}, draws)
        table = compare(prompts_of("a"), candidates_of({"a": k}), ctx, selections, ranker, by=PAIRWISE, rule=name)
        rows[name] = conform(table, COMPARISONS).to_pylist()
        assert 2 * len(rows[name]) == ctx.counters["ranker_calls"] == 2 * calls
        odd_one = [order[-1]] if name == "first_round" and k % 2 and k > 1 else []
        rejects = [row for row in ctx.rejects.to_pylist() if row["reason"] == "no neighbour"]
        assert [row["candidate_id"] for row in rejects] == odd_one
    first = rows["first_round"]
    assert [(row["left_id"], row["right_id"]) for row in first] == list(zip(order[::2], order[1::2], strict=False))
    assert [row for row in rows["tournament"] if row["round"] == 0] == first


def test_one_candidate_is_no_comparison(ranker):
    """A prompt with one, or with one that the ranker can read beside the others, is a reject; the others go on."""
    rows = [candidate("a", 0), candidate("b", 0), candidate("b", 1), candidate("c", 0), candidate("c", 1, text=LONG)]
    ctx = context()
    table = compare(prompts_of("abc"), candidate_table(rows), ctx, None, ranker, by=PAIRWISE)
    assert table.column("prompt_id").to_pylist() == ["b"]
    assert [(row["prompt_id"], row["reason"], row["detail"]) for row in ctx.rejects.to_pylist()] == [
        ("a", "one candidate", "of 1"),
        ("c", "does not fit the ranker", "together with c-0"),
        ("c", "one candidate", "of 2"),
    ]


def test_a_selection_of_one_is_never_compared():
    """Refused at plan time, for k = 1 of any rule; a rule without k, or wrong options, are no problem here."""
    for rule, refused in [
        ({"name": "best_of"}, True),
        ({"name": "plain", "k": 1}, True),
        ({"name": "plain", "k": 2}, False),
        ({"name": "everything"}, False),
        (None, False),
    ]:
        options = {"rule": selection_rule.bind(rule)} if rule else {}
        inputs = {"ranker": InputStep("model"), "selections": InputStep("select", options)}
        problems = check_of(compare)({"by": PAIRWISE}, inputs)
        assert len(problems) == refused
        assert not refused or ("one candidate" in problems[0] and rule["name"] in problems[0])


def test_a_comparison_is_the_judges_logit(ranker):
    """logit P(left beats right), both orders averaged: antisymmetric, and equal to that of `judge`."""
    prompts, rows = prompts_of("a"), [candidate("a", 0), candidate("a", 1)]
    (here,), (there,) = (
        compare(prompts, candidate_table(rows), context(), selections_of({"a": [0, 0]}, draws), ranker, by=PAIRWISE)
        .to_pylist()
        for draws in ([0, 1], [1, 0])
    )  # fmt: skip
    assert (here["left_id"], there["left_id"]) == ("a-0", "a-1")
    assert here["logit"] == pytest.approx(-there["logit"], rel=0, abs=1e-4)
    sides = (candidate_table([row | {"k": 0}]) for row in rows)
    (verdict,) = judge(prompts, *sides, context(), ranker, by=PAIRWISE).to_pylist()
    assert here["logit"] == pytest.approx(verdict["logit"], abs=1e-4)


# pair


def rule(name):
    return Bound(pair_rule.entries[name], {})


def test_matches_are_winner_and_loser_of_each_comparison():
    """logit > 0: left is chosen; < 0: right; the gap is |logit|. Ties and equal tokens have no better side."""
    rows = [candidate("a", 0), candidate("a", 1), candidate("a", 2, ids=[20, 30, 1]), candidate("a", 3)]
    matches = pa.Table.from_pylist(
        [
            dict(prompt_id="a", left_id=f"a-{i}", right_id=f"a-{j}", logit=logit, round=0)
            for i, j, logit in [(0, 1, 2.5), (1, 2, -0.5), (0, 1, 0.0), (0, 2, 1.0), (3, 2, 1.5)]
        ],
        schema=COMPARISONS,
    )
    ctx = context()
    pairs = conform(pair(candidate_table(rows), ctx, None, matches, rule=rule("matches")), PAIRS).to_pylist()
    assert sorted((row["chosen_id"], row["rejected_id"], row["gap"], row["rule"]) for row in pairs) == [
        ("a-0", "a-1", 2.5, "matches"),
        ("a-2", "a-1", 0.5, "matches"),
        ("a-3", "a-2", 1.5, "matches"),
    ]
    rejects = [(row["reason"], row["candidate_id"], row["detail"]) for row in ctx.rejects.to_pylist()]
    assert rejects == [("tie", "a-0", "a-1"), ("identical responses", "a-0", "a-2")]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9), st.randoms())
def test_rules_on_selections(rewards, rng):
    """neighbours: draws (0, 1), (2, 3), ...; best_vs_worst: one pair of max and min; the gap is r(w) - r(l) > 0.

    Neighbours that tie are paired anew where rewards differ, so that a prompt with two rewards has a pair.
    """
    draws = list(range(len(rewards)))
    rng.shuffle(draws)
    order = [draws.index(n) for n in range(len(rewards))]
    value = {f"a-{n}": reward for n, reward in enumerate(rewards)}
    for name in ("neighbours", "best_vs_worst"):
        ctx = context()
        table = pair(candidates_of({"a": len(rewards)}), ctx, selections_of({"a": rewards}, draws), rule=rule(name))
        sides = [(row["chosen_id"], row["rejected_id"]) for row in table.to_pylist()]
        gaps = [value[chosen] - value[rejected] for chosen, rejected in sides]
        assert table.column("gap").to_pylist() == gaps
        assert all(gap > 0 for gap in gaps)
        if name == "neighbours":
            couples = {frozenset((f"a-{i}", f"a-{j}")) for i, j in zip(order[::2], order[1::2], strict=False)}
            different = {couple for couple in couples if len({value[name] for name in couple}) == 2}
            assert set(map(frozenset, sides[: len(different)])) == different
            assert bool(sides) == (len(set(rewards)) > 1)
            assert len({name for side in sides for name in side}) == 2 * len(sides)
            assert len(sides) + len(ctx.rejects) == (len(rewards) // 2 if sides else 1)
        else:
            differs = max(rewards) > min(rewards)
            assert [(value[a], value[b]) for a, b in sides] == [(max(rewards), min(rewards))] * differs


def test_a_rule_is_refused_without_the_table_that_it_uses():
    """At plan time, by name; so is a table that it would ignore."""
    check, table = check_of(pair), InputStep("x")
    assert check({"rule": rule("matches")}, {"comparisons": InputStep("compare")}) == []
    (problem,) = check({"rule": rule("matches")}, {})
    assert "matches" in problem
    assert "`comparisons`" in problem
    assert "selections" in check({"rule": rule("matches")}, {"comparisons": table, "selections": table})[0]
    assert check({"rule": rule("neighbours")}, {"comparisons": InputStep("compare")})


# examples


def scores_of(prompts, candidates):
    ids = dict(zip(prompts.column("prompt_id").to_pylist(), prompts.column("token_ids").to_pylist(), strict=True))
    rows = [
        dict(prompt_id=row["prompt_id"], candidate_id=row["candidate_id"], logp=-1.5 * row["k"], n_tokens=3)
        | dict(tokens=token_digest(ids[row["prompt_id"]], row["token_ids"]), model="weights", dtype="float32")
        for row in candidates.to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=REFERENCE)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)).filter(lambda p: p[0] != p[1]), min_size=1, max_size=9))
def test_indices_point_at_the_responses_of_the_pairs_and_unused_rows_are_dropped(sides):
    """responses[chosen].candidate_id is the pair's chosen_id; only responses in some pair are there, each once."""
    prompts, candidates = prompts_of("a"), candidates_of({"a": 7})
    table = examples(prompts, context(), candidates, pairs_of(sides), reference=scores_of(prompts, candidates))
    (group,) = conform(table, EXAMPLES).to_pylist()
    names = [response["candidate_id"] for response in group["responses"]]
    assert sorted(names) == sorted({f"a-{n}" for side in sides for n in side})
    indices = [(names[pair["chosen"]], names[pair["rejected"]]) for pair in group["pairs"]]
    assert indices == [(f"a-{i}", f"a-{j}") for i, j in sides]
    for response in group["responses"]:
        k = int(response["candidate_id"][2:])
        assert response["token_ids"] == [20 + k, 30 + k, 1]
        assert (response["ref_logp"], response["weight"]) == (-1.5 * k, 0.0)
    assert (group["ref_model"], group["ref_dtype"]) == ("weights", "float32")


def test_weights_go_to_what_is_imitated():
    """Pairs (3 over 0) are there besides; `best` is the highest reward, and on ties the earliest draw."""
    prompts = prompts_of("a", demonstration="Yes.", demonstration_ids=[8, 1])
    selections = selections_of({"a": [0.0, 2.0, 2.0, -1.0]}, draws=[3, 2, 1, 0])
    for imitate, weighted in [
        ("nothing", set()),
        ("chosen", {"a-3"}),
        ("selected", {"a-0", "a-1", "a-2", "a-3"}),
        ("best", {"a-2"}),
        ("demonstration", {"demonstration"}),
    ]:
        table = examples(prompts, context(), candidates_of({"a": 6}), pairs_of([(3, 0)]), selections, imitate=imitate)
        (group,) = table.to_pylist()
        weights = {response["candidate_id"]: response["weight"] for response in group["responses"]}
        assert weights == dict.fromkeys({"a-3", "a-0"}, 0.0) | dict.fromkeys(weighted, 1.0)


def test_the_winner_of_a_tournament_is_imitated():
    """Of 3 over 0, 2 over 1, 3 over 2: 3 alone. Where a tie left two unbeaten, the one that won more often."""
    for sides, weighted in (([(3, 0), (2, 1), (3, 2)], {"a-3"}), ([(3, 0), (2, 1), (4, 5), (2, 4)], {"a-2"})):
        table = examples(prompts_of("a"), context(), candidates_of({"a": 6}), pairs_of(sides), imitate="winner")
        (group,) = table.to_pylist()
        assert {row["candidate_id"] for row in group["responses"] if row["weight"]} == weighted


def test_prompts_of_more_than_2_gib_of_text_are_sorted():
    """2.25 GiB in one column, 64 MiB of memory: its 36 chunks are one, and nearly all rows are held out."""
    names = [f"p{n * 7919 % 2304:04d}" for n in range(2304)]
    prompts = prompts_of(names, split="heldout")
    text = pa.chunked_array([pa.array(["x" * 2**20] * 64)] * 36)
    assert text.nbytes > 2**31
    split = pa.array(["train" if n % 500 == 0 else "heldout" for n in range(2304)])
    for name, column in (("text", text), ("split", split)):
        prompts = prompts.set_column(PROMPTS.get_field_index(name), name, column)
    train = names[::500]
    assert train != sorted(train)
    pairs = pa.concat_tables([pairs_of([(0, 1)], name) for name in train])
    table = examples(prompts, context(), candidates_of(dict.fromkeys(train, 2)), pairs)
    assert table["prompt_id"].to_pylist() == sorted(train)


def test_examples_are_those_of_their_split_and_a_prompt_without_a_use_is_rejected():
    """A held-out prompt is in the held-out table only; a prompt with candidates and no pair is a reject.

    So is one without reference log-probs, as one that killed its worker there; the others go on.
    """
    prompts = pa.concat_tables([prompts_of("abd"), prompts_of("c", split="heldout")])
    candidates = candidates_of(dict.fromkeys("abcd", 2))
    pairs = pa.concat_tables([pairs_of([(0, 1)], prompt) for prompt in "acd"])
    reference = scores_of(prompts, candidates_of(dict.fromkeys("abc", 2)))
    ctx = context()
    assert examples(prompts, ctx, candidates, pairs, reference=reference).column("prompt_id").to_pylist() == ["a"]
    assert {(row["prompt_id"], row["reason"]) for row in ctx.rejects.to_pylist()} == {
        ("b", "nothing to learn from"),
        ("d", "no reference log-prob"),
    }
    heldout = examples(prompts, context(), candidates, pairs, split="heldout")
    assert heldout.column("prompt_id").to_pylist() == ["c"]


def test_a_reference_on_other_tokens_or_without_a_candidate_is_refused():
    """By digest of (prompt ids, response ids); the message names the candidate."""
    prompts, candidates = prompts_of("a"), candidates_of({"a": 2})
    reference = scores_of(prompts, candidates)
    other = candidate_table([candidate("a", 0, ids=[7, 7, 1]), candidate("a", 1)])
    with pytest.raises(WinnowError, match=r"candidate a-0 .*other tokens"):
        examples(prompts, context(), other, pairs_of([(0, 1)]), reference=reference)
    with pytest.raises(WinnowError, match="candidate a-1 has no reference log-prob"):
        examples(prompts, context(), candidates, pairs_of([(0, 1)]), reference=reference.slice(0, 1))


def test_examples_without_their_inputs_are_refused_at_plan_time():
    """`imitate` and `desirable` need their table, pairs their candidates; without any, there is nothing to learn."""
    plain: dict[str, Any] = {"imitate": "nothing", "desirable": "nothing", "threshold": None, "labels": "hard"}

    def problems(options, *names, stage="x", behind=None):
        prompts = {"prompts": behind or InputStep("prompts", {"demonstration": "answer"})}
        return check_of(examples)(plain | options, prompts | dict.fromkeys(names, InputStep(stage)))

    for options, names in [
        ({}, ("pairs", "candidates")),
        ({"imitate": "demonstration"}, ()),
        ({"desirable": "rewards", "threshold": 0.0}, ("selections", "candidates")),
        ({"labels": "soft"}, ("pairs", "candidates")),
    ]:
        assert problems(options, *names, stage="pair") == []
    for options, names, fact in [
        ({}, ("candidates",), "nothing to learn from"),
        ({"imitate": "best"}, ("pairs", "candidates"), "`selections`"),
        ({"imitate": "chosen"}, ("candidates",), "`pairs`"),
        ({"imitate": "winner"}, ("candidates",), "`pairs`"),
        ({"desirable": "rewards"}, ("candidates",), "`selections`"),
        ({"desirable": "pairs"}, ("candidates",), "`pairs`"),
        ({}, ("pairs",), "candidates"),
        ({"threshold": 0.0}, ("pairs", "candidates"), "`desirable: rewards`"),
        ({"threshold": 0.0, "desirable": "pairs"}, ("pairs", "candidates"), "`desirable: rewards`"),
    ]:
        assert fact in "\n".join(problems(options, *names))
    assert "preferences" in problems({"labels": "soft"}, "pairs", "candidates", stage="preferences")[0]

    # Demonstrations, whatever stage the prompts come from; options or inputs that are wrong already are not repeated.
    for behind in (InputStep("prompts", {"demonstration": "answer"}), InputStep("prompts")):
        assert problems({"imitate": "demonstration"}, behind=behind) == []
    assert check_of(examples)(plain | {"imitate": "demonstration"}, {}) == []
    for behind in (
        InputStep("prompts", {"demonstration": None}),
        InputStep("preferences", {"chosen": "chosen"}),
        InputStep("own_candidates", {"reward": "score"}),
    ):
        assert f"stage {behind.stage} provides none" in problems({"imitate": "demonstration"}, behind=behind)[0]


# judge and evaluate


def test_every_response_meets_every_baseline_response_or_that_of_its_k(ranker):
    """All pairs of a prompt's responses by default, those of equal k by option; swapped sides negate the logit."""
    prompts, candidates = prompts_of("ab"), candidates_of({"a": 3, "b": 2})
    baseline = candidate_table(
        candidate(prompt, k, text=f"No {k}.", candidate_id=f"base-{prompt}-{k}")
        for prompt, k in (("a", 0), ("a", 2), ("b", 1))
    )
    ctx = context()
    table = conform(judge(prompts, candidates, baseline, ctx, ranker, by=PAIRWISE), JUDGEMENTS)
    logits = {(row["candidate_id"], row["baseline_id"]): row["logit"] for row in table.to_pylist()}
    ids = [row["candidate_id"] for row in candidates.to_pylist()]
    theirs = [row["candidate_id"] for row in baseline.to_pylist()]
    assert list(logits) == [(a, b) for a, b in product(ids, theirs) if a[0] == b[len("base-")]]
    assert ctx.counters["ranker_calls"] == 2 * len(logits) == 2 * (3 * 2 + 2)
    for row in judge(prompts, baseline, candidates, context(), ranker, by=PAIRWISE).to_pylist():
        assert row["logit"] == pytest.approx(-logits[row["baseline_id"], row["candidate_id"]], rel=0, abs=1e-4)
    few = judge(prompts, candidates, baseline, context(), ranker, by=PAIRWISE, matches="same_k").to_pylist()
    equal = [("a-0", "base-a-0"), ("a-2", "base-a-2"), ("b-1", "base-b-1")]
    assert [(row["candidate_id"], row["baseline_id"]) for row in few] == equal


@pytest.mark.filterwarnings("ignore:.*the ranker cannot read")
def test_what_the_ranker_cannot_read_loses_and_its_gold_counts(ranker):
    """A policy that rambles on one of two responses: it loses those by the proxy, and gold is of all four pairs.

    gold = length of the text, so that the long one wins both of its pairs, and the other ties both.
    """
    prompts = prompts_of("a")
    ours = candidate_table([candidate("a", 0), candidate("a", 1, text=LONG, n_tokens=900)])
    theirs = candidate_table(candidate("a", k, candidate_id=f"base-{k}") for k in range(2))
    ctx = context()
    judgements = conform(judge(prompts, ours, theirs, ctx, ranker, by=PAIRWISE), JUDGEMENTS)
    assert [row["unread"] for row in judgements.to_pylist()] == [None, None, "candidate", "candidate"]
    assert ctx.counters["unread_responses"] == 2
    (reject,) = ctx.rejects.to_pylist()  # once, although it met two
    assert (reject["candidate_id"], reject["place"]) == ("a-1", "candidates")
    assert reject["reason"] == "does not fit the ranker"
    assert "base-0" in reject["detail"]
    gold = Bound(Entry("length", lambda prompt, response: float(len(response)), {}), {})
    outcomes, metrics = evaluated(prompts, ours, theirs, judgements, gold=gold)
    assert [row["proxy_win"] for row in outcomes][1] == 0.0
    assert [row["gold_win"] for row in outcomes] == [0.5, 1.0]
    expected = {"proxy_unread": 0.5, "proxy_verdicts": 0.5, "gold_win": 0.75}
    assert {name: metrics[name]["value"] for name in expected} == expected
    swapped = judge(prompts, theirs, ours, context(), ranker, by=PAIRWISE)
    assert evaluated(prompts, theirs, ours, swapped)[1]["proxy_win"]["value"] == pytest.approx(
        1 - metrics["proxy_win"]["value"]
    )


def test_two_that_a_template_refuses_together_are_unread_on_both_sides():
    """The longer one is no worse for it, as it is where both are too long together."""

    class Refusing(Ranker):
        def fits(self, context, first, second):
            raise ValueError("the chat template refuses the messages")

        def logits(self, context, pairs):
            return np.zeros(len(pairs))

    class Opened(WarmCache):
        def open_once(self, open_it, *args):
            return Refusing()

    ctx = StageContext(Path("unused"), Opened(), lambda *progress: None)
    ours = candidate_table([candidate("a", 0, n_tokens=9)])
    theirs = candidate_table([candidate("a", 0, n_tokens=3, candidate_id="base")])
    (row,) = judge(prompts_of("a"), ours, theirs, ctx, None, by=PAIRWISE).to_pylist()
    assert row["unread"] == "both"
    rejects = {row["candidate_id"]: row["reason"] for row in ctx.rejects.to_pylist()}
    assert rejects == dict.fromkeys(
        ("a-0", "base"), "the ranker cannot read it: the chat template refuses the messages"
    )


def test_what_the_ranker_cannot_read_is_in_the_rejects_with_its_reason():
    """Of both policies, for SQL to list: a ranker that says why."""

    class Picky(Scorer):
        def read(self, context, response):
            if "!" in response.text:
                raise ValueError("it shouts")
            return None if response.text == "?" else response.text

        def score(self, context, texts):
            return np.array([float(len(text)) for text in texts])

    class Opened(WarmCache):
        def open_once(self, open_it, *args):
            return Picky()

    ctx = StageContext(Path("unused"), Opened(), lambda *progress: None)
    ours = candidate_table(candidate("a", k, text=text) for k, text in enumerate(("Yes!", "Yes.", "?")))
    theirs = candidate_table(
        candidate("a", k, text=text, candidate_id=f"base-{k}") for k, text in enumerate(("No!", "No."))
    )
    rows = judge(prompts_of("a"), ours, theirs, ctx, None, by={"name": "pattern", "regex": "x"}).to_pylist()
    assert [row["unread"] for row in rows] == ["both", "candidate", "baseline", None, "both", "candidate"]
    listed = [(row["candidate_id"], row["place"], row["reason"]) for row in ctx.rejects.to_pylist()]
    shouts = "the ranker cannot read it: it shouts"
    assert listed == [
        ("a-0", "candidates", shouts), ("a-2", "candidates", "does not fit the ranker"), ("base-0", "baseline", shouts),
    ]  # fmt: skip


@pytest.mark.parametrize("stage", ["reward", "compare", "judge"])
@pytest.mark.parametrize(
    ("reason", "cure"),
    [
        ("special token <|im_end|> in the text", "bad_words"),
        ("chat messages, and the tokenizer has no chat template", "give a ranker that has one"),
        ("the chat template does not render tools", "one that does"),
        ("a call, cut at max_tokens", "raise `max_tokens`"),
        ("answer is no number", "correct it in the data file"),
        (None, "longer context"),
    ],
)
def test_many_lost_responses_are_warned_of_with_their_reason_and_its_cure(stage, reason, cure):
    """One of ten is many, and one of forty is not."""

    class Picky(Scorer):
        def read(self, context, response):
            if response.text != "?":
                return response.text
            if reason is None:
                return None
            raise ValueError(reason)

        def score(self, context, texts):
            return np.zeros(len(texts))

    class Opened(WarmCache):
        def open_once(self, open_it, *args):
            return Picky()

    def run(count):
        ctx = StageContext(Path("unused"), Opened(), lambda *progress: None)
        table = candidate_table(candidate("a", k, text="?" if not k else "Yes.") for k in range(count))
        by = Bound(Entry("picky", lambda model: None, {}), {})
        if stage == "judge":
            other = candidate_table([candidate("a", 0, candidate_id="base")])
            judge(prompts_of("a"), table, other, ctx, by=by)
        elif stage == "compare":
            compare(prompts_of("a"), table, ctx, by=by)
        else:
            reward(prompts_of("a"), table, ctx, by=by)
        return next(row for row in ctx.rejects.to_pylist() if row["candidate_id"] == "a-0")

    with pytest.warns(WinnowWarning, match="cannot be ranked") as caught:
        reject = run(10)
    (message,) = {str(item.message) for item in caught}
    assert message.startswith(f"{stage}: ")
    assert (reason or "does not fit") in message
    assert cure in message
    assert (reason or "does not fit") in reject["reason"]
    assert reason or "tokens" in reject["detail"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(40)


@pytest.mark.parametrize("unclear", [1, 2])
def test_a_comparison_without_a_verdict_is_no_response_that_cannot_be_ranked(unclear):
    """All pairs of 8 are 28: one without a verdict is less than 5 % of them, and two are more."""

    class Abstaining(Ranker):
        symmetric = abstains = True

        def fits(self, context, first, second):
            return True

        def logits(self, context, pairs):
            return np.array([np.nan if set(pair) <= {*"012"[: unclear + 1]} else 1.0 for pair in pairs])

    class Opened(WarmCache):
        def open_once(self, open_it, *args):
            return Abstaining()

    ctx = StageContext(Path("unused"), Opened(), lambda *progress: None)
    table = candidate_table(candidate("a", k, text=str(k)) for k in range(8))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compare(prompts_of("a"), table, ctx, by=Bound(Entry("by", lambda model: None, {}), {}), rule="all_pairs")
    assert ctx.rejects.num_rows == (1 if unclear == 1 else 3)
    assert [str(item.message).partition(" cannot be ranked")[0] for item in caught] == (
        ["compare: more than 5 % of a part's comparisons"] if unclear > 1 else []
    )


def test_judgements_of_other_responses_are_refused():
    prompts, candidates, baseline, judgements = judged({"a": [1.0, 1.0]})
    options = {evaluate: {}, win_rate: {"judge": "j"}}
    for stage, tables in ((evaluate, (prompts,)), (win_rate, ())):
        with pytest.raises(WinnowError, match=rf"{stage.__name__}: .* 1 responses that `candidates` lacks.*a-1"):
            stage(*tables, candidates.slice(0, 1), baseline, judgements, context(), **options[stage])
        with pytest.raises(WinnowError, match=rf"{stage.__name__}: .* 1 responses that `baseline` lacks.*base-a-0"):
            stage(*tables, candidates, baseline.slice(1), judgements, context(), **options[stage])


def judged(logits, **columns):
    """{prompt: [logit of k]}: prompts, candidates, baseline, judgements."""
    counts = {prompt: len(values) for prompt, values in logits.items()}
    baseline = candidates_of(counts).to_pylist()
    rows = [
        dict(prompt_id=prompt, k=k, candidate_id=f"{prompt}-{k}", baseline_id=f"base-{prompt}-{k}", logit=float(value))
        for prompt, values in logits.items()
        for k, value in enumerate(values)
    ]
    return (
        prompts_of(counts),
        candidates_of(counts, **{"logp_kind": "exact"} | columns),
        candidate_table(row | {"candidate_id": "base-" + row["candidate_id"]} for row in baseline),
        pa.Table.from_pylist(rows, schema=JUDGEMENTS),
    )


def evaluated(*tables, **options):
    """Rows of `outcomes`, and {metric: row of `evaluations`}."""
    outcomes, metrics = evaluate(*tables[:4], context(), *tables[4:], **({"resamples": 400} | options))
    conform(outcomes, OUTCOMES), conform(metrics, EVALUATIONS)
    return outcomes.to_pylist(), {row["metric"]: row for row in metrics.to_pylist()}


def test_a_tie_is_one_half_and_the_mean_is_over_prompts():
    """a: (1 + 1/2) / 2 = 3/4; b: 0. Over prompts: 3/8, although over rows it would be 1.5 / 3 = 1/2."""
    outcomes, metrics = evaluated(*judged({"a": [2.0, 0.0], "b": [-0.1]}))
    assert [row["proxy_win"] for row in outcomes] == [1.0, 0.5, 0.0]
    assert metrics["proxy_win"]["value"] == pytest.approx(3 / 8)
    assert metrics["proxy_win"]["n"] == 2
    assert not {"gold_win", "kl"} & set(metrics)


def test_two_responses_that_do_not_fit_a_reward_model_have_no_verdict(ctx):
    """A reward model reads each alone: of two misfits neither wins nor ties, and most comparisons are a warning.

    Short against short is a tie, misfit against short loses, misfit against misfit is unread on both sides.
    """
    by = limited_scorer()
    ours = candidate_table([candidate("a", 0), candidate("a", 1, text=LONG)])
    theirs = candidate_table([row | {"candidate_id": f"base-{row['k']}"} for row in ours.to_pylist()])
    judgements = conform(judge(prompts_of("a"), ours, theirs, ctx, by=by), JUDGEMENTS)
    assert [row["unread"] for row in judgements.to_pylist()] == [None, "baseline", "candidate", "both"]
    with pytest.warns(WinnowWarning, match=r"75.*% of the comparisons.*cannot read"):
        outcomes, metrics = evaluated(prompts_of("a"), ours, theirs, judgements)
    assert outcomes[1]["proxy_win"] == 0  # lost to the one that is read, where a tie with the misfit made it 0.25
    assert [metrics[name]["value"] for name in ("proxy_win", "proxy_unread")] == [0.375, 0.75]


def test_of_two_that_a_judge_cannot_read_neither_wins_nor_ties():
    """The comparison is unread: not a tie, not undecided, and in no win rate; a prompt of such alone has none."""
    prompts, candidates, baseline, judgements = judged({"a": [math.nan], "b": [1.0]})
    first, second = judgements.to_pylist()
    judgements = pa.Table.from_pylist([first | {"logit": None, "unread": "both"}, second], schema=JUDGEMENTS)
    with pytest.warns(WinnowWarning, match="50 % of the comparisons"):
        outcomes, metrics = evaluated(prompts, candidates, baseline, judgements)
    assert [row["proxy_win"] for row in outcomes] == [None, 1.0]
    assert (metrics["proxy_win"]["value"], metrics["proxy_win"]["n"], metrics["proxy_win_lc"]["n"]) == (1, 1, 1)
    with pytest.warns(WinnowWarning, match="50 % of the comparisons by j"):
        wins, _ = win_rate(candidates, baseline, judgements, context(), judge="j", resamples=10)
    names = ("win", "ties", "undecided", "unread")
    assert [[row[name] for name in names] for row in wins.to_pylist()] == [[None, 0, 0, 1], [1, 0, 0, 0]]


def test_two_responses_of_one_length_that_do_not_fit_together_are_unread_on_both_sides(ranker):
    """No side is favoured: neither of a pair that is too long for the ranker is the longer one."""
    half = "q " * 60
    ours = candidate_table([candidate("a", 0, text=half)])
    theirs = candidate_table([candidate("a", 0, text=half, candidate_id="base")])
    (judgement,) = judge(prompts_of("a"), ours, theirs, context(), ranker, by=PAIRWISE).to_pylist()
    assert judgement["unread"] == "both"


def test_of_candidates_compared_by_a_reward_model_only_those_that_do_not_fit_are_rejected(ctx):
    """By their own reading: the longer text, which has fewer ids here, stays."""
    table = candidate_table([candidate("a", 0), candidate("a", 1, text="!"), candidate("a", 2, text="longer")])
    (match,) = compare(prompts_of("a"), table, ctx, by=limited_scorer(misfits=("!",))).to_pylist()
    assert {match["left_id"], match["right_id"]} == {"a-0", "a-2"}
    assert [row["candidate_id"] for row in ctx.rejects.to_pylist()] == ["a-1"]


def test_two_that_do_not_fit_the_ranker_together_are_not_compared(ranker):
    """Fewer characters than the two longest texts, which fit, and more tokens: four of a llama, one of most words."""
    texts = ["Please book a boat for two.", "Please book a car for two.", "🦙" * 16, "🦙" * 17]
    table, ctx = candidate_table(candidate("a", k, text=text) for k, text in enumerate(texts)), context()
    (match,) = compare(prompts_of("a"), table, ctx, None, ranker, by=PAIRWISE).to_pylist()
    assert {match["left_id"], match["right_id"]} == {"a-0", "a-1"}
    (reject,) = ctx.rejects.to_pylist()
    assert (reject["reason"], reject["candidate_id"], reject["detail"]) == ("does not fit the ranker", "a-2", "a-3")
    assert ctx.counters["ranker_calls"] == 2


def test_a_response_that_the_ranker_cannot_read_is_no_baseline_of_rewards(ranker):
    """Whatever the seed: it is rejected, and the others are compared with one that can be read."""
    marked = "[RESPONSE B] a boat"
    table = candidate_table([candidate("a", 0), candidate("a", 1), candidate("a", 2, text=marked)])
    for seed in range(6):
        ctx = context()
        rewards = reward(prompts_of("a"), table, ctx, ranker, by=PAIRWISE, seed=seed).to_pylist()
        assert [row["candidate_id"] for row in rewards] == ["a-0", "a-1"]
        assert [row["candidate_id"] for row in ctx.rejects.to_pylist()] == ["a-2"]


def limited_scorer(misfits=(LONG,)):
    """Return a ranker that scores each response by its length, and cannot read some texts."""

    class Limited(Scorer):
        def fits(self, context, first, second):
            return not {first, second} & set(misfits)

        def score(self, context, texts):
            return np.array([float(len(text)) for text in texts])

    metadata = {"reads_model": False}
    return Bound(Entry("limited", lambda model, **options: Limited(), metadata, "ranker"), {})


@few
@given(st.dictionaries(st.sampled_from("abcdefgh"), st.lists(st.integers(-2, 2), min_size=1, max_size=4), min_size=1))
def test_the_interval_contains_the_mean_and_swapping_sides_mirrors_the_rate(logits):
    """low <= mean <= high, all in [0, 1]; P(win) + P(win with sides swapped) = 1, ties included."""
    row, swapped = (
        evaluated(*judged({prompt: [sign * value for value in values] for prompt, values in logits.items()}))[1]
        for sign in (1, -1)
    )
    row, swapped = row["proxy_win"], swapped["proxy_win"]
    assert 0 <= row["low"] <= row["value"] + 1e-12
    assert row["value"] <= row["high"] + 1e-12 <= 1 + 1e-9
    assert row["value"] + swapped["value"] == pytest.approx(1)
    assert row["n"] == len(logits)


def test_few_heldout_prompts_are_warned_of_with_the_number_that_is_enough():
    """Of 25, a rate of one half has an interval of 1.96 sqrt(1 / 100) = ±20 points; 97 have ±10 and are enough."""
    with pytest.warns(WinnowWarning, match=r"25 held-out .* ±20 points; 97 make it ±10: raise `heldout`"):
        evaluated(*judged({f"p{n}": [1.0] for n in range(25)}), resamples=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluated(*judged({f"p{n}": [1.0] for n in range(97)}), resamples=1)


def test_the_interval_shrinks_with_prompts_and_has_the_width_of_theory():
    """Half of n prompts won: the 95 % interval is 2 * 1.96 sqrt(1 / 4n) wide: 0.392 at 25, 0.098 at 400 (to 20 %)."""
    for n in (25, 100, 400):
        _, metrics = evaluated(*judged({f"p{m:03}": [1.0 if m % 2 else -1.0] for m in range(n)}), resamples=2000)
        row = metrics["proxy_win"]
        assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * math.sqrt(0.25 / n), rel=0.2)


def test_the_win_rate_at_equal_length_is_that_of_the_model_that_made_the_wins():
    """Wins drawn by s(a + b tanh(d / sd d)): s(a) is in the interval, whatever b; without an effect it is the rate."""
    rng = np.random.default_rng(0)
    for a, b in ((-0.4, 2.0), (0.3, -1.0), (0.8, 0.0)):
        longer_by = rng.integers(-40, 60, 3000)
        chance = 1 / (1 + np.exp(-(a + b * np.tanh(longer_by / longer_by.std()))))
        matches = [
            Match(f"p{n // 4}", float(win), int(d))
            for n, (win, d) in enumerate(zip(rng.random(3000) < chance, longer_by, strict=True))
        ]
        value, (low, high) = length_controlled(matches, 400, rng)
        assert low < 1 / (1 + math.exp(-a)) < high
        assert high - low < 0.09
        plain = float(np.mean([match.win for match in matches]))
        assert abs(plain - value) > 0.04 or b == 0
    # All won, all of one length: near 1, and finite; half won: one half.
    assert 0.99 < length_controlled([Match(f"p{n}", 1.0, 0) for n in range(50)], 10, rng)[0] < 1
    assert length_controlled([Match("p", 0.5, 3), Match("q", 0.5, -9)], 10, rng)[0] == pytest.approx(0.5)


def test_longer_responses_that_win_by_length_have_a_lower_controlled_rate():
    """gold = length of the text: a policy that only writes more wins, and not at equal length."""
    texts = {f"p{n}": ["x" * (20 + n % 7), "x" * (9 + n % 5)] for n in range(60)}
    tables = [
        candidate_table(
            candidate(name, 0, text=pair[side], n_tokens=len(pair[side]), candidate_id=f"{name}-{side}")
            for name, pair in texts.items()
        )
        for side in (0, 1)
    ]
    gold = Bound(Entry("length", lambda prompt, response: float(len(response)), {}), {})
    none = pa.Table.from_pylist([], schema=JUDGEMENTS)
    _, metrics = evaluated(prompts_of(texts), *tables, none, gold=gold)
    assert metrics["gold_win"]["value"] == 1.0
    assert metrics["gold_win_lc"]["value"] < 0.95
    assert "proxy_win_lc" not in metrics


def test_an_interval_is_the_same_every_time_and_moves_with_the_seed():
    """The resamples come from the seed."""
    tables = judged({f"p{m}": [float(m % 3) - 1] for m in range(30)})
    assert evaluated(*tables) == evaluated(*tables)
    low, other = (evaluated(*tables, seed=seed, resamples=20)[1]["proxy_win"]["low"] for seed in (0, 5))
    assert low != other


def test_kl_is_there_only_where_the_draws_are_the_policys_own():
    """E_policy[log p - log p_base] is KL; under temperature or top-k the mean is of another law: null."""
    for kind, expected in (
        ("exact", [0.5, 1.0, 0.5]),
        ("raw", [None] * 3),
        ("approximate", [None] * 3),
        ("none", [None] * 3),
    ):
        tables = judged({"a": [1.0, 1.0], "b": [1.0]}, logp_kind=kind)
        logps = [
            pa.Table.from_pylist(
                [
                    dict(
                        prompt_id=row["prompt_id"], candidate_id=row["candidate_id"], logp=-10 + scale * (1 + row["k"])
                    )
                    | dict(n_tokens=3, tokens="t", model="m", dtype="float32")
                    for row in tables[1].to_pylist()
                ],
                schema=REFERENCE,
            )
            for scale in (1.0, 0.5)
        ]
        outcomes, metrics = evaluated(*tables, *logps)
        assert [row["kl"] for row in outcomes] == expected
        assert ("kl" in metrics) == (kind == "exact")
        assert kind != "exact" or metrics["kl"]["value"] == pytest.approx((0.75 + 0.5) / 2)


def test_gold_reads_the_texts_of_both_sides():
    """gold = length of the text: ours against the baseline's; equal is one half; the policy's own mean beside it."""
    prompts, candidates, baseline, judgements = judged({"a": [1.0], "b": [1.0]})
    rows = baseline.to_pylist()
    rows[0]["text"] += " and more"
    gold = Bound(Entry("length", lambda prompt, response: float(len(response)), {}), {})
    outcomes, metrics = evaluated(prompts, candidates, candidate_table(rows), judgements, gold=gold)
    assert [row["gold_win"] for row in outcomes] == [0.0, 0.5]
    assert metrics["gold_win"]["value"] == 0.25
    assert metrics["gold_baseline"]["value"] - metrics["gold"]["value"] == pytest.approx(len(" and more") / 2)
    # Paired: the interval is that of the differences (0 and -9), however far apart the two prompts' lengths are.
    assert metrics["gold_gain"] | {"n": 2} == {"metric": "gold_gain", "value": -4.5, "low": -9.0, "high": 0.0, "n": 2}
    assert metrics["n_tokens"]["value"] == 3.0
