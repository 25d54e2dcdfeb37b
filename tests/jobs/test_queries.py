"""Queries that ship: each says what it answers, runs on any store, and is right on a store with a known answer."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs import queries
from jobs.tables import leaderboard_table
from pipeline.sql.catalog import open_catalog, query
from pipeline.store.store import Store
from schemas import WinnowError
from schemas.tables import (
    CANDIDATES,
    COMPARISONS,
    EVALUATIONS,
    EXAMPLES,
    JUDGEMENTS,
    METRICS,
    OUTCOMES,
    PAIRS,
    PROMPTS,
    REFERENCE,
    REJECTS,
    REWARDS,
    SELECTIONS,
    SPEEDS,
    VOTES,
    WINS,
)
from tests.catalogs import link, put, table

# Columns that the report, the terminal and scripts of users read.
COLUMNS = {
    "all_evaluations": "run step gold_win gold_win_low gold_win_high proxy_win proxy_win_low proxy_win_high "
    "gold_reward gold_reward_baseline tokens prompts",
    "acceptance": "run step prompt_id kept passes beta acceptance ess mean_reward",
    "best_of": "run step n prompts best gained",
    "cost": "run stage steps rows rejects seconds wall_seconds gpu_seconds cpu_seconds share tokens ranker_calls",
    "curves": "run step metric value",
    "disagreements": "run prompt_id responses proxy_win gold_win too_kind gold_gain text",
    "duplicates": "run step prompts candidates different duplicates prompts_with_duplicates prompts_all_alike "
    "most_of_one",
    "evaluations_by_run": "run metric value low high",
    "gold": "run policy policy_low policy_high sft sft_low sft_high gain gain_low gain_high prompts",
    "heldout": "run step metric value",
    "leaderboard": "run gold_win gold_win_low gold_win_high proxy_win proxy_win_low proxy_win_high gold_reward "
    "gold_reward_low gold_reward_high kl_nats tokens prompts gold_win_as_sampled gold_win_as_sampled_low "
    "gold_win_as_sampled_high gold_win_greedy gold_win_greedy_low gold_win_greedy_high proxy_win_as_sampled "
    "proxy_win_as_sampled_low proxy_win_as_sampled_high proxy_win_greedy proxy_win_greedy_low proxy_win_greedy_high "
    "seconds own_seconds",
    "judges": "run judge against win win_low win_high win_lc agreement alpha prompts comparisons ties undecided unread",
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
    "now": "run step done_steps steps loss accuracy margin grad_norm kl proxy_win per_second seconds_left",
    "status": "run step stage key state rows rejects seconds tokens ranker_calls done per_second seconds_left",
    "two_losses": "policy seeds mix weight preference_loss preference_loss_se imitation_loss imitation_loss_se "
    "preference_accuracy distance distance_se ideal_preference_loss ideal_imitation_loss seconds optima_seconds cost "
    "front",
    "votes": "run judged_by shown_first votes candidate baseline same unread",
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
    return dict(prompt_id="h", k=k, candidate_id=candidate_id) | values


def metric(name: str, value: float) -> dict:
    return dict(metric=name, value=value, low=value - 0.1, high=value + 0.1, n=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One run of two rounds, that differ in their evaluation alone."""
    store = Store(tmp_path_factory.mktemp("queries") / "store")
    texts = [dict(prompt_id=name, text=f"text {name}", split=split) for name, split in TEXTS.items()]
    too_long = [dict(reason="too long", place=f"line {n}") for n in (3, 10)]
    put(store, "prompts", "1", [table(PROMPTS, *texts), table(REJECTS, *too_long)])
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
    # As combine has it: another reward beside the one that is selected by, and no part of any answer.
    put(store, "reward", "3b", [table(REWARDS, dict(prompt_id="p", candidate_id="a", reward=90.0))])
    read = {"version": 1, "options": {"k": 8}, "inputs": {"rewards": "3"}}
    put(store, "select", "4", [table(SELECTIONS, *selected)], identity=read)
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
    # d is longer than a, c than b; of e and f, both orders, one is longer: (1 + 0 + 0) / 3. Labels are one token.
    sides = [
        {"prompt_id": prompt_of(chosen), "prompt_ids": [1], "pairs": [dict(chosen=0, rejected=1, weight=1, label=1)]}
        | {"responses": [dict(candidate_id=name, token_ids=[1], weight=1) for name in (chosen, rejected)]}
        for chosen, rejected in ("da", "bc", "ef")
    ]
    origin = {"version": 1, "options": {}, "inputs": {"candidates": "2"}}
    put(store, "ranker_examples", "0", [table(EXAMPLES, *sides)], identity=origin)
    trained = origin | {"inputs": {"heldout": "0"}}
    measured = [table(METRICS, *losses), table(SPEEDS, speed)]
    put(store, "optimize", "8", measured, model="digest", seconds=100.0, identity=trained)
    held = [candidate("ours", [1], prompt_id="h"), candidate("base", [2], prompt_id="h")]
    judged = [
        outcome(0, "ours", proxy_win=1.0, gold_win=0.0, gold=1.0, gold_baseline=3.0),
        outcome(1, "ours", proxy_win=1.0, gold_win=0.5, gold=3.0, gold_baseline=3.0),
    ]
    put(store, "generate", "9", [table(CANDIDATES, *held)])
    met = dict(prompt_id="h", candidate_id="ours", baseline_id="base", logit=1.0)
    put(store, "judge", "10", [table(JUDGEMENTS, met)])
    for key, win in (("a", 0.6), ("b", 0.8)):
        metrics = [metric("gold_win", win), metric("proxy_win", 0.9), metric("kl", 10 * win)]
        metrics += [metric("gold", win), metric("gold_baseline", 0.5), metric("gold_gain", win - 0.5)]
        reading = {"version": 1, "options": {}, "inputs": {"prompts": "abc", "judgements": "10"}}
        put(store, "evaluate", key, [table(OUTCOMES, *judged), table(EVALUATIONS, *metrics)], identity=reading)
    shared = ["prompts", "sample", "reward", "select", "compare", "pair", "reference", "optimize", "generate", "judge"]
    greedy = [metric("gold_win", 0.3), metric("proxy_win", 0.2)]
    put(store, "evaluate", "c", [table(OUTCOMES, judged[0]), table(EVALUATIONS, *greedy)])
    rounds = {"evaluate@1": ("evaluate", "a"), "evaluate@2": ("evaluate", "b"), "evaluate_greedy@2": ("evaluate", "c")}
    named = {"version": 1, "options": {"judge": "sxs", "against": "sft"}, "inputs": {}}
    won = dict(
        prompt_id="h", candidate_id="ours", judge="sxs", against="sft", win=1.0, comparisons=2, ties=0, undecided=1
    )
    put(store, "win_rate", "d", [table(WINS, won), table(EVALUATIONS, metric("sxs_win", 0.7))], identity=named)
    voted = dict(prompt_id="h", candidate_id="ours", baseline_id="base", first="candidate", answer="A")
    others = met | dict(baseline_id="another run's")  # of the same response
    put(store, "autosxs", "e", [table(JUDGEMENTS, met, others), table(VOTES, voted | dict(vote=1.0), voted)])
    rounds |= {"evaluate_by_sxs@2": ("win_rate", "d"), "judge_by_sxs@2": ("autosxs", "e")}
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


