"""Two processes train one network together: the same losses, metrics and weights as one, to rounding."""

import pytest
import torch
import torch.distributed
from safetensors.torch import load_file
from torch.multiprocessing.spawn import start_processes

from pipeline.context import StageContext, WarmCache
from stages.training.objectives import objective
from stages.training.optimize import optimize
from tests.material import bound, cache, imitate, labelled, random_rows, table

pytestmark = pytest.mark.timeout(120)


def train_all(init, rows, folder, **options):
    """Return (weights by name, row of policies, {metric: [value per step]}, {measure: [value per step]})."""
    ctx = StageContext(folder, WarmCache(), lambda *_: None)
    options = (
        dict(objective=bound(objective, "kto"), batch_size=4, warmup_ratio=0.0, lr_scheduler_type="constant") | options
    )
    model, policy, metrics, speeds = optimize(init, table(rows), ctx, **options)
    weights = {name: weight for file in model.folder.glob("*.safetensors") for name, weight in load_file(file).items()}
    series: list[dict] = [{}, {}]
    for by_name, column, values in zip(series, ("metric", "measure"), (metrics, speeds), strict=True):
        for row in values.to_pylist():
            by_name.setdefault(row[column], []).append(row["value"])
    return weights, policy.to_pylist(), *series


# Rounding differs from the first step on and grows with every update: small ones keep all steps comparable
UNEVEN = dict(nll_weight=0.5, tokens_per_pass=25, checkpoint_every=2, learning_rate=3e-5)


def check_that_two_ranks_did_as_one(two, one):
    """Check rows of `policies`, names, steps and values of metrics, tokens, and weights of `train_all`."""
    (weights2, policy2, metrics2, speeds2), (weights, policy, metrics, speeds) = two, one
    assert policy2 == policy
    assert {name: len(values) for name, values in metrics2.items()} == {
        name: 1 if name.startswith("saved/") else policy[0]["steps"] for name in metrics
    }
    assert metrics2["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    for name, values in metrics2.items():
        limit = 1e-2 if name.startswith("saved/") else 1e-4  # a quotient of small differences
        assert values == pytest.approx(metrics[name], rel=limit, abs=limit), name
    for tokens2, tokens in zip(speeds2["tokens/read"], speeds["tokens/read"], strict=True):
        assert tokens <= tokens2 <= tokens + 4  # a token where a rank has nothing to read
    for name, both in dict(world_size=(1, 2), gradient_checkpointing=(0, 1), tokens_per_pass=(25, 25)).items():
        assert (set(speeds[name]), set(speeds2[name])) == tuple({value} for value in both)
    for name, weight in weights2.items():
        assert torch.allclose(weight, weights[name], atol=1e-4), name


def run_in_forks(job, world_size, ctx):
    """Stand in for `run_distributed`: ranks are forks of this process in a group of gloo, which import nothing anew."""

    def run_rank(rank):
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{ctx.folder}/group", rank=rank, world_size=world_size
        )
        outcome = job(lambda *_: None)
        if rank == 0:
            torch.save(outcome, ctx.folder / "outcome")
        torch.distributed.destroy_process_group()

    ctx.folder.mkdir(parents=True, exist_ok=True)
    start_processes(run_rank, nprocs=world_size, start_method="fork")
    return torch.load(ctx.folder / "outcome", weights_only=False)


def test_two_ranks_have_the_losses_of_one(sharp, tmp_path, monkeypatch):
    """KTO with an NLL term, uneven passes, and a group that is too large for one: all that ranks must agree on."""
    rows = cache(sharp, imitate(labelled(random_rows(prompts=7)), 0), spread=0.0)
    one = train_all(sharp, rows, tmp_path / "one", epochs=2, **UNEVEN)
    monkeypatch.setattr("pipeline.execution.distributed.run_distributed", run_in_forks)
    two = train_all(sharp, rows, tmp_path / "two", epochs=2, world_size=2, gradient_checkpointing=True, **UNEVEN)
    check_that_two_ranks_did_as_one(two, one)
