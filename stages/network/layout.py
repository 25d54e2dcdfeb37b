"""Which tokens of a packed sequence attend to which: as tiles, as cumulative lengths, or as a mask.

A packed sequence holds all prompts, then all responses. Attention on a CPU takes tiles, on a GPU cumulative
lengths; what is not asked for is neither computed nor copied to the device.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Index = NDArray[np.int64]


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
class CumulativeLengths:
    """Segments of a packed sequence as variable-length attention takes them: where they begin, int32, and the end.

    The response tokens of a prompt follow each other, so they are one segment of queries to that prompt.
    """

    segments: Tensor  # [G + S + 1] of each prompt and each response
    response_tokens: Tensor  # [G + 1] of all response tokens of each prompt, counted from the first response on
    prompts: Tensor  # [G + 1]
    prompt_tokens: int  # of all prompts together: the first response begins there
    longest_segment: int
    longest_response_tokens: int
    longest_prompt: int


@dataclass(frozen=True)
class Layout:
    """G prompts, short ones first, then S responses in their prompts' order: T tokens.

    A token attends to its own segment up to itself and, if it is in a response, to all of its prompt.
    """

    prompt_lengths: Index  # [G]
    response_lengths: Index  # [S] of which some may be 0
    owner: Index  # [S] which prompt each response answers
    device: torch.device

    @cached_property
    def lengths(self) -> Index:
        """Return the tokens of each segment, prompts first; a response of none is no segment."""
        return np.r_[self.prompt_lengths, self.response_lengths[self.response_lengths > 0]]

    @cached_property
    def response_tokens(self) -> Index:
        """Return the tokens of all responses of each prompt, [G]."""
        return np.bincount(self.owner, self.response_lengths, len(self.prompt_lengths)).astype(np.int64)

    @cached_property
    def parts(self) -> list[tuple[Tiles, Tiles, bool]]:
        """Return (queries, keys, causal): every segment attends to itself; then every response to its prompt.

        Prompts of one length go together, so that none is padded: a padded key would need a mask.
        """
        first_response = self.prompt_lengths.sum()
        within: list[tuple[Tiles, Tiles, bool]] = []
        across: list[tuple[Tiles, Tiles, bool]] = []
        for length in np.unique(self.prompt_lengths):
            alike = self.prompt_lengths == length
            prompts = self._tiles(starts_of(self.prompt_lengths)[alike], self.prompt_lengths[alike])
            starts = first_response + starts_of(self.response_tokens)[alike]
            queries = self._tiles(starts, self.response_tokens[alike])
            if prompts:
                within.append((prompts, prompts, True))
            if prompts and queries:
                across.append((queries, prompts, False))
        # A response of one token is not packed at all if its last token is not.
        packed = self.response_lengths > 0
        starts = first_response + starts_of(self.response_lengths)[packed]
        if responses := self._tiles(starts, self.response_lengths[packed]):
            within.append((responses, responses, True))
        return within + across

    @cached_property
    def cumulative(self) -> CumulativeLengths:
        """Return the segments for variable-length attention, in one copy to the device."""
        lengths = (self.lengths, self.response_tokens, self.prompt_lengths)
        ends = [np.r_[0, np.cumsum(part)].astype(np.int32) for part in lengths]
        segments, response_tokens, prompts = (
            torch.from_numpy(np.concatenate(ends)).to(self.device).split([len(part) for part in ends])
        )
        longest_segment, longest_response_tokens, longest_prompt = (int(part.max()) for part in lengths)
        return CumulativeLengths(
            segments=segments,
            response_tokens=response_tokens,
            prompts=prompts,
            prompt_tokens=int(self.prompt_lengths.sum()),
            longest_segment=longest_segment,
            longest_response_tokens=longest_response_tokens,
            longest_prompt=longest_prompt,
        )

    @cached_property
    def mask(self) -> Tensor:
        """Return [T, T], whether the query may attend to the key. Prompts precede all responses, so tril suffices."""
        prompts = np.arange(len(self.prompt_lengths))
        of_prompts = np.repeat(prompts, self.prompt_lengths)
        of_responses = np.repeat(len(prompts) + np.arange(len(self.response_lengths)), self.response_lengths)
        owners = np.repeat(self.owner, self.response_lengths)
        segments, prompt_segments = (
            torch.from_numpy(np.r_[of_prompts, numbers]).to(self.device) for numbers in (of_responses, owners)
        )
        same_segment = segments[:, None] == segments
        return (same_segment | (prompt_segments[:, None] == segments)).tril()

    def _tiles(self, starts: Index, lengths: Index) -> Tiles | None:
        """Return segments that follow each other, one per row; None if there is no token."""
        if not lengths.sum():
            return None
        shape = len(lengths), int(lengths.max())
        if shape[0] * shape[1] == lengths.sum():
            return Tiles(shape, slice(int(starts[0]), int(starts[0] + lengths.sum())))
        steps = np.arange(shape[1])
        valid = steps < lengths[:, None]
        tokens = np.where(valid, starts[:, None] + steps, 0).flatten()
        return Tiles(shape, *(torch.from_numpy(part).to(self.device) for part in (tokens, valid.flatten())))


def lengths_of(parts: Any) -> Index:
    """Return the length of each part."""
    return np.array([len(part) for part in parts], dtype=np.int64)


def starts_of(lengths: Index) -> Index:
    """Return where each of the parts that follow each other begins."""
    return np.cumsum(lengths) - lengths
