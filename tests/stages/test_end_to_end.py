"""Complete runs at the size of a test, one per shape of data: real stages, the command as users type it."""

import json
import shutil
from pathlib import Path

import pyarrow.compute as pc
import pytest

from jobs import queries
from jobs.export import export_pairs
from jobs.recipes import OWN_CANDIDATES, names
from jobs.report import write_report
from pipeline.sql.catalog import open_catalog, query
from pipeline.store.store import Store
from schemas.tables import CANDIDATES, PAIRS
from tests.runs import SHORT, plan_of, run_recipe

SHAPES = {
    "pairs": "dpo",
    "demonstrations": "sft",
    "mix": "mixture",
    "unpaired labels": "kto",
    "head": "cvx_dpo",
    "rounds": "raft",
}
SHARED = {"prompts", "preferences", "sft", "ranker"}  # steps that RSO's run has finished, and every recipe uses
DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def store(data_dir, finished, tmp_path_factory) -> Path:
    """RSO's finished store and, in it, one complete run per shape of data."""
    root = tmp_path_factory.mktemp("shapes") / "store"
    shutil.copytree(finished, root)
    for recipe in SHAPES.values():
        assert not (SHARED | {"sample", "reward"}) & set(run_recipe(data_dir, root, recipe, *SHORT)[1])
    return root


def test_a_policy_is_evaluated_at_three_temperatures(data_dir, finished, tmp_path):
    """Beside temperature 1: as `sample` draws, and greedily, of which draws of one seed and another are the same."""
    root = tmp_path / "store"
    shutil.copytree(finished, root)
    also = "evaluations=[evaluate_as_sampled, evaluate_greedy]"
    plan, ran = run_recipe(data_dir, root, "rso", also)
    assert len(ran) == 8
    assert set(ran) == {step.name for step in plan.steps if step.name.endswith(("_as_sampled", "_greedy"))}
    steps = {step.name: step for step in plan.steps}
    law = ("temperature", "top_k", "top_p", "max_tokens")
    of = {name: tuple(steps[name].options[option] for option in law) for name in steps if steps[name].stage == "sample"}
    assert of["eval_sample_as_sampled"] == of["sample"] == (0.7, 40, 1.0, 24)
    assert of["eval_sample"] == (1.0, 0, 1.0, 24)
    greedy = Store(root).folder(steps["eval_sample_greedy"]).read(CANDIDATES)
    assert set(pc.value_counts(greedy["prompt_id"]).field("counts").to_pylist()) == {1}
    again, _ = run_recipe(data_dir, root, "rso", also, "eval_sample_greedy.seed=9")
    other = Store(root).folder(next(step for step in again.steps if step.name == "eval_sample_greedy")).read(CANDIDATES)
    assert other["token_ids"] == greedy["token_ids"]
    board = query(open_catalog(Store(root), "rso"), queries.text("leaderboard")).to_pylist()
    assert all(row["gold_win_as_sampled"] is not None and row["gold_win_greedy"] is not None for row in board)


def test_each_shape_of_data_ends_on_one_leaderboard(store):
    """Every run, and every round of one with rounds, ends in a measured policy beside those of the others."""
    board = query(open_catalog(Store(store)), queries.text("leaderboard")).to_pylist()
    assert {row["run"] for row in board} == {"run", "dpo", "sft", "mixture", "kto", "cvx_dpo", "raft@1", "raft@2"}
    assert all(row["gold_win"] and row["proxy_win"] and row["seconds"] for row in board)


def test_the_sft_policy_against_itself_has_no_kl(store):
    """The control: same weights on both sides, so log p - log p_baseline is zero for every response."""
    catalog = open_catalog(Store(store), "sft")
    assert query(catalog, "SELECT max(abs(kl)) AS kl FROM outcomes").column("kl").to_pylist() == [0.0]


