"""Data recipes of methods: pair rules beyond the paper's, pools, mismatched rows, labels and weights of examples."""

import math
from fractions import Fraction
from itertools import combinations, product
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import recipes
from pipeline import InputStep
from pipeline.context import StageContext, WarmCache
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.registry import Bound, entry_of
from pipeline.store.store import Store
from schemas import WinnowError, candidate_id, conform
from schemas.tables import CANDIDATES, EXAMPLES, PAIRS
from stages.data.rows import cutoff
from stages.sampling.pool import mismatch, pool
from stages.selection.pair import pair, pair_rule
from stages.training.examples import examples
from stages.training.reference import reference
from tests.pipeline.config.test_recipe import own_candidates_config
from tests.runs import Silent
from tests.stages.test_stages import candidate, candidates_of, pairs_of, prompts_of, selections_of

rewards_lists = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=9)


def space():
    return StageContext(Path("unused"), WarmCache(), lambda *progress: None)


def rule(name, **options):
    entry = pair_rule.entries[name]
    return Bound(entry, entry.validate(options, name))


def table(rows):
    return pa.Table.from_pylist(rows, schema=CANDIDATES)


def selections_with(rewards, weights):
    """Selections of prompt a with these weights."""
    rows = [row | {"weight": w} for row, w in zip(selections_of({"a": rewards}).to_pylist(), weights, strict=True)]
    return pa.Table.from_pylist(rows, schema=selections_of({}).schema)


def pairs_by(name, rewards, ctx=None, weights=None, logps=None, **options):
    """The rule on one prompt whose candidate k has rewards[k]: [(chosen k, rejected k, gap, weight)]."""
    candidates = table([candidate("a", k) | {"logp": logps[k] if logps else -1.0} for k in range(len(rewards))])
    selections = selections_with(rewards, weights or [1.0] * len(rewards))
    rows = conform(pair(candidates, ctx or space(), selections, rule=rule(name, **options)), PAIRS).to_pylist()
    return [(int(row["chosen_id"][2:]), int(row["rejected_id"][2:]), row["gap"], row["weight"]) for row in rows]


@given(st.lists(st.tuples(st.integers(-3, 3).map(float), st.floats(0.1, 3)), min_size=1, max_size=9))
def test_all_pairs_are_every_strict_preference_once(rows):
    """{(i, j): r_i > r_j}, gap r_i - r_j; a prompt with equal rewards, or one candidate, is rejected.

    Weight w_i w_j: the chance that two independent draws from the weights are these two (up to 2).
    """
    ctx, (rewards, weights) = space(), map(list, zip(*rows, strict=True))
    pairs = pairs_by("all_pairs", rewards, ctx, weights)
    expected = [(i, j) for i, j in product(range(len(rewards)), repeat=2) if rewards[i] > rewards[j]]
    assert sorted((i, j) for i, j, _, _ in pairs) == expected
    for i, j, gap, weight in pairs:
        assert (gap, weight) == (rewards[i] - rewards[j], pytest.approx(weights[i] * weights[j]))
    reason = "all rewards equal" if len(rewards) > 1 else "one candidate"
    assert [row["reason"] for row in ctx.rejects.to_pylist()] == ([] if expected else [reason])


def test_mu_minus_2_sigma_is_not_the_very_worst():
    """Rewards 0 x 8, 4, -9: mean -0.5, sd 3.07, target -6.6: nearest is -9 (2.4 off), not 0 (6.6 off).

    With another -6 among them mean -1, sd 3.36, target -7.7: -9 is 1.3 off, -6 is 1.7. At one sigma, -4.4: -6.
    """
    few = [0.0] * 8 + [4.0, -9.0]
    for rewards, options, rejected in [(few, {}, 9), ([*few, -6.0], {}, 9), ([*few, -6.0], {"sigmas": 1.0}, 10)]:
        assert [pair[:2] for pair in pairs_by("mu_minus_2_sigma", rewards, **options)] == [(8, rejected)]


