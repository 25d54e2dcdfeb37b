"""A key is what was written and nothing else: it moves when the result would, and never otherwise."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jobs import recipes
from pipeline import DataPath, ModelPath
from pipeline.config.keys import canonical, differences, key_of
from pipeline.config.plan import Plan, Step
from stages.training.objectives import objective
from tests.pipeline.config.test_plan import fake_model
from tests.pipeline.config.test_recipe import own_candidates_config, plan_of

# Steps that are `like` another, and do not set this option themselves.
CACHES = ("reference", "preference_reference")  # their dtype must be the trainer's, or the plan is refused
ALIKE = {
    "optimize": ("only_preferences", "only_demonstrations"),
    "compare": ("compare_all",),
    **{f"sample@{n}": (f"judged_sample@{n}",) for n in (1, 2)},
}
# Another value for an option of each stage that has one; pair's are checked against its wires.
CHANGES = {
    "untrained": "seed=7",
    "prompts": "max_tokens=99",
    "preferences": "max_tokens=99",
    "own_candidates": "max_tokens=99",
    "examples": "split=heldout",
    "ranker_examples": "seed=7",
    "optimize": "seed=7",
    "sample": "seed=7",
    "reward": "orders=one",
    "select": "seed=7",
    "compare": "orders=one",
    "reference": "dtype=bfloat16",
    "judge": "by={name: pairwise, dtype: bfloat16}",
    "pool": None,
    "mismatch": None,
    "reward_head": None,
    "combine": "weights={first: 1.0, second: 0.7}",
    "head_reward": None,
    "features": "dtype=bfloat16",
    "partition": "components=16",
    "preference_head": "head={name: logistic, C: 0.5}",
    "score": "method=bradley_terry",
    "evaluate": "seed=7",
}


def keys_of(plan: Plan) -> dict[str, str]:
    return {step.name: step.key for step in plan.steps}


def behind(steps: list[Step]) -> dict[str, set[str]]:
    """Return the names of each step and of all that it is computed from."""
    names: dict[str, set[str]] = {}
    for step in steps:  # inputs first
        names[step.name] = {step.name}.union(*(names[source.name] for source in step.inputs.values()))
    return names


def test_what_has_no_stable_bytes_is_refused():
    """A set's order, an object's address, a folder's path: none of them may decide where a result is stored."""
    values = [{1, 2}, object(), Path("/tmp"), b"bytes", np.float64, np.int64(3), np.ones(2), 1j, {3: "x"}, len]
    for value in [*values, [{"a": {1}}]]:
        with pytest.raises(TypeError, match="has no stable bytes"):
            canonical(value)


def test_different_values_have_different_keys_and_the_order_of_writing_does_not_matter():
    """beta = infinity is plain sampling, so it must have a key of its own, the same each time."""
    assert key_of(canonical({"a": 1, "b": [1, 2]})) == key_of(canonical({"b": (1, 2), "a": 1}))
    assert key_of(canonical([1, 2])) != key_of(canonical([2, 1]))
    pairs = [(1, "1"), (1, 1.5), (None, "null"), (True, "true"), ("", None), ([], {}), ([1], 1), (0.0, "0.0")]
    for one, other in [*pairs, (math.inf, -math.inf), (math.inf, 1e308)]:
        assert key_of(canonical({"x": one})) == key_of(canonical({"x": one})) != key_of(canonical({"x": other}))


def test_a_function_is_its_name_and_all_its_options():
    """The default written out is the same function; another option or another name is not."""
    plain, written, other = (objective.bind(value) for value in
                             ("hinge", {"name": "hinge", "delta": 1.0}, {"name": "hinge", "delta": 2.0}))  # fmt: skip
    assert key_of(canonical(plain)) == key_of(canonical(written)) != key_of(canonical(other))
    assert key_of(canonical(objective.bind("nll"))) != key_of(canonical(plain))


