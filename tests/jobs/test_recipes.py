"""Recipes that must say what their paper says, as plans of the tiny configuration."""

import json
import shutil
from itertools import pairwise

import pyarrow as pa
import pytest

from jobs.recipes import plans
from jobs.sweeps import plan_sweep
from pipeline.config.plan import Step
from schemas import WinnowWarning
from schemas.tables import CANDIDATES, PROMPTS, REWARDS
from stages.ranking.rescale import rescale
from stages.sampling.pool import pool
from stages.selection.rules import selection_rule
from stages.selection.select import select
from stages.training.examples import examples
from tests.catalogs import table
from tests.material import context
from tests.runs import plan_of


def steps_of(data_dir, recipe: str, *sets: str) -> dict[str, Step]:
    return {step.name: step for step in plan_of(data_dir, *sets, recipe=recipe).steps}


def test_rest_scores_and_filters_its_original_data_with_the_samples(data_dir):
    """D_g is both (arXiv:2308.08998, algorithm 1); what is imitated is read from it."""
    steps = steps_of(data_dir, "rest")
    for n in range(1, 5):
        scored = steps[f"reward@{n}"].inputs["candidates"]
        assert scored is steps[f"examples@{n}"].inputs["candidates"]
        assert {name: step.stage for name, step in scored.inputs.items()} == {
            "candidates": "sample", "prompts": "prompts",
        }  # fmt: skip
    assert len({steps[f"sample@{n}"].key for n in range(1, 5)}) == 2  # two improve steps to each grow step


def test_rest_raises_the_threshold_and_lowers_the_learning_rate_within_a_grow_step(data_dir):
    steps = steps_of(data_dir, "rest")
    samples = [steps[f"sample@{n}"].key for n in range(1, 5)]
    thresholds = [steps[f"select@{n}"].options["rule"].options["threshold"] for n in range(1, 5)]
    rates = [
        options["learning_rate"] * options["learning_rate_scale"]
        for options in (steps[f"optimize@{n}"].options for n in range(1, 5))
    ]
    for one, other in pairwise(range(4)):
        if samples[one] == samples[other]:
            assert thresholds[other] > thresholds[one]
            assert rates[other] < rates[one]
        else:  # new samples
            assert (thresholds[other], rates[other]) == (thresholds[0], rates[0])


def test_rest_imitates_a_demonstration_above_the_threshold():
    """Of two prompts with a sample and a demonstration each: q's demonstration is better than its sample, p's worse."""
    prompts = table(
        PROMPTS,
        *(dict(prompt_id=name, text=name, token_ids=[1], split="train", demonstration="d", demonstration_ids=[n])
          for n, name in enumerate("pq", 7)),
    )  # fmt: skip
    samples = [dict(prompt_id=name, candidate_id=f"sample {name}", token_ids=[n]) for n, name in enumerate("pq", 3)]
    candidates = pool(context(), table(CANDIDATES, *samples), prompts)
    reward = {3: 4.0, 7: 1.0, 4: 0.0, 8: 3.9}
    rewards = pa.Table.from_pylist(
        [
            dict(prompt_id=row["prompt_id"], candidate_id=row["candidate_id"], reward=reward[row["token_ids"][0]])
            for row in candidates.to_pylist()
        ],
        REWARDS,
    )
    rule = selection_rule.bind({"name": "above", "threshold": 0.7})
    kept = select(rescale(rewards, context()), context(), rule=rule)
    rows = examples(prompts, context(), candidates, selections=kept, imitate="selected").to_pylist()
    assert {row["prompt_id"]: [r["token_ids"] for r in row["responses"]] for row in rows} == {"p": [[3]], "q": [[8]]}


