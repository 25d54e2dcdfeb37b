"""Sweeps: names, what is shared, what is refused, and one line per method at the end."""

import re
import shutil
from copy import copy
from pathlib import Path

import pytest

from jobs.sweeps import LABEL_BYTES, Axis, plan_sweep, sweep_table
from pipeline.config.yaml import parse_items
from pipeline.store.store import Store
from schemas import WinnowError
from tests.runs import plan_of

AFTER_TRAINING = ("optimize", "eval_sample", "judge", "eval_logp", "eval_logp_sft", "evaluate")


def names(data_dir: Path, *over: str, recipe: str = "rso", sets: tuple[str, ...] = ()) -> list[str]:
    return [plan.name for plan in plan_sweep([recipe], [data_dir / "demo.yaml"], list(sets), list(over)).plans]


# Values and names.


def test_values_are_those_of_a_yaml_list():
    """As they are written, so that 1e-6 stays 1e-6 in a run's name; commas inside a value do not split it."""
    assert parse_items("0.1, 1e-6,{name: hinge, delta: 1.0},[1, 2],'a,b',é", "--over") == [
        "0.1", "1e-6", "{name: hinge, delta: 1.0}", "[1, 2]", "'a,b'", "é",
    ]  # fmt: skip
    assert Axis.parse("select.rule.beta=0.1,0.5").sets == ["select.rule.beta=0.1", "select.rule.beta=0.5"]
    assert Axis.parse("x.y=1,true,1.0").texts == ["1", "true", "1.0"], "three values to YAML"


def test_names_have_the_ends_of_options_that_tell_them_apart(data_dir: Path):
    """In the order of --over, the last one fastest; what --set changes is in brackets as ever."""
    assert names(data_dir, "select.rule.beta=0.1,2", "optimize.seed=0,1") == [
        "rso rule.beta=0.1 seed=0", "rso rule.beta=0.1 seed=1", "rso rule.beta=2 seed=0", "rso rule.beta=2 seed=1",
    ]  # fmt: skip
    assert names(data_dir, "optimize.seed=0", "sample.seed=1", "optimize.objective={name: hinge, delta: 2.0}") == [
        "rso optimize.seed=0 sample.seed=1 objective=hinge(delta=2.0)"
    ]
    assert names(data_dir, "optimize.objective={name: hinge, delta: 2.0}", "optimize.seed=0", "sample.seed=1") == [
        "rso objective=hinge(delta=2.0) optimize.seed=0 sample.seed=1"
    ]
    sets = ("select.rule.k=2", "optimize.tokens_per_pass=64")
    assert names(data_dir, "select.rule.beta=0.1", sets=sets) == ["rso[k=2] rule.beta=0.1"]


def test_an_option_of_set_and_one_of_a_sweep_are_told_apart_in_a_name(data_dir: Path):
    over, sets = ["select.rule.beta=0.1,0.2"], ["optimize.objective.beta=0.3"]
    names = [plan.name for plan in plan_sweep(["rso"], [data_dir / "demo.yaml"], sets, over).plans]
    assert names == [f"rso[objective.beta=0.3] rule.beta={value}" for value in (0.1, 0.2)]


def test_a_long_value_is_cut_to_what_a_line_can_hold(data_dir: Path):
    long = names(data_dir, *(f"sample.stop=['{'x' * 80}/{end}']" for end in "a"), "optimize.seed=0,1")
    assert len(set(long)) == 2
    assert all(len(name) <= len("rso ") + LABEL_BYTES + len("-12345678") and "/" not in name for name in long)


# What is refused, before anything runs.

REFUSED = [
    (["rso"], ["optimize.tokens_per_pass=64,128"], ["optimize.tokens_per_pass", "how a step runs", "--set"]),
    (["rso"], ["optimize.tokens_per_pass=64", "optimize.seed=0,1"], ["optimize.tokens_per_pass", "how a step runs"]),
    (["dpo"], ["select.rule.beta=0.1,0.5"], ["dpo: --over select.rule.beta", "0.1 and 0.5", "does not depend"]),
    (["rso"], ["optimize.seed=1,01"], ["--over optimize.seed=1,01", "listed twice"]),
    (["rso"], ["optimize.seed=1", "optimize.seed=2"], ["--over optimize.seed: given 2 times"]),
    (["rso"], ["optimize.seed"], ["--over optimize.seed", "step.option=value,value"]),
    (["rso"], ["optimize.seed="], ["--over optimize.seed=", "step.option=value,value"]),
    (["rso"], ["optimize.seed=[1"], ["--over optimize.seed=[1", "not YAML"]),
    (["rso"], ["optimise.seed=1,2"], ["--over optimise.seed=1", "unknown step 'optimise'"]),
    (["rso"], ["optimize.sed=1,2", "select.rule.k=0,x"], ["rso: optimize.sed", "rso: select.rule.k", "got 0", "'x'"]),
    (["rso", "rso"], ["optimize.seed=0"], ["two runs would be 'rso seed=0'"]),
]


