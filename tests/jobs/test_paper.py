"""The paper's tables: cells and figures, conclusions that agree or not, and all of it on the tiny configuration."""

import re
import shutil

import numpy as np
import pytest

import jobs.paper
from jobs.paper import cells, conclusions, paper_plans, tables
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.sql.catalog import open_catalog, query
from pipeline.store.store import Store
from stages.evaluation import evaluate
from stages.evaluation.evaluate import bootstrap_interval
from tests.runs import Silent, plan_of

# Tables 1 and 2 of arXiv 2309.06657, as notes/methods.md 1.4 has them: proxy / gold / AutoSxS, TL;DR then HH.
TABLE_1 = """
likelihood raft              74.84/68.51/53.77 58.21/40.00/24.99
likelihood rest              49.03/46.17/34.36 43.48/30.33/15.58
sigmoid-norm direct          84.35/76.09/67.72 51.63/36.13/24.01
sigmoid-norm sft-sample-rank 88.63/78.14/69.02 85.09/58.65/39.56
sigmoid-norm rso-sample-rank 92.37/82.22/71.86 86.94/59.15/40.98
hinge direct                 86.92/79.76/60.54 35.95/27.56/15.69
hinge sft-sample-rank        90.15/80.19/67.34 80.82/54.55/30.66
hinge rso-sample-rank        93.36/84.40/69.26 82.21/55.22/32.56
hinge-norm direct            83.93/76.43/66.63 49.55/37.23/22.89
hinge-norm sft-sample-rank   88.04/76.57/68.46 82.40/56.55/35.96
hinge-norm rso-sample-rank   92.80/83.45/70.84 84.44/57.75/38.58
"""
TABLE_2 = """
sft 8 first-round  88.63/68.51
sft 8 tournament   90.69/68.57
rso 8 first-round  92.37/71.86
rso 8 tournament   93.35/71.69
sft 64 first-round 88.91/68.84
sft 64 tournament  91.14/71.08
"""
JUDGES = ("judge", "evaluate")
PROMPTS = [f"p{n}" for n in range(40)]


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(jobs.paper, "RESAMPLES", 200)


def transcribed(table):
    """{labels: figures, of one data set after the other}."""
    lines = (re.fullmatch(r"(.+?) +([\d./ ]+)", line) for line in table.strip().splitlines())
    return {match[1]: [float(figure) for figure in re.split("[/ ]", match[2])] for match in lines}


def test_the_cells_are_the_papers_eleven_and_six_with_its_figures():
    """Table 2 has no gold."""
    figures: dict[str, dict] = {"table 1": {}, "table 2": {}}
    for cell in cells():
        row = [figure for data in cell.paper.values() for figure in data if figure is not None]
        figures[cell.table][" ".join(cell.labels.values())] = row
    assert figures == {"table 1": transcribed(TABLE_1), "table 2": transcribed(TABLE_2)}
    assert [len(table) for table in figures.values()] == [11, 6]
    assert all(cell.paper["tldr"][1] is None for cell in cells() if cell.table == "table 2")


def objectives(plans):
    steps = {plan.name: next(step for step in plan.steps if step.name.startswith("optimize")) for plan in plans}
    return {name: (step.options["objective"].name, step.options["objective"].options) for name, step in steps.items()}


def test_all_pair_losses_take_the_same_gamma_and_the_hinge_the_margin_of_it(data_dir):
    """Whatever the objective of the configuration is; and --set still takes precedence over the table."""
    for gamma in (1.0, 0.05, 1e-5):
        by_run = objectives(paper_plans([data_dir / "demo.yaml"], [], gamma))
        assert len(by_run) == 17
        assert {by_run.pop(f"paper likelihood {name}")[0] for name in ("raft", "rest")} == {"nll"}
        for name, (loss, options) in by_run.items():
            expected = {"hinge": ("delta", 1 / gamma), "hinge_norm": ("gamma", gamma), "sigmoid_norm": ("beta", gamma)}
            assert expected[loss] in options.items(), name
    hinge = objectives(paper_plans([data_dir / "demo.yaml"], ["optimize.objective={name: hinge, delta: 2.0}"]))
    assert {hinge.pop(f"paper likelihood {name}")[0] for name in ("raft", "rest")} == {"nll"}
    assert {options["delta"] for _, options in hinge.values()} == {2.0}
    changed = paper_plans([data_dir / "demo.yaml"], ["optimize.epochs=3"])
    steps = [step for plan in changed for step in plan.steps if step.name.startswith("optimize")]
    assert {step.options["epochs"] for step in steps} == {3}


