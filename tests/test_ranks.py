"""Two processes train one network under Ray Train: the same losses as one, and a death changes nothing."""

import os
import signal
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from schemas import WinnowError
from stages.ranks import Ranks
from tests.material import cache, imitate, labelled, random_rows, train

pytestmark = pytest.mark.timeout(180)


def weights(model):
    return {name: each for file in model.folder.glob("*.safetensors") for name, each in load_file(file).items()}


def losses(metrics):
    return [value for (_, name), value in sorted(metrics.items()) if name == "loss"]


@pytest.mark.parametrize(("passes", "of"), [(0, 1), (1, 1), (3, 1), (1, 2), (5, 2), (6, 3), (7, 4)])
def test_every_pass_counts_once_and_all_ranks_do_as_many(passes, of):
    """The shares of a pass over all ranks add up to 1."""
    dealt = []
    for number in range(of):
        ranks = Ranks()
        ranks.of, ranks.number = of, number
        dealt.append(list(ranks.deal(list(range(passes)))))
    assert len({len(each) for each in dealt}) == 1
    for n in range(passes):
        assert sum(share for each in dealt for m, share in each if m == n) == 1


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


def test_two_ranks_have_the_losses_of_one_and_survive_a_death(sharp, tmp_path):
    """KTO with an imitated part, uneven passes, and a group that is too large for one: all that ranks must agree on."""
    rows = cache(sharp, imitate(labelled(random_rows(prompts=7)), 0), spread=0.0)
    options = dict(objective="kto", nll_weight=0.5, micro_tokens=25, epochs=5, checkpoint_every=2, lr=1e-4)
    alone, expected, row = train(sharp, rows, tmp_path / "one", **options)
    killed = kill_a_rank_after(tmp_path / "two", 4)
    together, found, other = train(sharp, rows, tmp_path / "two", ranks=2, **options)
    assert killed
    assert len(losses(found)) == row["steps"]
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    assert other["parameters"] == row["parameters"]
    for name, weight in weights(together).items():
        assert torch.allclose(weight, weights(alone)[name], atol=1e-4), name


def test_what_a_rank_refuses_ends_the_run_with_its_message(sharp, tmp_path):
    """A stale reference is seen by the gate of both ranks; it is no death that is worth another attempt."""
    rows = cache(sharp, random_rows())
    for row in rows:
        for each in row["responses"]:
            each["ref_logp"] += 3.0 * each["candidate_id"].endswith("0")
    with pytest.raises(WinnowError, match=r"step 0: .*the cache is stale"):
        train(sharp, rows, tmp_path, ranks=2)
