"""The demo's data are the same bytes every time, and its gold reward is used in two places only."""

import ast
import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.demo import OVERLAY, data
from jobs.demo.gold import concierge
from jobs.paper import paper_plans
from jobs.recipes import plan_named

ROOT = Path(__file__).parents[2]
PROMPT = "Please book a boat for four on Friday in Oslo."
RIGHT = "Gladly. I have booked a boat for four on Friday in Oslo. Enjoy your stay."
SHA256 = {
    "demonstrations": "163d4aa34ededb7d",
    "prompts": "ea2dc25365fa81ec",
    "preferences": "6be92d1848547728",
    "other_prompts": "7b804f0ba68212da",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "demo"
    folder.mkdir()
    for name, content in data.files().items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def rows_by_file(folder):
    return {name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()] for name in SHA256}


def test_the_files_are_the_same_bytes_everywhere(folder):
    """Results that were published stay comparable."""
    assert {file.stem: sha256(file.read_bytes()).hexdigest()[:16] for file in folder.glob("*.jsonl")} == SHA256


def test_no_prompt_occurs_twice_in_any_file(rows_by_file):
    prompts = [row["prompt"] for rows in rows_by_file.values() for row in rows]
    assert len(set(prompts)) == len(prompts)


def test_the_judge_is_better_than_chance_and_errs(rows_by_file):
    """Bradley-Terry on the difference of gold: most labels agree with gold, some do not."""
    agree = [
        concierge(row["prompt"], row["chosen"]) >= concierge(row["prompt"], row["rejected"])
        for row in rows_by_file["preferences"]
    ]
    assert 0.6 < sum(agree) / len(agree) < 0.95


def test_gold_prefers_what_the_guest_requested():
    for better, worse in [
        (RIGHT, RIGHT.replace("four", "nine")),  # a wrong slot
        (RIGHT, RIGHT.replace(" in Oslo", "")),  # a missing one
        (RIGHT, RIGHT + " I added champagne too."),  # an invention
        (RIGHT, RIGHT.replace("for four", "um for four")),  # filler
        (RIGHT, RIGHT + " Many people like it and they often come back again and again and again."),  # length
        (RIGHT, "A boat for four on Friday in Oslo."),  # curt, and nothing confirmed
        (RIGHT.replace(" in Oslo", ""), RIGHT.replace("Oslo", "Rome")),  # wrong is worse than open
    ]:
        assert concierge(PROMPT, better) > concierge(PROMPT, worse), worse


@settings(max_examples=30)
@given(st.text(), st.text())
def test_gold_is_a_finite_number_for_any_text(prompt, response):
    assert abs(concierge(prompt, response)) < 1e6


def test_only_the_evaluation_its_diagnosis_and_the_demos_judge_use_gold():
    """`diagnose`, for which jobs/recipes.py reads it from the config, trains nothing."""
    users = set()
    for path in [*ROOT.glob("stages/**/*.py"), *ROOT.glob("jobs/**/*.py"), *ROOT.glob("pipeline/**/*.py")]:
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        if names & {"concierge", "gold_reward"}:
            users.add(path.relative_to(ROOT).as_posix())
    assert users == {"stages/evaluation/evaluate.py", "jobs/recipes.py", "jobs/demo/gold.py", "jobs/demo/data.py"}


def test_the_papers_cells_are_the_demos_own_runs_where_they_are_the_same(folder):
    """gamma = 1 is the demo's beta: `winnow paper` trains no policy again that `winnow demo` has trained."""
    overlay = Path(shutil.copyfile(OVERLAY, folder / "demo.yaml"))

    def policy(plan):
        return next(step.key for step in plan.steps if step.name == "optimize")

    cells = {plan.name: policy(plan) for plan in paper_plans([overlay], []) if "likelihood" not in plan.name}
    for recipe, pairs in (("dpo", "direct"), ("sft_sample_rank", "sft-sample-rank"), ("rso", "rso-sample-rank")):
        assert cells[f"paper sigmoid-norm {pairs}"] == policy(plan_named(recipe, [overlay], []))
