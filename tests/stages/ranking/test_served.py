"""Judge and reward model on a server (tests/served.py): they say what they say in this process."""

import math
import re
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.store.fingerprints import model_digest
from schemas import Model, WinnowError
from stages.network.load import load_network, save_network
from stages.ranking.base import Response, both_orders
from stages.ranking.rankers import open_ranker
from stages.ranking.rankers import ranker as rankers
from tests.material import bound, context
from tests.served import CLASSIFY, ServedModel, no_client_left, served  # noqa: F401 - a fixture
from tests.stages.ranking.test_rankers import BAD, GOOD
from tests.stages.ranking.test_reward_models import headed
from tests.stages.sampling.test_endpoint import endpoint
from tests.stages.training.test_checks import planned

CONTEXT = "Please book a boat."
CHAT = "/v1/chat/completions"


def reward_model(tiny, folder, seed):
    """Return the tiny model with a random head, whose scores lie units apart."""
    init = headed(tiny, folder / "head")
    network = load_network(init)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        network.score.weight.copy_(torch.randn(network.score.weight.shape, generator=generator))
    model = save_network(network, init, folder / "model")
    return Model(model.folder, model_digest(model.folder))


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    return reward_model(tiny, tmp_path_factory.mktemp("one"), 3)


def opened_on(url, model, **options) -> Any:
    return closing(open_ranker(rankers.bind(endpoint(url, **options)), model))


def readings(ranker, *texts):
    return [ranker.read(CONTEXT, Response(text)) for text in texts]


def test_a_served_reward_model_scores_as_one_in_this_process(model):
    """It reads the same ids, and is asked for the score before any activation."""
    own: Any = open_ranker(bound(rankers, "pointwise"), model)
    with served(model) as server, opened_on(server.url, model) as ranker:
        rows = readings(ranker, GOOD, BAD, "boat")
        assert rows == readings(own, GOOD, BAD, "boat")
        scores = ranker.score(CONTEXT, rows)
        assert scores == pytest.approx(own.score(CONTEXT, rows), abs=1e-4)
        assert np.ptp(scores) > 0.1
        (body, *_) = server.bodies(CLASSIFY)
        assert body["input"] in [[*prompt, *response] for prompt, response in rows]
        assert (body["use_activation"], body["add_special_tokens"]) == (False, False)


def test_another_reward_model_is_refused(model, tiny, tmp_path):
    """When the step starts, and when the server was lost meanwhile."""
    other = reward_model(tiny, tmp_path, 4)
    with (
        served(other) as server,
        opened_on(server.url, model) as ranker,
        pytest.raises(WinnowError, match="vllm serve"),
    ):
        ranker.score(CONTEXT, readings(ranker, GOOD, BAD))
    with served(model) as server, opened_on(server.url, model) as ranker:
        ranker.score(CONTEXT, readings(ranker, GOOD, BAD))
        server.network = load_network(other)
        server.failures.append(None)
        with pytest.raises(WinnowError, match="vllm serve"):
            ranker.score(CONTEXT, readings(ranker, GOOD, BAD))


def test_a_served_classifier_of_several_labels_is_refused(model):
    with served(model) as server, opened_on(server.url, model) as ranker:
        server.alter = lambda answer: answer["data"][0].update(probs=[0.1, 0.9])
        with pytest.raises(WinnowError, match=r"2 classes.*one label"):
            ranker.score(CONTEXT, readings(ranker, GOOD))


@pytest.mark.parametrize("items", [0, 2])
def test_another_number_of_scores_than_asked_for_is_refused(items, model):
    with served(model) as server, opened_on(server.url, model, verify=False) as ranker:
        server.alter = lambda answer: answer.update(data=answer["data"] * items)
        with pytest.raises(WinnowError, match=rf"{server.url}.*{items} scores for one response"):
            ranker.score(CONTEXT, readings(ranker, GOOD))


def test_a_server_with_less_room_than_a_response_needs_is_refused(model):
    with served(model) as server:
        server.max_model_len = 4
        with opened_on(server.url, model) as ranker, pytest.raises(WinnowError, match=r"max-model-len 128"):
            ranker.score(CONTEXT, readings(ranker, GOOD))


def test_a_served_judge_votes_as_one_in_this_process(tiny):
    options = dict(max_tokens=2, temperature=1.0, template="{prompt} {a} or {b}?", seed=5)
    pairs = [(GOOD, BAD), (BAD, "x"), ("x", GOOD)]
    with served(tiny) as server:
        by_server, own = (
            open_ranker(bound(rankers, "llm_judge", engine=engine, **options), tiny)
            for engine in (endpoint(server.url), "transformers")
        )
        logits = by_server.logits(CONTEXT, pairs)
        assert np.array_equal(logits, own.logits(CONTEXT, pairs), equal_nan=True)
        sent = {tuple(body["prompt"]) for body in server.bodies()}
    assert {tuple(ids) for a, b in pairs for ids in own.questions(CONTEXT, a, b)} <= sent  # type: ignore[attr-defined]