@given(
    st.lists(
        st.tuples(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0]), st.integers(-9, 0).map(float)), min_size=1, max_size=9
    ),
    st.sampled_from([None, 0.0, 0.5]),
)
def test_next_likelier_loser(rows, threshold):
    """For each r < t: the r > t of greatest log p among those with log p below that of r; without any, no pair.

    t is the threshold, or the prompt's mean. A shift of all rewards (another baseline) then changes no pair.
    """
    rewards, logps = (list(side) for side in zip(*rows, strict=True))
    pairs = pairs_by("next_likelier_loser", rewards, logps=logps, threshold=threshold)
    losers = {j for _, j, _, _ in pairs}
    t = Fraction(sum(map(int, rewards)), len(rewards)) if threshold is None else threshold
    for j, (r, logp) in enumerate(rows):
        below = [lp for reward, lp in rows if reward > t and lp < logp]
        assert (j in losers) == (r < t and bool(below))
        assert all(logps[i] == max(below) and rewards[i] > t for i, k, _, _ in pairs if k == j)
    if threshold is None:
        assert pairs_by("next_likelier_loser", [r - 64 for r in rewards], logps=logps) == pairs


@given(st.floats(-1e3, 1e3), st.integers(1, 64))
def test_equal_rewards_are_neither_good_nor_bad(reward, n):
    """mean(r, ..., r) = r to the last bit: a running sum of 0.1 gives 0.30000000000000004 / 3 > 0.1."""
    group = [{"reward": reward}] * n
    assert cutoff(group, None) == reward
    assert cutoff(group, 0.25) == 0.25


def test_next_likelier_loser_needs_log_probs():
    rows = table([candidate("a", k) | {"logp": None} for k in range(2)])
    with pytest.raises(WinnowError, match=r"candidates\.logp"):
        pair(rows, space(), selections_of({"a": [1.0, -1.0]}), rule=rule("next_likelier_loser"))


def test_spin_pairs_the_demonstration_with_every_sample_of_the_policy():
    """Pooled: two draws and one demonstration make two pairs; a draw cut at max_tokens is rejected on request."""
    prompts = prompts_of("ab", demonstration="Yes.", demonstration_ids=[8, 1])
    drawn = table([candidate("a", 0), candidate("a", 1) | {"finish_reason": "length"}, candidate("b", 0, ids=[8, 1])])
    ctx = space()
    pooled = conform(pool(ctx, drawn, prompts), CANDIDATES)
    demonstrations = {row["candidate_id"] for row in pooled.to_pylist() if row["finish_reason"] == "given"}
    assert len(demonstrations) == 2
    pairs = pair(pooled, ctx, rule=rule("demonstration_vs_sample"), finished=True).to_pylist()
    assert [(row["chosen_id"] in demonstrations, row["rejected_id"], row["gap"]) for row in pairs] == [
        (True, "a-0", None)
    ]
    reasons = {(row["prompt_id"], row["reason"]) for row in ctx.rejects.to_pylist()}
    assert reasons == {("a", "cut at max_tokens"), ("b", "identical responses")}
    assert len(pair(pooled, space(), rule=rule("demonstration_vs_sample"))) == 2


def test_a_demonstration_that_the_policy_drew_too_costs_that_pair_alone():
    """It stays in the pool beside the draw of its tokens, and goes against the policy's other draws."""
    ids = [8, 1]
    drawn = [candidate("a", 0, ids=ids) | {"candidate_id": candidate_id("a", ids, 0)}, candidate("a", 1)]
    pooled = pool(space(), table(drawn), prompts_of("a", demonstration="Yes.", demonstration_ids=ids))
    assert len(set(pooled.column("candidate_id").to_pylist())) == 3
    ctx = space()
    pairs = pair(pooled, ctx, rule=rule("demonstration_vs_sample")).to_pylist()
    assert [(row["chosen_id"], row["rejected_id"]) for row in pairs] == [(candidate_id("a", ids, 1), "a-1")]
    assert [row["reason"] for row in ctx.rejects.to_pylist()] == ["identical responses"]


def test_a_pool_has_every_candidate_once_and_says_which_prompt_has_no_demonstration():
    """This round's and the last's; an equal id is one row; order by prompt."""
    now, before = candidates_of({"a": 2, "b": 1}), candidates_of({"a": 3})
    names = pool(space(), now, None, before).column("candidate_id").to_pylist()
    assert names == ["a-0", "a-1", "a-2", "b-0"]
    ctx = space()
    assert pool(ctx, now, prompts_of("ab")).num_rows == 3
    assert {row["reason"] for row in ctx.rejects.to_pylist()} == {"no demonstration"}


