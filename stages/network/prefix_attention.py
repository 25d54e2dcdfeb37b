"""Exact attention over groups: each prompt once, its responses after it, no response attending to another.

A packed sequence holds all prompts, then all responses. A token attends to its own segment up to itself and, if it is
in a response, to all of its prompt. The two parts of a response's attention are computed separately and merged by
their log-sum-exps, as ring attention does (arXiv:2310.01889): no mask, no copy of a prompt's keys, no padding outside
this file. The backward pass of each part, given the merged output and log-sum-exp, is its part of the whole gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "shared_prefix"
PADDING_LSE = 1e30  # a log-sum-exp that no score comes near: what pads a row then weighs nothing
UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # what transformers' attentions pass that is not computed here
_flash: Callable[..., Any] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward: Callable[..., Any] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Tiles:
    """N segments of up to W tokens of a packed sequence, as rows; a short one is padded at its end.

    Segments of one length that follow each other are a slice, which is read without a copy.
    """

    shape: tuple[int, int]  # N, W
    tokens: slice | Tensor  # their indices in the sequence; [N W], padded by 0
    valid: Tensor | None = None  # [N W] False where a row is padded; None for a slice

    def gather(self, packed: Tensor, padding: float | None = None) -> Tensor:
        """Return [N, ..., W] of [T, ...] in the order of attention: [T, H, D] gives [N, H, W, D]."""
        rows = packed[self.tokens] if isinstance(self.tokens, slice) else packed.index_select(0, self.tokens)
        if self.valid is not None and padding is not None:
            rows[~self.valid] = padding
        return rows.unflatten(0, self.shape).transpose(1, 2)

    def scatter(self, packed: Tensor, tiles: Tensor) -> None:
        """Write tiles back to their tokens."""
        values = tiles.transpose(1, 2).flatten(0, 1)
        if isinstance(self.tokens, slice):
            packed[self.tokens] = values
        else:
            packed.index_copy_(0, self.tokens[self.valid], values[self.valid])


@dataclass(frozen=True)
class Layout:
    """Which tokens of a packed sequence [T] attend to which."""

    prompts: list[Tiles]  # prompts of one length per entry, [G, P]
    response_tokens: list[Tiles | None]  # all response tokens of each of those prompts, [G, W]
    responses: Tiles | None  # one response per row, [S, R]
    segments: Tensor  # [T] a number for each prompt and each response
    prompt_segments: Tensor  # [T] the number of the token's prompt

    @cached_property
    def mask(self) -> Tensor:
        """Return [T, T], whether the query may attend to the key. Prompts precede all responses, so tril suffices."""
        same_segment = self.segments[:, None] == self.segments
        return (same_segment | (self.prompt_segments[:, None] == self.segments)).tril()

    @property
    def parts(self) -> list[tuple[Tiles, Tiles, bool]]:
        """Return (queries, keys, causal): every segment attends to itself; then every response to its prompt."""
        segments = self.prompts if self.responses is None else [*self.prompts, self.responses]
        across = zip(self.response_tokens, self.prompts, strict=True)
        return [
            *((tiles, tiles, True) for tiles in segments),
            *((queries, prompts, False) for queries, prompts in across if queries),
        ]


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
    if device == "cpu":
        return MergedAttention.apply(q, k, v, layout, scale)[None], None  # type: ignore[no-untyped-call]
    return masked_attention(q, k, v, layout, scale)[None], None


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
    """Compute the same as `MergedAttention` by a mask, for devices on which torch's fused kernels take one."""
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, k, v, attn_mask=layout.mask, scale=scale, enable_gqa=grouped)
    return out[0].transpose(0, 1)


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
    heads_per_key = q.shape[1] // k.shape[1]
    key, value = keys.gather(k), keys.gather(v)
    if heads_per_key > 1:
        key, value = (tensor.repeat_interleave(heads_per_key, dim=1) for tensor in (key, value))
    return queries.gather(q), key, value