def test_a_file_is_its_content(tmp_path: Path):
    """Under another name and in another folder it is the same; one byte more and it is another."""
    (tmp_path / "elsewhere").mkdir()
    first, second = tmp_path / "a.jsonl", tmp_path / "elsewhere" / "b.jsonl"
    first.write_bytes(b"x")
    second.write_bytes(b"x")
    key = key_of(canonical(DataPath(str(first))))
    assert key == key_of(canonical(DataPath(str(second))))
    assert str(tmp_path) not in json.dumps(canonical(DataPath(str(first))))
    first.write_bytes(b"xy")
    assert key != key_of(canonical(DataPath(str(first))))


def test_a_folder_is_its_files_and_their_names(tmp_path: Path):
    for name in ("one", "two", "three"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "f.csv").write_text("x")
    (tmp_path / "three" / "deep" / "f.csv").rename(tmp_path / "three" / "deep" / "g.csv")
    one, two, three = (key_of(canonical(DataPath(str(tmp_path / name)))) for name in ("one", "two", "three"))
    assert one == two != three


def test_a_model_is_its_weights_config_and_tokenizer(tmp_path: Path):
    """What else lies in the folder (a README, a pickle) does not count; a byte of the weights does."""
    folder = Path(fake_model(tmp_path / "m"))
    key = key_of(canonical(ModelPath(str(folder))))
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    (moved / "README.md").write_text("hello")
    assert key_of(canonical(ModelPath(str(moved)))) == key
    save_file({"bias": np.zeros(1)}, moved / "model.safetensors")
    assert key_of(canonical(ModelPath(str(moved)))) != key


def test_differences_name_the_field_and_both_values_and_cut_long_ones():
    old = {"version": 1, "options": {"k": 8, "objective": {"name": "hinge", "delta": 1.0}}, "inputs": {"a": "x"}}
    new = {"version": 1, "options": {"k": 4, "objective": {"name": "hinge", "delta": 2.0}}, "inputs": {"a": "x"}}
    assert differences(old, new) == ["options.k: 8 -> 4", "options.objective.delta: 1.0 -> 2.0"]
    assert differences(old, old) == []
    assert differences({"a": 1}, {}) == ["a: 1 -> null"]
    assert all(len(line) < 120 for line in differences({"text": "x" * 1000}, {"text": "y" * 1000}))


def test_one_option_moves_its_step_and_what_is_computed_from_it(data_dir: Path):
    """And nothing else: a new beta must not discard the candidates, nor a new seed of evaluation the policy.

    In each recipe, those steps that no recipe before it has with the same stages behind them.
    """
    tried = set()
    for recipe in recipes.names():
        before = plan_of(recipe, data_dir)
        assert {step.stage for step in before.steps} - {"pair", "rescale"} <= CHANGES.keys(), "every stage is varied"
        sources = behind(before.steps)
        for step in before.steps:
            changed = {step.name, *ALIKE.get(step.name, ())}
            expected = {name for name, its_sources in sources.items() if its_sources & changed}
            change = CHANGES.get(step.stage)
            case = (step.stage, *sorted({other.stage for other in before.steps if other.name in expected}))
            if not change or step.name.partition("@")[0] in CACHES or case in tried:
                continue
            if step.options[change.split("=")[0]] == "heldout":
                continue
            if change == "split=heldout" and step.inputs["prompts"].options.get("heldout") == 0:  # refused: none is
                continue
            tried.add(case)
            after = keys_of(plan_of(recipe, data_dir, f"{step.name}.{change}", name="run"))
            moved = {name for name, key in keys_of(before).items() if after[name] != key}
            assert moved == expected, (recipe, step.name, change)