def test_candidates_that_a_rule_cannot_read_are_refused_at_plan_time():
    """Log-probs are recorded by an engine, also through a pool; demonstrations are in a pool that has prompts."""
    check = entry_of(pair).metadata["signature"].check
    preferences, imported, drawn = InputStep("preferences"), InputStep("own_candidates"), InputStep("sample")
    with_prompts = InputStep("pool", {}, {"candidates": drawn, "prompts": InputStep("prompts")})
    without, of_imported = InputStep("pool"), InputStep("pool", {}, {"candidates": imported})
    for name, good, bad in [
        ("next_likelier_loser", [drawn, with_prompts], [preferences, imported, of_imported]),
        ("demonstration_vs_sample", [with_prompts], [drawn, without, preferences]),
        ("best_vs_worst", [drawn, preferences, imported, without], []),
    ]:
        reads = {"selections": InputStep("select")} if name != "demonstration_vs_sample" else {}
        for step in [*good, InputStep("")]:  # an unknown stage is already a problem of the plan
            assert check({"rule": rule(name)}, reads | {"candidates": step}) == []
        for step in bad:
            (problem,) = check({"rule": rule(name)}, reads | {"candidates": step})
            assert problem.startswith(f"rule {name} cannot read candidates of {step.stage}; ")
    assert check({"rule": rule("next_likelier_loser")}, {"selections": InputStep("select")}) == []


def test_a_pool_without_candidates_is_the_target_texts():
    prompts = prompts_of("ab", demonstration="Yes.", demonstration_ids=[7, 1])
    ctx = space()
    rows = conform(pool(ctx, prompts=prompts), CANDIDATES).to_pylist()
    assert [(row["prompt_id"], row["text"], row["token_ids"]) for row in rows] == [
        ("a", "Yes.", [7, 1]),
        ("b", "Yes.", [7, 1]),
    ]
    assert pool(ctx, prompts=prompts_of("a")).num_rows == 0
    assert ctx.rejects.column("reason").to_pylist() == ["no demonstration"]


def test_a_pool_needs_prompts_with_demonstrations():
    """At plan time: the column is named, or the stage behind has none; no word where its options are wrong already."""
    check = entry_of(pool).metadata["signature"].check
    assert check({}, {"prompts": InputStep("prompts", {"demonstration": "answer"})}) == []
    assert check({}, {"prompts": InputStep("prompts")}) == check({}, {"candidates": InputStep("sample")}) == []
    assert "`candidates` or `prompts`" in check({}, {})[0]
    for step in (InputStep("prompts", {"demonstration": None}), InputStep("preferences", {"chosen": "chosen"})):
        (problem,) = check({}, {"prompts": step})
        assert f"{step.stage} provides none" in problem


def borrowed(model, counts, selections=None, ids=None, ctx=None):
    """`mismatch` on {prompt: number of candidates}: {prompt: [token ids]}."""
    rows = [candidate(name, k, ids=ids or [ord(name), k, 1]) for name, n in counts.items() for k in range(n)]
    extra = mismatch(table(rows), prompts_of(counts), model, ctx or space(), selections)
    mismatched = conform(extra, CANDIDATES).to_pylist()
    assert len({row["candidate_id"] for row in [*mismatched, *rows]}) == len(mismatched) + len(rows)
    assert all(row["prompt_id"] in counts for row in mismatched)
    return {name: [row["token_ids"] for row in mismatched if row["prompt_id"] == name] for name in counts}


@given(st.lists(st.integers(1, 4), min_size=2, max_size=6))
def test_each_response_has_a_mismatched_row(tiny, counts):
    """The n-th of a prompt with the next prompt's n-th, as many as both have; the last borrows from the first."""
    names = "abcdef"[: len(counts)]
    number = dict(zip(names, counts, strict=True))
    expected = {
        name: [[ord(other), k, 1] for k in range(min(number[name], number[other]))]
        for name, other in zip(names, names[1:] + names[0], strict=True)
    }
    assert borrowed(tiny, number) == expected


