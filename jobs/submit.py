"""A Ray cluster by its dashboard's URL: putting a job there, and following, stopping and listing ours."""

import asyncio
import json
import logging
import os
import platform
import re
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from http.client import HTTPException
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pyarrow as pa

from jobs.resume import SUBMITTED
from pipeline.executors import Nodes
from pipeline.registry import nearest
from schemas import WinnowError

OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray's client prefers them to what it is told
SECONDS = 10.0  # for an answer
CHATTY = ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging")  # under ray
AT_WORK = ("PENDING", "RUNNING")
TOKEN = (
    "this cluster wants a token: put the one that its head was started with (`ray get-auth-token` prints it there) "
    "into RAY_AUTH_TOKEN or ~/.ray/auth_token"
)

PORT = "the head prints its dashboard's URL when it starts, with port 8265 unless told otherwise"


@dataclass(frozen=True)
class Job:
    """One of ours; `exit` is its command's exit code, where it came so far."""

    name: str
    status: str
    plan: str
    recipe: str
    store: str
    started: float
    ended: float | None
    message: str
    exit: int | None

    @property
    def at_work(self) -> bool:
        return self.status in AT_WORK


def resolved(address: str | None) -> tuple[str, str]:
    """The dashboard's URL, and what said it: one of Ray's variables, or --address. Raises WinnowError for no URL."""
    said = {name: os.environ.get(name) for name in OVERRIDES} | {"--address": address}
    source, url = next(((name, value) for name, value in said.items() if value), ("--address", ""))
    hint = f"; {source} outranks --address: unset it" if source in OVERRIDES else ""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        known = False
    if not known:
        raise WinnowError(
            f"{source}: must be the URL of the head's dashboard, like http://head:8265, got {url!r}{hint}"
        )
    return url.rstrip("/"), source


