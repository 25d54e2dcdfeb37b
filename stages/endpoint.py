"""Client of a model that an OpenAI-compatible server serves: what engine and ranker `endpoint` share."""

import asyncio
import json
import os
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from threading import Thread
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ValidationError

from pipeline import Range
from schemas import MachineError, WinnowError
from stages.extras import install_command

T = TypeVar("T")
A = TypeVar("A", bound=BaseModel)
CHAT = "/chat/completions"
NO_KEY = "EMPTY"  # what vLLM's own examples send to a server without a key
FIRST_RETRIES = 2  # before a server counts as down: nothing is lost yet, so that the user learns it in seconds
PROGRESS_SECONDS = 0.5
CONNECT_SECONDS = 10.0
IDLE_SECONDS = 15.0  # in which a server could have been started anew; vLLM needs longer
PASSING = (408, 409, 429)  # and all from 500 on: status codes after which the client has tried again


def _url(text: str) -> str:
    """Return the URL without a slash at its end. Errors do not repeat it: it may hold a password."""
    wrong = WinnowError(
        "must be the address of a server, as in http://host:8000/v1, with a port from 1 to 65535 if any"
    )
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:  # of brackets, or of a port; its message repeats the text
        raise wrong from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not re.fullmatch(r"[!-~]+", text):
        raise wrong
    if parts.username or parts.password or parts.query or parts.fragment:
        raise WinnowError(
            "must hold no user, password, query or fragment: a key does not belong in a config; put it into an "
            "environment variable and name that in `api_key_env`"
        )
    return text.rstrip("/")


def _environment_variable(name: str) -> str:
    """Return the name of an environment variable. Errors do not repeat it: it may be the key itself."""
    if not re.fullmatch("[A-Z_][A-Z0-9_]*", name):  # keys have lower case, and some are identifiers
        raise WinnowError(
            "must be the name of an environment variable that holds the key, as in MY_SERVER_KEY, and not the key"
        )
    return name


def _filled(name: str) -> str:
    if not name.strip():
        raise ValueError("must be the name under which the server serves the model")
    return name


Url = Annotated[str, AfterValidator(_url)]
ServedName = Annotated[str, AfterValidator(_filled)]
VariableName = Annotated[str, AfterValidator(_environment_variable)]
Concurrency = Annotated[int, Range(gt=0, le=10_000)]
Timeout = Annotated[float, Range(gt=0, le=86_400)]
Retries = Annotated[int, Range(ge=0, le=1000)]


@dataclass(frozen=True)
class Endpoint:
    """Where a model is served, and how it is asked: nothing of it is part of a key.

    url ends in /v1, as in OpenAI's clients. api_key_env: name of the environment variable that holds the key.
    """

    url: str
    model: str
    api_key_env: str | None
    concurrency: int
    timeout: float
    max_retries: int

    def __str__(self) -> str:
        return f"endpoint {self.url}"


class _Card(BaseModel):
    id: str
    max_model_len: int | None = None


class _Cards(BaseModel):
    data: list[_Card]


class ChatMessage(BaseModel):
    """Message that a model wrote."""

    content: str | None = None


class ChatToken(BaseModel):
    """Token that could have been drawn."""

    token: str
    logprob: float


class ChatPosition(ChatToken):
    """Token that was drawn, with the likeliest ones in its place."""

    top_logprobs: list[ChatToken]


class ChatLogprobs(BaseModel):
    """Log-probs of an answer's tokens."""

    content: list[ChatPosition] | None = None


class ChatChoice(BaseModel):
    """Answer to chat messages."""

    message: ChatMessage
    logprobs: ChatLogprobs | None = None


class ChatCompletion(BaseModel):
    """Response of `/chat/completions`."""

    choices: list[ChatChoice]


def endpoint_problems(option: str) -> list[str]:
    """Return at plan time why no server can be asked: the client is not installed. The server need not be up yet."""
    if find_spec("openai") is None:
        return [f"{option}: endpoint needs the library openai: {install_command('endpoint', 'openai')}"]
    return []


