"""Winnow in Python: plan, run and ask, and the shipped notebook cell by cell."""

import json
import shutil
from pathlib import Path

import pytest

from jobs import winnow
from jobs.recipes import recipe_path
from pipeline.plugins import unload_plugins
from schemas import WinnowError

NOTEBOOK = recipe_path("rso").parents[1] / "notebook.ipynb"


@pytest.fixture
def config(data_dir: Path) -> Path:
    return data_dir / "demo.yaml"


def test_a_plan_is_that_of_the_command(config: Path):
    """The keys of the same files and options; options outrank a config, and a mapping is one."""
    mapping = {"select": {"with": {"rule": {"beta": 2.0}}}}
    plans = [winnow.plan("rso", config), winnow.plan("rso", [config, mapping])]
    plans += [winnow.plan("rso", config, {"select.rule.beta": 2.0})]
    plans += [winnow.plan("rso", [config, mapping], {"select.rule.beta": 0.5})]
    keys = [{step.name: step.key for step in plan.steps}["select"] for plan in plans]
    assert keys[0] != keys[1] == keys[2]
    assert keys[3] == keys[0]


def test_paths_of_a_mapping_are_those_of_the_working_directory(config: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(config.parent)
    here = winnow.plan("rso", [config, {"prompts": {"with": {"path": "./prompts.jsonl"}}}])
    assert [step.key for step in here.steps] == [step.key for step in winnow.plan("rso", config).steps]


def test_mistakes_are_those_of_the_command(config: Path, tmp_path: Path):
    with pytest.raises(WinnowError, match="did you mean 'beta'"):
        winnow.plan("rso", config, {"select.rule.beat": 4})
    with pytest.raises(WinnowError, match="no such folder"):
        winnow.open(tmp_path / "none")


def test_code_that_a_config_names_runs_only_if_the_caller_names_it_too(config: Path, tmp_path: Path):
    """A config may be somebody else's, in Python as for the command."""
    reward = tmp_path / "reward.py"
    reward.write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n\n\ndef right(prompt, response):\n    return 1.0\n"
    )
    mine: list[winnow.Config] = [
        config,
        {"evaluate": {"with": {"gold": {"name": "python", "file": str(reward), "function": "right"}}}},
    ]
    with pytest.raises(WinnowError, match=r"reward\.py is Python code.*plugins=\["):
        winnow.plan("rso", mine)
    assert not (tmp_path / "ran").exists()
    try:
        assert winnow.plan("rso", mine, plugins=[reward]).target.options["gold"].name == "right"
        assert (tmp_path / "ran").exists()
    finally:
        unload_plugins()


def test_the_notebook_runs(config: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Each cell in its order, on a finished run in place of the demo's."""
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells[0]["metadata"]["tags"] == ["parameters"]
    store = shutil.copytree(finished, tmp_path / "store")
    cells[0]["source"] = [f"config, store = {str(config)!r}, {str(store)!r}"]
    names: dict = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
    assert names["results"].runs == ["rso"]
    assert sorted(names["kept"]) == [0.1, 0.5, 2.0]
    assert (names["results"].model("rso") / "config.json").is_file()
    assert names["results"].sql("SELECT count(*) AS n FROM candidates").arrow()["n"][0].as_py() > 0
