"""Exact attention over groups: each prompt once, its responses after it, no response attending to another.

A packed sequence holds all prompts, then all responses. A token attends to its own segment up to itself and, if it is
in a response, to all of its prompt. The two parts of a response's attention are computed separately and merged by
their log-sum-exps, as ring attention does (arXiv:2310.01889): no mask, no copy of a prompt's keys, no padding outside
this file. The backward pass of each part, given the merged output and log-sum-exp, is its part of the whole gradient.

On a CPU, a part is tiles of segments, and on a GPU one call of flash attention over segments of any length
(arXiv:2307.08691). Where a GPU has none for a precision or a size of heads, a mask says who attends to whom.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stages.network.device import has_flash
from stages.network.layout import Layout, Tiles

NAME = "shared_prefix"
PADDING_LSE = 1e30  # a log-sum-exp that no score comes near: what pads a row then weighs nothing
UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # what transformers' attentions pass that is not computed here
_flash: Callable[..., Any] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward: Callable[..., Any] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_varlen_flash: Callable[..., Any] = torch.ops.aten._flash_attention_forward
_varlen_flash_backward: Callable[..., Any] = torch.ops.aten._flash_attention_backward


def shared_prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention over a `layout`; without one (generation, padded rows), transformers' SDPA.

    query: [1, H, T, D], key and value: [1, H or fewer, T, D]. Returns [1, T, H, D].
    """
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if any(kwargs.get(name) is not None for name in UNSUPPORTED):
        raise ValueError(f"its attention has more than keys and queries: one of {', '.join(UNSUPPORTED)}")
    device = query.device.type
    # Under autocast, rotary embeddings leave queries and keys in fp32, and values not.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    q, k, v = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend: Callable[..., Tensor] = masked_attention
    if device == "cpu":
        attend = MergedAttention.apply
    elif has_flash(query.device, dtype, query.shape[-1]) and value.shape[-1] == query.shape[-1]:
        attend = VariableLengthAttention.apply
    return attend(q, k, v, layout, scale)[None], None


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
    """Compute the same as `MergedAttention` by a mask: in fp32 on a GPU, and on cards without flash attention.

    Keys are repeated for the heads that use them: with `enable_gqa`, torch would fall back on a plain product, of 29 GB
    at 7,515 tokens where its memory-efficient kernel takes 1.2 GB (tests/bench/h100.md).
    """
    k, v = (_repeated(tensor, q.shape[1]) for tensor in (k, v))
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=layout.mask, scale=scale)[0].transpose(0, 1)


class VariableLengthAttention(torch.autograd.Function):
    """Attention of q [T, H, D] to k and v [T, H or fewer, D] over a layout, by two calls of flash attention.

    One is causal, over all segments; one is of all response tokens to their prompt. Returns [T, H, D].
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
        at, start = layout.cumulative, layout.cumulative.prompt_tokens
        size = at.longest_segment
        out, lse, *states, _ = _varlen_flash(
            q, k, v, at.segments, at.segments, size, size, 0.0, True, False, scale=scale
        )
        if start < len(q):
            sizes = at.longest_response_tokens, at.longest_prompt
            part, part_lse, *more, _ = _varlen_flash(
                q[start:], k[:start], v[:start], at.response_tokens, at.prompts, *sizes, 0.0, False, False, scale=scale
            )
            # Softmax over both sets of keys from the softmax over each: weights are exp(log-sum-exp - the joint one).
            own_lse = lse[:, start:]
            weight = (part_lse - own_lse).sigmoid().T[..., None]
            out[start:].lerp_(part, weight.to(out.dtype))
            own_lse.copy_(torch.logaddexp(own_lse, part_lse))
            states += more
        ctx.save_for_backward(q, k, v, out, lse, *states)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *states = ctx.saved_tensors
        at, start = ctx.layout.cumulative, ctx.layout.cumulative.prompt_tokens
        grad, size = grads[0].contiguous(), at.longest_segment
        dq, dk, dv = _varlen_flash_backward(
            grad, q, k, v, out, lse, at.segments, at.segments, size, size, 0.0, True, *states[:2], scale=ctx.scale
        )
        if start < len(q):
            responses = (tensor[start:] for tensor in (grad, q))
            prompts = (tensor[:start] for tensor in (k, v))
            merged = out[start:], lse[:, start:].contiguous()
            lengths = at.response_tokens, at.prompts, at.longest_response_tokens, at.longest_prompt
            part = _varlen_flash_backward(
                *responses, *prompts, *merged, *lengths, 0.0, False, *states[2:], scale=ctx.scale
            )
            dq[start:] += part[0]
            dk[:start] += part[1]
            dv[:start] += part[2]
        return dq, dk, dv, None, None


class MergedAttention(torch.autograd.Function):
    """Attention of q [T, H, D] to k and v [T, H or fewer, D] over a layout; returns [T, H, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        for queries, keys, causal in layout.parts:
            part, part_lse = _flash(*_attention_inputs(q, k, v, queries, keys), 0.0, causal, scale=scale)
            if causal:
                queries.scatter(out, part)
                queries.scatter(lse, part_lse)
                continue
            # Softmax over both sets of keys from the softmax over each: weights are exp(log-sum-exp - the joint one).
            segment_lse = queries.gather(lse)
            joint = torch.logaddexp(segment_lse, part_lse)
            weights = [(x - joint).exp()[..., None] for x in (segment_lse, part_lse)]
            merged = queries.gather(out) * weights[0] + part * weights[1]
            queries.scatter(out, merged.to(out.dtype))
            queries.scatter(lse, joint)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(tensor) for tensor in (q, k, v))
        for queries, keys, causal in ctx.layout.parts:
            inputs = _attention_inputs(q, k, v, queries, keys)
            outputs = (queries.gather(out), queries.gather(lse, PADDING_LSE))
            part = _flash_backward(queries.gather(grads[0]), *inputs, *outputs, 0.0, causal, scale=ctx.scale)
            for total, tiles, grad in ((dq, queries, part[0]), (dk, keys, part[1]), (dv, keys, part[2])):
                heads = total.shape[1]
                if grad.shape[1] != heads:  # sum over the query heads of a key
                    grad = grad.unflatten(1, (heads, -1)).sum(2)
                # The causal parts come first, and have every token once. Later parts add to them; no token is in two
                # tiles of a part, so no sum depends on an order.
                tiles.scatter(total, grad if causal else tiles.gather(total) + grad)
        return dq, dk, dv, None, None


def _attention_inputs(q: Tensor, k: Tensor, v: Tensor, queries: Tiles, keys: Tiles) -> tuple[Tensor, Tensor, Tensor]:
    """With grouped queries, repeat each key for the heads that use it; the copies live for this part only."""
    key, value = (_repeated(keys.gather(tensor), q.shape[1]) for tensor in (k, v))
    return queries.gather(q), key, value


def _repeated(keys: Tensor, heads: int) -> Tensor:
    """Return keys (or values) with their heads, dimension 1, repeated until there are as many as of queries."""
    return keys if keys.shape[1] == heads else keys.repeat_interleave(heads // keys.shape[1], dim=1)
