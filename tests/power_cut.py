"""A disk that a power cut may take back to what was synced, replayed from what a run asked of the real one.

POSIX promises that fsync of a file keeps its content, and fsync of a folder the names in it. Of all else, a cut may
lose any part: names, or content while the names stay (ext4 without `auto_da_alloc`, XFS, network disks).
"""

import os
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


@dataclass(eq=False)
class File:
    """Content as programs see it, and as it was at the last sync; a file that was never synced may be empty."""

    content: bytes = b""
    synced: bytes | None = None


@dataclass(eq=False)
class Folder:
    """Names as programs see them, and as they were at the last sync."""

    names: dict[str, "File | Folder"] = field(default_factory=dict)
    synced: dict[str, "File | Folder"] = field(default_factory=dict)


Operation = tuple[Any, ...]  # name of the call and its arguments: paths relative to the root, the content of a write


class Recorder:
    """Every write, rename, link, deletion and sync below a folder, in order; `claim` adds what a program says."""

    def __init__(self, root: Path) -> None:
        self.root, self.operations = root, list[Operation]()
        self._states: dict[str, tuple[int, ...]] = {}
        self._lock = threading.RLock()

    def claim(self, *facts: Any) -> None:
        with self._lock:
            self._record_writes()
            self.operations.append(("claim", *facts))

    def synced(self, path: str) -> None:
        with self._lock:
            if (name := self._relative(path)) is not None:
                self._record_writes()
                self.operations.append(("sync", name))

    def called(self, event: str, args: tuple[Any, ...]) -> None:
        """Record a call of the operating system, before it happens."""
        if event in ("os.remove", "os.rmdir") and args[1] != -1:  # shutil.rmtree gives a name and an open folder
            args = (os.path.join(os.readlink(f"/proc/self/fd/{args[1]}"), args[0]),)
        names = [self._relative(arg) for arg in args[: 2 if event in ("os.rename", "os.link") else 1]]
        in_vain = (event == "os.mkdir" and os.path.exists(args[0])) or (
            event == "os.remove" and not os.path.exists(args[0])
        )
        if names[-1] is not None and not in_vain:
            with self._lock:
                self._record_writes()
                self.operations.append((event, *names))

    def _relative(self, path: Any) -> str | None:
        try:
            text = os.path.abspath(os.fspath(path))
        except TypeError:
            return None
        return os.path.relpath(text, self.root) if f"{text}/".startswith(f"{self.root}/") else None

    def _record_writes(self) -> None:
        """Record the files whose content has changed, whoever wrote them."""
        for parent, _, names in os.walk(self.root):
            for name in names:
                path = os.path.join(parent, name)
                try:
                    stat = os.stat(path)
                    state = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
                    if self._states.get(path) != state:
                        with open(path, "rb") as file:
                            self.operations.append(("write", os.path.relpath(path, self.root), file.read()))
                        self._states[path] = state
                except FileNotFoundError:
                    continue


_recorders: list[Recorder] = []
EVENTS = ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir")


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if event in EVENTS and _recorders:
        for recorder in list(_recorders):
            recorder.called(event, args)


sys.addaudithook(_hook)  # for the life of the process: Python has no way to take it back


@contextmanager
def recorded(root: Path) -> Iterator[Recorder]:
    """Record what happens below a folder, which exists."""
    recorder, fsync = Recorder(root), os.fsync

    def sync(number: int) -> None:
        path = os.readlink(f"/proc/self/fd/{number}")
        fsync(number)
        recorder.synced(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", sync)
        _recorders.append(recorder)
        try:
            yield recorder
        finally:
            _recorders.remove(recorder)


def replayed(operations: list[Operation]) -> Folder:
    """Return the disk after these operations."""
    disk = Folder()

    def find(path: str) -> File | Folder:
        node: File | Folder = disk
        for name in [] if path == "." else path.split("/"):
            assert isinstance(node, Folder)
            node = node.names[name]
        return node

    def parent(path: str) -> tuple[dict[str, File | Folder], str]:
        folder, _, name = path.rpartition("/")
        node = find(folder or ".")
        assert isinstance(node, Folder)
        return node.names, name

    for event, *args in operations:
        if event == "claim":
            continue
        try:
            names, name = parent(args[0])
        except KeyError:
            assert event == "os.mkdir", (event, args)  # mkdir(parents=True) begins with the last one, which fails
            continue
        node: File | Folder
        if event == "write":
            node = names.setdefault(name, File())
            assert isinstance(node, File)
            node.content = args[1]
        elif event == "os.mkdir":
            names.setdefault(name, Folder())
        elif event in ("os.rename", "os.link") and name in names:
            targets, target = parent(args[1])
            if event == "os.rename":
                targets[target] = names.pop(name)
            else:
                targets.setdefault(target, names[name])
        elif event in ("os.remove", "os.rmdir"):
            names.pop(name, None)
        elif event == "sync":
            node = find(args[0])
            if isinstance(node, File):
                node.synced = node.content
            else:
                node.synced = dict(node.names)
    return disk


def restart(disk: Folder, target: Path, way: str, seed: int = 0) -> None:
    """Write to `target` what a cut leaves: all that was not synced is `lost`, its content is `empty`, or either."""
    choose = random.Random(seed)

    def surviving(synced: Any, now: Any) -> Any:
        return choose.choice([synced, now]) if way == "either" else synced

    target.mkdir(exist_ok=True)
    for name in sorted({*disk.names, *disk.synced}):
        now, synced = disk.names.get(name), disk.synced.get(name)
        node = now if way == "empty" else surviving(synced, now)
        if isinstance(node, Folder):
            restart(node, target / name, way, choose.randrange(1 << 30))
        elif isinstance(node, File):
            before = node.synced if node.synced is not None else b""
            content = surviving(before, node.content)
            if way == "either" and node.synced is None:
                content = content[: choose.randrange(len(content) + 1)]
            (target / name).write_bytes(content)


WAYS = ("lost", "empty", "either")
# By the last call, the ways that leave what they did not before it; of other calls, the last two.
CHANGED = {"sync": WAYS, "claim": WAYS, "write": ("either",)}


def restarts(
    operations: list[Operation], folder: Path, every: int = 1, first: int = 1
) -> Iterator[tuple[Path, list[Operation]]]:
    """Yield what prefixes of the operations may leave, and what was claimed before the cut.

    Of those with at least `first` operations, without `every`, all in each way in which they differ from the one
    before; else one in so many, in one of the ways.
    """
    for length in range(first, len(operations) + 1, every):
        ways = CHANGED.get(operations[length - 1][0], WAYS[1:])
        ways = ways if every == 1 else (ways[length // every % len(ways)],)
        disk = replayed(operations[:length])
        claims = [operation[1:] for operation in operations[:length] if operation[0] == "claim"]
        for way in ways:
            target = folder / f"{length}-{way}"
            restart(disk, target, way, length)
            yield target, claims
