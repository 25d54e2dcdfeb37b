"""Notice that processes of a Ray cluster have ended without which a run would wait for ever: the head's GCS, and the
raylet of this machine.

Ray says nothing of a raylet that has died, and ends this process with its own log a minute after the GCS has died.
"""

import socket
import time
from dataclasses import dataclass, field

from schemas import MachineError

CHECK_SECONDS = 1.0  # between two checks
TIMEOUT_SECONDS = 2.0  # of a connection
# Without a connection, after which a process counts as dead: of a cluster of this process, whose ports nobody else can
# close, and of one that was joined, whose network may have failed for a moment.
OWN_SECONDS, JOINED_SECONDS = 3.0, 20.0


class LostClusterError(MachineError):
    """A process of the cluster has ended without which nothing goes on, and no call of Ray need return."""


@dataclass
class ClusterHealth:
    """Check of the cluster that this process has joined, by connecting to the ports of both processes.

    A process that is stopped for a while (SIGSTOP, a suspended machine) still has its port: the kernel answers for it.
    """

    ports: dict[str, tuple[str, int]]
    patience: float
    last: float = field(default_factory=time.monotonic)
    lost: dict[str, float] = field(default_factory=dict)  # since when a process has not answered

    def check(self) -> None:
        """Raise LostClusterError if one of the processes has ended; look at most once per CHECK_SECONDS."""
        if time.monotonic() - self.last < CHECK_SECONDS:
            return
        for name, address in self.ports.items():
            try:
                socket.create_connection(address, timeout=TIMEOUT_SECONDS).close()
                self.lost.pop(name, None)
            except OSError as error:
                since = self.lost.setdefault(name, time.monotonic())
                if time.monotonic() - since > self.patience:
                    host, port = address
                    raise LostClusterError(
                        f"Ray's {name} has ended: nothing answers at {host}:{port} ({error}); its log is in the folder "
                        "session_latest/logs of Ray's temporary folder, and a machine out of memory is a common cause"
                    ) from None
        self.last = time.monotonic()
