"""What a loss reads and a recipe's data will not have is refused when it is planned, with the reason."""

import warnings

import pytest
import yaml

from jobs import recipes
from schemas import WinnowError, WinnowWarning

NO_PAIRS = {"pairs": None, "reference": None, "selections": "select"}
SELECTED = {"selections": "select", "comparisons": None}
WEIGHED = {"rule": {"name": "softmax_weights", "beta": 1.0}}
LABELLED = {"examples": {"with": {"desirable": "pairs"}}}
SOFT = {"examples": {"with": {"labels": "soft"}}}
DEMONSTRATIONS = {"demonstrations": "demonstration_examples"}


def planned(data_dir, tmp_path, steps):
    """The plan of a recipe that extends ours by `steps`."""
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"extends": "_base", **steps}))
    return recipes.plan_named(str(path), [data_dir / "demo.yaml"], [])


def optimize(inputs=None, **options):
    return {"optimize": ({"from": inputs} if inputs else {}) | ({"with": options} if options else {})}


def test_a_recipe_whose_data_lack_what_its_loss_reads(data_dir, tmp_path):
    """All problems of a recipe are in one message: which table, what is missing or too much, and a cure."""
    for steps, problems in [
        ({"examples": {"from": {"reference": None}}}, ["examples: objective sigmoid_norm reads a reference"]),
        (
            {"examples": {"from": NO_PAIRS, "with": {"imitate": "selected"}}},
            ["sigmoid_norm reads pairs, and", "add `pairs`"],
        ),
        (optimize(objective="nll"), ["nll reads responses with a weight, and", "set `imitate`", "remove `pairs`"]),
        (optimize(nll_weight=0.5), ["set `imitate`"]),
        ({"examples": {"with": {"imitate": "chosen"}}}, ["reads no responses with a weight; unset `imitate`"]),
        (optimize(objective="kto"), ["kto reads unpaired labels, and", "set `desirable`", "add `mismatched`"]),
        (LABELLED, ["reads no unpaired labels; unset `desirable`"]),
        (optimize(objective="hinge_norm") | SOFT, ["hinge_norm takes every label as certain"]),
        (optimize(world_size=9, batch_size=8), ["world_size: 9, and a step has 8"]),
        (optimize(mix="alright"), ["`mix` and the input `demonstrations` go together"]),
        (optimize(DEMONSTRATIONS), ["go together"]),
        (
            optimize({"demonstrations": "examples"}, mix="alright"),
            ["demonstrations: nll reads responses with a weight"],
        ),
        (
            optimize(DEMONSTRATIONS | {"preference_optimum": "sft"}, mix="alright"),
            ["mix alright does not read preference_optimum; remove it"],
        ),
        ({"examples": {"from": {"selections": "select"}}}, ["nothing reads selections"]),
        ({"select": {"with": WEIGHED}}, ["nothing reads the weights of softmax_weights"]),
        (
            {"select": {"with": WEIGHED}, "pair": {"from": SELECTED, "with": {"rule": "neighbours"}}},
            ["nothing reads the weights of softmax_weights"],
        ),
        (optimize(nll_per="response"), ["there is no likelihood to average"]),
        ({"reference": {"from": {"policy": "ranker"}}}, ["training starts from another step"]),
        ({"reference": {"from": {"policy": "sft"}}, "rounds": 2}, ["optimize@2: init: training starts from another"]),
        ({"reference": {"with": {"dtype": "bfloat16"}}}, ["dtype: float32, and the reference is scored in bfloat16"]),
        (optimize(objective="hinge", reference="other"), ["reference: other, and objective hinge reads none"]),
        (optimize(lora_alpha=8.0), ["lora_alpha: 8.0, and all weights are trained; set lora_r, or unset it"]),
        (optimize(merge_lora=True), ["merge_lora: True, and all weights are trained"]),
        (optimize(save_rounding="stochastic"), ["save_rounding: stochastic", "nothing is rounded", "save_dtype"]),
        (optimize(lora_r=4, save_dtype="bfloat16"), ["save_dtype: bfloat16", "as it was trained", "merge_lora"]),
        (optimize(lora_target_modules=["q_proj"]), ["lora_target_modules", "all weights are trained"]),
    ]:
        with pytest.raises(WinnowError) as caught:
            planned(data_dir, tmp_path, steps)
        assert all(problem in str(caught.value) for problem in problems), (steps, str(caught.value))


