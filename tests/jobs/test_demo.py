"""The demo world: made on the spot, the same bytes every time, and a gold reward that only two places read."""

import ast
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.demo import OVERLAY, data
from jobs.demo.gold import concierge
from jobs.paper import paper_plans
from jobs.recipes import plan_named

ROOT = Path(__file__).parents[2]
ASKED = "Please book a boat for four on Friday in Oslo."
RIGHT = "Gladly. I have booked a boat for four on Friday in Oslo. Enjoy your stay."


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    for folder in made:
        data.write(folder)
    return made


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_the_same_bytes_every_time(folders):
    one, two = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
    assert one == two


def test_no_prompt_stands_in_two_files_or_twice_in_one(folders):
    prompts = [row["prompt"] for name in ("demonstrations", "prompts", "preferences") for row in rows(folders[0], name)]
    assert len(set(prompts)) == len(prompts)


def test_the_judge_is_better_than_chance_and_errs(folders):
    """Bradley-Terry on the gold gap: most labels agree with gold, some do not."""
    agree = [
        concierge(row["prompt"], row["chosen"]) >= concierge(row["prompt"], row["rejected"])
        for row in rows(folders[0], "preferences")
    ]
    assert 0.6 < sum(agree) / len(agree) < 0.95


@pytest.mark.parametrize(
    ("response", "worse"),
    [
        (RIGHT, RIGHT.replace("four", "nine")),  # a wrong slot
        (RIGHT, RIGHT.replace(" in Oslo", "")),  # a missing one
        (RIGHT, RIGHT + " I added champagne too."),  # an invention
        (RIGHT, RIGHT.replace("for four", "um for four")),  # filler
        (RIGHT, RIGHT + " Many people like it and they often come back again and again and again."),  # length
        (RIGHT, "A boat for four on Friday in Oslo."),  # curt, and nothing confirmed
        (RIGHT.replace(" in Oslo", ""), RIGHT.replace("Oslo", "Rome")),  # wrong is worse than open
    ],
)
def test_gold_prefers_what_the_guest_wants(response, worse):
    assert concierge(ASKED, response) > concierge(ASKED, worse)


@given(st.text(), st.text())
def test_gold_is_a_finite_number_for_any_text(prompt, response):
    assert abs(concierge(prompt, response)) < 1e6


def test_only_the_evaluation_and_the_judge_of_the_world_read_gold():
    readers = set()
    for path in [*ROOT.glob("stages/**/*.py"), *ROOT.glob("jobs/**/*.py"), *ROOT.glob("pipeline/*.py")]:
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        if names & {"concierge", "gold_reward"}:
            readers.add(path.relative_to(ROOT).as_posix())
    assert readers == {"stages/evaluation/evaluate.py", "jobs/demo/gold.py", "jobs/demo/data.py"}


def test_the_papers_cells_are_the_demos_own_runs_where_they_are_the_same(folders, tmp_path):
    """gamma = 1 is the demo world's beta: `winnow paper` trains no policy again that `winnow demo` has trained."""
    overlay = Path(shutil.copyfile(OVERLAY, shutil.copytree(folders[0], tmp_path / "demo") / "demo.yaml"))
    cells = {plan.name: plan.target.key for plan in paper_plans([overlay], [])}
    for recipe, pairs in (("dpo", "direct"), ("sft_sample_rank", "sft-sample-rank"), ("rso", "rso-sample-rank")):
        assert cells[f"paper sigmoid-norm {pairs}"] == plan_named(recipe, [overlay], []).target.key