@pytest.mark.parametrize(("recipes", "over", "facts"), REFUSED, ids=[" ".join(over) for _, over, _ in REFUSED])
def test_a_mistake_names_the_option_and_its_values(data_dir: Path, recipes, over, facts):
    with pytest.raises(WinnowError) as error:
        plan_sweep(recipes, [data_dir / "demo.yaml"], [], over)
    text = "\n".join(error.value.problems)
    assert [fact for fact in facts if fact not in text] == []
    assert len(error.value.problems) == len(set(error.value.problems))


def test_an_option_of_set_is_not_swept_too(winnow, data_dir: Path):
    words = ("--config", data_dir / "demo.yaml", "--set", "optimize.seed=3")
    code, text = winnow("sweep", "rso", *words, "--over", "optimize.seed=1,2")
    assert (code, "--set optimize.seed=3 and --over optimize.seed" in text) == (2, True)
    code, text = winnow("sweep", "rso", *words)
    assert (code, "--over: not given" in text) == (2, True)


def test_seeds_of_the_evaluation_alone_are_said_to_be_no_seeds_of_a_method(data_dir: Path):
    config = [data_dir / "demo.yaml"]
    (note,) = plan_sweep(["rso"], config, [], ["eval_sample.seed=1,5"]).notes
    assert "evaluate one policy" in note
    assert plan_sweep(["rso"], config, [], ["optimize.seed=0,1", "eval_sample.temperature=0.7,1.0"]).notes == []


# A sweep on the tiny data set.


@pytest.fixture
def words(data_dir: Path, finished: Path, tmp_path: Path) -> list[str]:
    """Options of a sweep over seeds on a store where all that comes before the training has finished."""
    shutil.copytree(finished, tmp_path / "store")
    options = ["--config", data_dir / "demo.yaml", "--store", tmp_path / "store", "--set", "optimize.epochs=1"]
    return ["rso", *map(str, options), "--over", "optimize.seed=0,1"]


def test_everything_that_runs_share_is_computed_once(winnow, words: list[str], tmp_path: Path):
    """Two seeds need two trainings and what is computed from them; `plan` says so before, and stores nothing."""
    store = Store(tmp_path / "store")
    before = {manifest["key"] for manifest in store.sealed()}
    code, text = winnow("plan", *words)
    assert code == 0
    assert re.search(r"2 runs of 46 steps: 29 different ones, of which 17 are cached and 12 will run", text), text
    assert len(store.sealed()) == len(before)

    code, text = winnow("sweep", *words)
    assert code == 0, text
    new = [manifest["stage"] for manifest in store.sealed() if manifest["key"] not in before]
    assert sorted(new) == sorted(2 * ["optimize", "sample", "judge", "reference", "reference", "evaluate"])
    assert sorted(store.runs()) == ["rso[epochs=1] seed=0", "rso[epochs=1] seed=1", "run"]
    row = next(line for line in text.splitlines() if "rso[epochs=1] " in line and "%" in line)
    assert [cell.strip() for cell in row.split("│")][1] == "rso[epochs=1]"
    code, text = winnow("leaderboard", "--store", tmp_path / "store")
    assert (code, "one seed each, so not compared: run" in text) == (0, True), text

    code, text = winnow("sweep", *words)
    assert (code, "running" in text) == (0, False), "the same command computes nothing again"

    # Another config: all runs of the sweep get one number, so that they stay one sweep.
    other = tmp_path / "other.yaml"
    other.write_text("evaluate: {with: {seed: 5}}\n")
    text = winnow("plan", *words[:-1], "optimize.seed=0,2", "--config", other)[1]
    assert "rso[epochs=1]-2 seed=0" in text
    assert "rso[epochs=1]-2 seed=2" in text


def test_part_of_a_sweep(winnow, words: list[str], tmp_path: Path):
    """--until, --only and --from mean what they mean of `run`."""
    code, text = winnow("sweep", *words, "--until", "optimize")
    assert code == 0, text
    links = Store(tmp_path / "store").run("rso[epochs=1] seed=1")
    store = Store(tmp_path / "store")
    assert store.at("optimize", links["optimize"]["key"]).manifest
    assert not store.at("evaluate", links["evaluate"]["key"]).manifest


def test_a_step_under_two_names_is_counted_once(data_dir: Path, tmp_path: Path):
    """As a judge that is the proxy again: what is cached, shared and to run is then all steps of the row."""
    plan = plan_of(data_dir)
    judge = copy(next(step for step in plan.steps if step.name == "judge"))
    judge.name = "judge_by_again"
    plan.steps.append(judge)
    (row,) = sweep_table([plan], Store(tmp_path), {step.key for step in plan.steps[:5]}).to_pylist()
    assert row["steps"] == row["cached"] + row["shared"] + row["will run"] == len(plan.steps) - 1
