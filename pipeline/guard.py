"""Program of a guard (processes.py): when its input ends, it kills the processes that were started with its argument in
their environment, as the variable MARK, and all that these have started. It imports nothing of ours, for it is to take
no memory and no time.
"""

import os
import select
import signal
import sys
import time
from contextlib import suppress

MARK = "WINNOW_GUARD"
LOOK_SECONDS = 2.0  # between two looks for what the processes have started
LAST_LOOKS, LAST_SECONDS = 5, 0.2  # after the end: one that was about to start has its environment a moment later


def stat_of(process: int) -> tuple[int, str] | None:
    """Return a process's parent and when it started, in ticks since the machine's boot; None if there is none."""
    with suppress(OSError), open(f"/proc/{process}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
        return int(fields[1]), fields[19]
    return None


def has_mark(process: int, mark: str) -> bool:
    """Return whether a process was started with this mark; one that has written its title over it is not seen."""
    with suppress(OSError), open(f"/proc/{process}/environ", "rb") as file:
        return f"{MARK}={mark}".encode() in file.read().split(b"\0")
    return False


def family_of(mark: str, starts: dict[int, str]) -> dict[int, str]:
    """Return the processes with the mark, those of `starts` (start by id) that are there, and all they have started."""
    names: list[str] = []
    with suppress(OSError):  # of a system that has none, where nothing is found
        names = os.listdir("/proc")
    processes = map(int, filter(str.isdigit, names))
    stats = {process: stat for process in processes if process != os.getpid() and (stat := stat_of(process))}
    family = {process: start for process, start in starts.items() if process in stats and stats[process][1] == start}
    family |= {process: stats[process][1] for process in stats if has_mark(process, mark)}
    while more := [process for process, (parent, _) in stats.items() if parent in family and process not in family]:
        family |= {process: stats[process][1] for process in more}
    return family


def guard(mark: str) -> None:
    """Wait for the end of the input, then kill the processes with the mark and what they have started."""
    family: dict[int, str] = {}
    while not select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:
        family = family_of(mark, family)
    for _ in range(LAST_LOOKS):
        family = family_of(mark, family)
        for process in family:
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(LAST_SECONDS)


if __name__ == "__main__":
    guard(sys.argv[1])