def test_the_mismatched_rows_do_not_depend_on_the_number_of_shards(tmp_path: Path):
    """KTO's KL estimate is of them: each prompt borrows from the same other prompt in 1 and in 4 parts."""
    config = own_candidates_config(tmp_path)
    recipe = tmp_path / "borrow.yaml"
    recipe.write_text(
        "extends: _base\ntarget: mismatched\n"
        f"own_candidates: {{from: {{tokenizer: sft}}, with: {{path: {tmp_path / 'own.jsonl'}, reward: reward}}}}\n"
        "mismatched: {use: mismatch, from: {candidates: own_candidates, prompts: own_candidates, policy: sft}}"
    )
    borrowed_ids = []
    for shards in (1, 4):
        (plan,) = recipes.plans([str(recipe)], [config], [f"shards={shards}"])
        store = Store(tmp_path / str(shards))
        run(plan, store, LocalExecutor(), Silent())
        rows = store.folder(plan.target).read(CANDIDATES).to_pylist()
        borrowed_ids.append({row["candidate_id"]: (row["prompt_id"], row["token_ids"]) for row in rows})
    assert len(borrowed_ids[0]) == 12
    assert borrowed_ids[0] == borrowed_ids[1]


def test_only_selected_responses_are_borrowed_and_a_prompt_alone_has_none(tiny):
    """Selected: 1 and 2 of a, 0 of b, none of c: a and b borrow one each. Alone, and too long: rejected."""
    rows = selections_of({"a": [0.0] * 3, "b": [0.0]})
    some = rows.filter(pa.array([False, True, True, True]))
    assert borrowed(tiny, {"a": 3, "b": 1, "c": 2}, some) == {"a": [[ord("b"), 0, 1]], "b": [[ord("a"), 1, 1]], "c": []}
    ctx = space()
    assert borrowed(tiny, {"a": 2}, ctx=ctx) == {"a": []}
    assert borrowed(tiny, {"a": 1, "b": 1}, ids=[7] * 126, ctx=ctx) == {"a": [], "b": []}
    reasons = [(row["prompt_id"], row["reason"]) for row in ctx.rejects.to_pylist()]
    assert reasons == [
        ("a", "no other prompt"),
        *((name, "mismatched response too long") for name in "ab"),
    ]


def test_equal_responses_are_borrowed_under_an_id_each(tiny):
    """Copies of the prompt's own draws and of each other: the first free copy number."""
    rows = [candidate(name, k, ids=[9, 1]) | {"candidate_id": candidate_id(name, [9, 1], k)}
            for name in "ab" for k in range(2)]  # fmt: skip
    mismatched = mismatch(table(rows), prompts_of("ab"), tiny, space()).to_pylist()
    expected = [candidate_id(name, [9, 1], copy) for name in "ab" for copy in (2, 3)]
    assert [row["candidate_id"] for row in mismatched] == expected


def labels_of(rewards, ctx=None, **options):
    """Labels by candidate of prompt a, whose candidate k has rewards[k]; None where it has no group."""
    selections, pooled = selections_of({"a": rewards}), candidates_of({"a": len(rewards)})
    table = examples(prompts_of("a"), ctx or space(), pooled, selections=selections, desirable="rewards", **options)
    groups = conform(table, EXAMPLES).to_pylist()
    return {row["candidate_id"]: row["desirable"] for row in groups[0]["responses"]} if groups else None


@given(rewards_lists, st.sampled_from([None, 0.0, -1.0]))
def test_labels_of_rewards_say_above_or_below(rewards, threshold):
    """sign(r - t), t the threshold or the mean; r = t has no label and is a reject. 1-4 of (0, 0, 0, 3): mean 3/4."""
    ctx = space()
    t = Fraction(sum(map(int, rewards)), len(rewards)) if threshold is None else threshold
    expected = {f"a-{k}": 1 if r > t else -1 for k, r in enumerate(rewards) if r != t}
    assert (labels_of(rewards, ctx, threshold=threshold) or {}) == expected
    rejects = [(row["candidate_id"], row["reason"]) for row in ctx.rejects.to_pylist() if row["candidate_id"]]
    assert rejects == [(f"a-{k}", "neither above nor below") for k, r in enumerate(rewards) if r == t]


