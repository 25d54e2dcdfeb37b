"""What `optimize` holds in memory, by measurement: one network, its gradients, Adam's two moments, and little else."""

import gc
import warnings

import pytest
import torch
from transformers import PreTrainedModel

from stages.training.objectives import objective
from tests.material import cache, imitate, labelled, random_rows, train


def held():
    """Networks alive, and bytes of all tensors alive, each storage once."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names in torch that are deprecated, and alive
        return _held()


def _held():
    tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    tensors += [each.grad for each in tensors if each.is_leaf and each.grad is not None]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    names = [type(each).__name__ for each in gc.get_objects() if isinstance(each, PreTrainedModel)]
    return sum(name.endswith("ForCausalLM") for name in names), sum(storages.values())


@pytest.mark.parametrize("name", sorted(objective.entries))
def test_every_objective_trains_with_one_network_in_memory(sharp, tmp_path, monkeypatch, name):
    """When all gradients of a step stand, and Adam's moments: at most 4 times the weights and a tenth, and one network.

    A second network, for the reference say, would be a fifth.
    """
    networks, before = held()
    seen = []
    clip = torch.nn.utils.clip_grad_norm_

    def look(weights, most):
        weights = list(weights)
        seen.append((*held(), sum(each.numel() * 4 for each in weights)))
        return clip(weights, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", look)
    rows = cache(sharp, imitate(labelled(random_rows()), 0))
    train(sharp, rows, tmp_path, objective=name, nll_weight=0.5 * (name != "nll"), epochs=2)
    alive, total, weights = seen[-1]
    assert alive - networks == 1
    assert 4 * weights <= total - before <= 4.1 * weights
