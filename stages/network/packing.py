"""Prompts and responses as tokens of one forward pass: each prompt once, or, padded, a row a response."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.network.prefix_attention import Layout, Tiles

Ids = Sequence[int]
Index = NDArray[np.int64]


class PromptResponses(Protocol):
    """A prompt and some responses to it, in token ids, none empty."""

    @property
    def prompt(self) -> Ids: ...
    @property
    def responses(self) -> Sequence[Ids]: ...


class PromptGroup(NamedTuple):
    prompt: Ids
    responses: Sequence[Ids]


@dataclass(frozen=True)
class PackedTokens:
    """N responses to their prompts, S of them different, M tokens long together, as a network reads them.

    A place is an index into the hidden states, their first two dimensions flattened.
    """

    ids: Tensor  # [1, T], or [S, T] if padded
    positions: Tensor | None  # [1, T] each response's go on from its prompt's
    layout: Layout | None  # None if padded
    predictors: Tensor  # [M] the place that predicts each token of each response: the one before it
    targets: Tensor  # [M]
    lengths: Tensor  # [S] tokens of each response
    places: Tensor  # [M] of the response tokens themselves; [M - S] if each last one was left out
    rows: Tensor  # [N] which of the S each is


def pack(groups: Sequence[PromptResponses], device: torch.device | str = "cpu", *, last: bool = False) -> PackedTokens:
    """All prompts, short ones first, then all responses in the same order: nothing twice, nothing filled up.

    last: with each response's last token, from which no log-prob is read, but a reward model's score is.
    """
    order = sorted(range(len(groups)), key=lambda n: len(groups[n].prompt))
    unique = [list(dict.fromkeys(map(tuple, groups[n].responses))) for n in order]
    prompt, said = _lengths([groups[n].prompt for n in order]), _lengths([each for of in unique for each in of])
    kept = said if last else said - 1
    owner = np.repeat(np.arange(len(groups)), _lengths(unique))
    at, own = _starts(prompt), prompt.sum() + _starts(kept)
    predictors = _ranges(own - 1, said)
    predictors[_starts(said)] = (at + prompt - 1)[owner]
    ids = [token for n in order for token in groups[n].prompt]
    ids += [token for of in unique for each in of for token in (each if last else each[:-1])]
    put = _Put(device)
    return PackedTokens(
        ids=put(ids)[None],
        positions=put(np.r_[_ranges(0 * at, prompt), _ranges(prompt[owner], kept)])[None],
        layout=_layout(prompt, owner, kept, put),
        predictors=put(predictors),
        targets=put([token for of in unique for each in of for token in each]),
        lengths=put(said),
        places=put(_ranges(own, kept)),
        rows=put(_rows(groups, order, unique)),
    )


def pad(groups: Sequence[PromptResponses], device: torch.device | str = "cpu") -> PackedTokens:
    """A row for every response, filled up on the right, where causal attention never sees it."""
    rows = [[*group.prompt, *response] for group in groups for response in group.responses]
    said = _lengths([response for group in groups for response in group.responses])
    total = _lengths(rows)
    ids = np.zeros((len(rows), total.max()), dtype=np.int64)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values
    places = _ranges(np.arange(len(rows)) * ids.shape[1] + total - said, said)
    put = _Put(device)
    return PackedTokens(
        ids=put(ids),
        positions=None,
        layout=None,
        predictors=put(places - 1),
        targets=put(ids.flatten()[places]),
        lengths=put(said),
        places=put(places),
        rows=put(np.arange(len(rows))),
    )


class _Put(NamedTuple):
    device: torch.device | str

    def __call__(self, values: Any) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(self.device)


def _lengths(parts: Sequence[Sequence[Any]]) -> Index:
    return np.array([len(part) for part in parts], dtype=np.int64)


def _starts(lengths: Index) -> Index:
    return np.cumsum(lengths) - lengths


def _ranges(starts: Index, lengths: Index) -> Index:
    """start, start + 1, ... of each length, one after the other."""
    return np.repeat(starts - _starts(lengths), lengths) + np.arange(lengths.sum())


def _rows(groups: Sequence[PromptResponses], order: list[int], unique: list[list[tuple[int, ...]]]) -> list[int]:
    """The place of each response as given among the different ones as packed."""
    before = dict(zip(order, accumulate(map(len, unique), initial=0), strict=False))
    known = {n: {each: before[n] + m for m, each in enumerate(of)} for n, of in zip(order, unique, strict=True)}
    return [known[n][tuple(response)] for n, group in enumerate(groups) for response in group.responses]


def _layout(prompt: Index, owner: Index, kept: Index, put: _Put) -> Layout:
    """Prompts of one length go together, so that none is filled up: a filled key would need a mask."""
    read = np.bincount(owner, kept, len(prompt)).astype(np.int64)
    tiles: dict[str, list[Any]] = {"prompts": [], "readers": []}
    for length in np.unique(prompt):
        alike = prompt == length
        tiles["prompts"].append(_tiles(_starts(prompt)[alike], prompt[alike], put))
        tiles["readers"].append(_tiles(prompt.sum() + _starts(read)[alike], read[alike], put))
    full = kept > 0
    count = np.arange(len(prompt))
    segments = np.r_[np.repeat(count, prompt), np.repeat(len(prompt) + np.arange(len(kept)), kept)]
    asked = np.r_[np.repeat(count, prompt), np.repeat(owner, kept)]
    return Layout(
        **tiles,
        segments=put(segments),
        asked=put(asked),
        responses=_tiles(prompt.sum() + _starts(kept)[full], kept[full], put),
    )


def _tiles(starts: Index, lengths: Index, put: _Put) -> Tiles | None:
    """Segments one after the other, a row each; None if there is no token."""
    if not lengths.sum():
        return None
    shape = len(lengths), int(lengths.max())
    if shape[0] * shape[1] == lengths.sum():
        return Tiles(shape, slice(int(starts[0]), int(starts[0] + lengths.sum())))
    steps = np.arange(shape[1])
    real = steps < lengths[:, None]
    return Tiles(shape, put(np.where(real, starts[:, None] + steps, 0).flatten()), put(real.flatten()).bool())


@dataclass
class PassSize:
    """What a forward pass costs in tokens: those packed, or, padded, rows times the longest."""

    shared: bool
    tokens: int = 0
    rows: int = 0
    width: int = 0

    @classmethod
    def of(cls, groups: Sequence[PromptResponses], shared: bool) -> "PassSize":
        load = cls(shared)
        for group in groups:
            load = load.add(group)
        return load

    def add(self, group: PromptResponses) -> "PassSize":
        lengths = [len(response) for response in group.responses]
        return PassSize(
            self.shared,
            self.tokens + len(group.prompt) + sum(lengths),
            self.rows + len(lengths),
            max(self.width, len(group.prompt) + max(lengths)),
        )

    @property
    def size(self) -> int:
        return self.tokens if self.shared else self.rows * self.width


def fill(groups: Sequence[PromptResponses], budget: int, shared: bool) -> Iterator[list[int]]:
    """Indices of groups of similar length in batches of `budget` tokens, or of one group."""
    alone = [PassSize.of([group], shared) for group in groups]
    batch: list[int] = []
    load = PassSize(shared)
    for n in sorted(range(len(groups)), key=lambda n: (alone[n].width, n)):
        if batch and load.add(groups[n]).size > budget:
            yield batch
            batch, load = [], PassSize(shared)
        batch.append(n)
        load = load.add(groups[n])
    if batch:
        yield batch


def split(group: PromptResponses, budget: int, shared: bool) -> list[list[int]]:
    """Indices of a group's responses in parts that fit, or of one response, in their order."""
    parts: list[list[int]] = []
    load = PassSize(shared)
    for n, response in enumerate(group.responses):
        one = PromptGroup(group.prompt[len(group.prompt) * (shared and load.rows > 0) :], [response])
        if not parts or load.add(one).size > budget:
            parts.append([])
            load, one = PassSize(shared), PromptGroup(group.prompt, [response])
        parts[-1].append(n)
        load = load.add(one)
    return parts
