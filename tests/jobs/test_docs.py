"""README is true: its methods, files, commands and tables are those of the code."""

import __future__

import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

import jobs.__main__  # noqa: F401 - registers every command
from jobs.bundle import plan_key
from jobs.commands.app import app
from jobs.recipes import names, plans
from pipeline.stage import stages
from schemas import TABLES
from stages.selection import pair
from stages.training import objectives

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line.replace(".venv/bin/winnow ", "", 1), comments=True)
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith(".venv/bin/winnow ")
]
YAML = re.findall(r"```yaml\n(.*?)```", README, re.S)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_method_table_names_every_recipe_once():
    cells = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", section("Methods"), re.M)
    told = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(told) == names()


def test_every_recipe_says_what_it_is():
    for name in names():
        assert yaml.safe_load((ROOT / "jobs" / "recipes" / f"{name}.yaml").read_text())["about"]


def test_the_file_map_names_every_stage_and_module():
    told = section("The files")
    for path in [*ROOT.glob("pipeline/*.py"), *ROOT.glob("stages/*.py")]:
        if path.stem not in ("__init__", "rooms", "content", "workspace", "text", "sources", "groups"):
            assert path.stem in told, f"{path.stem} is not in the file map"


def test_the_life_of_a_prompt_names_real_stages_and_tables():
    life = section("The life of one prompt")
    named = set(re.findall(r"`(\w+)`", life))
    assert named - {"rejects", "schemas"} <= set(stages.entries) | set(TABLES) | {"schemas/tables.py"}


def test_every_command_of_the_readme_parses():
    """Each is known to the command line with its options (that they run is tried by hand after `make demo`)."""
    assert len(COMMANDS) >= 8
    for words in COMMANDS:
        command = words[:2] if words[0] == "bench" else words[:1]
        answer = CliRunner().invoke(app, [*command, "--help"])
        assert answer.exit_code == 0, words
        for option in (word for word in words if word.startswith("--")):
            assert option in answer.output, f"{option} is no option of {command}"


def test_the_job_in_the_cluster_section_has_the_name_that_it_will_have():
    made = plans(["own_candidates"], [ROOT / "tests" / "data" / "untrained.yaml"], [])
    assert set(re.findall(r"own_candidates-([0-9a-f]{8})-\d", section("On a cluster"))) == {plan_key(made)}


@pytest.fixture
def one_more():
    """The README's own functions, registered as if they stood in the modules that they name."""
    space = vars(objectives) | vars(pair)
    exec(compile("\n".join(PYTHON), "README.md", "exec", __future__.annotations.compiler_flag), space)
    yield space
    del objectives.objective.entries["mean_norm"], pair.pair_rule.entries["best_vs_rest"]


def test_the_functions_of_the_readme_work_in_the_recipe_of_the_readme(one_more, world: Path, tmp_path: Path):
    """Both are named by --set, over a recipe that extends rso; the loss is ln 2 where policy and reference agree."""
    _, recipe = YAML
    (tmp_path / "mine.yaml").write_text(recipe)
    sets = ["optimize.objective=mean_norm", "pair.rule=best_vs_rest"]
    plain, own = (plans([str(tmp_path / "mine.yaml")], [world / "demo.yaml"], each)[0] for each in ([], sets))
    made = [{step.name: step for step in plan.steps} for plan in (plain, own)]
    assert [steps["pair"].options["rule"].name for steps in made] == ["best_vs_worst", "best_vs_rest"]
    assert {steps["select"].options["rule"].options["beta"] for steps in made} == {0.1}

    logp, pairs = torch.tensor([-3.0, -5.0]), (torch.tensor([0]), torch.tensor([1]))
    batch = objectives.Batch(logp, torch.tensor([4.0, 7.0]), torch.zeros(2), *pairs, ref=logp)
    assert made[1]["optimize"].options["objective"](batch).item() == pytest.approx(math.log(2))
    group = [{"candidate_id": str(n), "reward": reward} for n, reward in enumerate(np.array([1.0, 3.0, 2.0]))]
    found = list(made[1]["pair"].options["rule"](group))
    assert [(each.chosen, each.rejected, each.gap) for each in found] == [("1", "2", 1.0), ("1", "0", 2.0)]


def test_the_world_of_the_readme_names_steps_of_the_base():
    base = yaml.safe_load((ROOT / "jobs" / "recipes" / "_base.yaml").read_text())
    assert set(yaml.safe_load(YAML[0])) <= set(base)
