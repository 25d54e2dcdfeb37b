"""Canonical JSON and its hash: the identity of a step. What has no stable bytes is refused."""

import json
from hashlib import sha256
from typing import Any

from pipeline.registry import Bound
from pipeline.store.fingerprints import ContentPath


def canonical(value: Any) -> Any:
    """JSON-ready form with stable bytes; paths become digests, bound functions their name and options."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, ContentPath):
        return {"content": value.digest}
    if isinstance(value, Bound):
        options = {name: canonical(option) for name, option in value.options.items()}
        return {"name": value.name, "version": value.metadata.get("version", 1), **options}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: canonical(item) for name, item in value.items()}
    raise TypeError(f"{type(value).__name__} has no stable bytes, so it cannot be part of a key: {value!r}")


def encode(identity: Any) -> str:
    return json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def key_of(identity: Any) -> str:
    """16 hex digits of the canonical identity."""
    return sha256(encode(identity).encode()).hexdigest()[:16]


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Which fields differ between two identities, as `place: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        return [line for name in names for line in differences(old.get(name), new.get(name), f"{place}.{name}")]
    return [] if old == new else [f"{place.lstrip('.')}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = encode(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
