"""A scalarised multi-objective reward: the recipe's two rewards, their sum, and what is chosen by it."""

import shutil

import pytest
from rich.console import Console

from jobs import queries
from jobs.trace import trace_prompt
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.sql.catalog import open_catalog, query
from pipeline.store.store import Store
from tests.runs import SHORT, Silent, plan_of


@pytest.fixture(scope="module")
def catalog(data_dir, finished, tmp_path_factory):
    root = tmp_path_factory.mktemp("two") / "store"
    shutil.copytree(finished, root)
    plan, watcher = plan_of(data_dir, *SHORT, recipe="rso_two_rewards"), Silent()
    plan.name = "two"
    run(plan, Store(root), LocalExecutor(), watcher)
    assert not {"sample", "reward", "compare"} & set(watcher.ran), "these steps are rso's"
    return open_catalog(Store(root), "two")


def rewards_of(catalog, step):
    sql = f"SELECT candidate_id, reward, components FROM rewards JOIN runs USING (stage, key) WHERE step = '{step}'"
    return {row["candidate_id"]: row for row in query(catalog, sql).to_pylist()}


def test_the_sum_keeps_its_addends(catalog):
    """reward = 1.0 * the ranker's + 0.25 * minus the distance from 14 words."""
    total, ranked = rewards_of(catalog, "rewards"), rewards_of(catalog, "reward")
    texts = {row["candidate_id"]: row["text"] for row in query(catalog, "SELECT * FROM candidates").to_pylist()}
    assert set(total) == set(ranked)
    for name, row in total.items():
        parts = dict(row["components"])
        assert parts == {"first": ranked[name]["reward"], "second": -abs(len(texts[name].split()) - 14)}
        assert row["reward"] == pytest.approx(parts["first"] + 0.25 * parts["second"])


def test_selections_and_pairs_go_by_the_sum(catalog):
    total = {name: row["reward"] for name, row in rewards_of(catalog, "rewards").items()}
    selections = query(catalog, "SELECT candidate_id, reward FROM selections").to_pylist()
    assert all(row["reward"] == total[row["candidate_id"]] for row in selections)
    pairs = query(catalog, "SELECT pairs.* FROM pairs JOIN runs USING (stage, key) WHERE step = 'pair'").to_pylist()
    assert pairs
    for row in pairs:
        assert row["gap"] == pytest.approx(total[row["chosen_id"]] - total[row["rejected_id"]])
        assert row["gap"] > 0


def test_queries_and_traces_read_the_reward_that_selects_and_no_addend(catalog, capsys):
    """Means, bins and traces over the sum alone: each addend has a scale of its own."""
    total = [row["reward"] for row in rewards_of(catalog, "rewards").values()]
    (selection,) = query(catalog, queries.text("selection")).to_pylist()
    assert selection["mean_reward_all"] == pytest.approx(sum(total) / len(total))
    bins = [row for row in query(catalog, queries.text("reward_histogram")).to_pylist() if row["what"] != "kept"]
    assert sum(row["n"] for row in bins) == len(total)
    sizes = query(catalog, "SELECT prompt_id, count(*) AS n FROM candidates GROUP BY ALL").to_pylist()
    per_prompt = {row["prompt_id"]: row["n"] for row in sizes}
    unpaired = query(catalog, queries.text("unpaired")).to_pylist()
    assert all(row["candidates"] <= per_prompt[row["prompt_id"]] for row in unpaired)
    trace_prompt(Store(str(catalog.root)), "two", "", Console(width=200))
    rows = capsys.readouterr().out.partition("selected, in order")[0].splitlines()
    candidates = [words[1] for row in rows if row.startswith("│") and (words := row.split())]
    assert len(set(candidates)) == len(candidates) > 2
