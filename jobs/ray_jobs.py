"""Jobs of Winnow on a Ray cluster, by the URL of its dashboard: Ray's own client, with our checks and messages."""

import logging
import os
import platform
import re
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from jobs.resume import SUBMITTED
from pipeline.registry import nearest
from pipeline.store.storage import SYNC, is_synced
from schemas import COMMAND, WinnowError

Nodes = list[dict[str, float]]  # per node its resources: CPU, GPU, memory in bytes, ...
OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray's client prefers them to its argument
TIMEOUT = 15.0  # seconds for an answer; the head gives its own agents 10
UPLOAD_TIMEOUT = 300.0  # seconds for the upload of the code, and for the head to store it
POLL = 1.0  # seconds between two requests for the status of a job
LONG_LOG = 2**20  # characters of a log for which twice as long is waited
PATIENCE = 5  # polls of a job that is stopping before a message says so, or that fail before a job counts as lost
JOB_LIST = pa.schema([(name, pa.string()) for name in ("job", "status", "recipe", "store", "started", "seconds")])
CHATTY = ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging")  # under ray
PORT = "the head prints its dashboard's URL when it starts, with port 8265 by default"
NOT_RAY = f"answers, but not as a Ray dashboard: another port of Ray, or another program; {PORT}"


def dashboard_url(address: str | None) -> tuple[str, str]:
    """Return the dashboard's URL and its source, one of Ray's variables or --address. Raise WinnowError for no URL."""
    candidates = {name: os.environ.get(name) for name in OVERRIDES} | {"--address": address}
    source, url = next(((name, value) for name, value in candidates.items() if value), ("--address", ""))
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is not a number
        valid = False
    if not valid:
        hint = f"; {source} outranks --address: unset it" if source in OVERRIDES else ""
        got = f"got {url!r}" if url else "but is not set"
        raise WinnowError(f"{source}: must be the URL of the head's dashboard, like http://head:8265, {got}{hint}")
    return url.rstrip("/"), source


