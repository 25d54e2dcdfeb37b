"""Policy, reward model and judge read what transformers' apply_chat_template says of the same messages."""

import json
import shutil
from functools import cache
from typing import Any

import pytest
import torch

from pipeline.context import StageContext, WarmCache
from pipeline.store.fingerprints import DataPath, ModelPath, model_digest
from schemas import Model
from stages.data.prompts import prompts
from stages.data.texts import Conversation, conversation_of
from stages.data.tokenizer import Tokenizer
from stages.model_config import SCORED_AT_END
from stages.network.models import model
from stages.ranking.base import QUESTION, Unreadable, read_candidates
from stages.ranking.rankers import open_ranker
from stages.ranking.rankers import ranker as rankers
from tests.conftest import write_jsonl
from tests.families import write_chat_model
from tests.jobs.test_walk import CALL, RESULT, TOOL, turn

ANSWER = "It is noon."
ASK, HELLO = turn("user", "What is the time in Rome?"), [turn("user", "Hello."), turn("assistant", "Gladly.")]
SYSTEM, PREFIX = turn("system", "Be kind."), turn("assistant", "In Rome, it is")
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "one turn": ([ASK], None),
    "system": ([SYSTEM, ASK], None),
    "several turns": ([*HELLO, ASK], None),
    "system and several turns": ([SYSTEM, *HELLO, *HELLO, ASK], None),
    "tools": ([ASK], [TOOL]),
    "result of a call": ([ASK, CALL, RESULT], [TOOL]),
    "turn after a call": ([ASK, CALL, RESULT, turn("assistant", "Noon."), turn("user", "Sure?")], [TOOL]),
    "system and tools": ([SYSTEM, *HELLO, ASK], [TOOL]),
    "prefix": ([ASK, PREFIX], None),
    "prefix after several turns": ([SYSTEM, *HELLO, ASK, PREFIX], None),
}
# Models by shape and variables of the template: the thinking switch is one of them.
SHAPES = {
    "qwen2": ("qwen2", None),
    "llama": ("llama", None),
    "gemma": ("gemma", None),
    "thinking": ("qwen3", None),
    "not thinking": ("qwen3", {"enable_thinking": False}),
}


OPENED = WarmCache()  # of the tokenizers of all policies
tokenizer_of = cache(Tokenizer)


@cache
def ranker_of(model: Model, name: str, **options: str) -> Any:
    return open_ranker(rankers.bind({"name": name} | options), model)


@pytest.fixture(scope="module")
def model_of(unmarked, tmp_path_factory):
    """Return the model of a shape, as the stage `model` copies it; each once."""
    models: dict[tuple[str, bool], Model] = {}

    def load(name: str, score: bool = False) -> Model:
        if (name, score) not in models:
            shape, kwargs = SHAPES[name]
            folder = tmp_path_factory.mktemp("models")
            write_chat_model(shape, unmarked, folder / "own", score=score)
            ctx = StageContext(folder, WarmCache(), lambda *progress: None)
            models[name, score] = model(ctx, path=ModelPath(str(folder / "own")), chat_template_kwargs=kwargs)
        return models[name, score]

    return load


def expected_ids(name: str, owner: Model, messages, tools, reply: str | None = None) -> list[int]:
    """Return transformers' ids of a conversation, with the question for an answer or with the answer."""
    inner, variables = tokenizer_of(owner).inner, SHAPES[name][1] or {}
    is_prefix = messages[-1]["role"] == "assistant"
    modes: dict[str, Any] = {"continue_final_message": True} if is_prefix else {"add_generation_prompt": True}
    if reply is not None:
        before = messages[-1]["content"] + " " if is_prefix else ""
        messages = [*(messages[:-1] if is_prefix else messages), turn("assistant", before + reply)]
        modes = {}
    return list(inner.apply_chat_template(messages, tools=tools, **modes, **variables)["input_ids"])


def row_of(policy: Model, conversation: str, tmp_path) -> dict[str, Any] | None:
    """Return the row of `prompts` of a conversation; None if it is rejected."""
    messages, tools = CONVERSATIONS[conversation]
    path = write_jsonl(tmp_path / "in.jsonl", [{"prompt": messages, "tools": tools}])
    ctx = StageContext(tmp_path, OPENED, lambda *progress: None)
    rows = prompts(policy, ctx, path=DataPath(str(path)), prefill="continue").to_pylist()
    return rows[0] if rows else None


def candidate_of(text: str, ids: list[int]) -> dict[str, Any]:
    """Return the row of `candidates` of a drawn response."""
    values = {"candidate_id": "c", "text": text, "raw_text": None, "chat": None, "token_ids": ids, "n_tokens": len(ids)}
    return values | {"finish_reason": "stop"}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_the_policy_reads_what_transformers_renders(model_of, tmp_path, name, conversation):
    """Only where the template ignores the tools, or refuses a result, is the row rejected."""
    messages, tools = CONVERSATIONS[conversation]
    row = row_of(model_of(name), conversation, tmp_path)
    assert (row is None) == (name == "gemma" and tools is not None)
    if row is not None:
        assert row["token_ids"] == expected_ids(name, model_of(name), messages, tools)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize(("policy", "scorer"), [("qwen2", "qwen2"), ("qwen2", "llama"), ("llama", "not thinking")])
