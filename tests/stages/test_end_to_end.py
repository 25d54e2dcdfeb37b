"""The main job at the size of a test: real stages, real vLLM, the command as people type it."""

import json
import shutil
import sys
from pathlib import Path

import pyarrow.compute as pc
import pytest

from jobs.__main__ import main
from jobs.commands.app import QUERIES
from jobs.recipes import names
from jobs.report import write_report
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.sql.catalog import open_catalog, query
from pipeline.store.store import Store
from schemas.tables import CANDIDATES, EVALUATIONS, PAIRS
from tests.runs import Silent, plan_of

SAMPLED = ("sft", "dpo", "kto", "simpo")
DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def methods(finished, tmp_path_factory) -> Path:
    """A copy of the finished store that all methods add to."""
    root = tmp_path_factory.mktemp("all") / "store"
    shutil.copytree(finished, root)
    return root


@pytest.fixture(scope="module")
def sampled(world, finished, tmp_path_factory) -> Path:
    """The finished store and, on top, runs of other recipes: they share candidates and rewards."""
    root = tmp_path_factory.mktemp("methods") / "store"
    shutil.copytree(finished, root)
    watcher = Silent()
    for recipe in SAMPLED:
        plan = plan_of(world, recipe=recipe)
        plan.name = recipe
        run(plan, Store(root), LocalExecutor(), watcher)
    assert not {"sample", "reward", "sft", "ranker"} & set(watcher.ran)
    return root


def test_the_pipeline_runs_on_real_vllm(world, finished, tmp_path):
    """From the SFT policy to a measured one, sampling by vLLM: 6 draws a prompt, all seeds different."""
    root = tmp_path / "store"
    shutil.copytree(finished, root)
    steps = [f"{step}.engine=vllm" for step in ("sample", "eval_sample", "eval_baseline")]
    plan = plan_of(world, *steps, "sample.n=6")
    run(plan, Store(root), LocalExecutor(), Silent())
    folders = {step.name: Store(root).folder(step) for step in plan.steps}
    candidates = folders["sample"].read(CANDIDATES)
    assert len(set(candidates.column("seed").to_pylist())) == candidates.num_rows
    assert pc.all(pc.less_equal(candidates.column("logp"), 0)).as_py()
    metrics = dict(zip(*folders["evaluate"].read(EVALUATIONS).select(["metric", "value"]).columns, strict=True))
    assert {"proxy_win", "gold_win", "kl", "n_tokens"} <= {str(name) for name in metrics}


def test_recipes_share_candidates_and_land_on_one_leaderboard(sampled):
    board = query(open_catalog(Store(sampled)), (QUERIES / "leaderboard.sql").read_text())
    assert set(board.column("run").to_pylist()) == {"run", *SAMPLED}
    assert None not in board.column("gold_win").to_pylist()


@pytest.mark.parametrize("recipe", [name for name in names() if name not in ("own_candidates", *SAMPLED)])
def test_every_method_runs_from_its_recipe_to_the_leaderboard(world, methods, recipe):
    """One store for all: what is shared is made once, and a measured policy stands at the end of every round."""
    plan, watcher = plan_of(world, recipe=recipe), Silent()
    plan.name = recipe
    run(plan, Store(methods), LocalExecutor(), watcher)
    assert not {"sft", "ranker", "preferences", "prompts"} & set(watcher.ran)
    board = query(open_catalog(Store(methods), recipe), (QUERIES / "leaderboard.sql").read_text()).to_pylist()
    rounds = [f"{recipe}@{n}" for n in range(1, len(plan.targets) + 1)] if "@" in plan.target.name else [recipe]
    assert sorted(row["run"] for row in board) == rounds
    assert all(row["gold_win"] and row["proxy_win"] and row["seconds"] for row in board)


def test_the_sft_policy_against_itself_has_no_kl(sampled):
    """The control: same weights on both sides, so log p - log p_baseline is zero for every response."""
    catalog = open_catalog(Store(sampled), "sft")
    assert query(catalog, "SELECT max(abs(kl)) AS kl FROM outcomes").column("kl").to_pylist() == [0.0]


def test_the_report_is_one_self_contained_page(sampled, tmp_path):
    write_report(Store(sampled), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for run_name in ("dpo", "kto", "simpo"):
        assert f"<h2>{run_name}</h2>" in page
    assert page.count("<svg") >= 5
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "<script" not in page


def test_trace_tells_the_life_of_a_prompt(sampled, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["winnow", "trace", "run", "--store", str(sampled)])
    with pytest.raises(SystemExit, match="0"):
        main()
    told = capsys.readouterr().out
    for room in ("sampled", "kept by select", "compared", "pairs", "reference log-probs", "training group"):
        assert room in told


def test_candidates_of_another_system_enter_at_select(tmp_path, monkeypatch, capsys):
    """The README's command: 120 rows, of which an empty response, p = 0, p = 1 and p = null are left out."""
    words = ["winnow", "run", "own_candidates", "--store", str(tmp_path), "--config", str(DATA / "untrained.yaml")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="0"):
        main()
    told = capsys.readouterr().out
    for reason in ("empty response", "probability is exactly 0", "probability is exactly 1", "not a number"):
        assert reason in told
    manifests = {manifest["stage"]: manifest for manifest in Store(tmp_path).sealed()}
    assert manifests["own_candidates"]["rows"]["candidates"] == 116
    assert manifests["optimize"]["model"]


def test_pairs_of_people_are_trained_on_as_they_came(world, sampled):
    """DPO's direct: one pair a preference row, chosen first, and the reference covers both sides."""
    plan = plan_of(world, recipe="dpo")
    step = {step.name: step for step in plan.steps}["preferences"]
    pairs = Store(sampled).folder(step).read(PAIRS)
    texts = {row["candidate_id"]: row["text"] for row in Store(sampled).folder(step).read(CANDIDATES).to_pylist()}
    given = {json.loads(line)["chosen"] for line in (world / "preferences.jsonl").read_text().splitlines()}
    assert {texts[name] for name in pairs.column("chosen_id").to_pylist()} == given
