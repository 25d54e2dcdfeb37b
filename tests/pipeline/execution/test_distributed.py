"""Two processes train one network under Ray Train: the same losses as one, and a death changes nothing."""

import os
import signal
import threading
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file

from pipeline.context import StageContext, WarmCache
from pipeline.execution.distributed import _each
from pipeline.resources import Resources
from schemas import WinnowError, WinnowWarning
from stages.network.load import load_network
from stages.network.packing import PassSize
from stages.training.distributed import Distributed
from stages.training.objectives import objective
from stages.training.optimize import optimize
from stages.training.trainer import check_ranks
from tests.material import bound, cache, imitate, labelled, leg_of, random_rows, table, train

pytestmark = pytest.mark.timeout(180)


def weights(model):
    return {name: each for file in model.folder.glob("*.safetensors") for name, each in load_file(file).items()}


@pytest.mark.parametrize(("passes", "of"), [(0, 1), (1, 1), (3, 1), (1, 2), (5, 2), (6, 3), (7, 4)])
def test_every_pass_counts_once_and_all_ranks_do_as_many(passes, of):
    """Each pass is one rank's, and where there are fewer than turns, the last ones have none."""
    dealt = []
    for number in range(of):
        ranks = Distributed()
        ranks.of, ranks.number = of, number
        dealt.append(list(ranks.deal(list(range(passes)))))
    assert len({len(each) for each in dealt}) == 1
    for n in range(passes):
        assert sum(each.count(n) for each in dealt) == 1
    assert sum(map(len, dealt)) - passes == sum(each.count(None) for each in dealt) < of


@pytest.mark.parametrize("of", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("tokens_per_pass", [1, 60, 10_000])
def test_ranks_share_a_step_that_fits_one_pass(sharp, of, tokens_per_pass):
    """Every group in one pass, a pass for each rank while groups last, none above the budget but of one group."""
    leg = leg_of(sharp, random_rows(prompts=7), "hinge", tokens_per_pass=tokens_per_pass)
    leg.ranks.of = of
    passes = leg.micro(load_network(sharp), leg.groups)
    assert sorted(group.prompt_id for each in passes for group in each) == [f"p{n}" for n in range(7)]
    assert len(passes) >= min(of, 7)
    assert all(len(each) == 1 or PassSize.of(each, True).size <= tokens_per_pass for each in passes)
    sizes = [PassSize.of(each, True).size for each in passes]
    assert sizes == sorted(sizes)
    assert len(passes) == of or tokens_per_pass < 10_000 or of > 7


def test_more_ranks_than_a_step_has_groups_are_refused(sharp):
    """Steps of 4 pairs have 2 groups, mostly: two ranks share them, a third would wait."""
    leg = leg_of(sharp, random_rows(prompts=7), "hinge", batch_size=4)
    sizes = sorted(len(leg.batch(n)) for n in range(leg.steps(1)))
    assert sizes[len(sizes) // 2] == 2
    check_ranks(2, [leg])
    with pytest.raises(
        WinnowError, match=r"optimize.world_size: 3, and half .* 2 prompts or fewer.*set world_size to 2"
    ):
        check_ranks(3, [leg])


def test_more_ranks_than_the_cluster_has_room_for_are_refused():
    """By the option's name in a recipe, with what there is and what would do."""
    with pytest.raises(
        WinnowError, match=r"optimize.world_size: 3 of 1 CPU each, and the cluster has 2; set world_size to 2"
    ):
        _each(Resources(), 3, {"CPU": 2.0})
    assert _each(Resources(), 2, {"CPU": 4.0, "GPU": 2.0}) == {"CPU": 2, "GPU": 1}


def kill_a_rank_after(folder, step):
    """Kill -9 one of Ray Train's workers when the run has a checkpoint of this step."""

    def wait():
        while not list((folder / "checkpoint").glob(f"step-{step:08d}")):
            time.sleep(0.05)
        found = [int(name) for name in os.listdir("/proc") if name.isdigit() and "RayTrainWorker" in title(name)]
        os.kill(max(found), signal.SIGKILL)
        killed.append(max(found))

    killed: list[int] = []
    threading.Thread(target=wait, daemon=True).start()
    return killed


def title(process):
    try:
        with open(f"/proc/{process}/cmdline") as file:
            return file.read()
    except OSError:
        return ""


def train_all(init, rows, folder, **options):
    """(model, row of policies, {metric: [value a step]}, {measure: [value a step]})"""
    ctx = StageContext(folder, WarmCache(), lambda *_: None)
    given = (
        dict(objective=bound(objective, "kto"), batch_size=4, warmup_ratio=0.0, lr_scheduler_type="constant") | options
    )
    made, policy, metrics, speeds = optimize(init, table(rows), ctx, **given)
    return (
        made,
        policy.to_pylist(),
        *(
            {name: [row["value"] for row in rows if row[of] == name] for name in {row[of] for row in rows}}
            for of, rows in (("metric", metrics.to_pylist()), ("measure", speeds.to_pylist()))
        ),
    )


def test_two_ranks_have_the_losses_of_one_and_survive_a_death(sharp, tmp_path):
    """KTO with an imitated part, uneven passes, and a group that is too large for one: all that ranks must agree on.

    `policies` and the names and steps of `metrics` are the same, all values to rounding; no rank reads what another
    does, but for a token where it has nothing to read. That all started again is said.
    """
    rows = cache(sharp, imitate(labelled(random_rows(prompts=7)), 0), spread=0.0)
    options = dict(nll_weight=0.5, tokens_per_pass=25, epochs=5, checkpoint_every=2, learning_rate=1e-4)
    alone, row, expected, speeds = train_all(sharp, rows, tmp_path / "one", **options)
    killed = kill_a_rank_after(tmp_path / "two", 4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", WinnowWarning)
        together, other, found, faster = train_all(
            sharp, rows, tmp_path / "two", world_size=2, gradient_checkpointing=True, **options
        )
    assert killed
    assert any("a rank died" in str(each.message) and "attempt 2 of 3" in str(each.message) for each in said)
    assert other == row
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(expected, row[0]["steps"])
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for name, values in found.items():
        assert values == pytest.approx(expected[name], rel=1e-4, abs=1e-4), name
    for read, wanted in zip(faster["tokens/read"], speeds["tokens/read"], strict=True):
        assert wanted <= read <= wanted + 4
    for name, both in dict(world_size=(1, 2), gradient_checkpointing=(0, 1), tokens_per_pass=(25, 25)).items():
        assert (set(speeds[name]), set(faster[name])) == tuple({value} for value in both)
    for name, weight in weights(together).items():
        assert torch.allclose(weight, weights(alone)[name], atol=1e-4), name


def test_what_a_rank_refuses_ends_the_run_with_its_message(sharp, tmp_path):
    """A stale reference is seen by the gate of both ranks; it is no death that is worth another attempt."""
    rows = cache(sharp, random_rows())
    for row in rows:
        for each in row["responses"]:
            each["ref_logp"] += 3.0 * each["candidate_id"].endswith("0")
    with pytest.raises(WinnowError, match=r"step 0: .*the cache is stale"):
        train(sharp, rows, tmp_path, world_size=2)
