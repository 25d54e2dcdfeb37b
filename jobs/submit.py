"""A Ray cluster by its dashboard's URL: putting a job there, and following, stopping and listing ours."""

import asyncio
import logging
import re
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from importlib import import_module
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pyarrow as pa

from jobs.ray_client import Dashboard, NotThereError, last_line, token_wanted
from jobs.resume import SUBMITTED
from pipeline.registry import nearest
from schemas import WinnowError

if TYPE_CHECKING:
    from aiohttp import ClientWebSocketResponse, WSMessage

POLL = 1.0  # seconds from one look at a job to the next
PATIENCE = 5  # looks at a job that is being stopped, before we say that we wait
SILENCE = 60.0  # seconds without a line of the log until we ask whether the stream is alive
CHATTY = ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging")  # under ray
AT_WORK = ("PENDING", "RUNNING")
JOBS = "/api/jobs/"


@dataclass(frozen=True)
class Job:
    """One of ours; `exit` is its command's exit code, where it came so far, below 0 for a signal."""

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

    @property
    def attempt(self) -> int:
        return int(self.name.rsplit("-", 1)[1])


class Cluster(Dashboard):
    """A dashboard's Jobs endpoint."""

    @cached_property
    def client(self) -> Any:
        """Ray's own, which packs a folder up; it waits for answers without end."""
        ray_jobs: Any = import_module("ray.job_submission")
        for name in CHATTY:
            logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
        return ray_jobs.JobSubmissionClient(self.url, headers=self.headers)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What Ray's client raises is said in a line, the last of a traceback from there."""
        refused: Any = import_module("ray.exceptions").AuthenticationError
        try:
            yield
        except refused as error:
            raise WinnowError(f"{self.url}: {error.message.splitlines()[0]}; {token_wanted()}") from None
        except (OSError, RuntimeError, ValueError) as error:
            raise WinnowError(f"{self.url}: {last_line(str(error)) or type(error).__name__}") from None

    def jobs(self) -> list[Job]:
        """Ours, the first started first."""
        found = self.asked(JOBS, lambda told: [job for each in told if (job := _job(each))])
        return sorted(found, key=lambda job: job.started)

    def job(self, name: str) -> Job:
        """One of ours; raises WinnowError where there is none of this name."""
        with suppress(NotThereError):
            if job := self.asked(_path(name), _job):
                return job
        known = [job.name for job in self.jobs()]
        raise WinnowError(f"{self.url}: no job {name!r}; {nearest(name, known) if known else 'it has none'}")

    def submit(
        self, folder: Path, words: list[str], *, recipes: str, plan: str, store: str, again: str
    ) -> tuple[str, Job | None]:
        """Start `winnow <words>` there with the folder's content; `again` is how to go on from it.

        The job's name, and the job itself if this one makes the plan in the store already. The name is the lock: of
        two who come at once with one name Ray takes one, and the other looks again.
        """
        stem = re.sub(r"[^A-Za-z0-9_.]+", "-", recipes)[:60].strip("-") or "run"
        about = {"winnow_plan": plan, "winnow_recipe": recipes, "winnow_store": store}
        while True:
            ours = [job for job in self.jobs() if job.plan == plan]
            if busy := next((job for job in ours if job.at_work and job.store == store), None):
                return busy.name, busy
            name = f"{stem}-{plan}-{max((job.attempt for job in ours), default=0) + 1}"
            try:
                self._post(name, folder, words, about, again)
            except WinnowError:
                if name not in [job.name for job in self.jobs()]:
                    raise
            else:
                return name, None

    def _post(self, name: str, folder: Path, words: list[str], about: dict[str, str], again: str) -> None:
        with self._told():
            self.client.submit_job(
                entrypoint=f"sh jobs/start.sh $PPID {shlex.join(words)}",
                submission_id=name,
                runtime_env={"working_dir": str(folder), "env_vars": {SUBMITTED: again}},
                metadata=about,
            )

    def log(self, name: str) -> str:
        """All of it so far."""
        text: str = self.asked(f"{_path(name)}/logs", itemgetter("logs"))
        return text

    def follow(self, name: str, write: Callable[[str], Any]) -> Job:
        """Write the log as it comes; the job once it has ended. Raises WinnowError where the cluster is lost."""
        log = Transcript(write)
        while True:
            asyncio.run(self._stream(name, log))
            try:
                job = self.job(name)
            except WinnowError as error:
                raise WinnowError(
                    f"{self.url}: lost while following {name} ({str(error).removeprefix(f'{self.url}: ')}); if the "
                    f"cluster is there, `winnow logs {name} --address {self.url}` follows again; if not, submitting "
                    "again goes on from the finished parts"
                ) from None
            with suppress(WinnowError):  # of a node that is gone, its log is too
                log.add(0, self.log(name))
            if not job.at_work:
                return job
            time.sleep(POLL)

    async def _stream(self, name: str, log: "Transcript") -> None:
        """As much of the log as comes in one go: a proxy ends what is idle, and a node what runs on it."""
        from aiohttp import ClientSession, ClientWSTimeout, WSMsgType

        url, length = f"{self.url}{_path(name)}/logs/tail", 0
        try:
            async with (
                ClientSession(headers=self.headers) as session,
                session.ws_connect(url, timeout=ClientWSTimeout(ws_close=0)) as socket,  # the head says no farewell
            ):
                while (part := await self._next(socket, name, length)) and part.type is WSMsgType.TEXT:
                    log.add(length, part.data)
                    length += len(part.data)
        except BrokenPipeError:
            raise  # of the one who reads us
        except Exception:  # whatever the libraries make of a lost connection: what it means, the next question tells
            return

    async def _next(self, socket: "ClientWebSocketResponse", name: str, length: int) -> "WSMessage | None":
        """What comes next; none where the stream died in silence, as one does when the power goes."""
        coming = asyncio.ensure_future(socket.receive())
        while not (await asyncio.wait([coming], timeout=SILENCE))[0]:
            if len(self.log(name)) > length or not self.job(name).at_work:
                return None
        return await coming

    def stop(self, name: str, say: Callable[[str], Any]) -> Job:
        """The job as it ended, which may have been before."""
        looks, told = 0, False
        while (job := self.job(name)).at_work:
            told = told or self.asked(f"{_path(name)}/stop", itemgetter("stopped"), "POST")
            if looks == PATIENCE:
                say(f"{name} is told to stop, and has not ended yet; ctrl-c ends the waiting alone")
            time.sleep(POLL)
            looks += 1
        return job


class Transcript:
    """A log that comes in parts, and again from its start: each character is written once."""

    def __init__(self, write: Callable[[str], Any]) -> None:
        self.write = write
        self.length = 0

    def add(self, start: int, text: str) -> None:
        """Text from this place on, which is not after the end of what came so far."""
        new = text[self.length - start :] if start < self.length else text
        self.write(new)
        self.length += len(new)


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


def _path(name: str) -> str:
    return JOBS + quote(name, safe="")


def _job(details: Any) -> Job | None:
    """If it is one of ours."""
    about = details["metadata"] or {}
    if "winnow_plan" not in about:
        return None
    return Job(
        name=details["submission_id"],
        status=details["status"],
        plan=about["winnow_plan"],
        recipe=about.get("winnow_recipe", ""),
        store=about.get("winnow_store", ""),
        started=(details["start_time"] or 0) / 1000,
        ended=details["end_time"] / 1000 if details["end_time"] else None,
        message=last_line(details["message"] or ""),
        exit=details["driver_exit_code"],
    )
