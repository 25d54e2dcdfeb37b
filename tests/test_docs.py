"""README is true: its methods, files, commands and tables are those of the code."""

import re
import shlex
from pathlib import Path

import yaml
from typer.testing import CliRunner

from jobs.__main__ import app
from jobs.recipes import names
from pipeline.stage import stages
from schemas import TABLES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line.replace(".venv/bin/winnow ", "", 1))
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.startswith(".venv/bin/winnow ")
]


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
        answer = CliRunner().invoke(app, [words[0], "--help"])
        assert answer.exit_code == 0, words
        for option in (word for word in words if word.startswith("--")):
            assert option in answer.output, f"{option} is no option of {words[0]}"
