"""Prompts and responses as tokens of one forward pass: each prompt once, or, padded, one row per response."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.network.layout import Index, Layout, lengths_of, starts_of

Ids = Sequence[int]
Mask = Sequence[bool] | None  # which ids of a response count in its sums; None: all


@dataclass(frozen=True)
class PromptGroup:
    """Prompt and some responses to it, in token ids, none empty.

    masks: one per response; empty where all ids count. Of a response of several turns, those of the assistant do.
    """

    prompt: Ids
    responses: Sequence[Ids]
    masks: Sequence[Mask] = field(default=(), kw_only=True)

    @property
    def masked_responses(self) -> list[tuple[tuple[int, ...], tuple[bool, ...] | None]]:
        """Return the ids of each response with its mask, as keys of a dict."""
        masks = self.masks or [None] * len(self.responses)
        return [
            (tuple(ids), None if mask is None else tuple(mask)) for ids, mask in zip(self.responses, masks, strict=True)
        ]

    @property
    def counted(self) -> list[int]:
        """Return how many ids of each response count."""
        if not self.masks:
            return [len(ids) for ids in self.responses]
        return [len(ids) if mask is None else sum(mask) for ids, mask in zip(self.responses, self.masks, strict=True)]

    def part(self, indices: Sequence[int]) -> "PromptGroup":
        """Return the prompt with some of its responses."""
        masks = [self.masks[n] for n in indices] if self.masks else ()
        return PromptGroup(self.prompt, [self.responses[n] for n in indices], masks=masks)


@dataclass(frozen=True)
class PackedTokens:
    """N responses to their prompts, S of them different, M tokens long together, as a network takes them.

    A position is an index into the hidden states, their first two dimensions flattened.
    """

    ids: Tensor  # [1, T], or [S, T] if padded
    position_ids: Tensor | None  # [1, T] each response's continue its prompt's; None if padded
    layout: Layout | None  # None if padded
    predictors: Tensor  # [M] position that predicts each token of each response: the one before it
    targets: Tensor  # [M]
    lengths: Tensor  # [S] tokens of each response
    positions: Tensor  # [M] of the response tokens themselves; [M - S] if each last one was not packed
    rows: Tensor  # [N] which of the S each is
    weights: Tensor  # [T], or [S T] if padded: rows of prompt and response that each token is in; 0 for padding
    counted: Tensor | None = None  # [M] bool: whether each token counts in its response's sums; None if all do


def pack(groups: Sequence[PromptGroup], device: torch.device | str = "cpu", *, last: bool = False) -> PackedTokens:
    """Pack all prompts, short ones first, then all responses in the same order: nothing twice, nothing padded.

    last: include each response's last token, which no log-prob needs, but a reward model's score does.
    """
    to_device = partial(_to_device, device=device)
    order = sorted(range(len(groups)), key=lambda n: len(groups[n].prompt))
    unique = [list(dict.fromkeys(groups[n].masked_responses)) for n in order]
    flat = [response for responses in unique for response, _ in responses]
    masks = [mask for responses in unique for _, mask in responses]
    prompt_lengths, lengths = lengths_of([groups[n].prompt for n in order]), lengths_of(flat)
    packed_lengths = lengths if last else lengths - 1
    owner = np.repeat(np.arange(len(groups)), lengths_of(unique))  # [S] which prompt each response answers
    prompt_starts = starts_of(prompt_lengths)
    response_starts = prompt_lengths.sum() + starts_of(packed_lengths)

    # A response's first token is predicted by the last of its prompt, each other one by the token before it.
    predictors = _ranges(response_starts - 1, lengths)
    predictors[starts_of(lengths)] = (prompt_starts + prompt_lengths - 1)[owner]

    # Which different response each of the given ones is.
    first = dict(zip(order, accumulate(map(len, unique), initial=0), strict=False))
    row_of = {
        n: {response: first[n] + m for m, response in enumerate(responses)}
        for n, responses in zip(order, unique, strict=True)
    }

    rows = [row_of[n][response] for n, group in enumerate(groups) for response in group.masked_responses]
    responses_of_prompt = lengths_of([groups[n].responses for n in order])
    copies = np.bincount(rows, minlength=len(flat))

    from_start = _ranges(0 * prompt_starts, prompt_lengths)
    from_prompt = _ranges(prompt_lengths[owner], packed_lengths)
    ids = [token for n in order for token in groups[n].prompt]
    ids += [token for response in flat for token in (response if last else response[:-1])]
    return PackedTokens(
        ids=to_device(ids)[None],
        position_ids=to_device(np.r_[from_start, from_prompt])[None],
        layout=Layout(prompt_lengths, packed_lengths, owner, torch.device(device)),
        predictors=to_device(predictors),
        targets=to_device([token for response in flat for token in response]),
        lengths=to_device(lengths),
        positions=to_device(_ranges(response_starts, packed_lengths)),
        rows=to_device(rows),
        weights=to_device(np.repeat(np.r_[responses_of_prompt, copies], np.r_[prompt_lengths, packed_lengths])),
        counted=_counted(flat, masks, to_device),
    )


def pad(groups: Sequence[PromptGroup], device: torch.device | str = "cpu") -> PackedTokens:
    """Return one row per response, padded on the right, where causal attention never sees it."""
    to_device = partial(_to_device, device=device)
    rows = [[*group.prompt, *response] for group in groups for response in group.responses]
    lengths = lengths_of([response for group in groups for response in group.responses])
    row_lengths = lengths_of(rows)
    ids = np.zeros((len(rows), row_lengths.max()), dtype=np.int64)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values
    positions = _ranges(np.arange(len(rows)) * ids.shape[1] + row_lengths - lengths, lengths)
    return PackedTokens(
        ids=to_device(ids),
        position_ids=None,
        layout=None,
        predictors=to_device(positions - 1),
        targets=to_device(ids.flatten()[positions]),
        lengths=to_device(lengths),
        positions=to_device(positions),
        rows=to_device(np.arange(len(rows))),
        weights=to_device((np.arange(ids.shape[1]) < row_lengths[:, None]).flatten()),
        counted=_counted(
            [response for group in groups for response in group.responses],
            [mask for group in groups for _, mask in group.masked_responses],
            to_device,
        ),
    )


def _counted(responses: Sequence[Ids], masks: Sequence[Mask], to_device: Callable[[Any], Tensor]) -> Tensor | None:
    """Return whether each token of the responses counts, one after the other; None if all do."""
    if all(mask is None for mask in masks):
        return None
    flags = [
        flag
        for ids, mask in zip(responses, masks, strict=True)
        for _, flag in zip(ids, [True] * len(ids) if mask is None else mask, strict=True)
    ]
    return to_device(flags).bool()


def _to_device(values: Any, device: torch.device | str) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(device)


def _ranges(starts: Index, lengths: Index) -> Index:
    """Return start, start + 1, ... of each length, one after the other."""
    return np.repeat(starts - starts_of(lengths), lengths) + np.arange(lengths.sum())


def longest_row(group: PromptGroup) -> int:
    """Return the tokens of the prompt with its longest response."""
    return len(group.prompt) + max(map(len, group.responses))


def forward_tokens(groups: Sequence[PromptGroup], shared_prefix: bool) -> int:
    """Return the tokens of a forward pass: those packed, or, padded, rows times the longest."""
    if shared_prefix:
        return sum(len(group.prompt) + sum(map(len, group.responses)) for group in groups)
    return sum(len(group.responses) for group in groups) * max(map(longest_row, groups))


def batch_by_tokens(groups: Sequence[PromptGroup], budget: int, shared_prefix: bool) -> Iterator[list[int]]:
    """Yield indices of groups of similar length in batches of at most `budget` tokens, or of one group."""
    batch: list[int] = []
    packed = rows = 0
    for n in sorted(range(len(groups)), key=lambda n: (longest_row(groups[n]), n)):
        tokens, responses = forward_tokens([groups[n]], True), len(groups[n].responses)
        size = packed + tokens if shared_prefix else (rows + responses) * longest_row(groups[n])
        if batch and size > budget:
            yield batch
            batch, packed, rows = [], 0, 0
        batch.append(n)
        packed, rows = packed + tokens, rows + responses
    if batch:
        yield batch


def split_responses(group: PromptGroup, budget: int, shared_prefix: bool) -> list[list[int]]:
    """Return indices of a group's responses, in order, in parts of at most `budget` tokens, or of one response."""
    if forward_tokens([group], shared_prefix) <= budget:
        return [list(range(len(group.responses)))]
    parts: list[list[int]] = []
    for n in range(len(group.responses)):
        extended = [group.responses[m] for m in (*parts[-1], n)] if parts else []
        if not parts or forward_tokens([PromptGroup(group.prompt, extended)], shared_prefix) > budget:
            parts.append([])
        parts[-1].append(n)
    return parts
