"""Profiles: what is wrong in one is said at once, all of it, and none of it is ever part of a key."""

from pathlib import Path

import pytest
import yaml

from jobs import profiles
from pipeline.execution.executors import check_fits
from pipeline.execution.profiles import load_profile
from pipeline.resources import Profile, Resources
from schemas import WinnowError
from tests.runs import plan_of

STAGES = ["sample", "reward", "select"]
LAPTOP, SERVER = {"CPU": 2.0, "memory": 8 * 2**30}, {"CPU": 64.0, "GPU": 8.0, "accelerator_type:H100": 1.0}


def loaded(tmp_path: Path, text: str) -> Profile:
    (tmp_path / "p.yaml").write_text(text)
    return load_profile(tmp_path / "p.yaml", STAGES)


def test_a_stage_has_the_default_and_what_differs_from_it(tmp_path):
    made = loaded(tmp_path, "default: {cpus: 4, gpus: 0}\nsample: {gpus: 1, min_workers: 2}\nreward:\n")
    assert made.of("sample") == Resources(cpus=4, gpus=1, min_workers=2)
    assert made.of("reward") == made.of("select") == Resources(cpus=4, gpus=0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "must be a mapping of stages, got [1, 2]"),
        ("sampel: {gpus: 1}", "sampel: unknown stage; did you mean 'sample'?"),
        ("sample: 3", "sample: must be a mapping of resources, got 3"),
        ("sample: {gpu: 1}", "sample.gpu: unknown; did you mean 'gpus'?"),
        ("sample: {gpus: many}", "sample.gpus: must be a number from 0, got 'many'"),
        ("sample: {gpus: 1.5}", "sample.gpus: must be a whole number, or a share below 1, got 1.5"),
        ("sample: {cpus: -1}", "sample.cpus: must be a number from 0, got -1"),
        ("sample: {cpus: true}", "sample.cpus: must be a number from 0, got True"),
        ("sample: {memory: .inf}", "sample.memory: must be a number from 0, got inf"),
        ("sample: {max_workers: 0}", "sample.max_workers: must be a whole number from 1, got 0"),
        ("sample: {in_flight: 1.5}", "sample.in_flight: must be a whole number from 1, got 1.5"),
        ("sample: {in_flight: null}", "sample.in_flight: must be a whole number from 1, got None"),
        ("sample: {accelerator_type: 1}", "sample.accelerator_type: must be Ray's name of an accelerator"),
        ("default: {min_workers: 4}\nsample: {max_workers: 2}", "sample.min_workers: 4 is more than max_workers, 2"),
        ("default: {gpus: 1}\nsample: {tensor_parallel: 4}", "sample.gpus: 1, and tensor_parallel: 4 needs as many"),
        ("sample: {tensor_parallel: 4}", "sample.gpus: not said, and tensor_parallel: 4 needs as many"),
        ("sample: {tensor_parallel: true}", "sample.tensor_parallel: must be a whole number from 1, got True"),
        ("autoscaling: 1", "autoscaling: must be true or false, got 1"),
        ("a: [", "not YAML"),
    ],
)
def test_a_mistake_names_place_value_and_cure(tmp_path, text, said):
    with pytest.raises(WinnowError, match=r"p\.yaml") as caught:
        loaded(tmp_path, text)
    assert said in str(caught.value)


def test_all_mistakes_are_told_at_once(tmp_path):
    with pytest.raises(WinnowError) as caught:
        loaded(tmp_path, "sampel: {gpus: 1}\nsample: {gpus: x, cpus: y}")
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("name", profiles.names())
def test_what_ships_is_read_and_named(name):
    assert profiles.load(name).of("optimize").cpus


def test_an_unknown_name_or_file():
    with pytest.raises(WinnowError, match="did you mean 'laptop'"):
        profiles.load("labtop")
    with pytest.raises(WinnowError, match=r"nowhere\.yaml: cannot be read"):
        profiles.load("nowhere.yaml")


@pytest.mark.parametrize(
    ("body", "nodes", "said"),
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
def test_a_stage_that_needs_more_than_the_cluster_has(world, body, nodes, said):
    plan, profile = plan_of(world), Profile(stages={"sample": Resources(**body)})
    if said is None:
        check_fits(profile, plan.wanted, nodes)
        return
    with pytest.raises(WinnowError, match=r"profile, sample: ") as caught:
        check_fits(profile, plan.wanted, nodes)
    assert said in str(caught.value)
    check_fits(Profile(stages=profile.stages, autoscaling=True), plan.wanted, nodes)  # it may grow


def test_ranks_are_workers_that_there_must_be(world):
    plan, profile = plan_of(world, "optimize.world_size=4"), Profile(stages={"optimize": Resources(cpus=1)})
    check_fits(profile, plan.wanted, [LAPTOP, LAPTOP])
    with pytest.raises(WinnowError, match="optimize: 4 workers with 1 CPU each, and the cluster has room for 2"):
        check_fits(profile, plan.wanted, [LAPTOP])


def test_a_stage_that_the_plan_has_not_needs_nothing(world):
    check_fits(Profile(stages={"features": Resources(gpus=99)}), plan_of(world).wanted, [LAPTOP])


def test_a_profile_is_no_part_of_a_key(world, tmp_path):
    """The same steps are done with, whatever made them: a run under another profile finds nothing to do."""
    from pipeline.execution.executors import LocalExecutor
    from pipeline.execution.run import run
    from pipeline.store.store import Store
    from tests.runs import Silent

    first, second = Silent(), Silent()
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"default": {"cpus": 1, "in_flight": 7, "tensor_parallel": 1}}))
    plan = plan_of(world, "target=sft_examples")
    run(plan, Store(tmp_path / "store"), LocalExecutor(), first)
    run(plan, Store(tmp_path / "store"), LocalExecutor(profiles.load(str(tmp_path / "p.yaml"))), second)
    assert first.ran
    assert not second.ran