def test_the_reward_model_reads_what_its_own_template_renders(model_of, tmp_path, policy, scorer, conversation):
    """All that its own template renders of prompt and answer, whatever the policy's is."""
    messages, tools = CONVERSATIONS[conversation]
    row = row_of(model_of(policy), conversation, tmp_path)
    assert row is not None
    owner = model_of(scorer, True)
    reply = " " + ANSWER if messages[-1]["role"] == "assistant" else ANSWER
    asked = conversation_of(row) or Conversation(row["text"])
    drawn = tokenizer_of(model_of(policy)).response_ids(asked, reply)
    opened = ranker_of(owner, "pointwise")
    (reading,) = read_candidates(opened, row, [candidate_of(reply, drawn)], False).values()
    assert not isinstance(reading, Unreadable)
    prompt, response = map(list, reading)
    assert prompt == expected_ids(scorer, owner, messages, tools)
    assert prompt + response == expected_ids(scorer, owner, messages, tools, ANSWER)


def with_template(model: Model, folder, *, template: str = "", **config: Any) -> Model:
    """Return a copy of a model with another chat template, and more keys in its config."""
    shutil.copytree(model.folder, folder)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return Model(folder, model_digest(folder))


# Its generation prompt ends in a space, with which the first word of an answer is one token.
SPACED = """{% for message in messages %}<|im_start|>{{ message.role }}: {{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"""


def read_by(scorer: Model, policy: Model, reply: str, tmp_path) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Return a reward model, what it reads of a reply that the policy drew, and the messages of the conversation."""
    row = row_of(policy, "several turns", tmp_path)
    assert row is not None
    drawn = Tokenizer(policy).response_ids(conversation_of(row) or row["text"], reply)
    opened: Any = open_ranker(rankers.bind("pointwise"), scorer)
    (reading,) = read_candidates(opened, row, [candidate_of(reply, drawn)], False).values()
    return opened, reading, [*CONVERSATIONS["several turns"][0], turn("assistant", reply)]


@pytest.mark.parametrize("reply", [ANSWER, "noon", "7 o'clock.", "(a) is noon"])
def test_a_token_may_lie_across_prompt_and_response(model_of, tmp_path, reply):
    """The score is the network's own on the ids of apply_chat_template of the whole conversation."""
    scorer = with_template(model_of("qwen2", True), tmp_path / "scorer", template=SPACED)
    opened, reading, messages = read_by(scorer, model_of("qwen2"), reply, tmp_path)
    ids = list(opened.tokenizer.inner.apply_chat_template(messages)["input_ids"])
    assert [*reading[0], *reading[1]] == ids
    (score,) = opened.score("", [reading]).tolist()
    network = opened.network
    with torch.inference_mode():
        (expected,) = network.score(network.base_model(torch.tensor([ids])).last_hidden_state[0, -1:].float())[0]
    assert score == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("template", ["", SPACED])
def test_a_reward_model_of_our_training_reads_no_further_than_the_end_of_the_turn(model_of, tmp_path, template):
    """As it was trained; one from elsewhere reads the line end that its template writes behind it, too."""
    scorer = with_template(model_of("qwen2", True), tmp_path / "scorer", template=template, **{SCORED_AT_END: True})
    opened, reading, messages = read_by(scorer, model_of("qwen2"), ANSWER, tmp_path)
    text = opened.tokenizer.inner.apply_chat_template(messages, tokenize=False)
    assert text.endswith("<|im_end|>\n")
    assert opened.tokenizer.rendered([*reading[0], *reading[1]]) == text.removesuffix("\n")


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("by", ["llm_judge", "pairwise"])
@pytest.mark.parametrize("name", ["qwen2", "llama", "not thinking"])
def test_a_judge_reads_a_question_that_quotes_all_turns(model_of, tmp_path, by, name, conversation):
    """One turn of a user by its own template, with every turn, call and tool of the prompt in its text."""
    messages, tools = CONVERSATIONS[conversation]
    row, judge = row_of(model_of("qwen2"), conversation, tmp_path), model_of(name)
    assert row is not None
    question = QUESTION.format(prompt=row["text"], a=ANSWER, b="No.")
    options = {"engine": "transformers"} if by == "llm_judge" else {"format": "chat"}
    opened = ranker_of(judge, by, **options)
    if by == "llm_judge":
        ids, _ = opened.questions(row["text"], ANSWER, "No.")
    else:
        ids = opened.prompt.ids(row["text"], ANSWER, "No.")
    assert ids == expected_ids(name, judge, [turn("user", question)], None)
    quoted = [message["content"] for message in messages] + ["get_time"] * bool(tools)
    assert all(text in question for text in quoted)
