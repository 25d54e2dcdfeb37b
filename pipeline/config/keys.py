"""Canonical JSON and its hash: the key of a step. Values without stable bytes are refused."""

import json
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

from pipeline.registry import Bound
from pipeline.store.fingerprints import ContentPath


def canonical(value: Any) -> Any:
    """Return the value as JSON with stable bytes: a path is its content's digest, a function its name and options.

    Raise TypeError for anything else that JSON does not have, such as a set, whose order is not stable.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, ContentPath):
        return {"content": value.digest}
    if isinstance(value, Bound):
        options = {name: canonical(option) for name, option in value.entry.identity_of(value.options).items()}
        return {"name": value.name, "version": value.metadata.get("version", 1), **options}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: canonical(item) for name, item in value.items()}
    raise TypeError(f"{type(value).__name__} has no stable bytes, so it cannot be part of a key: {value!r}")


def content_paths(value: Any) -> Iterator[ContentPath]:
    """Yield the files and folders in an option, those in options of its functions included."""
    if isinstance(value, ContentPath):
        yield value
    elif isinstance(value, Bound):
        yield from content_paths(value.options)
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from content_paths(item)


def encode(identity: Any) -> str:
    return json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def key_of(identity: Any) -> str:
    """Return 16 hex digits of the hash of a canonical identity."""
    return sha256(encode(identity).encode()).hexdigest()[:16]


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return the fields in which two identities differ, as `path: old -> new`; long values are cut."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        return [line for name in names for line in differences(old.get(name), new.get(name), f"{path}.{name}")]
    texts = (text if len(text) <= 40 else f"{text[:37]}..." for text in (encode(old), encode(new)))
    return [] if old == new else [f"{path.lstrip('.')}: {' -> '.join(texts)}"]