@pytest.mark.parametrize("recipe", ["alright", "maxright", "mixture", "sequence", "sequence_reverse"])
def test_both_objectives_are_trained_from_either_start(data_dir, recipe):
    """From the pretrained model as in the authors' scripts, or from the SFT policy, which is the reference of both."""
    for name, start, reference in ((recipe, "sft", "init"), (f"{recipe}_pretrained", "base", "other")):
        steps = steps_of(data_dir, name, "target=optimize")
        trained = [step for step in steps.values() if step.stage == "optimize" and step.options["mix"]]
        assert len(trained) == (3 if recipe == "maxright" else 1)  # whose two optima are of the same start
        for step in trained:
            assert step.inputs["init"].name == start
            assert step.options["reference"] == reference
            assert step.inputs["examples"].inputs["reference"].inputs["policy"].name == "sft"


def test_the_two_orders_of_a_sequence_differ_in_nothing_else(data_dir):
    one, other = (steps_of(data_dir, name)["optimize"] for name in ("sequence", "sequence_reverse"))
    assert one.identity["inputs"] == other.identity["inputs"]
    mixes = [step.options["mix"].options for step in (one, other)]
    assert [options["first"] for options in mixes] == ["imitation", "preference"]
    assert mixes[0]["weight"] == mixes[1]["weight"]


def test_the_objectives_alone_are_one_training_per_seed_for_every_mix_and_weight(data_dir):
    """The reference points of a front; they differ from its policies in the mix alone, which `two_losses` reads."""
    names = ["alright", "maxright", "mixture", "sequence", "sequence_reverse"]
    over = ["optimize.mix.weight=0.25,0.75", "optimize.seed=0,1"]
    plans = plan_sweep(names, [data_dir / "demo.yaml"], ["target=optimize"], over).plans
    assert len(plans) == 5 * 4
    trained = [step for plan in plans for step in plan.steps if step.stage == "optimize" and step.options["mix"]]
    assert len({step.key for step in trained}) == 5 * 4 + 2 * 2
    settings = set()
    for step in trained:
        inputs = {name: key for name, key in step.identity["inputs"].items() if not name.endswith("optimum")}
        settings.add(json.dumps([step.identity["options"] | {"mix": None}, inputs], sort_keys=True))
    assert len(settings) == 2


def test_a_warning_of_several_plans_is_shown_once_with_the_steps_of_all(data_dir, tiny, tmp_path):
    """`dpo` draws from the SFT policy for its evaluation alone."""
    shutil.copytree(tiny.folder, tmp_path / "sft")
    options = {"eos_token_id": 1, "repetition_penalty": 1.3}
    (tmp_path / "sft" / "generation_config.json").write_text(json.dumps(options))
    config = {
        "sft": {"use": "model", "with": {"path": str(tmp_path / "sft")}},
        "ranker": {"use": "concierge"},
        "sample": {"with": {"max_tokens": 24}},
        "evaluations": [],
        "prompts": {"with": {"path": str(data_dir / "prompts.jsonl")}},
        "preferences": {"with": {"path": str(data_dir / "preferences.jsonl")}},
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(config))
    with pytest.warns(WinnowWarning) as caught:
        plans(["dpo", "rso"], [tmp_path / "mine.yaml"], [])
    (text,) = (str(item.message) for item in caught if "repetition_penalty: 1.3" in str(item.message))
    assert sorted(text.split(":")[0].split(", ")) == ["eval_baseline", "eval_sample", "sample"]


def test_pairs_that_are_held_out_and_that_no_step_reads_are_named(data_dir):
    """A fifth of the pairs of DPO, by default, for nothing; a ranker of the same pairs is measured on them."""
    plan = plan_of(data_dir, "target=optimize", "preferences.heldout=0.3", recipe="dpo")
    (note,) = (note for note in plan.notes if "heldout" in note)
    assert note.startswith("preferences.heldout: the pairs of 30% of its prompts are held out, and no step")
    for sets in (["target=optimize", "preferences.heldout=0.0"], ["target=evaluate"]):
        assert not any("heldout" in note for note in plan_of(data_dir, *sets, recipe="dpo").notes)