def test_where_a_reward_model_is_served_is_not_part_of_the_key():
    one, two = (
        rankers.bind(endpoint(url, max_retries=n, dtype=dtype)) for url, n, dtype in
        (("http://one/v1", 1, "float32"), ("http://two/v1", 2, "float32"))
    )  # fmt: skip
    assert one.entry.identity_of(one.options) == two.entry.identity_of(two.options) == {"dtype": "float32"}


class ChatServer(ServedModel):
    """Server of chat completions that prefers the longer response, by half a nat per letter, and A by a nat.

    answer_with: what it does instead, of the texts of the question.
    """

    def respond(self, path, body):
        assert path == CHAT
        (message,) = body["messages"]
        first, second = re.findall(r"<(.*?)>", message["content"])
        logit = 1.0 + 0.5 * (len(first) - len(second))
        a = -math.log1p(math.exp(-logit))
        top = [{"token": token, "logprob": logp} for token, logp in self.tokens(first, second, a, a - logit)]
        logprobs = {"content": [{"token": "A", "logprob": a, "top_logprobs": top}]}
        return {"choices": [{"message": {"role": "assistant", "content": "A"}, "logprobs": logprobs}]}

    def tokens(self, first, second, a, b):
        half = math.log(0.5)
        return [("A", a + half), (" A", a + half), ("B", b), ("The", -20.0)]


def hosted(url, **options):
    by = {"name": "hosted_judge", "url": url, "model": "tiny", "template": "{prompt} <{a}> <{b}>", "max_retries": 2}
    return closing(open_ranker(rankers.bind(by | options), None))


@pytest.fixture
def chat(tiny):
    with closing(ChatServer(tiny)) as server:
        yield server


def test_a_hosted_judge_needs_no_folder_and_its_logits_are_those_of_the_servers_labels(chat):
    """Label tokens add up; both orders cancel the server's bias to A; each question is one user's message."""
    pairs = [("long one", "short"), ("x", "y"), ("a", "much longer"), ("long one", "short")]
    with hosted(chat.url) as judge:
        ((mean, forward, _),) = both_orders(judge, [(CONTEXT, pairs)], "both")
    assert forward == pytest.approx([1 + 0.5 * (len(a) - len(b)) for a, b in pairs])
    assert mean == pytest.approx([0.5 * (len(a) - len(b)) for a, b in pairs])
    bodies = chat.bodies(CHAT)
    assert len(bodies) == 6  # equal pairs are asked once
    assert {(body["max_tokens"], body["logprobs"], body["top_logprobs"], body["temperature"]) for body in bodies} == {
        (1, True, 20, 1.0)
    }
    assert {message["role"] for body in bodies for message in body["messages"]} == {"user"}


def test_a_label_that_is_not_listed_is_bounded_and_neither_is_no_verdict(chat):
    chat.tokens = lambda first, second, a, b: {
        "x": [("A", -0.1), ("The", -9.0)], "y": [("The", -0.1), ("It", -3.0)],
    }[first]  # fmt: skip
    ctx = context()
    with hosted(chat.url) as judge:
        assert judge.logits(CONTEXT, [("x", "z"), ("y", "z")]) == pytest.approx([8.9, math.nan], nan_ok=True)
        judge.finish_part(ctx)
        assert ctx.counters == {"answers": 2, "answers_without_verdict": 1, "answers_of_one_label": 1}
        chat.tokens = lambda first, second, a, b: [("The", -0.1)]
        judge.logits(CONTEXT, [("x", f"w{n}") for n in range(31)])
        with pytest.raises(WinnowError, match=r"32 of 33 answers.*`by.max_without_verdict`.*'The'.*`by.template`"):
            judge.finish_part(ctx)


@pytest.mark.parametrize("logprobs", [None, {"content": None}, {"content": []}])
def test_a_server_without_log_probs_is_refused_with_the_cure(chat, logprobs):
    message = {"role": "assistant", "content": "A"}
    chat.respond = lambda path, body: {"choices": [{"message": message, "logprobs": logprobs}]}
    with hosted(chat.url) as judge, pytest.raises(WinnowError, match=r"log-probs.*vLLM.*`llm_judge`"):
        judge.logits(CONTEXT, [("a", "b")])


def test_a_hosted_judge_is_known_by_its_name_and_not_by_its_address(data_dir, tmp_path):
    """It takes the place of a ranker's step in a config; the key has the model's name, and no URL."""

    def key(url, model):
        use = {"use": "hosted_judge", "with": {"url": url, "model": model}}
        plan = planned(data_dir, tmp_path, {"ranker": use})
        return next(step.key for step in plan.steps if step.name == "reward")

    assert key("http://one:1/v1", "judge") == key("http://two:2/v1", "judge") != key("http://one:1/v1", "other")