def test_every_query_has_its_columns_on_any_store(tmp_path: Path, store: Store):
    """Also on an empty store, with the same types but no row."""
    catalog, nothing = open_catalog(store), open_catalog(Store(tmp_path / "nothing"))
    for name in queries.names():
        full, empty = query(catalog, queries.text(name)), query(nothing, queries.text(name))
        assert full.column_names == empty.column_names == COLUMNS[name].split()
        assert empty.schema.equals(full.schema)
        assert empty.num_rows == 0 < full.num_rows or name == "now", name  # of steps that run, which none does here


def test_a_bare_name_is_a_query_and_a_misspelt_one_is_refused():
    assert queries.statement(" leaderboard; ") == queries.text("leaderboard")
    for plain in ("SELECT 1", "describe", "FROM leaderboard", ""):
        assert queries.statement(plain) == plain
    with pytest.raises(WinnowError, match="no query 'leaderbord'; did you mean 'leaderboard'"):
        queries.statement("leaderbord")


# What is known of the store above: a query, a row of its answer (by some of its values), and other values of that row.
KNOWN: list[tuple[str, dict, dict]] = [
    ("acceptance", dict(prompt_id="p"), dict(kept=2, passes=3, mean_reward=2.5)),
    ("acceptance", dict(prompt_id="q"), dict(acceptance=1.0, ess=2.0)),
    # The expected maximum. p has 0, 1, 2, 5: the mean is 2, the best of two (1 + 2 + 2 + 3 * 5) / 6; q has 3, 3.
    ("best_of", dict(n=1), dict(prompts=2, best=(2 + 3) / 2)),
    ("best_of", dict(n=2), dict(prompts=2, best=(20 / 6 + 3) / 2)),
    ("best_of", dict(n=4), dict(prompts=1, best=5)),
    # Two responses: proxy 1 and 1, gold 0 and one half; the gold reward lost 2 and 0.
    ("disagreements", dict(prompt_id="h"), dict(run="rso@1", responses=2, text="text h", too_kind=0.75, gold_gain=-1)),
    # a and b are duplicates among six candidates of two prompts.
    ("duplicates", dict(step="sample"), dict(prompts=2, candidates=6, different=5, duplicates=1 / 6)),
    ("duplicates", dict(step="sample"), dict(prompts_with_duplicates=1, prompts_all_alike=0, most_of_one=2)),
    # d (3 tokens) over a (1), and b (1) over c (2): the longer one of two was chosen once of twice.
    ("length_bias", {}, dict(pairs=2, chosen_tokens=2.0, rejected_tokens=1.5, longer_chosen=0.5, gap_and_length=1)),
    ("lengths", dict(step="sample", finish_reason="length"), dict(n=1, most=3, share=1 / 6)),
    ("lengths", dict(step="sample", finish_reason="stop"), dict(n=5, most=2)),
    # Gaps of 3 and 0.05 nats; near ties are below a tenth.
    ("pair_gaps", {}, dict(rule="matches", pairs=2, prompts=1, near_ties=0.5, median=1.525, mean_gap=1.525)),
    ("pair_gaps", {}, dict(chosen_better=(1 / (1 + math.exp(-3)) + 1 / (1 + math.exp(-0.05))) / 2)),
    # (2 - 0) / 2 and (3 + 1) / 2: half the difference of both orders; a sign and a zero differ too.
    ("position_bias", {}, dict(n=2, bias=1.5, mean_difference=3.0, flipped=1.0)),
    # d beats a, as 5 > 0; b loses to a, against 1 > 0; e and f have equal rewards, which are omitted.
    ("ranker_agreement", dict(nats_apart="1 to 2"), dict(comparisons=1, agree=0.0)),
    ("ranker_agreement", dict(nats_apart="2 or more"), dict(comparisons=1, agree=1.0)),
    # Of the reference alone: d - a = 2 nats, b - c = -2.
    ("reference_margin", {}, dict(pairs=2, mean_margin=0.0, already_right=0.5, model="sft", spread=math.sqrt(8))),
    ("rejects", dict(step="pair"), dict(reason="tie", n=1, first_place="pair")),
    # Line 3 is before line 10, which is the first by its name.
    ("rejects", dict(step="prompts"), dict(reason="too long", n=2, first_place="line 3")),
    ("rounds", dict(round=1), dict(gold_win=0.6, kl=6.0, gained=None)),
    ("rounds", dict(round=2), dict(run="rso", gained=0.2)),
    ("selection", {}, dict(prompts=2, kept=3, passes=3, mean_reward_kept=8 / 3, mean_reward_all=14 / 6)),
    # q was scored and selected, and its pair was a tie; h is held out, p has pairs.
    ("unpaired", {}, dict(prompt_id="q", candidates=2, kept=1, spread=0.0, reject_reasons="tie")),
    ("gold", dict(run="rso@2"), dict(policy=0.8, sft=0.5, gain=0.3, gain_low=0.2, gain_high=0.4, prompts=1)),
    ("heldout", dict(metric="loss"), dict(value=0.4)),
    ("heldout", dict(metric="accuracy"), dict(value=0.4)),
    ("heldout", dict(metric="longer_one"), dict(value=1 / 3)),
    ("judges", {}, dict(run="rso@2", judge="sxs", win=0.7, prompts=1, comparisons=2, ties=0, undecided=1)),
    ("votes", {}, dict(run="rso@2", judged_by="judge_by_sxs", votes=2, candidate=0.5, unread=0.5, same=0.0)),
    ("two_losses", {}, dict(policy="rso", preference_loss=0.4, imitation_loss=0.4, preference_accuracy=0.4)),
]
# Number of rows of some answers, and a column of all rows in order.
COUNTS = {"acceptance": 2, "best_of": 3, "ranker_agreement": 2, "rejects": 2, "rounds": 2, "unpaired": 1, "heldout": 3}
ORDERED = {
    "acceptance": ("prompt_id", ["p", "q"]),  # the hardest prompt first
    "evaluations_by_run": ("run", ["rso@2", "rso@2", "rso@2", "rso@1", "rso@1"]),
    "leaderboard": ("gold_win", [0.8, 0.6]),  # the best round first
    "rejects": ("step", ["pair", "prompts"]),
}