def test_all_rewards_may_beat_the_baseline_and_half_are_undesirable_all_the_same():
    """r = (1, 2, 3, 4): the baseline was the worst draw, and every sign is +; the mean 2.5 parts them."""
    assert labels_of([1.0, 2.0, 3.0, 4.0]) == {"a-0": -1, "a-1": -1, "a-2": 1, "a-3": 1}
    assert set(labels_of([1.0, 2.0, 3.0, 4.0], threshold=0.0).values()) == {1}


def test_labels_of_pairs():
    """+1 for the chosen, -1 for the rejected, none for one that is both."""
    prompts, pooled = prompts_of("a"), candidates_of({"a": 4})
    both = examples(prompts, space(), pooled, pairs_of([(0, 1), (1, 2)]), desirable="pairs").to_pylist()[0]
    assert {row["candidate_id"]: row["desirable"] for row in both["responses"]} == {"a-0": 1, "a-1": None, "a-2": -1}


def test_pairs_of_another_origin_are_refused_by_name():
    """Not a KeyError: which id, and what to wire."""
    with pytest.raises(WinnowError, match="no row has the id a-7"):
        examples(prompts_of("a"), space(), candidates_of({"a": 2}), pairs_of([(0, 7)]))


def test_mismatched_rows_stand_last_with_their_own_reference(tiny):
    """desirable 0, in no pair, scored under the prompt that they are read with."""
    prompts, pooled = prompts_of("ab"), table([candidate(name, 0, ids=[20 + ord(name), 1]) for name in "ab"])
    other = mismatch(pooled, prompts, tiny, space())
    scores = reference(prompts, pooled, tiny, space(), mismatched=other)
    selections, options = selections_of({"a": [1.0], "b": [-1.0]}), {"desirable": "rewards", "threshold": 0.0}
    groups = examples(prompts, space(), pooled, None, selections, scores, other, **options).to_pylist()
    assert [[row["desirable"] for row in group["responses"]] for group in groups] == [[1, 0], [-1, 0]]
    values = {(row["prompt_id"], row["candidate_id"]): row["logp"] for row in scores.to_pylist()}
    for group in groups:
        for row in group["responses"]:
            assert row["ref_logp"] == values[group["prompt_id"], row["candidate_id"]]


@given(st.floats(0, 30))
def test_soft_labels_are_the_probability_of_the_ranker(gap):
    """s(gap) >= 1/2; a pair without a gap (demonstration_vs_sample) has the label 1."""
    (row,) = pairs_of([(0, 1)]).to_pylist()
    for value, label in [(gap, pytest.approx(1 / (1 + math.exp(-gap)), rel=1e-6)), (None, 1.0)]:
        pairs = pa.Table.from_pylist([row | {"gap": value}], schema=PAIRS)
        (group,) = examples(prompts_of("a"), space(), candidates_of({"a": 2}), pairs, labels="soft").to_pylist()
        assert group["pairs"][0]["label"] == label


def test_likelihood_weights_are_those_of_the_selection():
    selections, pooled = selections_with([1.0, 0.0], [0.25, 1.25]), candidates_of({"a": 3})
    (group,) = examples(prompts_of("a"), space(), pooled, selections=selections, imitate="selected").to_pylist()
    assert [row["weight"] for row in group["responses"]] == [0.25, 1.25]


READ_SELECTIONS = sorted(name for name, entry in pair_rule.entries.items() if entry.metadata["reads"] == "selections")


@given(st.sampled_from(READ_SELECTIONS), rewards_lists)
def test_no_rule_on_rewards_prefers_the_worse(name, rewards):
    """Whatever the rule: gap = r(chosen) - r(rejected) > 0, no pair twice, and one candidate gives no pair."""
    pairs = pairs_by(name, rewards)
    assert all(gap == rewards[i] - rewards[j] > 0 for i, j, gap, _ in pairs)
    assert len({(i, j) for i, j, _, _ in pairs}) == len(pairs) <= len(list(combinations(rewards, 2)))
