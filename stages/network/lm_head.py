"""Log-probs of given tokens from last hidden states: the head on the states asked for alone, a slice at a time."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

ELEMENTS = 1 << 21  # logits in memory at once: 8 MiB, which a processor's cache can hold some of


@dataclass(frozen=True)
class LMHead:
    """logits = cap(scale * (states weight^T + bias)), cap(x) = soft_cap tanh(x / soft_cap)."""

    weight: Tensor  # [V, hidden]
    bias: Tensor | None  # [V]
    scale: float
    soft_cap: float | None

    def logits(self, states: Tensor) -> Tensor:
        """[n, hidden] to fp32 [n, V]; the product is in the dtype of the states."""
        weight, bias = (None if each is None else each.to(states.dtype) for each in (self.weight, self.bias))
        logits = nn.functional.linear(states, weight, bias).float()  # type: ignore[arg-type]
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.soft_cap is None else torch.tanh(logits / self.soft_cap) * self.soft_cap

    def slope(self, logits: Tensor) -> Tensor | float:
        """d logits / d (states weight^T + bias)."""
        return self.scale if self.soft_cap is None else self.scale * (1 - (logits / self.soft_cap) ** 2)


def lm_head_of(network: PreTrainedModel) -> LMHead:
    """The network's output layer; raises ValueError where it is more than a linear one (with an adapter, say)."""
    layer, config = network.get_output_embeddings(), network.config.get_text_config()
    if type(layer) is not nn.Linear:
        raise ValueError(f"its head is a {type(layer).__name__} and not one linear layer")
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return LMHead(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))


def token_logp(states: Tensor, head: LMHead, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p(target | state), fp32 [n], and whether the target is the likeliest token, [n].

    The softmax is in fp32; logits are made a slice at a time, and again in the backward pass instead of being
    kept; the head's gradient adds up in fp32. Where targets repeat a state, so does the work.
    """
    return _TokenLogp.apply(states, head.weight, head.bias, head, targets)  # type: ignore[no-untyped-call,no-any-return]


class _TokenLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, head: LMHead, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        logp, hits, lse = [], [], []
        for part, wanted in zip(_slices(states, head), _slices(targets, head), strict=True):
            logits = head.logits(part)
            own = logits.gather(-1, wanted[:, None])[:, 0]
            lse.append(logits.logsumexp(-1))
            logp.append(own - lse[-1])
            hits.append(own == logits.amax(-1))
        ctx.save_for_backward(states, weight, bias, targets, torch.cat(lse))
        ctx.head = head
        ctx.mark_non_differentiable(found := torch.cat(hits))
        return torch.cat(logp), found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, targets, lse = ctx.saved_tensors
        head: LMHead = ctx.head
        d_states = torch.empty_like(states)
        d_weight, d_bias = (  # none for a head that is frozen
            torch.zeros_like(each, dtype=torch.float32) if needed else None
            for each, needed in zip((weight, bias), ctx.needs_input_grad[1:3], strict=True)
        )
        low = weight.to(states.dtype)
        parts = [_slices(each, head) for each in (states, targets, lse, grads[0], d_states)]
        for part, wanted, total, grad, into in zip(*parts, strict=True):
            logits = head.logits(part)
            slope = head.slope(logits)
            d_logits = logits.sub_(total[:, None]).exp_().mul_(-grad[:, None])
            d_logits[torch.arange(len(part), device=part.device), wanted] += grad
            d_logits *= slope
            torch.mm(d_logits.to(low.dtype), low, out=into)
            if d_weight is not None:
                d_weight.addmm_(d_logits.T, part.float())
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        return d_states, d_weight, d_bias, None, None


def _slices(rows: Tensor, head: LMHead) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = rows.split(max(1, ELEMENTS // len(head.weight)))
    return parts
