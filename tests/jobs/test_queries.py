"""Queries that ship: each says what it answers, runs on any store, and is right on a store with a known answer."""

import math
from pathlib import Path

import pyarrow as pa
import pytest

from jobs import queries
from pipeline.sql.catalog import open_catalog, query
from pipeline.store.store import Store
from schemas import WinnowError
from schemas.tables import (
    CANDIDATES,
    COMPARISONS,
    EVALUATIONS,
    METRICS,
    OUTCOMES,
    PAIRS,
    PROMPTS,
    REFERENCE,
    REJECTS,
    REWARDS,
    SELECTIONS,
    SPEEDS,
)
from tests.catalogs import link, put, table

# Columns that the report, the terminal and scripts of users read.
COLUMNS = {
    "acceptance": "run step prompt_id kept passes beta acceptance ess mean_reward",
    "best_of": "run step n prompts best gained",
    "cost": "run stage steps rows rejects seconds wall_seconds gpu_seconds cpu_seconds share tokens ranker_calls",
    "curves": "run step metric value",
    "disagreements": "run prompt_id responses proxy_win gold_win too_kind gold_gain text",
    "duplicates": "run step prompts candidates different duplicates prompts_with_duplicates prompts_all_alike "
    "most_of_one",
    "evaluations_by_run": "run metric value low high",
    "heldout": "run step metric value",
    "leaderboard": "run gold_win proxy_win gold_reward kl_nats tokens prompts seconds own_seconds",
    "length_bias": "run step rule pairs chosen_tokens rejected_tokens longer_chosen gap_and_length",
    "lengths": "run step finish_reason n share mean_tokens median p95 most",
    "pair_gaps": "run step rule pairs prompts mean_gap p10 median p90 near_ties chosen_better",
    "position_bias": "run step n bias mean_difference flipped correlation",
    "ranker_agreement": "run step rewards_key nats_apart comparisons agree mean_logit",
    "reference_margin": "run step rule model pairs mean_margin spread already_right",
    "rejects": "step stage key reason n first_place",
    "responses": "prompt baseline response gold_baseline gold",
    "reward_by_length": "run step prompts candidates mean_tokens mean_reward overall within_prompts",
    "reward_histogram": "what low high n",
    "rounds": "run round gold_win proxy_win gold_reward kl tokens gained",
    "selection": "prompts kept mean_reward_kept mean_reward_all first_pass_acceptance effective_sample_size passes",
    "slow_steps": "run step stage key seconds wall_seconds busy rows_per_second tokens_per_second bytes",
    "status": "run step stage key state rows rejects seconds tokens ranker_calls",
    "two_losses": "policy preference_loss imitation_loss preference_accuracy",
    "unpaired": "run prompt_id candidates kept spread reject_reasons text",
}
# Two prompts to train on and one that is held out; four candidates of p, of which two are duplicates, and two of q.
TEXTS = {"p": "train", "q": "train", "h": "heldout"}
TOKENS = {"a": [1], "b": [1], "c": [2, 3], "d": [4, 5, 6], "e": [7], "f": [8, 9]}
SCORES = {"a": 0.0, "b": 1.0, "c": 2.0, "d": 5.0, "e": 3.0, "f": 3.0}


def prompt_of(candidate: str) -> str:
    return "p" if candidate in "abcd" else "q"


def candidate(name: str, tokens: list[int], **values) -> dict:
    ids = dict(prompt_id=prompt_of(name), candidate_id=name, token_ids=tokens, n_tokens=len(tokens), text=name)
    return ids | dict(finish_reason="stop") | values


def outcome(k: int, candidate_id: str, **values) -> dict:
    return dict(prompt_id="h", k=k, candidate_id=candidate_id, baseline_id="base") | values


