"""`dtype` at the top of a config: the option `dtype` of each step and function that has one and is not given one."""

from pathlib import Path

import pytest

from pipeline.config.plan import Plan, make_plan
from pipeline.config.recipe import load_recipe
from schemas import WinnowError
from tests.runs import RECIPES

# Sampling rounds what is saved in fp32, which is its own test.
pytestmark = pytest.mark.filterwarnings("ignore:.*dtype. bfloat16, and its policy")


def plan(data_dir: Path, folder: Path, text: str, *sets: str, recipe: str = "rso") -> Plan:
    config = folder / "my.yaml"
    config.write_text(text)
    overlays = (data_dir / "demo.yaml", config)
    return make_plan(load_recipe(RECIPES / f"{recipe}.yaml", overlays, sets, "run", (RECIPES,)))


def dtypes(plan: Plan) -> dict[str, str]:
    """Return the value of each `dtype` of a plan, of the functions under `by` too."""
    values = {step.name: step.options["dtype"] for step in plan.steps if "dtype" in step.options}
    return values | {
        f"{step.name}.by": step.options["by"].options["dtype"] for step in plan.steps if step.options.get("by")
    }


def test_sampling_reference_ranker_judge_training_and_evaluation_inherit_it(data_dir: Path, tmp_path: Path):
    values = dtypes(plan(data_dir, tmp_path, "dtype: bfloat16"))
    assert set(values.values()) == {"bfloat16"}
    assert values.keys() >= {
        "sample",
        "eval_sample",
        "reference",
        "eval_logp",
        "optimize",
        "ranker",
        "reward.by",
        "judge.by",
    }


def test_the_ranker_of_evaluations_during_training_inherits_it(data_dir: Path, tmp_path: Path):
    text = (
        "dtype: bfloat16\nprompts: {with: {validation: 0.2}}\n"
        "optimize: {from: {prompts: prompts, baseline: validation_baseline, ranker: ranker}, with: {evaluate_every: 2}}"
    )
    assert dtypes(plan(data_dir, tmp_path, text))["optimize.by"] == "bfloat16"


def test_without_it_nothing_changes(data_dir: Path, tmp_path: Path):
    """float32 is the default of every stage, so that saying it changes no key."""
    keys = [step.key for step in plan(data_dir, tmp_path, "{}").steps]
    assert [step.key for step in plan(data_dir, tmp_path, "dtype: float32").steps] == keys


def test_an_option_of_a_step_outranks_it_and_set_outranks_the_config(data_dir: Path, tmp_path: Path):
    text = (
        "dtype: bfloat16\nreward: {with: {by: {name: pairwise, dtype: float32}}}\neval_logp: {with: {dtype: float32}}"
    )
    values = dtypes(plan(data_dir, tmp_path, text))
    assert {name for name, value in values.items() if value == "float32"} == {"reward.by", "eval_logp"}
    assert set(dtypes(plan(data_dir, tmp_path, "dtype: bfloat16", "dtype=float32")).values()) == {"float32"}


def test_a_config_may_set_it_for_one_recipe(data_dir: Path, tmp_path: Path):
    text = "recipes: {raft: {dtype: bfloat16}}"
    assert set(dtypes(plan(data_dir, tmp_path, text)).values()) == {"float32"}
    assert set(dtypes(plan(data_dir, tmp_path, text, recipe="raft")).values()) == {"bfloat16"}


def test_the_plan_names_it_as_the_origin_of_the_options(data_dir: Path, tmp_path: Path):
    steps = {step.name: step for step in plan(data_dir, tmp_path, "dtype: bfloat16").steps}
    for step, path in (("sample", "dtype"), ("compare", "by.dtype")):
        assert steps[step].origins[path].layer == f"dtype of {tmp_path / 'my.yaml'}"
        assert steps[step].origins[path].by_user


def test_a_wrong_value_is_one_mistake(data_dir: Path, tmp_path: Path):
    with pytest.raises(WinnowError) as caught:
        plan(data_dir, tmp_path, "dtype: fp16")
    assert len(caught.value.problems) == 1
    assert "'float32' or 'bfloat16', got 'fp16'" in caught.value.problems[0]


def test_steps_that_stay_in_fp32_beside_others_in_bfloat16_are_said(data_dir: Path, tmp_path: Path):
    """The most expensive scoring must not run in fp32 because an option of the ranker was forgotten."""
    notes = plan(data_dir, tmp_path, "sample: {with: {dtype: bfloat16}}").notes
    assert any("reward.by" in note and "float32" in note and "dtype: bfloat16" in note for note in notes)
    assert plan(data_dir, tmp_path, "dtype: bfloat16").notes == plan(data_dir, tmp_path, "{}").notes == []