def test_the_report_is_one_self_contained_page(store, tmp_path):
    write_report(Store(store), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert all(f">{name}</h2>" in page for name in ("dpo", "kto", "mixture"))
    assert page.count("<svg") >= 5
    for namespace in ("http://www.w3.org", "http://purl.org", "http://creativecommons.org"):
        page = page.replace(namespace, "")
    assert "http://" not in page
    assert "<script" not in page


def test_trace_shows_each_stage_of_a_prompt(store, winnow):
    code, text = winnow("trace", "run", "--store", store)
    assert code == 0
    for title in ("sampled", "select", "compared", "pairs", "reference log-prob", "training"):
        assert title in text


@pytest.mark.filterwarnings("ignore:.*path. 1 of the first 120 responses of .* will be rejected")  # by the plan
def test_candidates_of_another_system_enter_at_select(tmp_path, winnow):
    """The README's command: 120 rows, of which an empty response, p = 0, p = 1 and p = null are rejected."""
    code, text = winnow("run", "own_candidates", "--store", tmp_path, "--config", DATA / "untrained.yaml")
    assert code == 0
    for reason in ("empty response", "probability is exactly 0", "probability is exactly 1", "not a number"):
        assert reason in text
    manifests = {manifest["stage"]: manifest for manifest in Store(tmp_path).sealed()}
    assert manifests["own_candidates"]["rows"]["candidates"] == 116
    assert manifests["optimize"]["model"]


@pytest.mark.filterwarnings("ignore:.*path. 1 of the first 120 responses of .* will be rejected")  # by the plan
def test_completions_without_scores_are_scored_and_trained_on(tmp_path, winnow):
    """By the ranker, from a file to the evaluation on its held-out prompts; exported pairs have these rewards."""
    candidates = f"{{path: {DATA / 'candidates.jsonl'}, probability: null, max_tokens: 512}}"
    (tmp_path / "my.yaml").write_text(
        f"ranker: {{use: brevity, with: {{words: 14}}}}\nown_candidates: {{with: {candidates}}}\n"
        "shards: 2\nevaluations: []\nsample: {with: {engine: transformers, max_tokens: 8}}\neval_sample: {with: {n: 1}}"
    )
    configs = ("--config", DATA / "untrained.yaml", "--config", tmp_path / "my.yaml")
    code, text = winnow("run", "own_completions", "--store", tmp_path / "store", *configs)
    assert code == 0, text
    store = Store(tmp_path / "store")
    rows = {manifest["stage"]: manifest["rows"] for manifest in store.sealed()}
    assert rows["own_candidates"]["rewards"] == 0
    assert rows["reward"]["rewards"] == rows["own_candidates"]["candidates"] == 119  # without the empty response
    (row,) = query(open_catalog(store), queries.text("leaderboard")).to_pylist()
    assert (row["run"], row["proxy_win"] is not None) == ("own_completions", True)
    exported = export_pairs(store, "own_completions", "jsonl", tmp_path / "pairs.jsonl").out.read_text().splitlines()
    assert exported
    assert all(pair["chosen_reward"] > pair["rejected_reward"] for pair in map(json.loads, exported))


def test_human_pairs_are_trained_on_as_they_came(data_dir, store):
    """DPO's direct: one pair per preference row, chosen first, and the reference covers both sides."""
    plan = plan_of(data_dir, recipe="dpo")
    folder = Store(store).folder(next(step for step in plan.steps if step.name == "preferences"))
    texts = {row["candidate_id"]: row["text"] for row in folder.read(CANDIDATES).to_pylist()}
    rows = [json.loads(line) for line in (data_dir / "preferences.jsonl").read_text().splitlines()]
    sides = {(texts[row["chosen_id"]], texts[row["rejected_id"]]) for row in folder.read(PAIRS).to_pylist()}
    assert sides == {(row["chosen"], row["rejected"]) for row in rows}


# `-m bench` trains all: test_walk.py.
OTHER_STARTS = [name for name in names() if name.endswith("_pretrained")]
# As another one's but for a loss, the order of two trainings, a rule, or the objective that is trained in each round
SAME_STEPS = [
    *("cdpo", "hinge_norm", "ipo", "sequence_reverse", "maxright_pretrained", "iterated_dpo", "raft_tournament", "spr"),
    *("rso_scores", "rrhf_ip"),
]


@pytest.mark.parametrize(
    "recipe", [name for name in names() if name not in (*OWN_CANDIDATES, *SHAPES.values(), *OTHER_STARTS, *SAME_STEPS)]
)
def test_every_recipe_is_trained(data_dir, store, recipe):
    """The other recipes, up to the policy or head of their last round; shared steps are taken from the store."""
    target = "preference_head" if recipe == "logistic_head" else "optimize"
    plan, executed = run_recipe(data_dir, store, recipe, f"target={target}", *SHORT)
    assert not SHARED & set(executed)
    assert all(Store(store).folder(step).manifest for step in plan.targets)
