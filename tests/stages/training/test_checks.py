"""What a loss reads and a recipe's data never make is refused when it is planned, with the reason."""

import pytest
import yaml

from jobs import recipes
from schemas import WinnowError

NO_PAIRS = {"pairs": None, "reference": None, "selections": "select"}

SELECTED = {"selections": "select", "comparisons": None}
WEIGHED = {"rule": {"name": "softmax_weights", "beta": 1.0}}


def planned(world, tmp_path, steps):
    """The plan of a recipe that extends ours by `steps`."""
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"extends": "_base", **steps}))
    return recipes.plan_named(str(path), [world / "demo.yaml"], [])


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ({"examples": {"from": {"reference": None}}}, "examples: objective sigmoid_norm reads a reference"),
        ({"examples": {"from": NO_PAIRS, "with": {"imitate": "selected"}}}, "sigmoid_norm reads pairs"),
        ({"optimize": {"with": {"objective": "nll"}}}, "nll reads responses with a weight; set its `imitate`"),
        ({"optimize": {"with": {"objective": "nll"}}}, "objective nll reads no pairs; unwire `pairs`"),
        ({"optimize": {"with": {"nll_weight": 0.5}}}, "set its `imitate`"),
        ({"examples": {"with": {"imitate": "chosen"}}}, "reads no weights; unset its `imitate`"),
        ({"optimize": {"with": {"objective": "kto"}}}, "kto reads unpaired labels; set its `desirable`"),
        ({"optimize": {"with": {"objective": "kto"}}}, "kto reads mismatched rows; wire `mismatched`"),
        ({"examples": {"with": {"desirable": "pairs"}}}, "reads no unpaired labels; unset its `desirable`"),
        (
            {"optimize": {"with": {"objective": "hinge_norm"}}, "examples": {"with": {"labels": "soft"}}},
            "hinge_norm takes every label as certain",
        ),
        ({"optimize": {"with": {"world_size": 9, "batch_size": 8}}}, "world_size: 9, and a step has 8"),
        ({"optimize": {"with": {"mix": "alright"}}}, "`mix` and the input `demonstrations` go together"),
        ({"optimize": {"from": {"demonstrations": "demonstration_examples"}}}, "go together"),
        (
            {"optimize": {"from": {"demonstrations": "examples"}, "with": {"mix": "alright"}}},
            "demonstrations: nll reads responses with a weight",
        ),
        (
            {"optimize": {"from": {"demonstrations": "demonstration_examples", "preference_optimum": "sft"},
                          "with": {"mix": "alright"}}},
            "mix alright does not read it",
        ),
        ({"examples": {"from": {"selections": "select"}}}, "selections are wired, and nothing reads them"),
        ({"select": {"with": WEIGHED}}, "nothing reads the weights of softmax_weights"),
        (
            {"select": {"with": WEIGHED}, "pair": {"from": SELECTED, "with": {"rule": "neighbours"}}},
            "nothing reads the weights of softmax_weights",
        ),
        ({"optimize": {"with": {"nll_per": "response"}}}, "there is no likelihood to average"),
        ({"reference": {"from": {"policy": "ranker"}}}, "training starts from another step"),
        ({"reference": {"from": {"policy": "sft"}}, "rounds": 2}, "optimize@2: init: training starts from another"),
        ({"reference": {"with": {"dtype": "bfloat16"}}}, "dtype: float32, and the reference is scored in bfloat16"),
        (
            {"optimize": {"with": {"objective": "hinge", "reference": "other"}}},
            "reference: other, and objective hinge reads none",
        ),
    ],
)  # fmt: skip
def test_a_recipe_whose_data_lack_what_its_loss_reads(world, tmp_path, steps, said):
    with pytest.raises(WinnowError) as caught:
        planned(world, tmp_path, steps)
    assert said in str(caught.value)


def test_the_reference_of_rounds_may_stay_the_sft_policy(world, tmp_path):
    """`reference: other` keeps one reference for all rounds; its key is one, whatever the policy that is trained."""
    steps = {
        "rounds": 2,
        "reference": {"from": {"policy": "sft"}},
        "optimize": {"with": {"reference": "other"}},
    }
    plan = planned(world, tmp_path, steps)
    made = {step.name: step for step in plan.steps}
    assert made["reference@1"].inputs["policy"] is made["reference@2"].inputs["policy"]
    assert made["optimize@2"].inputs["init"] is made["optimize@1"]


@pytest.mark.parametrize("recipe", ["spin", "click", "alright"])
def test_a_demonstration_that_the_data_set_has_not(recipe, world, tmp_path):
    overlay = tmp_path / "bare.yaml"
    overlay.write_text("prompts: {with: {demonstration: null}}\ndemonstrations: {with: {demonstration: null}}\n")
    with pytest.raises(WinnowError, match="demonstration"):
        recipes.plan_named(recipe, [world / "demo.yaml", overlay], [])


def test_weights_that_pairs_or_the_imitation_carry_on_are_no_mistake(world, tmp_path):
    for steps in (
        {"pair": {"from": SELECTED, "with": {"rule": "all_pairs"}}},
        {
            "examples": {"from": {"selections": "select"}, "with": {"imitate": "selected"}},
            "optimize": {"with": {"nll_weight": 0.1, "nll_per": "response"}},
        },
    ):
        assert planned(world, tmp_path, {"select": {"with": WEIGHED}} | steps).target


@pytest.mark.parametrize("recipe", sorted({*recipes.names()} - {"own_candidates"}))
def test_an_option_of_a_step_of_the_base_fits_every_recipe(recipe, world, tmp_path):
    """A step that a recipe makes by another stage has a name of its own, so that a world may say `reward: ...`."""
    overlay = tmp_path / "both.yaml"
    overlay.write_text("reward: {with: {orders: one}}\ncompare: {with: {orders: one}}\n")
    assert recipes.plan_named(recipe, [world / "demo.yaml", overlay], []).steps
