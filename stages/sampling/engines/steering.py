"""Decoding with a preference head: likely next tokens are tried out, and those that the head likes gain.

COALA's guidance (arXiv:2605.23244): every few tokens, the head scores the prefix with each of the top tokens at
its end, and strength times the score, scaled to 0..1 over them, is added to their logits before temperature.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from schemas import WinnowError
from stages.sampling.engines import Sampling, Steering

Noisy = Callable[[int, Tensor, Tensor], Tensor]


def steered_ids(network: Any, ids: Tensor, noisy: Noisy, sampling: Sampling, steering: Steering) -> Tensor:
    """Token ids [N, T] drawn after prompts [N, L] of one length, until each row has a stop id, or max_tokens.

    `noisy` turns a step's logits, as they are and as they are steered, into the numbers whose argmax is drawn.
    """
    guide = Guide(network, steering)
    stop, ended = torch.tensor(sampling.stop, device=ids.device), ids.new_zeros(len(ids), dtype=torch.bool)
    drawn: list[Tensor] = []
    said = torch.zeros(len(ids), network.config.hidden_size, device=ids.device)
    read = ids
    for step in range(sampling.max_tokens):
        made = network(input_ids=read, past_key_values=guide.cache, logits_to_keep=1, output_hidden_states=True)
        if step:
            said += made.hidden_states[-1][:, -1].float()
        logits = made.logits[:, -1].float()
        steered = logits + guide.bonus(logits, said, step) if step % steering.every == 0 else logits
        drawn.append(noisy(step, logits, steered).argmax(-1))
        ended |= torch.isin(drawn[-1], stop)
        if ended.all():
            break
        read = drawn[-1][:, None]
    return torch.stack(drawn, dim=1)


class Guide:
    """The head, and the network's cache of what each row has said so far."""

    def __init__(self, network: Any, steering: Steering) -> None:
        steering.head.check_width(network.config.hidden_size)
        self.network, self.steering = network, steering
        self.cache = DynamicCache(config=network.config)
        if any(self.cache.is_sliding):
            raise WinnowError("sample: a model with sliding windows cannot be steered; unwire `head`")
        head, device = steering.head, network.device
        self.inner, self.bias, self.outer = (
            torch.from_numpy(a).to(device) for a in (head.inner, head.bias, head.outer)
        )

    def score(self, features: Tensor) -> Tensor:
        """[..., hidden] to [...], float64."""
        made: Tensor = (features.double() @ self.inner.T + self.bias).clamp(min=0) @ self.outer
        return made

    def bonus(self, logits: Tensor, said: Tensor, count: int) -> Tensor:
        """What is added to the logits [N, V]; said: sum of the hidden states of the `count` tokens so far."""
        tokens = logits.topk(min(self.steering.top, logits.shape[-1])).indices
        scores = self.score((said[:, None] + self.continued(tokens)) / (count + 1))
        low, high = scores.aminmax(dim=-1, keepdim=True)
        share = (scores - low) / (high - low).clamp(min=torch.finfo(scores.dtype).tiny)
        return torch.zeros_like(logits).scatter(-1, tokens, (self.steering.strength * share).float())

    def continued(self, tokens: Tensor) -> Tensor:
        """Last hidden states [N, m, hidden] of each of m next tokens [N, m], had it come next.

        All go through the network at once: at the same position, each sees the prefix and itself alone.
        The cache is left as it was.
        """
        past, (rows, m) = self.cache.get_seq_length(), tokens.shape
        seen = torch.cat([tokens.new_ones(m, past), torch.eye(m, dtype=tokens.dtype, device=tokens.device)], dim=1)
        barred = torch.zeros_like(seen, dtype=self.network.dtype).masked_fill(
            seen == 0, torch.finfo(self.network.dtype).min
        )
        made = self.network.base_model(
            input_ids=tokens,
            attention_mask=barred.expand(rows, 1, -1, -1),
            position_ids=torch.full_like(tokens, past),
            past_key_values=self.cache,
        )
        self.cache.crop(-m)
        hidden: Tensor = made.last_hidden_state.float()
        return hidden