def test_what_carries_data_on_is_no_mistake(data_dir, tmp_path):
    """Weights that pairs or the imitation carry on; a LoRA with its options; an optimum of a mix that reads losses."""
    imitation = {"examples": {"from": {"selections": "select"}, "with": {"imitate": "selected"}}}
    for steps in (
        {"select": {"with": WEIGHED}, "pair": {"from": SELECTED, "with": {"rule": "all_pairs"}}},
        {"select": {"with": WEIGHED}} | imitation | optimize(nll_weight=0.1, nll_per="response"),
        optimize(lora_alpha=8.0, lora_r=4),
        optimize(lora_r=4, merge_lora=True, save_dtype="bfloat16", save_rounding="stochastic"),
        optimize(DEMONSTRATIONS | {"preference_optimum": "sft"}, mix="maxright"),
    ):
        assert planned(data_dir, tmp_path, steps).target


def test_the_reference_of_rounds_may_stay_the_sft_policy(data_dir, tmp_path):
    """`reference: other` keeps one reference for all rounds; its key is one, whatever the policy that is trained."""
    steps = {"rounds": 2, "reference": {"from": {"policy": "sft"}}} | optimize(reference="other")
    by_name = {step.name: step for step in planned(data_dir, tmp_path, steps).steps}
    assert by_name["reference@1"].inputs["policy"] is by_name["reference@2"].inputs["policy"]
    assert by_name["optimize@2"].inputs["init"] is by_name["optimize@1"]


def test_a_demonstration_that_the_data_set_has_not(data_dir, tmp_path):
    """By recipes that imitate it, or sample beside it."""
    overlay = tmp_path / "bare.yaml"
    overlay.write_text("prompts: {with: {demonstration: null}}\ndemonstrations: {with: {demonstration: null}}\n")
    for recipe in ("spin", "click", "alright"):
        with pytest.raises(WinnowError, match="demonstration"):
            recipes.plan_named(recipe, [data_dir / "demo.yaml", overlay], [])


def test_an_option_of_a_step_of_the_base_fits_every_recipe(data_dir, tmp_path):
    """A step that a recipe makes by another stage has a name of its own, so that a config may say `reward: ...`."""
    overlay = tmp_path / "both.yaml"
    overlay.write_text("reward: {with: {orders: one}}\ncompare: {with: {orders: one}}\n")
    for recipe in sorted({*recipes.names()} - {*recipes.OWN_CANDIDATES}):
        assert recipes.plan_named(recipe, [data_dir / "demo.yaml", overlay], []).steps


# Evaluations during training

SPLIT = {"prompts": {"with": {"validation": 0.2}}}
READ = {"prompts": "prompts", "baseline": "validation_baseline", "ranker": "ranker"}


def options_of(plan, name="optimize"):
    return next(step.options for step in plan.steps if step.name == name)


def test_two_lines_of_a_config_evaluate_any_recipe_while_it_trains(data_dir, tmp_path):
    """The ranker's kind is that of its model, and a response ends as those of the baseline."""
    lines = ["prompts: {with: {validation: 0.2}}",
             f"optimize: {{from: {yaml.safe_dump(READ, default_flow_style=True).strip()}, "
             "with: {evaluate_every: 5, keep: best}}"]  # fmt: skip
    (tmp_path / "my.yaml").write_text("\n".join(lines))
    for recipe, step in [("rso", "optimize"), ("dpo", "optimize"), ("raft", "optimize@2"), ("mixture", "optimize")]:
        plan = recipes.plan_named(recipe, [data_dir / "demo.yaml", tmp_path / "my.yaml"], [])
        options = options_of(plan, step)
        assert (options["by"].name, options["evaluate_max_tokens"], options["evaluate_stop"]) == ("pairwise", 24, None)
        assert options_of(plan, "validation_baseline")["split"] == "validation"
        assert options_of(plan, "eval_baseline")["split"] == "heldout"
    sets = ["sample.stop=[Sure]", "sample.stop_token_ids=[7]"]
    options = options_of(recipes.plan_named("rso", [data_dir / "demo.yaml", tmp_path / "my.yaml"], sets))
    assert (options["evaluate_stop"], options["evaluate_stop_token_ids"]) == (["Sure"], [7])


