"""Auxiliary loss of mixture-of-experts networks, which keeps their routers from using a few experts alone."""

import torch
from torch import Tensor
from torch.nn.functional import softmax
from transformers import PreTrainedModel


class RouterLoss:
    """Load balancing loss of Switch Transformers (arXiv:2101.03961, eq. 4-6) over the tokens of a whole training step.

    experts * sum_i f_i P_i: f_i is how often expert i is among a token's first `top_k`, P_i its mean probability, both
    over all tokens of all layers. f has no gradient, and P is a mean, so the loss of a step is a sum over its forward
    passes once f is known: `count` them all, then `add` each.

    As in a padded batch, a token counts once for every row that it is in: a prompt, for each of its responses.
    """

    def __init__(self, network: PreTrainedModel) -> None:
        self.coefficient = float(network.router_aux_loss_coef)
        self.experts, self.top_k = int(network.num_experts), int(network.num_experts_per_tok)
        self.counts = torch.zeros(self.experts + 1, device=network.device)  # of each expert; then of tokens and layers
        self.counting = True
        self._pending: list[Tensor] = []

    def add(self, logits: tuple[Tensor, ...], weights: Tensor) -> None:
        """Take in a forward pass: router logits [T, experts] of each layer, and the rows [T] that each token is in."""
        for layer in logits:
            probabilities = softmax(layer, dim=-1).float()
            if self.counting:
                chosen = probabilities.topk(self.top_k, dim=-1).indices
                self.counts[:-1].index_add_(0, chosen.flatten(), weights.repeat_interleave(self.top_k))
                self.counts[-1] += weights.sum()
            else:
                frequency = self.counts[:-1] / self.counts[-1]
                self._pending.append(self.experts * (weights @ probabilities @ frequency) / self.counts[-1])

    def take(self) -> Tensor:
        """Return the loss of the forward passes since the last call."""
        loss = torch.stack(self._pending).sum() if self._pending else self.counts.new_zeros(())
        self._pending = []
        return loss


def has_router_loss(network: PreTrainedModel) -> bool:
    """Return whether transformers would add a router's loss to the network's own: if its config says so."""
    config = network.config.get_text_config()
    return bool(getattr(config, "output_router_logits", False) and getattr(config, "router_aux_loss_coef", 0))
