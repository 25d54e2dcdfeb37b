"""Prompts and responses as tokens of one forward pass: each prompt once, or, padded, a row a response."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.shared_prefix import Layout, Tiles

Ids = Sequence[int]
Index = NDArray[np.int64]


class Prompted(Protocol):
    """A prompt and some responses to it, in token ids, none empty."""

    @property
    def prompt(self) -> Ids: ...
    @property
    def responses(self) -> Sequence[Ids]: ...


class Asked(NamedTuple):
    prompt: Ids
    responses: Sequence[Ids]


@dataclass(frozen=True)
class Tokens:
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


def pack(groups: Sequence[Prompted], device: torch.device | str = "cpu", *, last: bool = False) -> Tokens:
    """Prompt, response, response, ..., prompt, ...: nothing twice, nothing filled up.

    last: with each response's last token, from which no log-prob is read, but a reward model's score is.
    """
    unique = [list(dict.fromkeys(map(tuple, group.responses))) for group in groups]
    prompt, said = _lengths([group.prompt for group in groups]), _lengths([each for of in unique for each in of])
    kept = said if last else said - 1
    count = _lengths(unique)
    owner = np.repeat(np.arange(len(groups)), count)
    first = np.cumsum(count) - count  # each group's first response
    sizes = np.insert(kept, first, prompt)  # of all segments
    starts = np.cumsum(sizes) - sizes
    heads = first + np.arange(len(groups))
    at, own = starts[heads], np.delete(starts, heads)
    predictors = _ranges(own - 1, said)
    predictors[np.cumsum(said) - said] = (at + prompt - 1)[owner]
    ids = [token for group, of in zip(groups, unique, strict=True) for token in _tokens(group, of, last)]
    put = _Put(device)
    return Tokens(
        ids=put(ids)[None],
        positions=put(_ranges(np.insert(prompt[owner], first, 0), sizes))[None],
        layout=_layout(at, prompt, np.bincount(owner, kept, len(groups)).astype(np.int64), own, kept, put),
        predictors=put(predictors),
        targets=put([token for of in unique for each in of for token in each]),
        lengths=put(said),
        places=put(_ranges(own, kept)),
        rows=put(_rows(groups, unique)),
    )


def pad(groups: Sequence[Prompted], device: torch.device | str = "cpu", *, last: bool = True) -> Tokens:
    """A row for every response, filled up on the right, where causal attention never sees it."""
    rows = [[*group.prompt, *response] for group in groups for response in group.responses]
    said = _lengths([response for group in groups for response in group.responses])
    total = _lengths(rows)
    ids = np.zeros((len(rows), total.max()), dtype=np.int64)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values
    places = _ranges(np.arange(len(rows)) * ids.shape[1] + total - said, said)
    put = _Put(device)
    return Tokens(
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


def _ranges(starts: Index, lengths: Index) -> Index:
    """start, start + 1, ... of each length, one after the other."""
    return np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())


def _tokens(group: Prompted, responses: list[tuple[int, ...]], last: bool) -> list[int]:
    return [*group.prompt, *(token for each in responses for token in (each if last else each[:-1]))]


def _rows(groups: Sequence[Prompted], unique: list[list[tuple[int, ...]]]) -> list[int]:
    """The place of each response as given among the different ones of all groups."""
    rows, before = [], 0
    for group, responses in zip(groups, unique, strict=True):
        known = {response: before + n for n, response in enumerate(responses)}
        rows += [known[tuple(response)] for response in group.responses]
        before += len(responses)
    return rows


def _layout(at: Index, prompt: Index, read: Index, own: Index, kept: Index, put: _Put) -> Layout:
    """Prompts of one length go together, so that none is filled up: a filled key would need a mask."""
    alike = [np.flatnonzero(prompt == length) for length in np.unique(prompt)]
    return Layout(
        prompts=[_tiles(at[which], prompt[which], put) for which in alike],  # type: ignore[misc]
        readers=[_tiles((at + prompt)[which], read[which], put) for which in alike],
        responses=_tiles(own[kept > 0], kept[kept > 0], put),
    )


def _tiles(starts: Index, lengths: Index, put: _Put) -> Tiles | None:
    """A segment a row, filled up at its end; None if there is no token."""
    if not lengths.sum():
        return None
    steps = np.arange(lengths.max())
    real = steps < lengths[:, None]
    index = put(np.where(real, starts[:, None] + steps, 0))
    return Tiles(index, None if real.all() else put(real).bool())


@dataclass
class Load:
    """What a forward pass costs in tokens: those packed, or, padded, rows times the longest."""

    shared: bool
    tokens: int = 0
    rows: int = 0
    width: int = 0

    def add(self, group: Prompted) -> "Load":
        lengths = [len(response) for response in group.responses]
        return Load(
            self.shared,
            self.tokens + len(group.prompt) + sum(lengths),
            self.rows + len(lengths),
            max(self.width, len(group.prompt) + max(lengths)),
        )

    @property
    def size(self) -> int:
        return self.tokens if self.shared else self.rows * self.width


def fill(groups: Sequence[Prompted], budget: int, shared: bool) -> Iterator[list[int]]:
    """Indices of groups of similar length in batches of `budget` tokens, or of one group."""
    alone = [Load(shared).add(group) for group in groups]
    batch: list[int] = []
    load = Load(shared)
    for n in sorted(range(len(groups)), key=lambda n: (alone[n].width, n)):
        if batch and load.add(groups[n]).size > budget:
            yield batch
            batch, load = [], Load(shared)
        batch.append(n)
        load = load.add(groups[n])
    if batch:
        yield batch


def split(group: Prompted, budget: int, shared: bool) -> list[list[int]]:
    """Indices of a group's responses in parts that fit, or of one response, in their order."""
    parts: list[list[int]] = []
    load = Load(shared)
    for n, response in enumerate(group.responses):
        one = Asked(group.prompt[len(group.prompt) * (shared and load.rows > 0) :], [response])
        if not parts or load.add(one).size > budget:
            parts.append([])
            load, one = Load(shared), Asked(group.prompt, [response])
        parts[-1].append(n)
        load = load.add(one)
    return parts