class RayJobs(JobSubmissionClient):
    """Ray's client of one cluster, with a time limit on every request, and WinnowError for all that fails.

    The constructor raises WinnowError unless the dashboard answers, accepts our token, and runs our versions of Ray
    and Python: the dashboard speaks HTTP with any client, but the code that we ship is run by the cluster's versions.
    """

    def __init__(self, address: str | None) -> None:
        self.url, self.source = dashboard_url(address)
        for name in CHATTY:
            logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
        # Ray's client sends its token only if RAY_AUTH_MODE asks for it; ours is sent if there is one.
        token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
        file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        if not token and file.is_file():
            token = file.read_text().strip()
        try:
            super().__init__(self.url, headers={"Authorization": f"Bearer {token}"} if token else {})
            metadata = self._do_request("GET", "/api/v0/cluster_metadata").json()["data"]
            versions = {
                "Ray": (metadata["rayVersion"], version("ray")),
                "Python": tuple(
                    ".".join(v.split(".")[:2]) for v in (metadata["pythonVersion"], platform.python_version())
                ),
            }
        except WinnowError:  # a ValueError too
            raise
        except (RuntimeError, ValueError, TypeError, LookupError):
            raise self._error(NOT_RAY) from None
        for library, (theirs, ours) in versions.items():
            if theirs != ours:
                raise self._error(
                    f"this cluster runs {library} {theirs}, and this environment has {library} {ours}; start the "
                    "cluster from an environment made like this one (make setup), or use one here with "
                    f"{library} {theirs}"
                )

    def _error(self, problem: str) -> WinnowError:
        return WinnowError(f"{self.url}: {problem}")

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        """Send a request with a time limit, which Ray's client does not set: a head without power never answers.

        Status 404 of a package or a job is left to the caller: it also says that the package is not uploaded yet.
        """
        limit = UPLOAD_TIMEOUT if method in ("PUT", "POST") else TIMEOUT
        try:
            response: requests.Response = super()._do_request(method, endpoint, timeout=limit, **options)
        except AuthenticationError as error:
            file = os.environ.get("RAY_AUTH_TOKEN_PATH")
            location = (
                f"{file}, which RAY_AUTH_TOKEN_PATH names instead of ~/.ray/auth_token" if file else "~/.ray/auth_token"
            )
            raise self._error(
                f"{error.message.splitlines()[0]}; this cluster requires a token: put the one with which its head was "
                f"started (`ray get-auth-token` prints it there) into RAY_AUTH_TOKEN or {location}"
            ) from None
        except (requests.ConnectionError, requests.Timeout) as error:
            if "BadStatusLine" in str(error) or "Connection reset" in str(error):  # a server, but not of HTTP
                raise self._error(NOT_RAY) from None
            # The operating system's words come last: `[Errno 111] Connection refused`, and quotes and brackets.
            words = str(error).rpartition("] ")[2].strip("()'\"")
            reason = "timed out" if isinstance(error, requests.Timeout) else words
            override = f"; {self.source} named it, and outranks --address" if self.source in OVERRIDES else ""
            raise self._error(
                f"does not answer ({reason}); is the cluster up, and reachable from here? {PORT}{override}"
            ) from None
        if response.status_code == 404:
            if not endpoint.startswith(("/api/packages/", "/api/jobs/")) or endpoint == "/api/jobs/":
                raise self._error(NOT_RAY)
        elif response.status_code >= 400:
            text = _last_line(response.text)[:300]
            problem = f"answers {response.status_code} {response.reason}{f' ({text})' if text else ''}"
            busy = response.status_code in (429, 502, 503, 504)
            raise self._error(f"{problem}; if it is just starting, try again in a moment" if busy else problem)
        return response

    def nodes(self) -> Nodes:
        """Return the resources of each living node. Raise WinnowError if there is none."""
        nodes = self._do_request("GET", "/api/v0/nodes?limit=10000").json()["data"]["result"]["result"]
        if not (alive := [node["resources_total"] for node in nodes if node["state"] == "ALIVE"]):
            raise self._error("no node of this cluster is up; if it is just starting, try again in a moment")
        return alive

    def jobs(self) -> list[JobDetails]:
        """Return the jobs that Winnow submitted, the earliest first."""
        ours = [job for job in self.list_jobs() if "winnow_plan" in (job.metadata or {})]
        return sorted(ours, key=lambda job: job.start_time or 0)

    def job(self, name: str) -> JobDetails:
        """Return one of our jobs. Raise WinnowError if there is none of this name."""
        with suppress(RuntimeError):  # 404
            if "winnow_plan" in ((job := self.get_job_info(name)).metadata or {}):
                return job
        names = [str(job.submission_id) for job in self.jobs()]
        raise self._error(f"no job {name!r}; {nearest(name, names) if names else 'it has none'}")

    def jobs_table(self) -> pa.Table:
        """Return our jobs as a table, the latest last."""
        rows = []
        for job in self.jobs():
            metadata, started = job.metadata or {}, (job.start_time or 0) / 1000
            rows.append({
                "job": job.submission_id,
                "status": str(job.status),
                "recipe": metadata.get("winnow_recipe"),
                "store": metadata.get("winnow_store"),
                "started": f"{datetime.fromtimestamp(started):%Y-%m-%d %H:%M:%S}",
                "seconds": str(round((job.end_time / 1000 if job.end_time else time.time()) - started)),
            })  # fmt: skip
        return pa.Table.from_pylist(rows, JOB_LIST)

    def submit(
        self, folder: Path, words: list[str], *, recipes: str, plan: str, store: str, resume: str
    ) -> tuple[str, JobDetails | None]:
        """Start `winnow <words>` on the cluster in a copy of `folder`; `resume` is the command that continues it.

        Return the job's name, and the job if a running one computes this plan in this store already. The name is the
        lock: of two users who submit the same at once, Ray accepts one, and the other looks again.
        """
        stem = re.sub(r"[^A-Za-z0-9_.]+", "-", recipes)[:60].strip("-") or "run"
        metadata = {"winnow_plan": plan, "winnow_recipe": recipes, "winnow_store": store}
        while True:
            same_plan = {
                str(job.submission_id): job for job in self.jobs() if (job.metadata or {})["winnow_plan"] == plan
            }
            for name, job in same_plan.items():
                if not job.status.is_terminal() and (job.metadata or {}).get("winnow_store") == store:
                    return name, job
            attempt = 1 + max((int(name.rsplit("-", 1)[1]) for name in same_plan), default=0)
            name = f"{stem}-{plan}-{attempt}"
            environment = {SUBMITTED: resume} | ({} if is_synced() else {SYNC: "off"})
            try:
                self.submit_job(
                    entrypoint=f"sh jobs/start.sh $PPID {shlex.join(words)}",
                    submission_id=name,
                    runtime_env={"working_dir": str(folder), "env_vars": environment},
                    metadata=metadata,
                )
            except (WinnowError, RuntimeError, ValueError) as error:
                if name in [job.submission_id for job in self.jobs()]:
                    continue  # another user was faster
                raise error if isinstance(error, WinnowError) else self._error(_last_line(str(error))) from None
            return name, None

    def log(self, name: str) -> str:
        """Return the whole log so far. Raise WinnowError if it is lost, as with the node that had it."""
        with self._runtime_errors():
            return self.get_job_logs(name)

    @contextmanager
    def _runtime_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._error(_last_line(str(error))) from None

    def follow(self, name: str, write: Callable[[str], Any]) -> JobDetails:
        """Write the log as it grows, and return the job when it has ended. Raise WinnowError if the cluster is lost.

        The log is polled as a whole and not streamed: a proxy cuts idle connections, and a node takes its streams with
        it. A request may fail now and then, as over hours some do.
        """
        written = failures = 0
        while True:
            try:  # the job before its log, which is then complete if the job has ended
                job, failures = self.job(name), 0
                with suppress(WinnowError):  # the node of the log is lost
                    text = self.log(name)
                    write(text[written:])
                    written = max(written, len(text))
                if job.status.is_terminal():
                    return job
            except ValueError as error:  # a WinnowError, or an answer that is no JSON
                failures += 1
                if failures == PATIENCE:
                    raise self._error(
                        f"lost while following {name} ({str(error).removeprefix(f'{self.url}: ')}); if the cluster is "
                        f"up, `{COMMAND} logs {name} --address {self.url}` follows again; if not, submitting again "
                        "continues from the finished parts"
                    ) from None
            time.sleep(POLL * (1 + written / LONG_LOG))

    def stop(self, name: str, say: Callable[[str], Any]) -> JobDetails:
        """Stop a job, wait until it has ended, and return it; it may have ended before."""
        polls, requested = 0, False
        while not (job := self.job(name)).status.is_terminal():
            with self._runtime_errors():
                requested = requested or self.stop_job(name)
            if polls == PATIENCE:
                say(f"{name} has been told to stop, and has not ended yet; Ctrl-C ends only the waiting")
            time.sleep(POLL)
            polls += 1
        return job


def failure_reason(job: JobDetails) -> str:
    """Return why a job failed, as far as its log does not say it; empty if it does."""
    code = job.driver_exit_code
    if code is None:
        return f": {_last_line(job.message)}" if job.status == "FAILED" and job.message else ""
    if code == 127:
        return ": no python3 there; start Ray from its environment, activated"
    number = -code if code < 0 else code - 128  # a signal, as a process of Ray or a shell reports it
    if number not in signal.valid_signals():
        return ""
    return f": killed by signal {number}{' (out of memory?)' if number == signal.SIGKILL else ''}"


def _last_line(text: str) -> str:
    """Return the last line with a word: of a traceback, the error; Ray ends it with a line of one period."""
    lines = (line.strip() for line in reversed(text.splitlines()))
    return next((line for line in lines if re.match(r"\w", line)), "")