def test_methods_share_what_they_have_in_common(data_dir: Path):
    """RSO, IPO and RAFT's first round draw and score the same candidates, and SLiC takes its draws from there."""
    plans = {
        name: {step.removesuffix("@1"): key for step, key in keys_of(plan_of(name, data_dir)).items()}
        for name in ("rso", "ipo", "raft", "slic_sample_rank", "dpo", "sft")
    }
    for name in ("ipo", "raft"):
        assert plans[name]["sample"] == plans["rso"]["sample"]
        assert plans[name]["reward"] == plans["rso"]["reward"]
    assert "reward" not in plans["slic_sample_rank"]
    assert plans["ipo"]["reference"] == plans["rso"]["reference"]
    assert len({keys["eval_baseline"] for keys in plans.values()}) == 1
    assert len({keys["evaluate"] for keys in plans.values()}) == len(plans)


def test_how_tables_are_divided_is_part_of_no_key(data_dir: Path):
    """Leave keys as they are: what is in a table does not depend on the number of its parts."""
    few, many = keys_of(plan_of("rso", data_dir)), keys_of(plan_of("rso", data_dir, "shards=4"))
    assert few == many


def test_the_content_of_data_files_is_part_of_a_key_and_their_path_is_not(data_dir: Path, tmp_path: Path):
    """All files copied to another folder: the same keys. One prompt more: other keys for what reads the prompts."""
    moved = Path(shutil.copytree(data_dir, tmp_path / "moved"))
    before = keys_of(plan_of("rso", data_dir))
    assert keys_of(plan_of("rso", moved)) == before
    with (moved / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": "One more.", "demonstration": "Yes."}\n')
    after = keys_of(plan_of("rso", moved))
    assert after["prompts"] != before["prompts"]
    assert after["sample"] != before["sample"]
    assert {name: after[name] for name in ("sft", "ranker")} == {name: before[name] for name in ("sft", "ranker")}


def test_two_processes_agree_on_every_key(data_dir: Path):
    """With other hash seeds and from other folders: nothing of a process is in a key."""
    own_candidates_config(data_dir)
    code = """
import json, sys
from pathlib import Path
from jobs import recipes
from tests.pipeline.config.test_keys import keys_of
from tests.pipeline.config.test_recipe import plan_of
print(json.dumps({name: keys_of(plan_of(name, Path(sys.argv[1]))) for name in recipes.names()}))
"""
    environment = os.environ | {"PYTHONHASHSEED": "4711", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", code, str(data_dir)], cwd="/", env=environment, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {name: keys_of(plan_of(name, data_dir)) for name in recipes.names()}


def test_an_option_that_was_added_later_is_in_a_key_only_where_it_is_not_the_default(data_dir: Path):
    """So that results from before it are found again; written out, the default is the same key."""
    plain, written, other = (
        plan_of("rso", data_dir, *sets)
        for sets in ([], ["prompts.validation=0.0", "optimize.by=null"], ["prompts.validation=0.1"])
    )
    assert keys_of(plain) == keys_of(written)
    identities = {step.name: step.identity["options"] for step in plain.steps}
    assert not identities["prompts"].keys() & {"validation"}
    assert not identities["optimize"].keys() & {"by", "keep", "evaluate_every", "evaluate_split"}
    of_prompts = next(step for step in other.steps if step.name == "prompts")
    assert of_prompts.identity["options"]["validation"] == 0.1
    assert keys_of(other)["prompts"] != keys_of(plain)["prompts"]


def test_draws_of_a_prompt_are_the_same_whatever_prompts_are_held_out_beside_it(data_dir: Path):
    """So that a share of prompts that is set later costs no draw again: `sample` takes those of equal row keys."""
    steps = [
        {step.name: step for step in plan_of("rso", data_dir, *sets).steps}
        for sets in ([], ["prompts.validation=0.2"], ["prompts.heldout=0.3"], ["prompts.system_prompt=Hi"])
    ]
    assert len({each["sample"].key for each in steps}) == len(steps)
    assert len({each["sample"].row_key for each in steps[:3]}) == 1
    assert steps[3]["sample"].row_key != steps[0]["sample"].row_key