class Cluster:
    """One that answers, lets us in, and has our versions of Ray and Python; raises WinnowError otherwise."""

    def __init__(self, address: str | None) -> None:
        self.url, self.source = resolved(address)
        self.headers = _authorization()
        self._check_version("Ray", self._asked("/api/version", "ray_version"), version("ray"))
        python = self._asked("/api/v0/cluster_metadata", "data")["pythonVersion"]
        self._check_version("Python", _minor(python), _minor(platform.python_version()))
        ray_jobs: Any = import_module("ray.job_submission")
        for name in CHATTY:
            logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
        with self._told():
            self.client = ray_jobs.JobSubmissionClient(self.url, headers=self.headers)

    def _asked(self, path: str, name: str) -> Any:
        """One field of what the dashboard answers; Ray's own client waits for an answer without end."""
        try:
            with urlopen(Request(self.url + path, headers=self.headers), timeout=SECONDS) as answer:
                return json.load(answer)[name]
        except HTTPError as error:
            if error.code in (401, 403):
                raise WinnowError(f"{self.url}: {error.read().decode(errors='replace')[:200]}; {TOKEN}") from None
        except (HTTPException, ConnectionResetError, ValueError, TypeError, LookupError):
            pass
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise WinnowError(
                f"{self.url}: does not answer ({reason}); is the cluster up, and reachable from here? {PORT}"
            ) from None
        raise WinnowError(
            f"{self.url}: answers, but not as a Ray dashboard: a port of Ray's own, or another program; {PORT}"
        )

    def _check_version(self, what: str, theirs: str, ours: str) -> None:
        """The dashboard speaks HTTP to any client, but what we ship is run by the cluster's Ray and Python."""
        if theirs != ours:
            raise WinnowError(
                f"{self.url}: this cluster runs {what} {theirs}, and here is {what} {ours}; start it from an "
                f"environment made as this one was (make setup), or use one here with {what} {theirs}"
            )

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What Ray's client raises is said in a line, the last of a traceback from there."""
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise WinnowError(f"{self.url}: {lines[-1]}") from None

    def nodes(self) -> Nodes:
        """What each living node has."""
        found = self._asked("/api/v0/nodes?limit=10000", "data")["result"]["result"]
        if not (alive := [node["resources_total"] for node in found if node["state"] == "ALIVE"]):
            raise WinnowError(f"{self.url}: no node of this cluster is up; is it just starting? try again in a moment")
        return alive

    def jobs(self) -> list[Job]:
        """Ours, the first started first."""
        with self._told():
            found = self.client.list_jobs()
        ours = [_job(each) for each in found if "winnow_plan" in (each.metadata or {})]
        return sorted(ours, key=lambda job: job.started)

    def job(self, name: str) -> Job:
        known = {job.name: job for job in self.jobs()}
        if name not in known:
            raise WinnowError(f"{self.url}: no job {name!r}; {nearest(name, list(known)) if known else 'it has none'}")
        return known[name]

    def at_work(self, plan: str, store: str) -> Job | None:
        """The job that makes this plan in this store now."""
        return next((job for job in self.jobs() if job.at_work and (job.plan, job.store) == (plan, store)), None)

    def submit(self, folder: Path, words: list[str], *, recipes: str, plan: str, store: str, again: str) -> str:
        """Start `winnow <words>` there with the folder's content; `again` is how to go on from it. The job's name."""
        attempts = [int(job.name.rsplit("-", 1)[1]) for job in self.jobs() if job.plan == plan]
        name = f"{re.sub(r'[^A-Za-z0-9_.]+', '-', recipes)[:60]}-{plan}-{max(attempts, default=0) + 1}"
        with self._told():
            made: str = self.client.submit_job(
                entrypoint=f"sh jobs/start.sh $PPID {shlex.join(words)}",
                submission_id=name,
                runtime_env={"working_dir": str(folder), "env_vars": {SUBMITTED: again}},
                metadata={"winnow_plan": plan, "winnow_recipe": recipes, "winnow_store": store},
            )
        return made

    def log(self, name: str) -> str:
        with self._told():
            text: str = self.client.get_job_logs(name)
            return text

    def follow(self, name: str, write: Callable[[str], Any]) -> Job:
        """Write the log as it comes; the job once it has ended. Raises WinnowError where the cluster is lost."""
        try:
            asyncio.run(self._tail(name, write))
            while (job := self.job(name)).at_work:
                time.sleep(0.2)
        except BrokenPipeError:
            raise  # of the one who reads us
        except Exception as error:  # whatever the libraries under Ray's client make of a lost connection
            raise WinnowError(
                f"{self.url}: lost while following {name} ({error}); if the cluster is there, `winnow logs {name} "
                f"--address {self.url}` follows again; if not, submitting again goes on from the finished parts"
            ) from None
        return job

    async def _tail(self, name: str, write: Callable[[str], Any]) -> None:
        async for chunk in self.client.tail_job_logs(name):
            write(chunk)

    def stop(self, name: str) -> Job:
        """The job as it ended, which may have been before."""
        job = self.job(name)
        if job.at_work:
            with self._told():
                self.client.stop_job(name)
        while (job := self.job(name)).at_work:
            time.sleep(0.2)
        return job


def listing(address: str | None) -> pa.Table:
    """Our jobs on a cluster, the last started last."""
    rows = [
        {
            "job": job.name,
            "status": job.status,
            "recipe": job.recipe,
            "store": job.store,
            "started": f"{datetime.fromtimestamp(job.started):%Y-%m-%d %H:%M:%S}",
            "seconds": round((job.ended or time.time()) - job.started),
        }
        for job in Cluster(address).jobs()
    ]
    names = ("job", "status", "recipe", "store", "started", "seconds")
    return pa.table({name: [row[name] for row in rows] for name in names})


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _job(details: Any) -> Job:
    about = details.metadata
    return Job(
        name=details.submission_id,
        status=str(details.status.value),
        plan=about["winnow_plan"],
        recipe=about.get("winnow_recipe", ""),
        store=about.get("winnow_store", ""),
        started=(details.start_time or 0) / 1000,
        ended=details.end_time / 1000 if details.end_time else None,
        message=details.message or "",
        exit=details.driver_exit_code,
    )


def _authorization() -> dict[str, str]:
    """The token that Ray would use too, if there is one: its own client sends it only where RAY_AUTH_MODE says so."""
    token = os.environ.get("RAY_AUTH_TOKEN")
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not token and file.is_file():
        token = file.read_text().strip()
    return {"Authorization": f"Bearer {token}"} if token else {}
