"""SHA-256 of files. That of a large one is remembered on this machine: a model is read once, not in every plan."""

import json
import os
import time
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from pipeline.store.storage import cache, replace

LARGE = 1 << 26  # bytes; a smaller file is as soon read as looked up
SETTLED = 2 * 10**9  # nanoseconds; what changed less than that ago may change again within a tick of the disk's clock

State = tuple[int, ...]


def digest_of_file(path: Path) -> str:
    """Of its bytes, 64 hex digits."""
    return _digest(path, _state(path))


def _state(path: Path) -> State:
    """Changes with the content; the time of the last change of any kind cannot be set by anybody."""
    about = os.stat(path)
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino, about.st_dev


@lru_cache(maxsize=4096)
def _digest(path: Path, state: State) -> str:
    if state[0] < LARGE:
        return _read(path)
    note = cache() / "digests" / f"{sha256(str(path).encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # no note, or none of ours
        known = json.loads(note.read_text())
        if known["state"] == list(state):
            return str(known["digest"])
    settled = time.time_ns() - max(state[1:3]) > SETTLED
    digest = _read(path)
    if settled and _state(path) == state:
        with suppress(OSError):  # a machine without room for notes reads again
            replace(note, json.dumps({"path": str(path), "state": state, "digest": digest}).encode())
    return digest


def _read(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