def test_answers_on_a_known_store(store: Store):
    answers = {name: rows_of(store, name) for name in {*(name for name, *_ in KNOWN), *COUNTS, *ORDERED}}
    for name, values, expected in KNOWN:
        row = next(row for row in answers[name] if values.items() <= row.items())
        assert {column: row[column] for column in expected} == pytest.approx(expected), name
    assert {name: len(answers[name]) for name in COUNTS} == COUNTS
    for name, (column, cells) in ORDERED.items():
        assert [row[column] for row in answers[name]] == cells, name


def test_cost_and_slow_steps_say_where_the_time_went(store: Store):
    """100 s of training, and 10 s of sampling by two workers in 5 s, on two GPUs; ten other steps took 1.5 s each."""
    cost = {row["stage"]: row for row in rows_of(store, "cost")}
    total = sum(row["gpu_seconds"] for row in cost.values())
    assert next(iter(cost)) == "optimize"
    assert cost["sample"]["gpu_seconds"] == 2 * cost["sample"]["cpu_seconds"] == 2 * cost["sample"]["seconds"]
    assert cost["evaluate"]["steps"] == 3
    assert sum(row["share"] for row in cost.values()) == pytest.approx(1)
    assert cost["optimize"]["share"] == pytest.approx(cost["optimize"]["gpu_seconds"] / total)
    rows = rows_of(store, "slow_steps")
    assert [row["seconds"] for row in rows] == sorted((row["seconds"] for row in rows), reverse=True)
    row = next(row for row in rows if row["step"] == "sample")
    assert (row["busy"], row["rows_per_second"]) == (row["seconds"] / 5.0, 6 / row["seconds"])


