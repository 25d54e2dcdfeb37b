"""What a loss reads and a recipe's data will not have is refused when it is planned, with the reason."""

import pytest
import yaml

from jobs import recipes
from schemas import WinnowError

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
