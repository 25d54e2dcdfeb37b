"""Two processes train one network under Ray Train: the same losses as one, and a death changes nothing."""

import threading
import time
import warnings
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from pipeline.context import StageContext, WarmCache
from pipeline.execution.distributed import _train_on_rank, resources_per_rank, run_distributed
from pipeline.resources import Resources
from schemas import WinnowError, WinnowWarning
from stages.network.load import load_network
from stages.network.packing import forward_tokens
from stages.training.distributed import Distributed
from stages.training.trainer import check_world_size
from tests.material import cache, imitate, labelled, random_rows, term_of, train
from tests.stages.training.test_two_ranks import UNEVEN, check_that_two_ranks_did_as_one, train_all

pytestmark = pytest.mark.timeout(180)


def test_every_pass_counts_once_and_all_ranks_do_as_many():
    """Each pass belongs to one rank; where there are fewer passes than turns, the last ranks have none."""
    for passes, world_size in [(0, 1), (3, 1), (1, 2), (5, 2), (6, 3), (7, 4)]:
        dealt = []
        for rank in range(world_size):
            dist = Distributed()
            dist.world_size, dist.rank = world_size, rank
            dealt.append(list(dist.items_of_this_rank(list(range(passes)))))
        assert len({len(turns) for turns in dealt}) == 1
        for n in range(passes):
            assert sum(turns.count(n) for turns in dealt) == 1
        idle = sum(turns.count(None) for turns in dealt)
        assert sum(map(len, dealt)) - passes == idle < world_size


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
@pytest.mark.parametrize("tokens_per_pass", [1, 60, 10_000])
def test_ranks_share_a_step_that_fits_one_pass(sharp, world_size, tokens_per_pass):
    """Every group in one pass, a pass for each rank while groups last, none above the budget but of one group."""
    term = term_of(sharp, random_rows(prompts=7), "hinge", tokens_per_pass=tokens_per_pass)
    term.dist.world_size = world_size
    passes = term.micro_batches(load_network(sharp), term.groups)
    sizes = [forward_tokens(groups, True) for groups in passes]
    assert sorted(group.prompt_id for groups in passes for group in groups) == [f"p{n}" for n in range(7)]
    assert len(passes) >= min(world_size, 7)
    assert all(len(groups) == 1 or size <= tokens_per_pass for groups, size in zip(passes, sizes, strict=True))
    assert sizes == sorted(sizes)
    assert len(passes) == world_size or tokens_per_pass < 10_000 or world_size > 7


def test_more_ranks_than_a_step_has_groups_are_refused(sharp):
    """Steps of 4 pairs have 2 groups, mostly: two ranks share them, a third would wait."""
    term = term_of(sharp, random_rows(prompts=7), "hinge", batch_size=4)
    sizes = sorted(len(term.batches[n]) for n in range(term.batches.steps(1)))
    assert sizes[len(sizes) // 2] == 2
    check_world_size(2, [term])
    with pytest.raises(WinnowError, match=r"optimize.world_size: 3\b.*set world_size to 2"):
        check_world_size(3, [term])


def test_more_ranks_than_the_cluster_has_room_for_are_refused():
    """By the option's name in a recipe, with what there is and what would do."""
    with pytest.raises(WinnowError, match=r"optimize.world_size: 3 .*1 CPU .* has 2; set world_size to 2"):
        resources_per_rank(Resources(), 3, {"CPU": 2.0})
    assert resources_per_rank(Resources(), 2, {"CPU": 4.0, "GPU": 2.0}) == {"CPU": 2, "GPU": 1}


def kill_a_rank_after(folder, step):
    """Kill -9 one of Ray Train's workers when the run has a checkpoint of this step; return a list for its pid."""

    def kill():
        while not (folder / "checkpoint" / f"step-{step:08d}").exists():
            time.sleep(0.05)
        workers = []
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    workers.append(process)
        victim = max(workers, key=lambda process: process.pid)
        victim.kill()
        killed.append(victim.pid)

    killed: list[int] = []
    threading.Thread(target=kill, daemon=True).start()
    return killed


@pytest.mark.bench  # Ray Train takes 16 to 30 seconds to start two ranks
def test_ray_train_runs_a_job_on_each_rank(tmp_path, monkeypatch):
    """It returns what rank 0 does; progress and warnings are those of rank 0."""

    def add_up_ranks(report_progress):  # sent by its code, so that no rank imports this file, and with it transformers
        import torch

        report_progress("step", 1, 1)
        warnings.warn("once", WinnowWarning, stacklevel=1)
        number = torch.tensor(torch.distributed.get_rank() + 1.0)
        torch.distributed.all_reduce(number)
        return {"sum": number.item(), "world_size": torch.distributed.get_world_size()}

    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process for what no local Ray has
    progress = []
    ctx = StageContext(tmp_path, WarmCache(), lambda *report: progress.append(report))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", WinnowWarning)
        assert run_distributed(add_up_ranks, 2, ctx) == {"sum": 3.0, "world_size": 2}
    assert len(progress) == 1
    assert [str(warning.message) for warning in caught if warning.category is WinnowWarning] == ["once"]


@pytest.mark.bench
@pytest.mark.parametrize("killed_after", [None, 4])
def test_two_ranks_of_ray_have_the_losses_of_one_even_if_one_dies(sharp, tmp_path, monkeypatch, killed_after):
    """As above; that all started again is reported."""
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    rows = cache(sharp, imitate(labelled(random_rows(prompts=7)), 0), spread=0.0)
    options = dict(epochs=5 if killed_after else 2, **UNEVEN)
    one = train_all(sharp, rows, tmp_path / "one", **options)
    killed = kill_a_rank_after(tmp_path / "two", killed_after) if killed_after else []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", WinnowWarning)
        two = train_all(sharp, rows, tmp_path / "two", world_size=2, gradient_checkpointing=True, **options)
    assert len(killed) == bool(killed_after)
    restarts = [message for message in map(str, (warning.message for warning in caught)) if "a rank died" in message]
    assert ["attempt 2 of 3" in message for message in restarts] == [True] * len(killed)
    check_that_two_ranks_did_as_one(two, one)


def test_a_rank_that_refuses_leaves_its_message_and_is_not_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr("ray.train.get_context", lambda: SimpleNamespace(get_world_rank=lambda: 1))
    calls, queue = [], cast(Any, None)  # of the second rank, which reports nothing

    def refuse(report_progress):
        calls.append(report_progress)
        raise WinnowError("step 0: the cache is stale")

    with pytest.raises(WinnowError, match="stale"):
        _train_on_rank(refuse, tmp_path / "refusal", queue, Resources())
    assert (tmp_path / "refusal").read_text() == "step 0: the cache is stale"
    assert _train_on_rank(refuse, tmp_path / "refusal", queue, Resources()) is None
    assert len(calls) == 1


@pytest.mark.bench
def test_what_a_rank_refuses_ends_the_run_with_its_message(sharp, tmp_path):
    """A stale reference is seen by the gate of both ranks; it is no death that is worth another attempt."""
    rows = cache(sharp, random_rows())
    for row in rows:
        for response in row["responses"]:
            response["ref_logp"] += 3.0 * response["candidate_id"].endswith("0")
    with pytest.raises(WinnowError, match=r"step 0: .*the cache is stale"):
        train(sharp, rows, tmp_path, world_size=2)
