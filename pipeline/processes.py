"""Processes that end with the one that started them, also if that is killed, and orphans that are ended at a start.

A process that is killed ends nothing that it has started: an engine in a process of its own would keep its GPU's
memory. So a process of ours watches its parent. Should it hang, and not end by itself, a file with its id and the time
of its start, in the folder `processes` of WINNOW_CACHE, names it to the next run on this machine. Processes whose code
is not ours have a guard.
"""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from uuid import uuid4

from pipeline import guard
from pipeline.store.storage import cache, machine, replace
from schemas import WinnowWarning

WATCH_SECONDS = 1.0  # between two looks at the parent
END_SECONDS = 10.0  # that the kernel may take to end a killed process
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class DeadProcessError(RuntimeError):
    """A process that a task needs has ended: what the task did may be the cause, and another attempt may succeed."""


def start_of(process: int) -> str:
    """Return when a living process of this machine started, which tells it from a later process of the same id.

    It is counted in ticks since the machine's boot, which no change of its clock alters. Empty for a process that has
    ended, and where the system does not say it (there is no /proc).
    """
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else f"{BOOT_ID.read_text().strip()} {fields[19]}"
    except OSError:
        return ""


class Guard:
    """Process that kills others when `end` is called or this one has ended: what starts while it is `marking`.

    It is there before the first of them, for this process may be killed while they start.
    """

    def __init__(self) -> None:
        self.mark = f"{os.getpid()}-{uuid4().hex}"
        # In a session of its own, for Ctrl-C is sent to all processes of a terminal's.
        program = [sys.executable, "-I", "-S", guard.__file__, self.mark]
        self.process = subprocess.Popen(program, stdin=subprocess.PIPE, start_new_session=True)

    @contextmanager
    def marking(self) -> Iterator[None]:
        """Put a mark into the environment of the processes that start inside, and of those that they start."""
        os.environ[guard.MARK] = self.mark
        try:
            yield
        finally:
            del os.environ[guard.MARK]

    def end(self) -> None:
        """Kill the processes now."""
        self.process.communicate(timeout=END_SECONDS)


def end_with(parent: int) -> None:
    """Let this process be killed as soon as `parent`, which started it, has ended."""
    with suppress(OSError):  # of a cache that cannot be written: the watch goes without it
        content = {
            "process": os.getpid(),
            "start": start_of(os.getpid()),
            "parent": parent,
            "parent_start": start_of(parent),
        }
        record = cache() / "processes" / f"{machine()}.{os.getpid()}.json"
        replace(record, json.dumps(content).encode(), durable=False)
    Thread(target=_watch, args=(parent,), daemon=True, name="watch of the parent").start()


def _watch(parent: int) -> None:
    # Not by PR_SET_PDEATHSIG: the kernel sends it when the thread ends that started this process, not the process.
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def end_orphans() -> list[int]:
    """Kill the processes of this machine whose parent has ended, and return their ids; forget those that ended."""
    killed = []
    for record in (cache() / "processes").glob(f"{machine()}.*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):  # a cut record, or one that another run deleted
            content = json.loads(record.read_text())
            process, start = int(content["process"]), content["start"]
            if start and start_of(process) == start:
                if start_of(int(content["parent"])) == content["parent_start"]:
                    continue
                os.kill(process, signal.SIGKILL)
                killed.append(process)
                deadline = time.monotonic() + END_SECONDS
                while start_of(process) == start and time.monotonic() < deadline:
                    time.sleep(0.05)
        record.unlink(missing_ok=True)
    if killed:
        numbers = ", ".join(map(str, killed))
        warnings.warn(f"ended what a killed run had left on this machine: process {numbers}", WinnowWarning, 2)
    return killed
