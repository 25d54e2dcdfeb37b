"""The READMEs are true: their commands, files, configs, recipes and functions are those of the code."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

import jobs.__main__  # noqa: F401 - registers every command
from jobs.commands.app import app
from jobs.recipes import plans
from pipeline.config.layers import ONLY
from pipeline.plugins import unload_plugins
from stages.selection.groups import RewardGroups
from stages.training.objectives import Batch
from tests.conftest import write_jsonl

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *(page for top in ("schemas", "pipeline", "stages", "jobs", "tests") for page in ROOT.glob(f"{top}/**/README.md")),
]
README = (ROOT / "README.md").read_text()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def test_the_readme_is_short_and_its_first_screen_has_what_a_newcomer_needs():
    """At most 200 lines; sentence, picture, the two commands, a config and the result stand in the first 70."""
    lines = README.splitlines()
    assert len(lines) <= 200
    first_screen = "\n".join(lines[:70])
    for part in ("sample → rank → optimize", "make demo", "make test", "# my.yaml", "gold_win", "Tested on"):
        assert part in first_screen, part


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_to_a_file(page: Path):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_command_of_the_pages_is_known_with_its_options():
    """(That each runs as it stands is tried by hand in a fresh clone after `make demo`.)"""
    commands = [
        shlex.split(line.removeprefix(".venv/bin/winnow "), comments=True)
        for page in PAGES
        for block in blocks(page, "sh")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith(".venv/bin/winnow ")
    ]
    assert len(commands) > 30
    for words in commands:
        answer = CliRunner().invoke(app, [words[0], "--help"], env={"COLUMNS": "200"})
        assert answer.exit_code == 0, words
        for option in (word for word in words if word.startswith("--")):
            assert option in answer.output, f"{option} is no option of {words[0]}"


def test_the_configs_of_the_pages_name_steps_of_the_base():
    base = yaml.safe_load((ROOT / "jobs" / "recipes" / "_base.yaml").read_text())
    configs = [blocks(ROOT / "README.md", "yaml")[0], blocks(ROOT / "jobs" / "recipes" / "README.md", "yaml")[0]]
    for config in configs:
        assert set(yaml.safe_load(config)) <= {*base, ONLY, "recipes", "dtype"}


def test_the_plugin_of_the_stages_page_works_in_the_recipe_of_the_recipes_page(data_dir: Path, tmp_path: Path):
    """The loss is ln 2 where policy and reference agree; the best of three is paired with each of the others."""
    (python,) = blocks(ROOT / "stages" / "README.md", "python")
    (tmp_path / "my_code.py").write_text(python)
    pages = blocks(ROOT / "jobs" / "recipes" / "README.md", "yaml")
    recipe = next(block for block in pages if block.startswith("extends:"))
    (tmp_path / "mine.yaml").write_text(recipe + "plugins: [./my_code.py]\n")
    sets = ["optimize.objective=mean_norm", "pair.rule=best_vs_rest"]
    (plan,) = plans([str(tmp_path / "mine.yaml")], [data_dir / "demo.yaml"], sets)
    steps = {step.name: step for step in plan.steps}
    assert steps["select"].options["rule"].options["beta"] == 0.1

    logp, index = torch.tensor([-3.0, -5.0]), (torch.tensor([0]), torch.tensor([1]))
    batch = Batch(logp, torch.tensor([4.0, 7.0]), torch.zeros(2), *index, ref=logp)
    assert steps["optimize"].options["objective"](batch).item() == pytest.approx(0.693147, abs=1e-6)
    rows = [{"candidate_id": str(n), "reward": reward} for n, reward in enumerate([1.0, 3.0, 2.0])]
    pairs = list(steps["pair"].options["rule"](rows))
    assert [(pair.chosen, pair.rejected, pair.gap) for pair in pairs] == [("1", "2", 1.0), ("1", "0", 2.0)]


@pytest.fixture
def _no_plugins_left():
    yield
    unload_plugins()


@pytest.mark.usefixtures("_no_plugins_left")
def test_rule_scale_reward_and_reader_of_the_stages_page_work_in_a_recipe(data_dir: Path, tmp_path: Path):
    """Of rewards 0, 1, 5 of a prompt, whose mean is 2, the two nearest are 1 and 0; labels are right above 0.5."""
    (python,) = blocks(ROOT / "stages" / "README.md", "python")
    (tmp_path / "my_code.py").write_text(python)
    rows = [{"question": f"q{n}", "good": "yes", "bad": "no"} for n in range(9)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    (tmp_path / "mine.yaml").write_text(
        "extends: rso\nplugins: [./my_code.py]\n"
        "select: {with: {rule: {name: nearest_mean, k: 2}, scale: {name: capped, limit: 3.0}}}\n"
    )
    (tmp_path / "mine_dpo.yaml").write_text(
        "extends: dpo\nplugins: [./my_code.py]\npreferences: {with: {path: ./pairs.jsonl, reader: sides}}\n"
    )
    (tmp_path / "my.yaml").write_text("ranker: {use: right}\n")
    names = [str(tmp_path / name) for name in ("mine_dpo.yaml", "mine.yaml")]
    planned = plans(names, [data_dir / "demo.yaml", tmp_path / "my.yaml"], [])
    options = {step.name: step.options for plan in planned for step in plan.steps}
    groups = RewardGroups(np.array([5.0, 0, 1, 7]), np.array([0, 3, 4]), np.zeros(2, np.uint64))
    selection = options["select"]["rule"](groups)
    assert (selection.index.tolist(), selection.draw.tolist()) == ([2, 1, 3], [0, 1, 0])
    assert options["select"]["scale"](groups).tolist() == [3.0, 0.0, 1.0, 3.0]
    assert options["reward"]["by"].metadata["label_threshold"] == 0.5
    assert options["preferences"]["reader"](rows[0]).chosen == "yes"
