"""A server of a small model over real sockets, which answers as vLLM's OpenAI-compatible server does.

It draws with the engine transformers and scores with our own network, so that what comes back can be compared. It can
be told to fail. tests/bench/test_bench_endpoint.py has vLLM's own server.
"""

import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from transformers import AutoTokenizer

from schemas import Model
from stages.endpoint import EndpointClient
from stages.limits import context_length
from stages.network.forward import completion_scores, forward_rows
from stages.network.load import is_reward_model, load_network
from stages.sampling.engines import Request, Sampling, open_engine

Answer = tuple[int, Any, dict[str, str]]  # status, JSON (or text) and headers
COMPLETIONS, CLASSIFY = "/v1/completions", "/classify"


def refusal(status: int, message: str, **headers: str) -> Answer:
    """Return an error as vLLM writes it."""
    error = {"message": message, "type": "error", "param": None, "code": status}
    return status, {"error": error}, {name.replace("_", "-"): value for name, value in headers.items()}


class ServedModel:
    """Model on a port of the loopback address.

    requests: (path, body, headers) of each POST. failures: what the next POSTs get in place of an answer, an `Answer`
    or None for a connection that is closed. alter: changes an answer. on_post: called with the number of each POST.
    """

    def __init__(self, model: Model, port: int = 0, name: str = "tiny") -> None:
        self.model, self.name = model, name
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.failures: deque[Answer | None] = deque()
        self.alter: Callable[[dict[str, Any]], None] = lambda answer: None
        self.on_post: Callable[[int], None] = lambda number: None
        self.fingerprint = "one"
        self.lock = threading.Lock()
        self.running = self.most_running = 0
        self.network = load_network(model) if is_reward_model(model) else None
        self.engine = None if self.network else open_engine("transformers", model.folder, "float32")
        self.tokenizer = AutoTokenizer.from_pretrained(model.folder)
        self.max_model_len = context_length(model.folder)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(handler) -> None:  # noqa: N805
                card = {"id": self.name, "object": "model", "max_model_len": self.max_model_len}
                self.answer(handler, (200, {"object": "list", "data": [card]}, {}))

            def do_POST(handler) -> None:  # noqa: N805
                self.post(handler)

            def log_message(handler, *words: Any) -> None:  # noqa: N805
                pass

        self.connections: set[socket.socket] = set()

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def process_request(server, request: Any, address: Any) -> None:  # noqa: N805
                self.connections.add(request)
                super().process_request(request, address)

            request_queue_size = 128

            def handle_error(server, *words: Any) -> None:  # noqa: N805
                pass  # of a connection that is gone

        self.server = Server(("127.0.0.1", port), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def post(self, handler: Any) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self.lock:
            self.requests.append((handler.path, body, {key.lower(): value for key, value in handler.headers.items()}))
            number, failure = len(self.requests), self.failures.popleft() if self.failures else ()
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            self.on_post(number)
            if failure is None:
                handler.close_connection = True
                handler.connection.shutdown(socket.SHUT_RDWR)
                return
            self.answer(handler, failure or (200, self.respond(handler.path, body), {}))
        finally:
            with self.lock:
                self.running -= 1

    def answer(self, handler: Any, answer: Answer) -> None:
        status, content, headers = answer
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        handler.send_response(status)
        for name, value in ({"content-type": "application/json", "content-length": str(len(data))} | headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)

    def respond(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/tokenize":
            return {"tokens": self.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])}
        with self.lock:
            if path == CLASSIFY:
                ids = body["input"]
                scores = forward_rows(completion_scores, self.network, [(ids[:-1], ids[-1:])], "float32", 1000)
                answer = {"data": [{"index": 0, "label": "LABEL_0", "probs": scores.tolist(), "num_classes": 1}]}
            else:
                answer = self.complete(body)
            self.alter(answer)
        return answer

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        sampling = Sampling(
            body["temperature"], body["top_k"], body["max_tokens"], tuple(body["stop_token_ids"]),
            logit_bias=tuple((int(token), value) for token, value in body["logit_bias"].items()),
            bad_words=tuple(body["bad_words"]), stop=tuple(body["stop"]),
            **{name: body[name] for name in ("top_p", "min_p", "repetition_penalty", "presence_penalty",
                                             "frequency_penalty", "min_tokens", "ignore_eos")},
        )  # fmt: skip
        (completion,) = self.engine.generate([Request(body["prompt"], body["seed"])], sampling)
        ids, by_text = completion.token_ids, completion.finish_reason == "stop_string"
        choice = {
            "index": 0, "text": self.tokenizer.decode(ids), "finish_reason": "stop" if by_text else
            completion.finish_reason, "stop_reason": sampling.stop[0] if by_text else None, "token_ids": ids,
            "prompt_token_ids": body["prompt"],
            "logprobs": {"token_logprobs": [completion.logp, *[0.0] * (len(ids) - 1)]},
        }  # fmt: skip
        return {"choices": [choice], "system_fingerprint": self.fingerprint}

    def bodies(self, path: str = COMPLETIONS) -> list[dict[str, Any]]:
        """Return the bodies of the requests for a path."""
        return [body for at, body, _ in self.requests if at == path]

    def close(self) -> None:
        """Stop: connections that are open break, and new ones are refused."""
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:
            with suppress(OSError):  # closed by the other side
                connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def served(model: Model, port: int = 0, name: str = "tiny"):
    """Serve a model while the block runs."""
    server = ServedModel(model, port, name)
    try:
        yield server
    finally:
        server.close()


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def no_client_left(monkeypatch):
    """Close the clients that a test leaves to its context, as an executor does at the end of a run."""
    clients: list[EndpointClient] = []
    start = EndpointClient.__init__

    def recorded(client, endpoint):
        start(client, endpoint)
        clients.append(client)

    monkeypatch.setattr(EndpointClient, "__init__", recorded)
    yield
    for client in clients:
        if not client.loop.is_closed():
            client.close()