def test_curves_have_metrics_and_speeds_but_nothing_held_out(store: Store):
    assert [(row["metric"], row["step"], row["value"]) for row in rows_of(store, "curves")] == [
        ("loss", 1, 0.7),
        ("loss", 2, 0.5),
        ("pairs_per_second", 1, 9.0),
    ]


def test_rewards_and_lengths_are_correlated_within_prompts_and_over_all(store: Store):
    """As numpy computes it: within prompts, both are measured from the mean of the prompt."""
    length = np.array([len(tokens) for tokens in TOKENS.values()], dtype=float)
    reward = np.array(list(SCORES.values()))
    is_p = np.array([name in "abcd" for name in TOKENS])
    x, y = (values - np.where(is_p, values[is_p].mean(), values[~is_p].mean()) for values in (length, reward))
    row = rows_of(store, "reward_by_length")[0]
    assert (row["prompts"], row["candidates"]) == (2, 6)
    assert row["overall"] == pytest.approx(np.corrcoef(length, reward)[0, 1])
    assert row["within_prompts"] == pytest.approx(x @ y / math.sqrt((x @ x) * (y @ y)))


def test_the_histogram_counts_every_reward_once(store: Store):
    """Six rewards from 0 to 5 in bins of a tenth; the largest is in the last bin, not in another."""
    rows = rows_of(store, "reward_histogram")
    assert [(row["low"], row["n"]) for row in rows if row["what"] == "all candidates"] == [
        (pytest.approx(low), n) for low, n in ((0, 1), (1, 1), (2, 1), (3, 2), (4.9, 1))
    ]
    assert sum(row["n"] for row in rows if row["what"] == "kept") == 3


