"""Exact attention over groups: each prompt once, its responses after it, every response blind to the others.

A packed sequence holds prompt, response, response, ..., prompt, ... one after the other. A token sees its own
segment up to itself and, if it stands in a response, all of its prompt. The two parts of a response's attention
are computed apart and merged by their log-sum-exps, as ring attention does (arXiv:2310.01889): no mask, no copy
of a prompt's keys, no padding outside this file. The backward pass of each part, given the merged output and
log-sum-exp, is its share of the whole gradient.
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
UNREACHED = 1e30  # a log-sum-exp that no score comes near: what a row is filled up with weighs nothing
BEYOND = ("softcap", "s_aux", "position_bias")  # what transformers' attentions pass that is not computed here
_flash: Callable[..., Any] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward: Callable[..., Any] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Tiles:
    """N segments of up to W tokens of a packed sequence, as rows; a short one is filled up at its end.

    Segments of one length that stand one after the other are a slice, which is read without a copy.
    """

    shape: tuple[int, int]  # N, W
    where: slice | Tensor  # the tokens; [N W] places, filled up by the first
    real: Tensor | None = None  # [N W] False where a row is filled up; None for a slice

    def take(self, packed: Tensor, other: float | None = None) -> Tensor:
        """[T, ...] to [N, ..., W] in the order of attention: [T, H, D] gives [N, H, W, D]. Fills up with `other`."""
        taken = packed[self.where] if isinstance(self.where, slice) else packed.index_select(0, self.where)
        if self.real is not None and other is not None:
            taken[~self.real] = other
        rows: Tensor = taken.unflatten(0, self.shape)
        return rows.transpose(1, 2)

    def put(self, packed: Tensor, tiles: Tensor) -> None:
        values = tiles.transpose(1, 2).flatten(0, 1)
        if isinstance(self.where, slice):
            packed[self.where] = values
        else:
            packed.index_copy_(0, self.where[self.real], values[self.real])

    def add(self, packed: Tensor, tiles: Tensor) -> None:
        """No token stands in two tiles, so no sum depends on an order."""
        self.put(packed, self.take(packed) + tiles)


@dataclass(frozen=True)
class Layout:
    """Which tokens of a packed sequence [T] see which."""

    prompts: list[Tiles]  # prompts of one length a tile, [G, P]
    readers: list[Tiles | None]  # all response tokens of each of those prompts, [G, W]
    responses: Tiles | None  # one response a row, [S, R]
    segments: Tensor  # [T] a number for each prompt and each response
    asked: Tensor  # [T] the number of the token's prompt

    @cached_property
    def mask(self) -> Tensor:
        """[T, T] may the query see the key? Prompts stand before all responses, so what is later is never seen."""
        own = self.segments[:, None] == self.segments
        return (own | (self.asked[:, None] == self.segments)).tril()


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
    """transformers' attention interface; without a layout, its scaled dot product attention.

    query: [1, H, T, D], key and value: [1, H or fewer, T, D]. Returns [1, T, H, D].
    """
    if layout is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return plain
    if any(kwargs.get(name) is not None for name in BEYOND):
        raise ValueError(f"its attention has more than keys and queries: one of {', '.join(BEYOND)}")
    where = query.device.type  # under autocast, rotary embeddings leave queries and keys in fp32, and values not
    dtype = torch.get_autocast_dtype(where) if torch.is_autocast_enabled(where) else query.dtype
    q, k, v = (each[0].transpose(0, 1).to(dtype) for each in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if where == "cpu":
        return Merged.apply(q, k, v, layout, scale)[None], None  # type: ignore[no-untyped-call]
    return masked_attention(q, k, v, layout, scale)[None], None


def masked_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
    """The same by a mask, for devices on which torch's fused kernels take one."""
    q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
    shared = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, k, v, attn_mask=layout.mask, scale=scale, enable_gqa=shared)
    return out[0].transpose(0, 1)


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


class Merged(torch.autograd.Function):
    """q [T, H, D], k and v [T, H or fewer, D] -> [T, H, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        for queries, keys, causal in _parts(layout):
            part, part_lse = _flash(*_tiles(q, k, v, queries, keys), 0.0, causal, scale=scale)
            if causal:
                queries.put(out, part)
                queries.put(lse, part_lse)
            else:
                _merge(out, lse, queries, part, part_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(each) for each in (q, k, v))
        for queries, keys, causal in _parts(ctx.layout):
            tiles = _tiles(q, k, v, queries, keys)
            seen = (queries.take(out), queries.take(lse, UNREACHED))
            by = _flash_backward(queries.take(grads[0]), *tiles, *seen, 0.0, causal, scale=ctx.scale)
            for into, where, part in ((dq, queries, by[0]), (dk, keys, by[1]), (dv, keys, by[2])):
                write = where.put if causal else where.add  # the causal parts come first, and have every token once
                write(into, _fold(part, into.shape[1]))
        return dq, dk, dv, None, None


def _parts(layout: Layout) -> list[tuple[Tiles, Tiles, bool]]:
    """(queries, keys, causal): every segment sees itself; then every response its prompt."""
    own = [*layout.prompts, *([layout.responses] if layout.responses is not None else [])]
    cross = [
        (readers, prompts, False) for readers, prompts in zip(layout.readers, layout.prompts, strict=True) if readers
    ]
    return [*((tiles, tiles, True) for tiles in own), *cross]


def _tiles(q: Tensor, k: Tensor, v: Tensor, queries: Tiles, keys: Tiles) -> tuple[Tensor, Tensor, Tensor]:
    """With grouped queries, each key stands for several heads; the copies live for this part only."""
    times = q.shape[1] // k.shape[1]
    key, value = (keys.take(each) for each in (k, v))
    if times > 1:
        key, value = (each.repeat_interleave(times, dim=1) for each in (key, value))
    return queries.take(q), key, value


def _fold(grad: Tensor, heads: int) -> Tensor:
    """Sum over the query heads that share a key."""
    return grad if grad.shape[1] == heads else grad.unflatten(1, (heads, -1)).sum(2)


def _merge(out: Tensor, lse: Tensor, queries: Tiles, part: Tensor, part_lse: Tensor) -> None:
    """Softmax over both sets of keys, from the softmax over each: weights are exp(own log-sum-exp - joint one)."""
    before = queries.take(lse)
    joint = torch.logaddexp(before, part_lse)
    shares = [(each - joint).exp()[..., None] for each in (before, part_lse)]
    merged = queries.take(out) * shares[0] + part * shares[1]
    queries.put(out, merged.to(out.dtype))
    queries.put(lse, joint)
