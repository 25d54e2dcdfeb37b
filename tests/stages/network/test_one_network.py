"""What `optimize` holds in memory, by measurement: one network, its gradients, Adam's two moments, and little else."""

import gc
import warnings

import pytest
import torch
from transformers import PreTrainedModel

from pipeline.context import WarmCache
from schemas import Model
from stages.network.load import load_network
from stages.ranking.pairwise import PairwiseRanker
from stages.sampling.engines.transformers import TransformersEngine
from tests.material import cache, imitate, labelled, random_rows, train


def in_memory(collect: bool = True):
    """Networks alive, and bytes of all tensors alive, each storage once."""
    if collect:
        gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated names in torch, which are alive
        objects = gc.get_objects()
        tensors = [thing for thing in objects if type(thing) in (torch.Tensor, torch.nn.Parameter)]
        networks = [type(thing).__name__ for thing in objects if isinstance(thing, PreTrainedModel)]
        tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
        tensors = [tensor for tensor in tensors if not tensor.is_meta]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(name.endswith("ForCausalLM") for name in networks), sum(storages.values())


@pytest.mark.parametrize("name", ["sigmoid_norm", "kto"])
def test_training_beside_a_reference_has_one_network_in_memory(sharp, tmp_path, monkeypatch, name):
    """When all gradients of a step stand, and Adam's moments: at most 4 times the weights and a tenth, and one network.

    A second network, for the reference say, would be a fifth. The loop knows no objective by name: a loss of pairs and
    one of rows, both with a reference and a likelihood, stand for all.
    """
    networks, before = in_memory()
    measured = []
    clip = torch.nn.utils.clip_grad_norm_

    def measure(weights, max_norm):
        weights = list(weights)
        measured.append((*in_memory(), sum(weight.numel() * 4 for weight in weights)))
        return clip(weights, max_norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", measure)
    rows = cache(sharp, imitate(labelled(random_rows()), 0))
    train(sharp, rows, tmp_path, objective=name, nll_weight=0.5, epochs=2, batch_size=1000)  # two steps
    alive, total, weights = measured[-1]
    assert alive - networks == 1
    assert 4 * weights <= total - before <= 4.1 * weights


def test_what_a_worker_closes_has_no_weights_whoever_refers_to_it(sharp: Model):
    """A network refers to itself: until Python collects it, its weights would keep the next engine off the device."""
    _, before = in_memory()
    cache = WarmCache()
    network = cache.open_once(load_network, sharp)
    ranker = cache.open_once(PairwiseRanker, sharp, "float32")
    engine = cache.open_once(TransformersEngine, sharp.folder, "float32")
    weights = sum(weight.numel() * 4 for weight in network.parameters())
    assert in_memory()[1] - before >= 3 * weights
    cache.close()
    networks, after = in_memory(collect=False)
    assert after - before < 0.1 * weights
    assert networks >= len({network, ranker.network, engine.network})


def test_a_training_leaves_nothing(sharp: Model, tmp_path):
    """Neither weights nor moments, before any collection: the next stage of this process may start an engine."""
    rows = cache(sharp, labelled(random_rows()))
    _, before = in_memory()
    gc.disable()
    try:
        train(sharp, rows, tmp_path)
        _, after = in_memory(collect=False)
    finally:
        gc.enable()
    weights = sum(weight.numel() * 4 for weight in load_network(sharp).parameters())
    assert after - before < 0.1 * weights
