"""The dashboard of a Ray cluster, by its URL: whether it lets us in, and what it answers."""

import json
import os
import platform
import re
from collections.abc import Callable
from http.client import HTTPException
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from pipeline.execution.ray_executor import Nodes
from schemas import WinnowError

OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray's client prefers them to what it is told
SECONDS = 15.0  # for an answer; the head gives its own agent 10
PORT = "the head prints its dashboard's URL when it starts, with port 8265 unless told otherwise"
STRANGER = f"answers, but not as a Ray dashboard: a port of Ray's own, or another program; {PORT}"
T = TypeVar("T")


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
        got = f"got {url!r}" if url else "and is not given"
        raise WinnowError(f"{source}: must be the URL of the head's dashboard, like http://head:8265, {got}{hint}")
    return url.rstrip("/"), source


class NotThereError(WinnowError):
    """The server has no such path."""


class Dashboard:
    """One that answers, lets us in, and has our versions of Ray and Python; raises WinnowError otherwise."""

    def __init__(self, address: str | None) -> None:
        self.url, self.source = resolved(address)
        self.headers = _authorization()
        self._check_version("Ray", self.asked("/api/version", itemgetter("ray_version")), version("ray"))
        python = self.asked("/api/v0/cluster_metadata", lambda told: _minor(told["data"]["pythonVersion"]))
        self._check_version("Python", python, _minor(platform.python_version()))

    def asked(self, path: str, read: Callable[[Any], T], method: str = "GET") -> T:
        """What is read in the dashboard's answer, which is JSON."""
        request = Request(self.url + path, method=method)
        for name, value in self.headers.items():
            request.add_unredirected_header(name, value)  # another host is not to have the token
        try:
            with urlopen(request, timeout=SECONDS) as answer:
                return read(json.load(answer))
        except HTTPError as error:
            raise self._refusal(error) from None
        except (HTTPException, ConnectionResetError, ValueError, TypeError, LookupError):
            raise WinnowError(f"{self.url}: {STRANGER}") from None
        except OSError as error:
            reason = getattr(error, "reason", error)
            outranks = f"; {self.source} named it, and outranks --address" if self.source in OVERRIDES else ""
            raise WinnowError(
                f"{self.url}: does not answer ({reason}); is the cluster up, and reachable from here? {PORT}{outranks}"
            ) from None

    def _refusal(self, error: HTTPError) -> WinnowError:
        said = last_line(error.read().decode(errors="replace"))[:200]
        answered = f"{self.url}: answers {error.code} {error.reason}{f' ({said})' if said else ''}"
        if error.code in (401, 403):
            return WinnowError(f"{answered}; {token_wanted()}")
        if error.code == 429 or error.code >= 500:
            return WinnowError(f"{answered}; if it is just starting, try again in a moment")
        kind = NotThereError if error.code == 404 else WinnowError
        return kind(f"{self.url}: {STRANGER}")

    def _check_version(self, what: str, theirs: str, ours: str) -> None:
        """The dashboard speaks HTTP to any client, but what we ship is run by the cluster's Ray and Python."""
        if theirs != ours:
            raise WinnowError(
                f"{self.url}: this cluster runs {what} {theirs}, and here is {what} {ours}; start it from an "
                f"environment made as this one was (make setup), or use one here with {what} {theirs}"
            )

    def nodes(self) -> Nodes:
        """What each living node has."""
        found = self.asked("/api/v0/nodes?limit=10000", lambda told: told["data"]["result"]["result"])
        if not (alive := [node["resources_total"] for node in found if node["state"] == "ALIVE"]):
            raise WinnowError(f"{self.url}: no node of this cluster is up; is it just starting? try again in a moment")
        return alive


def last_line(text: str) -> str:
    """The last line that says something: of a traceback, what was raised; Ray ends it with a line of one period."""
    lines = (line.strip() for line in reversed(text.splitlines()))
    return next((line for line in lines if re.match(r"\w", line)), "")


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _authorization() -> dict[str, str]:
    """The token that Ray would use too, if there is one: its own client sends it only where RAY_AUTH_MODE says so."""
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not token and file.is_file():
        token = file.read_text().strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def token_wanted() -> str:
    file = os.environ.get("RAY_AUTH_TOKEN_PATH")
    place = f"{file}, which RAY_AUTH_TOKEN_PATH names instead of ~/.ray/auth_token" if file else "~/.ray/auth_token"
    return (
        "this cluster wants a token: put the one that its head was started with (`ray get-auth-token` prints it "
        f"there) into RAY_AUTH_TOKEN or {place}"
    )