def metric(name: str, value: float) -> dict:
    return dict(metric=name, value=value, low=value - 0.1, high=value + 0.1, n=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One run of two rounds, that differ in their evaluation alone."""
    store = Store(tmp_path_factory.mktemp("queries") / "store")
    texts = [dict(prompt_id=name, text=f"text {name}", split=split) for name, split in TEXTS.items()]
    put(store, "prompts", "1", [table(PROMPTS, *texts), table(REJECTS, dict(reason="too long", place="line 3"))])
    candidates = [candidate(name, tokens) for name, tokens in TOKENS.items()]
    candidates[3]["finish_reason"] = "length"
    put(store, "sample", "2", [table(CANDIDATES, *candidates)], seconds=10.0, wall_seconds=5.0)
    scored = [dict(prompt_id=prompt_of(name), candidate_id=name, reward=r) for name, r in SCORES.items()]
    scored[1] |= dict(logit_ab=2.0, logit_ba=0.0)
    scored[2] |= dict(logit_ab=3.0, logit_ba=-1.0)
    put(store, "reward", "3", [table(REWARDS, *scored)])
    selected = [
        dict(prompt_id="p", candidate_id="d", reward=5.0, acceptance=0.2, ess=1.5, beta=0.5),
        dict(prompt_id="p", candidate_id="a", draw=1, round=2, reward=0.0, acceptance=0.2, ess=1.5, beta=0.5),
        dict(prompt_id="q", candidate_id="e", reward=3.0, acceptance=1.0, ess=2.0, beta=0.5),
    ]
    put(store, "select", "4", [table(SELECTIONS, *selected)])
    compared = [("d", "a", 3.0), ("b", "a", -1.0), ("e", "f", 1.0)]
    logits = [dict(prompt_id=prompt_of(a), left_id=a, right_id=b, logit=logit) for a, b, logit in compared]
    put(store, "compare", "5", [table(COMPARISONS, *logits)])
    pairs = [("d", "a", 3.0), ("b", "c", 0.05)]
    rows = [dict(prompt_id="p", chosen_id=a, rejected_id=b, gap=gap, rule="matches") for a, b, gap in pairs]
    tie = dict(prompt_id="q", reason="tie", place="pair")
    put(store, "pair", "6", [table(PAIRS, *rows), table(REJECTS, tie)])
    logps = {"d": -1.0, "a": -3.0, "b": -4.0, "c": -2.0}
    frozen = [dict(prompt_id="p", candidate_id=name, logp=logp, model="sft") for name, logp in logps.items()]
    put(store, "reference", "7", [table(REFERENCE, *frozen)])
    losses = [dict(step=2, metric="loss", value=0.5), dict(step=1, metric="loss", value=0.7)]
    losses += [dict(step=2, metric=f"heldout/{name}", value=0.4) for name in ("loss", "imitation/loss", "accuracy")]
    speed = dict(step=1, measure="pairs_per_second", value=9.0)
    put(store, "optimize", "8", [table(METRICS, *losses), table(SPEEDS, speed)], model="digest", seconds=100.0)
    held = [candidate("ours", [1], prompt_id="h"), candidate("base", [2], prompt_id="h")]
    judged = [
        outcome(0, "ours", proxy_win=1.0, gold_win=0.0, gold=1.0, gold_baseline=3.0),
        outcome(1, "ours", proxy_win=1.0, gold_win=0.5, gold=3.0, gold_baseline=3.0),
    ]
    put(store, "generate", "9", [table(CANDIDATES, *held)])
    for key, win in (("a", 0.6), ("b", 0.8)):
        metrics = [metric("gold_win", win), metric("proxy_win", 0.9), metric("kl", 10 * win)]
        put(store, "evaluate", key, [table(OUTCOMES, *judged), table(EVALUATIONS, *metrics)])
    shared = ["prompts", "sample", "reward", "select", "compare", "pair", "reference", "optimize", "generate"]
    rounds = {"evaluate@1": ("evaluate", "a"), "evaluate@2": ("evaluate", "b")}
    link(store, "rso", **{stage: (stage, str(n + 1)) for n, stage in enumerate(shared)}, **rounds)
    return store


def rows_of(store: Store, name: str) -> list[dict]:
    return query(open_catalog(store), queries.text(name)).to_pylist()


def test_every_query_says_in_its_first_line_what_it_answers():
    assert len(queries.names()) >= 12
    assert set(queries.names()) == set(COLUMNS)
    for name in queries.names():
        assert queries.text(name).startswith("-- ")
        assert 20 < len(queries.about(name)) <= 120
        assert queries.about(name)[-1] in ".?"


@pytest.mark.parametrize("name", queries.names())
def test_every_query_has_its_columns_on_any_store(tmp_path: Path, store: Store, name: str):
    """Also on an empty store, with the same types but no row."""
    full = query(open_catalog(store), queries.text(name))
    empty = query(open_catalog(Store(tmp_path / "nothing")), queries.text(name))
    assert full.column_names == empty.column_names == COLUMNS[name].split()
    assert empty.schema.equals(full.schema)
    assert empty.num_rows == 0 < full.num_rows


def test_a_bare_name_is_a_query_and_a_misspelt_one_is_refused():
    assert queries.statement(" leaderboard; ") == queries.text("leaderboard")
    for plain in ("SELECT 1", "describe", "FROM leaderboard", ""):
        assert queries.statement(plain) == plain
    with pytest.raises(WinnowError, match="no query 'leaderbord'; did you mean 'leaderboard'"):
        queries.statement("leaderbord")


def test_acceptance_has_the_hardest_prompt_first(store: Store):
    first, second = rows_of(store, "acceptance")
    assert (first["prompt_id"], first["kept"], first["passes"], first["mean_reward"]) == ("p", 2, 3, 2.5)
    assert (second["prompt_id"], second["acceptance"], second["ess"]) == ("q", 1.0, 2.0)


def test_best_of_is_the_expected_maximum(store: Store):
    """p has 0, 1, 2, 5: the mean is 2, the best of two is (1 + 2 + 2 + 3 * 5) / 6, of four 5; q has 3, 3."""
    best = {row["n"]: (row["prompts"], row["best"]) for row in rows_of(store, "best_of")}
    assert best == {
        1: (2, pytest.approx((2 + 3) / 2)),
        2: (2, pytest.approx((20 / 6 + 3) / 2)),
        4: (1, pytest.approx(5)),
    }


def test_cost_says_where_the_time_went(store: Store):
    """100 s of training and 10 s of sampling, on two GPUs; nine other steps took 1.5 s, two of them evaluations."""
    rows = {row["stage"]: row for row in rows_of(store, "cost")}
    total = sum(row["gpu_seconds"] for row in rows.values())
    assert next(iter(rows)) == "optimize"
    assert rows["sample"]["gpu_seconds"] == 2 * rows["sample"]["cpu_seconds"] == 2 * rows["sample"]["seconds"]
    assert rows["evaluate"]["steps"] == 2
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert rows["optimize"]["share"] == pytest.approx(rows["optimize"]["gpu_seconds"] / total)


def test_curves_have_metrics_and_speeds_but_nothing_held_out(store: Store):
    assert [(row["metric"], row["step"], row["value"]) for row in rows_of(store, "curves")] == [
        ("loss", 1, 0.7),
        ("loss", 2, 0.5),
        ("pairs_per_second", 1, 9.0),
    ]


def test_disagreements_are_what_the_ranker_likes_and_gold_does_not(store: Store):
    """Two responses: proxy 1 and 1, gold 0 and one half; the gold reward lost 2 and 0."""
    row = rows_of(store, "disagreements")[0]
    assert (row["run"], row["prompt_id"], row["responses"], row["text"]) == ("rso@1", "h", 2, "text h")
    assert (row["too_kind"], row["gold_gain"]) == (0.75, -1.0)


def test_duplicates_are_equal_tokens_of_one_prompt(store: Store):
    """a and b are duplicates among six candidates of two prompts; the held-out responses have none."""
    row = next(row for row in rows_of(store, "duplicates") if row["step"] == "sample")
    assert (row["prompts"], row["candidates"], row["different"], row["prompts_with_duplicates"]) == (2, 6, 5, 1)
    assert row["duplicates"] == pytest.approx(1 / 6)
    assert (row["prompts_all_alike"], row["most_of_one"]) == (0, 2)


def test_length_bias_counts_how_often_the_longer_one_was_chosen(store: Store):
    """d (3 tokens) over a (1), and b (1) over c (2): the longer one of two was chosen once of twice."""
    row = rows_of(store, "length_bias")[0]
    assert (row["pairs"], row["chosen_tokens"], row["rejected_tokens"], row["longer_chosen"]) == (2, 2.0, 1.5, 0.5)
    assert row["gap_and_length"] == pytest.approx(1)


def test_lengths_say_how_responses_end(store: Store):
    rows = {row["finish_reason"]: row for row in rows_of(store, "lengths") if row["step"] == "sample"}
    assert {reason: (row["n"], row["most"]) for reason, row in rows.items()} == {"length": (1, 3), "stop": (5, 2)}
    assert rows["length"]["share"] == pytest.approx(1 / 6)


def test_pair_gaps_are_nats_and_near_ties_are_below_a_tenth(store: Store):
    row = rows_of(store, "pair_gaps")[0]
    assert (row["rule"], row["pairs"], row["prompts"], row["near_ties"]) == ("matches", 2, 1, 0.5)
    assert row["median"] == row["mean_gap"] == pytest.approx(1.525)
    assert row["chosen_better"] == pytest.approx((1 / (1 + math.exp(-3)) + 1 / (1 + math.exp(-0.05))) / 2)


def test_position_bias_is_half_the_difference_of_both_orders(store: Store):
    """(2 - 0) / 2 and (3 + 1) / 2; the second changes its sign, and a sign and a zero differ too."""
    row = rows_of(store, "position_bias")[0]
    assert (row["n"], row["bias"], row["mean_difference"], row["flipped"]) == (2, 1.5, 3.0, 1.0)


def test_ranker_agreement_leaves_out_equal_rewards(store: Store):
    """d beats a, as 5 > 0; b loses to a, against 1 > 0; e and f have one reward, which says nothing."""
    rows = {row["nats_apart"]: (row["comparisons"], row["agree"]) for row in rows_of(store, "ranker_agreement")}
    assert rows == {"1 to 2": (1, 0.0), "2 or more": (1, 1.0)}


def test_reference_margin_is_of_the_reference_alone(store: Store):
    """d - a = 2 nats, b - c = -2: the reference has one of two right."""
    row = rows_of(store, "reference_margin")[0]
    assert (row["pairs"], row["mean_margin"], row["already_right"], row["model"]) == (2, 0.0, 0.5, "sft")
    assert row["spread"] == pytest.approx(math.sqrt(8))


def test_rewards_and_lengths_are_correlated_within_prompts_and_over_all(store: Store):
    """As numpy has it: within prompts, both are measured from the mean of the prompt."""
    import numpy as np

    length = np.array([len(tokens) for tokens in TOKENS.values()], dtype=float)
    reward = np.array(list(SCORES.values()))
    is_p = np.array([name in "abcd" for name in TOKENS])
    centred = [x - np.where(is_p, x[is_p].mean(), x[~is_p].mean()) for x in (length, reward)]
    row = rows_of(store, "reward_by_length")[0]
    assert (row["prompts"], row["candidates"]) == (2, 6)
    assert row["overall"] == pytest.approx(np.corrcoef(length, reward)[0, 1])
    assert row["within_prompts"] == pytest.approx(centred[0] @ centred[1] / math.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))  # fmt: skip # noqa: E501


def test_the_histogram_counts_every_reward_once(store: Store):
    """Six rewards from 0 to 5 in bins of a tenth; the largest is in the last bin, not in another."""
    rows = rows_of(store, "reward_histogram")
    every = [row for row in rows if row["what"] == "all candidates"]
    assert [(row["low"], row["n"]) for row in every] == [
        (pytest.approx(low), n) for low, n in ((0, 1), (1, 1), (2, 1), (3, 2), (4.9, 1))
    ]
    assert sum(row["n"] for row in rows if row["what"] == "kept") == 3


def test_rejects_are_counted_by_step_and_reason(store: Store):
    rejects = [(row["step"], row["reason"], row["n"], row["first_place"]) for row in rows_of(store, "rejects")]
    assert rejects == [("pair", "tie", 1, "pair"), ("prompts", "too long", 1, "line 3")]


def test_responses_stand_beside_the_baseline(store: Store):
    row = query(open_catalog(store, "rso", 2), queries.text("responses")).to_pylist()
    assert row == [dict(prompt="text h", baseline="base", response="ours", gold_baseline=3.0, gold=1.0)]


def test_rounds_say_what_each_gained(store: Store):
    first, second = rows_of(store, "rounds")
    assert (first["gold_win"], first["kl"], first["gained"]) == (0.6, 6.0, None)
    assert (second["run"], second["round"], second["gained"]) == ("rso", 2, pytest.approx(0.2))


def test_selection_is_averaged_over_selected_rows(store: Store):
    row = rows_of(store, "selection")[0]
    assert (row["prompts"], row["kept"], row["passes"]) == (2, 3, 3)
    assert row["mean_reward_kept"] == pytest.approx(8 / 3)
    assert row["mean_reward_all"] == pytest.approx(14 / 6)


def test_slow_steps_are_ordered_by_seconds_of_work(store: Store):
    """Two workers at once: ten seconds of work in five."""
    rows = rows_of(store, "slow_steps")
    assert [row["seconds"] for row in rows] == sorted((row["seconds"] for row in rows), reverse=True)
    row = next(row for row in rows if row["step"] == "sample")
    assert (row["busy"], row["rows_per_second"]) == (row["seconds"] / 5.0, 6 / row["seconds"])


def test_status_shows_steps_that_are_not_finished(tmp_path: Path):
    store = Store(tmp_path / "store")
    put(store, "prompts", "1", [table(PROMPTS)])
    link(store, "one", prompts=("prompts", "1"), later=("select", "4444"))
    assert {row["step"]: row["state"] for row in rows_of(store, "status")} == {
        "prompts": "finished",
        "later": "not finished",
    }


def test_an_unpaired_prompt_says_why(store: Store):
    """q was scored and kept, and its pair was a tie; h is held out, p has pairs."""
    rows = rows_of(store, "unpaired")
    assert [
        (row["prompt_id"], row["candidates"], row["kept"], row["spread"], row["reject_reasons"]) for row in rows
    ] == [("q", 2, 1, 0.0, "tie")]


def test_evaluations_and_leaderboard_have_the_best_round_first(store: Store):
    assert [row["run"] for row in rows_of(store, "leaderboard")] == ["rso@2", "rso@1"]
    assert [row["run"] for row in rows_of(store, "evaluations_by_run")] == ["rso@2", "rso@2", "rso@1", "rso@1"]
    assert rows_of(store, "leaderboard")[0]["gold_win"] == "80.0 % [70.0, 90.0]"


def test_held_out_losses_of_a_policy(store: Store):
    assert {row["metric"]: row["value"] for row in rows_of(store, "heldout")} == {"loss": 0.4, "accuracy": 0.4}
    assert rows_of(store, "two_losses") == [
        dict(policy="rso", preference_loss=0.4, imitation_loss=0.4, preference_accuracy=0.4)
    ]


def test_every_query_runs_on_a_whole_run(finished: Path):
    """Of RSO on the tiny world; those that ask for what it has no rows of answer with none."""
    catalog = open_catalog(Store(finished))
    none = {"rejects", "rounds", "two_losses", "unpaired"}
    assert {name for name in queries.names() if not query(catalog, queries.text(name)).num_rows} <= none
    assert isinstance(query(catalog, queries.text("cost")), pa.Table)
