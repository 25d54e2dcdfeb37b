"""A Ray head of our own, made by `ray start`: on the loopback address, on free ports, with a token, and gone after."""

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
    """All held until all are found, so that no two are one."""
    with ExitStack() as held:
        found = [held.enter_context(closing(socket.socket())) for _ in range(count)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in found]


@dataclass(frozen=True)
class Head:
    url: str
    gcs: str
    home: Path
    token: str

    def winnow(self, *words: str | Path, token: str | None = "") -> subprocess.CompletedProcess:
        """The command as a user runs it who was given the token, or another one, or none."""
        return subprocess.run(self.command(*words), env=self.env(token), capture_output=True, text=True, check=False)

    def following(self, *words: str | Path) -> subprocess.Popen:
        """The same, while it runs."""
        return subprocess.Popen(self.command(*words), env=self.env(), stdout=subprocess.PIPE, text=True)

    def command(self, *words: str | Path) -> list[str]:
        return [sys.executable, "-m", "jobs", *map(str, words)]

    def env(self, token: str | None = "") -> dict[str, str]:
        given = self.token if token == "" else token
        clean = {name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
        own = {"HOME": str(self.home), "PYTHONPATH": str(ROOT)}
        return clean | own | ({"RAY_AUTH_TOKEN": given} if given else {})

    def nodes(self) -> int:
        """That are up; 0 before anything answers."""
        request = Request(f"{self.url}/api/v0/nodes", headers={"Authorization": f"Bearer {self.token}"})
        with suppress(OSError, KeyError, TypeError), urlopen(request, timeout=5) as answer:
            return len(json.load(answer)["data"]["result"]["result"])
        return 0


@contextmanager
def ray_head(cpus: int = 2) -> Iterator[Head]:
    """Started by its full name, with no environment on the PATH; every process of it is killed at the end."""
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
            end(process)


def end(process: subprocess.Popen) -> None:
    """Kill a process and all that it started."""
    with suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(family, timeout=10)
    process.wait()
