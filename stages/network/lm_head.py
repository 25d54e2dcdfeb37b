"""Log-probs of target tokens from last hidden states: the head runs on those states alone, a slice at a time."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from stages.network.device import fused, kept_bytes, logits_at_once


@dataclass(frozen=True)
class LMHead:
    """Linear output layer: logits = cap(scale * (states weight^T + bias)), cap(x) = soft_cap tanh(x / soft_cap)."""

    weight: Tensor  # [V, hidden]
    bias: Tensor | None  # [V]
    scale: float
    soft_cap: float | None

    def logits(self, states: Tensor, low: Tensor | None = None) -> Tensor:
        """Return fp32 [n, V] of states [n, hidden].

        low: the weights in the dtype of the states, if they are at hand. A GPU adds products up in fp32; a CPU rounds
        their sum to the dtype of the states.
        """
        low = self.weight.to(states.dtype) if low is None else low
        if states.device.type == "cpu":
            bias = None if self.bias is None else self.bias.to(states.dtype)
            logits = nn.functional.linear(states, low, bias).float()
        else:
            logits = product(states, low.T)
            if self.bias is not None:
                logits += self.bias
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

    The softmax is in fp32, and so are sums of the head's gradient. A CPU computes logits a slice at a time, and again
    in the backward pass. A GPU keeps probabilities, in the dtype of the states, for the backward pass, as many as
    `device.kept_bytes` allows, so that the head is cast once and logits are computed once.
    """
    if states.device.type == "cpu":
        return _RecomputedLogp.apply(states, head.weight, head.bias, head, targets)  # type: ignore[no-untyped-call]
    low = head.weight.detach().to(states.dtype)
    rows = max(1, kept_bytes(states.device) // (len(low) * states.element_size()))
    if len(states) <= rows or not torch.is_grad_enabled():
        return _KeptLogp.apply(states, head.weight, head.bias, low, head, targets)  # type: ignore[no-untyped-call]
    parts = [
        checkpoint(_KeptLogp.apply, state, head.weight, head.bias, low, head, target, use_reentrant=False)
        for state, target in zip(states.split(rows), targets.split(rows), strict=True)
    ]
    logp, is_correct = zip(*parts, strict=True)
    return torch.cat(logp), torch.cat(is_correct)


class _RecomputedLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, head: LMHead, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Results have their memory before the first logits: glibc would put those of each slice into the block that its
        # logits leave, and no logits would fit there again.
        logp, lse = (states.new_empty(len(states), dtype=torch.float32) for _ in range(2))
        is_correct = states.new_empty(len(states), dtype=torch.bool)
        slices = [_row_chunks(tensor, head) for tensor in (states, targets, logp, lse, is_correct)]
        for state, target, slice_logp, slice_lse, slice_correct in zip(*slices, strict=True):
            logits = head.logits(state)
            target_logit = logits.gather(-1, target[:, None])[:, 0]
            torch.logsumexp(logits, -1, out=slice_lse)
            torch.sub(target_logit, slice_lse, out=slice_logp)
            torch.eq(target_logit, logits.amax(-1), out=slice_correct)
        ctx.save_for_backward(states, weight, bias, targets, lse)
        ctx.head = head
        ctx.mark_non_differentiable(is_correct)
        return logp, is_correct

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
        slices = [_row_chunks(tensor, head) for tensor in (states, targets, lse, grads[0], d_states)]
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


class _KeptLogp(torch.autograd.Function):
    """The same, with softmax(logits) kept: of three matrix products and one softmax, each once.

    low: the head's weights in the dtype of the states.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, head: LMHead, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        keep = any(ctx.needs_input_grad)
        logp = states.new_empty(len(states), dtype=torch.float32)
        is_correct = targets.new_empty(len(targets), dtype=torch.bool)
        p_slope = states.new_empty(len(states) if keep else 0, len(low))
        target_slope = torch.empty_like(logp)
        softmax = fused(_softmax, len(states) * len(low), states.device)
        # Slices of equal sizes to one row, of as many rows as have their logits in memory at once.
        parts = max(1, -(-len(states) * len(low) // logits_at_once(states.device)))
        size = -(-len(states) // parts)
        for start in range(0, len(states), max(1, size)):
            rows = slice(start, start + size)
            logits = product(states[rows], low.T)
            if bias is not None:
                logits += bias
            out = p_slope[rows] if keep else None
            logp[rows], is_correct[rows], target_slope[rows] = softmax(
                logits, targets[rows], out, head.scale, head.soft_cap
            )
        ctx.save_for_backward(states, low, targets, p_slope, logp, target_slope)
        ctx.mark_non_differentiable(is_correct)
        return logp, is_correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        states, low, targets, p_slope, logp, target_slope = ctx.saved_tensors
        # Minus d log p / d product: (softmax - onehot) slope. The target's entry is from fp32: 1 - p is lost where
        # p, rounded, is 1. The loss's gradient, a number per row, weights the states and not these [n, V].
        d_logits = p_slope.scatter_(1, targets[:, None], (target_slope * torch.expm1(logp))[:, None].to(p_slope.dtype))
        grad = -grads[0][:, None]
        d_states = (product(d_logits, low) * grad).to(states.dtype) if ctx.needs_input_grad[0] else None
        d_weight = product(d_logits.T, (states * grad).to(states.dtype)) if ctx.needs_input_grad[1] else None
        d_bias = product(d_logits.T, grad.to(states.dtype))[:, 0] if ctx.needs_input_grad[2] else None
        return d_states, d_weight, d_bias, None, None, None


def _softmax(
    logits: Tensor, targets: Tensor, p_slope: Tensor | None, scale: float, soft_cap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p of the targets, whether each is the likeliest, and its slope, [n], of fp32 products [n, V].

    Writes softmax * slope to `p_slope`: d log softmax(logits)[target] / d product = (onehot - softmax) * slope.
    """
    if scale != 1:
        logits = logits * scale
    if soft_cap is not None:
        logits = torch.tanh(logits / soft_cap) * soft_cap
    target_logit = logits.gather(-1, targets[:, None])
    largest = logits.amax(-1, keepdim=True)
    exponentials = (logits - largest).exp()
    total = exponentials.sum(-1, keepdim=True)
    logp = target_logit - largest - total.log()
    slope, target_slope = (
        scale if soft_cap is None else scale * (1 - (values / soft_cap) ** 2) for values in (logits, target_logit)
    )
    if p_slope is not None:
        p_slope.copy_(exponentials * (slope / total))
    return logp[:, 0], (target_logit == largest)[:, 0], (torch.ones_like(logp) * target_slope)[:, 0]


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b in fp32: of bfloat16, products are exact, and added up in fp32."""
    if a.dtype != torch.float32 and a.device.type != "cpu":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _row_chunks(rows: Tensor, head: LMHead) -> tuple[Tensor, ...]:
    return rows.split(max(1, logits_at_once(rows.device) // len(head.weight)))