def test_responses_are_beside_the_baseline(store: Store):
    """The one of the evaluation, and not what another judge of the config compared the response with."""
    rows = query(open_catalog(store, "rso", 2), queries.text("responses")).to_pylist()
    assert rows == [dict(prompt="text h", baseline="base", response="ours", gold_baseline=3.0, gold=1.0)]


def test_status_shows_steps_that_are_not_finished(tmp_path: Path):
    store = Store(tmp_path / "store")
    put(store, "prompts", "1", [table(PROMPTS)])
    link(store, "one", prompts=("prompts", "1"), later=("select", "4444"))
    states = {row["step"]: row["state"] for row in rows_of(store, "status")}
    assert states == {"prompts": "finished", "later": "not finished"}


def test_every_query_runs_on_a_whole_run(finished: Path):
    """Of RSO on the tiny data set; those that ask for what it has no rows of answer with none."""
    catalog = open_catalog(Store(finished))
    none = {"now", "rejects", "rounds", "two_losses", "unpaired", "votes"}
    assert {name for name in queries.names() if not query(catalog, queries.text(name)).num_rows} <= none
    assert isinstance(query(catalog, queries.text("cost")), pa.Table)


def test_the_baseline_of_a_win_rate_is_the_sft_policys_whatever_else_has_the_same_draws(tmp_path: Path):
    """Two steps with equal options are one result: at temperature 1, draws as `sample` has them are those of it."""
    store, key = Store(tmp_path / "store"), "ba5e000000000000"
    put(store, "sample", key, [])
    identity = {"version": 1, "options": {}, "inputs": {"baseline": key}}
    figure = dict(metric="proxy_win", value=0.5, low=0.4, high=0.6, n=2)
    put(store, "evaluate", "e000000000000000", [table(EVALUATIONS, figure)], identity=identity)
    steps = dict.fromkeys(("another", "eval_baseline", "eval_baseline_as_sampled"), ("sample", key))
    link(store, "run", **steps, evaluate=("evaluate", "e000000000000000"))
    assert [row["against"] for row in rows_of(store, "judges")] == ["sft"]


def test_other_evaluations_are_columns_of_the_leaderboard_and_rows_of_all_evaluations(store):
    """Round 2 was also evaluated greedily: win rates, rounds and gains are those at temperature 1."""
    catalog = open_catalog(store)
    board = {row["run"]: row for row in query(catalog, queries.text("leaderboard")).to_pylist()}
    assert {run: row["gold_win"] for run, row in board.items()} == {"rso@1": 0.6, "rso@2": 0.8}
    assert [board[run]["gold_win_greedy"] for run in ("rso@1", "rso@2")] == [None, 0.3]
    assert board["rso@2"]["proxy_win_greedy_low"] == pytest.approx(0.1)
    assert board["rso@2"]["gold_win_as_sampled"] is None
    shown = leaderboard_table(query(catalog, queries.text("leaderboard"))).to_pylist()[0]
    assert shown["gold_win_greedy"] == "30.0 % [20.0, 40.0]"
    assert not {"gold_win_as_sampled", "proxy_win_greedy"} & shown.keys()
    # A judge called gold judges the draws at temperature 1 alone: of others, the proxy's win rate is shown.
    no_gold = f"SELECT * REPLACE (NULL::DOUBLE AS gold_win_greedy) FROM ({queries.text('leaderboard')})"
    shown = leaderboard_table(query(catalog, no_gold)).to_pylist()[0]
    assert (shown["gold_win"][:4], shown["proxy_win_greedy"]) == ("80.0", "20.0 % [10.0, 30.0]")
    assert not {"gold_win_greedy", "proxy_win_as_sampled"} & shown.keys()
    rows = [(row["run"], row["step"], row["gold_win"]) for row in rows_of(store, "all_evaluations")]
    assert rows == [("rso@2", "evaluate", 0.8), ("rso@1", "evaluate", 0.6), ("rso@2", "evaluate_greedy", 0.3)]
