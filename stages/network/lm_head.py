"""Log-probs of target tokens from last hidden states: the head runs on those states alone, a slice at a time."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

ELEMENTS = 1 << 21  # logits in memory at once: 8 MiB, which a processor's cache can hold some of


@dataclass(frozen=True)
class LMHead:
    """Linear output layer: logits = cap(scale * (states weight^T + bias)), cap(x) = soft_cap tanh(x / soft_cap)."""

    weight: Tensor  # [V, hidden]
    bias: Tensor | None  # [V]
    scale: float
    soft_cap: float | None

    def logits(self, states: Tensor) -> Tensor:
        """Return fp32 [n, V] of states [n, hidden]; the product is in the dtype of the states."""
        bias = None if self.bias is None else self.bias.to(states.dtype)
        logits = nn.functional.linear(states, self.weight.to(states.dtype), bias).float()
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.soft_cap is None else torch.tanh(logits / self.soft_cap) * self.soft_cap

    def slope(self, logits: Tensor) -> Tensor | float:
        """Return d logits / d (states weight^T + bias)."""
        return self.scale if self.soft_cap is None else self.scale * (1 - (logits / self.soft_cap) ** 2)


def lm_head_of(network: PreTrainedModel) -> LMHead:
    """Return the network's output layer; raises ValueError where it is more than a linear one (with a LoRA, say)."""
    layer, config = network.get_output_embeddings(), network.config.get_text_config()
    if type(layer) is not nn.Linear:
        raise ValueError(f"its head is a {type(layer).__name__} and not one linear layer")
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return LMHead(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))


def token_logp(states: Tensor, head: LMHead, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p(target | state), fp32 [n], and whether the target is the likeliest token, [n].

    The softmax is in fp32. Logits are computed a slice at a time, and again in the backward pass instead of being
    stored. The head's gradient adds up in fp32: bfloat16 would round every slice.
    """
    return _TokenLogp.apply(states, head.weight, head.bias, head, targets)  # type: ignore[no-untyped-call]


class _TokenLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, head: LMHead, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        logp, is_correct, lse = [], [], []
        for state, target in zip(_slices(states, head), _slices(targets, head), strict=True):
            logits = head.logits(state)
            target_logit = logits.gather(-1, target[:, None])[:, 0]
            lse.append(logits.logsumexp(-1))
            logp.append(target_logit - lse[-1])
            is_correct.append(target_logit == logits.amax(-1))
        ctx.save_for_backward(states, weight, bias, targets, torch.cat(lse))
        ctx.head = head
        ctx.mark_non_differentiable(correct := torch.cat(is_correct))
        return torch.cat(logp), correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, targets, lse = ctx.saved_tensors
        head: LMHead = ctx.head
        d_states = torch.empty_like(states)
        d_weight, d_bias = (  # none for a head that is frozen
            torch.zeros_like(tensor, dtype=torch.float32) if needed else None
            for tensor, needed in zip((weight, bias), ctx.needs_input_grad[1:3], strict=True)
        )
        low = weight.to(states.dtype)
        slices = [_slices(tensor, head) for tensor in (states, targets, lse, grads[0], d_states)]
        for state, target, total, grad, d_state in zip(*slices, strict=True):
            # d log softmax(logits)[target] / d logits = onehot(target) - softmax(logits)
            logits = head.logits(state)
            slope = head.slope(logits)
            d_logits = logits.sub_(total[:, None]).exp_().mul_(-grad[:, None])
            d_logits[torch.arange(len(state), device=state.device), target] += grad
            d_logits *= slope
            torch.mm(d_logits.to(low.dtype), low, out=d_state)
            if d_weight is not None:
                d_weight.addmm_(d_logits.T, state.float())
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        return d_states, d_weight, d_bias, None, None


def _slices(rows: Tensor, head: LMHead) -> tuple[Tensor, ...]:
    return rows.split(max(1, ELEMENTS // len(head.weight)))
