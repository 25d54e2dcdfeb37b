"""Profiles: all that is wrong in one is reported at once, and nothing of it is part of a key."""

from pathlib import Path

import pytest

from jobs import recipes
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.ray_executor import check_fits
from pipeline.execution.run import run
from pipeline.resources import Profile, Resources, load_profile
from pipeline.store.store import Store
from schemas import WinnowError
from tests.chain import planned, recipe, toys
from tests.runs import Silent, plan_of

STAGES = ["sample", "reward", "select"]
LAPTOP, SERVER = {"CPU": 2.0, "memory": 8 * 2**30}, {"CPU": 64.0, "GPU": 8.0, "accelerator_type:H100": 1.0}


def load(folder: Path, text: str) -> Profile:
    (folder / "p.yaml").write_text(text)
    return load_profile(folder / "p.yaml", STAGES)


def test_a_stage_has_the_default_and_what_differs_from_it(tmp_path):
    profile = load(tmp_path, "default: {cpus: 4, gpus: 0}\nsample: {gpus: 1, min_workers: 2}\nreward:\n")
    assert profile.of("sample") == Resources(cpus=4, gpus=1, min_workers=2)
    assert profile.of("reward") == profile.of("select") == Resources(cpus=4, gpus=0)


MISTAKES = {
    "[1, 2]": "must be a mapping of stages, got [1, 2]",
    "sampel: {gpus: 1}": "sampel: unknown stage; did you mean 'sample'?",
    "sample: 3": "sample: must be a mapping of resources, got 3",
    "sample: {gpu: 1}": "sample.gpu: unknown resource; did you mean 'gpus'?",
    "sample: {gpus: 1.5}": "sample.gpus: must be a whole number, or a share below 1, got 1.5",
    "sample: {cpus: true}": "sample.cpus: must be a valid number, got True",
    "sample: {memory: .inf}": "sample.memory: must be a finite number of GiB, at least 0, got inf",
    "sample: {max_workers: 0}": "sample.max_workers: must be greater than or equal to 1, got 0",
    "sample: {tensor_parallel: true}": "sample.tensor_parallel: must be a valid integer, got True",
    "sample: {accelerator_type: 1}": "accelerator_type: must be Ray's name of an accelerator, such as H100, got 1",
    "default: {min_workers: 4}\nsample: {max_workers: 2}": "sample.min_workers: must be <= max_workers (2), got 4",
    "default: {gpus: 1}\nsample: {tensor_parallel: 4}": "sample.gpus: must be >= tensor_parallel (4), got 1",
    "sample: {tensor_parallel: 4}": "sample.gpus: must be >= tensor_parallel (4), got no value",
    "autoscaling: 1": "autoscaling: must be a valid boolean, got 1",
    "rates: {sample: 1.0e+308}": "rates.sample: must be less than or equal to 1000000000000",
    "rates: {sample: 1.0e-300}": "rates.sample: must be greater than or equal to 0.000001",
    "a: [": "not YAML",
}


def test_a_mistake_is_reported_with_place_value_and_cure(tmp_path):
    for text, message in MISTAKES.items():
        with pytest.raises(WinnowError, match=r"p\.yaml") as caught:
            load(tmp_path, text)
        assert message in str(caught.value), text


def test_all_mistakes_are_reported_at_once_and_those_of_the_default_once(tmp_path):
    with pytest.raises(WinnowError) as caught:
        load(tmp_path, "sampel: {gpus: 1}\nsample: {gpus: x, cpus: y}\ndefault: {memory: z}\nreward:")
    assert len(caught.value.problems) == 4


def test_profiles_that_ship_are_valid_and_others_are_named():
    for name in recipes.names(recipes.PROFILES):
        assert recipes.load_resources(name).of("optimize").cpus
    with pytest.raises(WinnowError, match="did you mean 'laptop'"):
        recipes.load_resources("labtop")
    with pytest.raises(WinnowError, match=r"nowhere\.yaml: there is no such file"):
        recipes.load_resources("nowhere.yaml")


@pytest.mark.parametrize(
    ("body", "nodes", "message"),
    [
        ({"gpus": 1}, [LAPTOP], "sample: 1 worker with 1 GPU each, and the cluster has room for 0"),
        ({"gpus": 4}, [SERVER], None),
        ({"gpus": 8, "min_workers": 2}, [SERVER], "2 workers with 8 GPU each, and the cluster has room for 1"),
        ({"gpus": 8, "min_workers": 2}, [SERVER, LAPTOP, SERVER], None),
        ({"cpus": 3}, [LAPTOP, LAPTOP], "room for 0"),  # no worker spans machines
        ({"memory": 16}, [LAPTOP], "16.0 GiB"),
        ({"gpus": 1, "accelerator_type": "H100"}, [SERVER], None),
        ({"gpus": 1, "accelerator_type": "A100"}, [SERVER], "A100: no"),
    ],
)
def test_a_stage_that_needs_more_than_the_cluster_has(data_dir, body, nodes, message):
    plan, profile = plan_of(data_dir), Profile(stages={"sample": Resources(**body)})
    if message is None:
        check_fits(profile, plan.steps_to_run, nodes)
        return
    with pytest.raises(WinnowError, match=r"profile, sample: ") as caught:
        check_fits(profile, plan.steps_to_run, nodes)
    assert message in str(caught.value)
    check_fits(Profile(stages=profile.stages, autoscaling=True), plan.steps_to_run, nodes)  # it may grow


def test_ranks_are_counted_as_workers_and_stages_outside_of_the_plan_are_not(data_dir):
    plan = plan_of(data_dir, "optimize.world_size=4")
    profile = Profile(stages={"optimize": Resources(cpus=1), "features": Resources(gpus=99)})
    check_fits(profile, plan.steps_to_run, [LAPTOP, LAPTOP])
    with pytest.raises(WinnowError, match="optimize: 4 workers with 1 CPU each, and the cluster has room for 2"):
        check_fits(profile, plan.steps_to_run, [LAPTOP])


def test_a_profile_is_not_part_of_a_key(tmp_path):
    """A run under another profile finds every step finished."""
    other = Profile(default=Resources(cpus=1, in_flight=7))
    with toys():
        plan, store = planned(recipe(tmp_path)), Store(tmp_path / "store")
        reporters = [Silent(), Silent()]
        for executor, reporter in zip([LocalExecutor(), LocalExecutor(other)], reporters, strict=True):
            run(plan, store, executor, reporter)
    assert [reporter.ran for reporter in reporters] == [["draw", "rate", "keep"], []]