def test_a_program_evaluates_in_place_of_the_ranker(data_dir, tmp_path):
    steps = SPLIT | optimize(READ, evaluate_every=5) | {"short": {"use": "brevity", "with": {"words": 3}}}
    steps["optimize"]["from"] = READ | {"ranker": "short"}
    plan = planned(data_dir, tmp_path, steps)
    assert options_of(plan)["by"].name == "brevity"
    assert "ranker" not in next(step for step in plan.steps if step.name == "optimize").inputs


def test_evaluations_that_cannot_be_made_are_refused(data_dir, tmp_path):
    """And so is what only they read where there are none: each with the reason and the cure."""
    every = {"evaluate_every": 5}
    judge = {"name": "llm_judge", "engine": "vllm"}
    for steps, problems in [
        (
            optimize(evaluate_every=5),
            [f"evaluate_every: 5, and there is no `{name}`; add it under `from`" for name in READ],
        ),
        (SPLIT | optimize(READ), [f"{name}: only evaluations during training read it" for name in READ]),
        (optimize(keep="best"), ["keep: only evaluations during training read it", "set `evaluate_every`"]),
        (optimize(evaluate_n=2), ["evaluate_n: only evaluations"]),
        (optimize(READ, **every), ["evaluate_split: validation", "`validation: 0.0`", "such as 0.1"]),
        (SPLIT | optimize(READ, world_size=2, **every), ["`world_size: 2`", "set world_size to 1"]),
        (SPLIT | optimize(READ | {"init": "reward_head"}, **every), ["`init` is a reward model"]),
        (SPLIT | optimize(READ | {"examples": "ranker_examples"}, **every), ["the examples train a ranker"]),
        (SPLIT | optimize(READ | {"baseline": "eval_baseline"}, **every), ["prompts of split heldout, and"]),
        (SPLIT | optimize(READ | {"baseline": "targets"}, **every), ["evaluate_max_tokens: ", "of `sample`"]),
        (SPLIT | optimize(READ, evaluate_max_tokens=128, **every), ["evaluate_max_tokens: 128", "context of 128"]),
        (SPLIT | optimize(READ, by=judge, **every), ["by: llm_judge would start vLLM", "name: endpoint"]),
        (SPLIT | optimize(READ | {"prompts": "demonstrations"}, **every), ["the prompts of another step"]),
        (
            SPLIT | optimize(READ, **every) | {"sample": {"with": {"ignore_eos": True, "keep_special": True}}},
            ["baseline: its responses go on after EOS"],
        ),
    ]:
        steps = {"reward_head": {"from": {"init": "sft"}}} | steps
        with pytest.raises(WinnowError) as caught:
            planned(data_dir, tmp_path, steps)
        for problem in problems:
            assert problem in str(caught.value), steps


def test_prompts_that_choose_and_judge_the_policy_are_warned_of(data_dir, tmp_path):
    inputs = READ | {"baseline": "eval_baseline"}
    steps = optimize(inputs, evaluate_every=5, evaluate_split="heldout", keep="best")
    with pytest.warns(WinnowWarning, match="evaluate_split: heldout.*final evaluation"):
        planned(data_dir, tmp_path, steps)


def test_a_step_of_another_name_with_the_same_result_is_the_same_policy(data_dir, tmp_path):
    """As its key says: log-probs that are cached of it are those of `init`."""
    planned(data_dir, tmp_path, {"again": {"like": "sft"}, "reference": {"from": {"policy": "again"}}})


@pytest.mark.parametrize(
    ("options", "usual"),
    [
        (dict(learning_rate=3), "1e-7 to 1e-5"),
        (dict(learning_rate=0.006, learning_rate_scale=2.0), "1e-7 to 1e-5"),
        (dict(learning_rate=1e-2), None),
        (dict(learning_rate=0.5, lora_r=8), "1e-6 to 1e-3"),
        (dict(learning_rate=0.1, lora_r=8), None),
    ],
)
def test_a_learning_rate_that_destroys_the_policy_is_warned_of(data_dir, tmp_path, options, usual):
    """When the plan is made, and not refused; the demo's own rates are no reason to."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", WinnowWarning)
        planned(data_dir, tmp_path, optimize(**options))
    texts = [str(item.message) for item in caught if "learning_rate" in str(item.message)]
    assert len(texts) == (usual is not None)
    assert all(usual in text for text in texts)
