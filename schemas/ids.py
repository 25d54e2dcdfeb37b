"""Ids, seeds and shards: all derived from content by hash, none random, none from a position."""

import json
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

Message = dict[str, str]


def _hash(*parts: str | bytes, size: int = 10) -> bytes:
    """Length-prefixed, so that no two lists of parts share their bytes."""
    digest = blake2b(digest_size=size)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def prompt_id(prompt: str | Sequence[Message]) -> str:
    """20 hex digits of the prompt's own content; the same under every tokenizer and chat template."""
    content = prompt if isinstance(prompt, str) else json.dumps(list(prompt), sort_keys=True, ensure_ascii=False)
    return _hash("prompt", content).hex()


def candidate_id(prompt: str, token_ids: Sequence[int], copy: int = 0) -> str:
    """20 hex digits of prompt, tokens, and which copy of these tokens it is (equal draws stay apart)."""
    return _hash("candidate", prompt, token_bytes(token_ids), str(copy)).hex()


def token_digest(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
    """Fingerprint of exactly what a forward pass reads: another template or truncation changes it."""
    return _hash("tokens", token_bytes(prompt_ids), token_bytes(response_ids)).hex()


def token_bytes(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian int32."""
    return np.asarray(token_ids, dtype="<i4").tobytes()


def seed_for(seed: int, *names: str | int) -> int:
    """A 63-bit seed for one draw, e.g. `seed_for(0, prompt_id, k)`.

    vLLM hashes noise from (seed, position): equal seeds correlate draws across prompts, so every
    (prompt, k) has its own.
    """
    return int.from_bytes(_hash("seed", str(seed), *map(str, names), size=8), "little") >> 1


def shard_of(prompt: str, shards: int) -> int:
    """Which of `shards` parts this prompt's rows live in, in every table."""
    return int.from_bytes(_hash("shard", prompt, size=8), "little") % shards


def split_of(prompt: str, heldout: float) -> str:
    """`train` or `heldout`, by prompt id: with one share, a prompt is on the same side in every file."""
    point = int.from_bytes(_hash("split", prompt, size=8), "little") / 2**64
    return "heldout" if point < heldout else "train"
