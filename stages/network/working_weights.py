"""Linear layers in bfloat16 for passes under autocast: the numbers of autocast, without a cast in every pass.

For scoring, the weights are rounded for good. For training, the optimizer's are fp32, and passes read rounded copies.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.network.forward import trial


def round_linear_layers(network: PreTrainedModel) -> None:
    """Store linear layers in bfloat16, for scoring."""
    for weight in linear_weights(network):
        weight.data = weight.data.bfloat16()


def linear_weights(network: PreTrainedModel) -> list[nn.Parameter]:
    """Return weights and biases of linear layers that passes under autocast may have in bfloat16, each once.

    None if a trial gives other numbers, as where a layer computes in fp32 even under autocast. Embeddings, norms, the
    head of a reward model and a head that is the embedding are not among them: autocast leaves those alone.
    """
    if network.config.is_encoder_decoder:
        return []
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    layers = [layer for layer in (*network.base_model.modules(), head) if type(layer) is nn.Linear]
    layers = [layer for layer in layers if layer.weight is not embedding.weight]
    weights = list(dict.fromkeys(weight for layer in layers for weight in layer.parameters(recurse=False)))
    with torch.no_grad():
        expected = trial(network, "bfloat16")
        stored = [weight.data for weight in weights]
        try:
            for weight in weights:
                weight.data = weight.data.bfloat16()
            is_same = all(map(torch.equal, trial(network, "bfloat16"), expected))
        except RuntimeError:  # two precisions in one product
            is_same = False
        finally:
            for weight, fp32 in zip(weights, stored, strict=True):
                weight.data = fp32
    return weights if is_same else []


class WorkingWeights:
    """Copies of linear weights in bfloat16, which the passes of a training step read.

    Outside of `passes`, the network is as if there were none: fp32 weights, and their gradients added up in fp32.
    """

    def __init__(self, network: PreTrainedModel) -> None:
        head = network.get_output_embeddings()
        of_head = set() if head is None else {*head.parameters()}  # whose gradient is in fp32
        self.weights = [weight for weight in linear_weights(network) if weight not in of_head]
        self.copies: list[Tensor] = []

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Let the network have the copies, as of now; gradients of all passes are there at the end."""
        weights = self.weights
        stored: list[Tensor] = [weight.data for weight in weights]
        gradients: dict[Tensor, Tensor] = {}

        def add(weight: Tensor) -> None:
            assert weight.grad is not None
            if weight in gradients:
                gradients[weight].add_(weight.grad)
            else:
                gradients[weight] = weight.grad.float()
            weight.grad = None

        if not self.copies:
            self.copies = [fp32.bfloat16() for fp32 in stored]
        else:
            torch._foreach_copy_(self.copies, stored)
        hooks = [weight.register_post_accumulate_grad_hook(add) for weight in weights if weight.requires_grad]
        for weight, copy in zip(weights, self.copies, strict=True):
            weight.data = copy
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for weight, fp32 in zip(weights, stored, strict=True):
                weight.grad = None
                weight.data = fp32
                weight.grad = gradients.get(weight)