def test_wins_are_against_the_target_texts_as_in_the_paper(data_dir):
    """By default; or against the SFT policy's draws."""
    config = [data_dir / "demo.yaml"]
    for plans, stage in ((paper_plans(config, []), "pool"), (paper_plans(config, [], against="sft"), "sample")):
        baselines = [step.inputs["baseline"].stage for plan in plans for step in plan.steps if step.stage in JUDGES]
        assert baselines == [stage] * 2 * 17


def wins_of(rate):
    """The same share of wins of every prompt, by run, for both metrics."""
    return {
        cell.run: {metric: dict.fromkeys(PROMPTS, rate(cell)) for metric in ("gold_win", "proxy_win")}
        for cell in cells()
    }


def verdicts(wins, metric, claim):
    return {row["for"]: row[f"{metric} agrees"] for row in conclusions(wins) if row["claim"] == claim}


def test_a_conclusion_is_confirmed_refuted_or_unclear():
    """+20 points on each prompt agree with the paper's sign, -20 do not, and 0 on average are unclear."""
    claim = "plain sampling beats direct pairs"
    losses = ("sigmoid-norm", "hinge", "hinge-norm")
    for shift, verdict in ((0.2, "yes"), (-0.2, "no")):
        wins = wins_of(lambda cell, shift=shift: 0.5 + shift * (cell.labels["pairs"] == "sft-sample-rank"))
        for metric in ("gold", "proxy"):
            assert verdicts(wins, metric, claim) == dict.fromkeys(losses, verdict)
    noisy = wins_of(lambda cell: 0.5)
    noisy["paper hinge direct"]["gold_win"] = {prompt: float(n % 2) for n, prompt in enumerate(PROMPTS)}
    assert set(verdicts(noisy, "gold", claim).values()) == {"unclear"}


def test_a_conclusion_compares_prompts_that_both_cells_have():
    """+10 points on each of the 30 shared prompts, whatever the other ten are; where none is shared, no verdict."""
    wins = wins_of(lambda cell: 0.5)
    wins["paper sft 8 tournament"]["proxy_win"] = {p: 0.6 if n < 30 else 0.0 for n, p in enumerate(PROMPTS)}
    wins["paper sft 8 first-round"]["proxy_win"] = dict.fromkeys(PROMPTS[:30], 0.5)
    wins["paper rso 8 first-round"]["proxy_win"] = {}
    rows = {row["for"]: row for row in conclusions(wins) if row["claim"] == "a tournament raises the proxy"}
    assert (rows["sft 8"]["proxy"], rows["sft 8"]["paper proxy"]) == ("+10.0 [+10.0, +10.0]", "+2.1")
    assert (rows["sft 8"]["proxy agrees"], rows["rso 8"]["proxy agrees"]) == ("yes", "")
    assert {row["gold agrees"] for row in rows.values()} == {""}, "the paper gives no gold here"


@pytest.fixture(scope="module")
def measured(data_dir, finished, tmp_path_factory):
    """A store with all cells of table 2, and those of table 1 that are among them; and which steps each ran."""
    root = tmp_path_factory.mktemp("paper") / "store"
    shutil.copytree(finished, root)
    ran = {}
    for plan in paper_plans([data_dir / "demo.yaml"], ["optimize.epochs=1", "optimize.batch_size=64"]):
        if not any(word in plan.name for word in ("hinge", "direct", "likelihood")):
            watcher = Silent()
            run(plan, Store(root), LocalExecutor(), watcher)
            ran[plan.name] = watcher.ran
    return Store(root), ran


def test_the_tables_come_out_with_intervals_beside_the_papers_figures(measured):
    store, _ = measured
    (_, first), (_, second), (_, claims) = tables(store)
    assert [first.num_rows, second.num_rows] == [11, 6]
    for row in second.to_pylist():
        for ours in (row["our gold %"], row["our proxy %"]):
            mean, low, high = map(float, re.fullmatch(r"(\S+) \[(\S+), (\S+)\]", ours).groups())
            assert 0 <= low <= mean <= high <= 100
    rso = next(row for row in second.to_pylist() if (row["pairs"], row["rank"]) == ("rso 8", "first-round"))
    assert rso["paper TL;DR gold/proxy/AutoSxS"] == "- / 92.37 / 71.86"
    losses = {row["loss"] for row in first.to_pylist() if row["our gold %"]}
    assert losses == {"sigmoid-norm"}, "a cell that is not run yet is empty"
    verdict = {row["proxy agrees"] for row in claims.to_pylist() if row["for"].startswith(("sft", "rso"))}
    assert verdict <= {"yes", "no", "unclear"}


