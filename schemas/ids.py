"""Ids, seeds, shards and splits: hashes of content, never random and never a position in a file.

They are part of the format of a store: if one of them changed, no cached result would be found again and no table
would join with an older one.
"""

import json
from collections.abc import Sequence
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Message = dict[str, Any]  # role, content, and what else a chat template renders, such as tool calls


def _hash(*parts: str | bytes, size: int = 10) -> bytes:
    """Return a BLAKE2b digest of the parts, each prefixed with its length so that ("a", "b1") is not ("ab", "1")."""
    digest = blake2b(digest_size=size)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def prompt_id(prompt: str | Sequence[Message], tools: Sequence[Any] | None = None) -> str:
    """Return 20 hex digits of the prompt's content, the same under every tokenizer and chat template."""
    if isinstance(prompt, str) and not tools:
        return _hash("prompt", prompt).hex()
    content: Any = {"prompt": prompt, "tools": list(tools)} if tools else list(prompt)
    return _hash("prompt", json.dumps(content, sort_keys=True, ensure_ascii=False)).hex()


def candidate_id(prompt: str, token_ids: Sequence[int], copy: int = 0) -> str:
    """Return 20 hex digits of prompt id, tokens, and `copy`, which keeps equal draws of a prompt apart."""
    return _hash("candidate", prompt, token_bytes(token_ids), str(copy)).hex()


def token_digest(prompt_ids: Sequence[int], response_ids: Sequence[int], mask: Sequence[bool] | None = None) -> str:
    """Return a fingerprint of what a forward pass sums: another chat template, truncation or mask changes it."""
    masks = [] if mask is None else [bytes(mask)]
    return _hash("tokens", token_bytes(prompt_ids), token_bytes(response_ids), *masks).hex()


def token_digests(
    prompts: pa.ListArray, of_row: NDArray[np.int64], responses: pa.ListArray, masks: pa.ListArray
) -> list[str]:
    """Return `token_digest` of every response: its prompt is that of number `of_row`; a mask may be null."""
    states: dict[int, Any] = {}  # the state after a prompt, which all its responses share
    digests = []
    contents = zip(of_row.tolist(), _bytes_of(responses), masks.to_pylist(), strict=True)
    ids = _bytes_of(prompts)
    for number, response, mask in contents:
        if number not in states:
            states[number] = blake2b(digest_size=10)
            for part in (b"tokens", ids[number]):
                states[number].update(len(part).to_bytes(8, "little") + part)
        digest = states[number].copy()
        for part in (response,) if mask is None else (response, bytes(mask)):
            digest.update(len(part).to_bytes(8, "little") + part)
        digests.append(digest.hexdigest())
    return digests


def _bytes_of(lists: pa.ListArray) -> list[bytes]:
    """Return `token_bytes` of every list."""
    content = token_bytes(lists.values)
    ends = lists.offsets.to_numpy().astype(np.int64) * 4
    return [content[start:end] for start, end in pairwise(ends.tolist())]


def token_bytes(token_ids: Sequence[int] | pa.Array) -> bytes:
    """Return token ids as little-endian int32."""
    return np.asarray(token_ids, dtype="<i4").tobytes()


def seed_for(seed: int, *names: str | int) -> int:
    """Return a 63-bit seed for one draw, e.g. `seed_for(0, prompt_id, k)`; NumPy, torch and vLLM all take it.

    vLLM hashes its noise from (seed, position), so equal seeds would correlate draws across prompts: every (prompt, k)
    has a seed of its own.
    """
    return int.from_bytes(_hash("seed", str(seed), *map(str, names), size=8), "little") >> 1


def seeds_for(seed: int, name: str, ids: pa.Array) -> NDArray[np.uint64]:
    """Return `seed_for(seed, name, id)` of every id: the state after the parts before is hashed once, and copied."""
    state = blake2b(digest_size=8)
    for part in ("seed", str(seed), name):
        state.update(len(part.encode()).to_bytes(8, "little") + part.encode())
    digests = []
    for part in ids.cast(pa.large_binary()).to_pylist():
        digest = state.copy()
        digest.update(len(part).to_bytes(8, "little") + part)
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64) >> np.uint64(1)


def shard_of(prompt: str, shards: int) -> int:
    """Return the number, below `shards`, of the part that holds the prompt's rows in every table."""
    return int.from_bytes(_hash("shard", prompt, size=8), "little") % shards


def split_of(text: str, heldout: float, validation: float = 0.0) -> str:
    """Return `heldout` or `validation` for these shares of all prompts' texts, else `train`.

    The same in every file and every run: the two are at opposite ends of the hashes, so that neither share changes
    which prompts the other has. Texts that differ in case or white space only are in the same split: a near copy of a
    training prompt is no test.
    """
    normalised = " ".join(text.casefold().split())
    point = int.from_bytes(_hash("split", normalised, size=8), "little") / 2**64
    if point < heldout:
        return "heldout"
    return "validation" if point > 1 - validation else "train"  # none for 0, even where a point is rounded to 1
