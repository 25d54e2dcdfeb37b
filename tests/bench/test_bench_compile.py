"""Layers that torch compiled: log-probs and gradients are those of plain ones. Takes a minute of a C++ compiler."""

import pytest
import torch

from stages.network.forward import completion_logp, share_prefixes
from stages.network.load import checkpoint_layers, compile_layers
from stages.network.packing import PromptGroup
from tests.stages.network.test_prefix_attention import SHARING, enlarged


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_layers_give_the_same_gradients(checkpointed):
    """In fp32, over passes of other lengths, with and without checkpoints: to 1e-5 of the largest."""
    network = enlarged(SHARING["qwen2"]())
    share_prefixes(network)
    passes = [
        [PromptGroup([5, 6, 7], [[8], [9, 10, 11]])],
        [PromptGroup([4] * 9, [[3, 7, 12, 30], [5]]), PromptGroup([8], [[6, 6]])],
    ]

    def gradients():
        network.zero_grad()
        for groups in passes:
            completion_logp(network, groups, "float32")[0].sum().backward()
        return [weight.grad.clone() for weight in network.parameters()]

    expected = gradients()
    compile_layers(network)
    if checkpointed:
        checkpoint_layers(network)
    for ours, theirs in zip(gradients(), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