def test_the_number_that_was_selected_stands_beside_the_papers(measured):
    """Plain samples are counted where they are compared; a few of 64 are rejected."""
    rows = tables(measured[0])[1][1].to_pylist()
    selected = {(row["pairs"], row["rank"]): float(row["our selected per prompt"]) for row in rows}
    assert 50 < selected["sft 64", "first-round"] <= selected["sft 64", "tournament"] <= 64
    assert 4 < selected["sft 8", "first-round"] <= 8
    assert selected["rso 8", "first-round"] <= 8


def test_another_gamma_makes_other_runs_beside_those_of_before(winnow, data_dir, finished, tmp_path, monkeypatch):
    """A cell's run that has finished keeps its name; all cells of the command have one number then."""
    store = Store(shutil.copytree(finished, tmp_path / "store"))
    store.link_run("paper rso 8 first-round", plan_of(data_dir).steps)
    first, names = store.run("paper rso 8 first-round"), list[str]()
    monkeypatch.setattr("jobs.commands.run.run_plans", lambda plans, *rest: names.extend(plan.name for plan in plans))
    code, text = winnow("paper", "--config", data_dir / "demo.yaml", "--store", store.root)
    assert (code, {name.split()[0] for name in names}) == (0, {"paper-2"}), text
    assert store.run("paper rso 8 first-round") == first


def test_a_table_reads_the_runs_that_stand_for_its_cells(measured):
    """Such as `paper-2 ...`; here a run that is no cell."""
    sql = "SELECT 100 * avg(proxy_win) AS rate FROM outcomes"
    (rate,) = query(open_catalog(measured[0], "run"), sql)["rate"].to_pylist()
    rows = tables(measured[0], {"paper rso 8 first-round": "run"})[1][1].to_pylist()
    figures = {(row["pairs"], row["rank"]): row["our proxy %"] for row in rows}
    assert figures["rso 8", "first-round"].startswith(f"{rate:.1f} [")


def test_cells_share_all_that_is_the_same(measured):
    """All but the 64 plain samples; the first-round cells of 8 of table 2 are two of table 1."""
    _, ran = measured
    shared = {"sft", "ranker", "sample", "reward", "targets"}
    made = [step for steps in ran.values() for step in steps if step in shared]
    assert made == ["targets", "sample"]  # the others are those of the run before
    assert ran["paper sft 8 first-round"] == ran["paper rso 8 first-round"] == []


def test_a_run_with_rounds_counts_by_its_last(data_dir, finished, tmp_path):
    """Of the wins of round 1 and 2, the cell's are those of 2."""
    root = tmp_path / "store"
    shutil.copytree(finished, root)
    store = Store(root)
    plan = plan_of(data_dir, "optimize.epochs=1", "optimize@2.learning_rate=3e-3", recipe="raft")
    plan.name = "paper rso 8 first-round"
    run(plan, store, LocalExecutor(), Silent())
    sql = "SELECT 100 * avg(proxy_win) AS rate FROM outcomes GROUP BY stage, key"
    rates = [query(open_catalog(store, plan.name, n), sql)["rate"].to_pylist() for n in (1, 2)]
    assert rates[0] != rates[1]
    row = next(row for row in tables(store)[1][1].to_pylist() if row["our proxy %"])
    assert row["our proxy %"].startswith(f"{rates[1][0]:.1f} [")


def test_resamples_in_blocks_are_those_drawn_one_by_one(monkeypatch):
    """Intervals in tables of results do not depend on how many resamples fit in a block."""
    monkeypatch.setattr(evaluate, "RESAMPLED_VALUES", 100)
    values, rng = np.random.default_rng(0).normal(size=33), np.random.default_rng(1)
    means = [rng.choice(values, 33).mean() for _ in range(200)]
    assert bootstrap_interval(values, 200, np.random.default_rng(1)) == tuple(np.percentile(means, [2.5, 97.5]))


def test_the_bootstrap_interval_of_equal_values_is_a_point():
    assert bootstrap_interval(np.full(7, 0.25), 50, np.random.default_rng(0)) == (0.25, 0.25)
