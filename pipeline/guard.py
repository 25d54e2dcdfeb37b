"""Program of a guard (processes.py): when its input ends, it kills the processes that its arguments name as `id:start`,
and all that these have started. It imports nothing of ours, for it is to take no memory and no time.
"""

import os
import select
import signal
import sys
from contextlib import suppress

LOOK_SECONDS = 2.0  # between two looks for what the processes have started


def stat_of(process: int) -> tuple[int, str] | None:
    """Return a process's parent and when it started, in ticks since the machine's boot; None if there is none."""
    with suppress(OSError), open(f"/proc/{process}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
        return int(fields[1]), fields[19]
    return None


def with_children(starts: dict[int, str]) -> dict[int, str]:
    """Return those of these processes, start by id, that are there, and all that they have started."""
    processes = map(int, filter(str.isdigit, os.listdir("/proc")))
    stats = {process: stat for process in processes if (stat := stat_of(process))}
    family = {process: start for process, start in starts.items() if process in stats and stats[process][1] == start}
    while more := [process for process, (parent, _) in stats.items() if parent in family and process not in family]:
        family |= {process: stats[process][1] for process in more}
    return family


def guard(starts: dict[int, str]) -> None:
    """Wait for the end of the input, then kill these processes and what they have started."""
    while not select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:
        starts = with_children(starts)
    for process in with_children(starts):
        with suppress(OSError):
            os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    guard({int(process): start for process, start in (word.split(":") for word in sys.argv[1:])})
