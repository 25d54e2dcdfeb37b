"""Guided decoding with a preference head, which scores likely next tokens and raises the logits of those it prefers.

COALA's guidance (arXiv:2605.23244): every few tokens, the head scores the prefix with each of the top tokens at
its end, and strength times the score, scaled to 0..1 over them, is added to their logits before temperature.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from schemas import WinnowError
from stages.sampling.engines import Sampling, Steering

AddNoise = Callable[[Tensor, Tensor, Tensor], Tensor]


def steered_ids(
    network: Any, ids: Tensor, add_noise: AddNoise, sampling: Sampling, steering: Steering,
    stopping: StoppingCriteriaList,
) -> Tensor:  # fmt: skip
    """Return token ids [N, T] drawn after prompts [N, L] of one length, until each row has ended, or max_tokens.

    add_noise: from the ids so far, logits and steered logits to the numbers whose argmax is the token drawn.
    stopping: what ends a row besides a stop id.
    """
    guide = Guide(network, steering)
    stop, ended = torch.tensor(sampling.stop_token_ids, device=ids.device), ids.new_zeros(len(ids), dtype=torch.bool)
    tokens: list[Tensor] = []
    state_sum = torch.zeros(
        len(ids), network.config.get_text_config().hidden_size, device=ids.device
    )  # over the response so far
    next_ids = all_ids = ids
    for step in range(sampling.max_tokens):
        output = network(input_ids=next_ids, past_key_values=guide.cache, logits_to_keep=1, output_hidden_states=True)
        if step:
            state_sum += output.hidden_states[-1][:, -1].float()
        logits = output.logits[:, -1].float()
        steered = logits + guide.bonus(logits, state_sum, step) if step % steering.every == 0 else logits
        tokens.append(add_noise(all_ids, logits, steered).argmax(-1))
        all_ids = torch.cat([all_ids, tokens[-1][:, None]], dim=1)
        ended |= torch.isin(tokens[-1], stop)
        for criterion in stopping:
            ended |= criterion(all_ids, logits)
        if ended.all():
            break
        next_ids = tokens[-1][:, None]
    return torch.stack(tokens, dim=1)


class Guide:
    """Preference head on the network's device, and the network's cache of each row's prefix."""

    def __init__(self, network: Any, steering: Steering) -> None:
        head = steering.head
        head.check_width(network.config.get_text_config().hidden_size)
        self.network, self.steering = network, steering
        self.cache = DynamicCache(config=network.config)
        if any(type(layer) is not DynamicLayer for layer in self.cache.layers):  # such a cache cannot be cropped back
            raise WinnowError(
                "sample: a model of which not all layers attend to all that precedes a token (sliding windows, linear "
                "attention) cannot be steered; remove `head` under `from`"
            )
        self.inner, self.bias, self.outer = (
            torch.from_numpy(array).to(network.device) for array in (head.inner, head.bias, head.outer)
        )

    def bonus(self, logits: Tensor, state_sum: Tensor, count: int) -> Tensor:
        """Return what to add to the logits [N, V]. state_sum: sum of the `count` hidden states so far [N, hidden]."""
        tokens = logits.topk(min(self.steering.top, logits.shape[-1])).indices
        features = (state_sum[:, None] + self.continued(tokens)) / (count + 1)
        scores = (features.double() @ self.inner.T + self.bias).clamp(min=0) @ self.outer
        low, high = scores.aminmax(dim=-1, keepdim=True)
        share = (scores - low) / (high - low).clamp(min=torch.finfo(scores.dtype).tiny)
        return torch.zeros_like(logits).scatter(-1, tokens, (self.steering.strength * share).float())

    def continued(self, tokens: Tensor) -> Tensor:
        """Return last hidden states [N, m, hidden] of each of m candidate next tokens [N, m], had it come next.

        All go through the network at once: at the same position, each attends to the prefix and itself alone.
        The cache is left as it was.
        """
        past, (rows, m) = self.cache.get_seq_length(), tokens.shape
        visible = torch.cat([tokens.new_ones(m, past), torch.eye(m, dtype=tokens.dtype, device=tokens.device)], dim=1)
        dtype = self.network.dtype
        mask = torch.zeros_like(visible, dtype=dtype).masked_fill(visible == 0, torch.finfo(dtype).min)
        output = self.network.base_model(
            input_ids=tokens,
            attention_mask=mask.expand(rows, 1, -1, -1),
            position_ids=torch.full_like(tokens, past),
            past_key_values=self.cache,
        )
        self.cache.crop(-m)
        return output.last_hidden_state.float()