class EndpointClient:
    """Client that asks for many answers at once, from any number of threads, of which `concurrency` are on their way.

    The library openai tries again after a lost connection, a timeout, 408, 409, 429 and 5xx, and waits 0.5, 1, 2, ...
    8 s before it does (or as long as `Retry-After` says). All requests are made in a thread of this object.

    max_model_len: the longest sequence that the server takes, None if it does not say so; it is asked at the start.
    Raises MachineError if the server is down, and WinnowError if it serves no model of this name.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        if find_spec("openai") is None:
            raise WinnowError(f"{endpoint}: needs the library openai: {install_command('endpoint', 'openai')}")
        import httpx2
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        self.endpoint = endpoint
        self.key = NO_KEY
        if endpoint.api_key_env is not None:
            self.key = os.environ.get(endpoint.api_key_env, "").removesuffix("\n").removesuffix("\r")  # as a file ends
            if self.key and not re.fullmatch("[!-~]+", self.key):  # libraries would repeat it in their refusal
                raise WinnowError(
                    f"{endpoint}: api_key_env: the key in the environment variable {endpoint.api_key_env} has a space, "
                    "a line break or a character that is not ASCII, which no header can hold: set the key alone"
                )
            if not self.key:
                raise WinnowError(
                    f"{endpoint}: api_key_env: the environment variable {endpoint.api_key_env} is not set where this "
                    "step runs; set it there, or remove `api_key_env` for a server without a key"
                )
        # Lost connections, and times without an answer that are as long as a start: after each, the server may be
        # another one. A connection that was idle is no sign, for vLLM closes it after 5 s.
        self.interruptions = 0
        self.last_answer = time.monotonic()

        class Client(DefaultAsyncHttpxClient):
            """HTTP client that counts lost connections, which openai's own attempts hide, and limits whole answers.

            httpx2's own limit is between two bytes: of an answer that drips, it would never be reached.
            """

            async def send(client, request: Any, **options: Any) -> Any:  # noqa: N805
                try:
                    async with asyncio.timeout(endpoint.timeout):
                        return await super().send(request, **options)
                except httpx2.TransportError:
                    self.interruptions += 1
                    raise
                except TimeoutError:
                    self.interruptions += 1
                    raise httpx2.ReadTimeout("no whole answer", request=request) from None

        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=endpoint.concurrency)
        timeout = httpx2.Timeout(endpoint.timeout, connect=min(CONNECT_SECONDS, endpoint.timeout))
        self.client = AsyncOpenAI(
            base_url=endpoint.url,
            api_key=self.key,
            max_retries=endpoint.max_retries,
            timeout=timeout,
            http_client=Client(limits=limits, timeout=timeout),
        )
        # Else those of the environment, which are for OpenAI and not for this server.
        self.client.organization = self.client.project = self.client.admin_api_key = None
        self.slots = asyncio.Semaphore(endpoint.concurrency)
        self.loop = asyncio.new_event_loop()
        self.thread = Thread(target=self.loop.run_forever, name="endpoint", daemon=True)
        self.thread.start()
        try:
            self.max_model_len = self._run(self._get_max_model_len())
        except BaseException:
            self.close()
            raise

    async def _get_max_model_len(self) -> int | None:
        """Return the longest sequence that the server takes, if it says so."""
        retries = min(FIRST_RETRIES, self.endpoint.max_retries)
        client = self.client.with_options(max_retries=retries)
        cards = self.parse(_Cards, await self._answer(lambda: client.get("/models", cast_to=object), retries))
        names = [card.id for card in cards.data]
        if self.endpoint.model not in names:
            raise WinnowError(
                f"{self.endpoint}: serves no model {self.endpoint.model!r}; it serves {', '.join(names) or 'none'}: "
                "set `model` to one of these"
            )
        return next(card.max_model_len for card in cards.data if card.id == self.endpoint.model)

    def post_all(
        self,
        path: str,
        bodies: Sequence[Callable[[], dict[str, Any]]],
        read: Callable[[int, Any], T],
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[T]:
        """Return `read(n, answer)` of each request, in their order; call `progress` now and then with the number done.

        bodies: functions that return the body of a request, called when it is sent. path: below the URL, or an address.
        Raises MachineError for a server that is down or overloaded after all attempts, WinnowError for what it refuses.
        """
        n_answers = 0

        async def post(n: int) -> T:
            nonlocal n_answers
            async with self.slots:
                request = partial(self.client.post, path, cast_to=object, body=bodies[n]())
                answer = await self._answer(request, self.endpoint.max_retries)
            n_answers += 1
            return read(n, answer)

        async def post_each() -> list[T]:
            tasks = [asyncio.ensure_future(post(n)) for n in range(len(bodies))]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:  # of one that failed, the others
                    task.cancel()

        future = asyncio.run_coroutine_threadsafe(post_each(), self.loop)
        try:
            while wait([future], PROGRESS_SECONDS).not_done:
                progress(n_answers)
            answers = future.result()
        finally:
            future.cancel()  # an interrupt leaves none behind
        progress(len(answers))
        return answers

    def ask_all(
        self, question: Callable[[int], str], options: Sequence[dict[str, Any]], read: Callable[[list[ChatChoice]], T]
    ) -> list[T]:
        """Return `read` of the answers to each question, one user's message that the server's own template renders.

        question: returns the nth, when it is sent. options: those of each request, such as `temperature`. Raises as
        `post_all` does.
        """

        def body(n: int) -> dict[str, Any]:
            return {"model": self.endpoint.model, "messages": [{"role": "user", "content": question(n)}]} | options[n]

        bodies = [partial(body, n) for n in range(len(options))]
        return self.post_all(CHAT, bodies, lambda n, answer: read(self.parse(ChatCompletion, answer).choices))

    def post(self, path: str, body: dict[str, Any], read: Callable[[int, Any], T]) -> T:
        """Return `read(0, answer)` of one request."""
        return self.post_all(path, [lambda: body], read)[0]

    def parse(self, model: type[A], answer: Any) -> A:
        """Return an answer as an instance of a pydantic model; raise WinnowError if it is none."""
        try:
            return model.model_validate(answer)
        except ValidationError as error:
            first = error.errors()[0]
            raise self._no_answer(": ".join([*map(str, first["loc"]), first["msg"]])) from None

    def close(self) -> None:
        """Close the connections, and end the thread."""
        self._run(self.client.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def _no_answer(self, why: str) -> WinnowError:
        return WinnowError(
            f"{self.endpoint}: its answer is none of an OpenAI-compatible server ({why}); see whether `url` is right, "
            "which ends in /v1"
        )

    async def _answer(self, request: Callable[[], Awaitable[object]], retries: int) -> object:
        """Return the answer; raise MachineError or WinnowError in one line, without the key, for what openai raises."""
        import openai

        attempts = f"in {retries + 1} attempts"
        if time.monotonic() - self.last_answer > IDLE_SECONDS:
            self.interruptions += 1
        try:
            answer = await request()
            self.last_answer = time.monotonic()
            return answer
        except openai.APITimeoutError:
            raise MachineError(
                f"{self.endpoint}: no answer within {self.endpoint.timeout:g} s, {attempts}; see whether the server "
                "still works, raise `timeout`, or lower `concurrency`"
            ) from None
        except openai.APIConnectionError as error:
            raise MachineError(
                f"{self.endpoint}: no connection {attempts} ({self._line(error.__cause__ or error)}); start the "
                f"server, so that it serves {self.endpoint.model}"
            ) from None
        except openai.APIStatusError as error:
            text = f"{self.endpoint}: status {error.status_code}: {self._line(_detail_of(error.body) or error.message)}"
            if error.status_code in PASSING or error.status_code >= 500:
                raise MachineError(
                    f"{text} ({attempts}); see the server's log, and lower `concurrency` if it is overloaded"
                ) from None
            if error.status_code in (401, 403):
                variable = self.endpoint.api_key_env
                cure = f"the key in {variable} is not its own" if variable else "name its key's variable: `api_key_env`"
                text = f"{text}; {cure}"
            elif error.status_code == 404:
                text = f"{text}; see whether `url` ends in /v1, and what the server was started for"
            raise WinnowError(text) from None
        except ValueError as error:  # it calls itself JSON, and is none
            raise self._no_answer(self._line(error)) from None

    def _line(self, text: object) -> str:
        """Return a text in one line, cut, and without the key, which a server may repeat."""
        line = " ".join(str(text).split())
        if self.key != NO_KEY:
            for written in (self.key, repr(self.key)[1:-1], json.dumps(self.key)[1:-1]):
                line = line.replace(written, "***")
        return line[:500]


def _detail_of(body: object) -> str | None:
    """Return the message of a server's error, as vLLM (`error.message`) or FastAPI (`detail`) has it."""
    if isinstance(body, dict):
        inner = body.get("error", body)
        message = inner.get("message") or inner.get("detail") if isinstance(inner, dict) else inner
        return str(message) if message else None
    return str(body) if body else None
