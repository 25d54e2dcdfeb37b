"""Ray head started by `ray start` on the loopback address, on free ports, with a token; killed at the end."""

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

import psutil

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    """Return different free ports: all are bound until the last is found."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]


@dataclass(frozen=True)
class Head:
    """Running head: URL of its dashboard, address of its GCS, the home folder of its user, its token."""

    url: str
    gcs: str
    home: Path
    token: str

    def winnow(self, *words: str | Path, token: str | None = "") -> subprocess.CompletedProcess:
        """Run the command as a user with the head's token, or with another one, or with None."""
        return subprocess.run(self.command(*words), env=self.env(token), capture_output=True, text=True, check=False)

    def start(self, *words: str | Path) -> subprocess.Popen:
        """Start the same command, and return the process."""
        return subprocess.Popen(self.command(*words), env=self.env(), stdout=subprocess.PIPE, text=True)

    def command(self, *words: str | Path) -> list[str]:
        return [sys.executable, "-m", "jobs", *map(str, words)]

    def env(self, token: str | None = "") -> dict[str, str]:
        token = self.token if token == "" else token
        clean = {name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
        changes = {"HOME": str(self.home), "PYTHONPATH": str(ROOT)}
        return clean | changes | ({"RAY_AUTH_TOKEN": token} if token else {})

    def nodes(self) -> int:
        """Return how many nodes are up; 0 before anything answers."""
        request = Request(f"{self.url}/api/v0/nodes", headers={"Authorization": f"Bearer {self.token}"})
        with suppress(OSError, KeyError, TypeError, ValueError), urlopen(request, timeout=5) as answer:
            return len(json.load(answer)["data"]["result"]["result"])
        return 0


@contextmanager
def ray_head(cpus: int = 2) -> Iterator[Head]:
    """Yield a head that was started by its full name, with no environment on the PATH."""
    gcs, dashboard, client, agent = free_ports(4)
    with tempfile.TemporaryDirectory(prefix="head-", ignore_cleanup_errors=True) as folder:  # sockets have short names
        head = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", Path(folder) / "home", secrets.token_hex(16))
        head.home.mkdir()
        command = [str(BIN / "ray"), "start", "--head", "--block", f"--num-cpus={cpus}", f"--port={gcs}"]
        command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        command += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
        command += ["--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={folder}/ray"]
        command += ["--object-store-memory=80000000", "--disable-usage-stats"]
        env = head.env() | {"RAY_AUTH_MODE": "token", "PATH": "/usr/bin:/bin"}
        del env["PYTHONPATH"]
        log = Path(folder) / "log"
        with log.open("w") as out:
            process = subprocess.Popen(command, env=env, cwd=folder, stdout=out, stderr=out, start_new_session=True)
        try:
            deadline = time.monotonic() + 120
            while not head.nodes():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield head
        finally:
            kill_tree(process)


def kill_tree(process: subprocess.Popen) -> None:
    """Kill a process and all that it started."""
    with suppress(psutil.NoSuchProcess):
        processes = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for item in processes:
            with suppress(psutil.NoSuchProcess):
                item.kill()
        psutil.wait_procs(processes, timeout=10)
    process.wait()
