"""Ids of prompts and responses are those of the chat template applied to both, for every template that TRL ships."""

import json
import re
import shutil
import warnings
from datetime import date
from pathlib import Path

import pytest
import trl
from tokenizers import AddedToken
from transformers import AutoTokenizer

from pipeline.stage import signature_of, stages
from pipeline.store.fingerprints import ModelPath
from schemas import Model, WinnowError
from stages.data.texts import TEMPLATE_OPTIONS, Conversation, Reply
from stages.data.tokenizer import Tokenizer
from stages.network.models import model

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(file.stem for file in TEMPLATES.glob("*.jinja") if not file.stem.endswith("_training"))
CONTROL_TOKENS = re.compile(r"<[|｜][\w▁:/ ]+[|｜]>|</?(?:start|end)_of_(?:turn|utterance)>|<turn\|>|<\|turn>")
DATE = "2026-01-31"
USER = {"role": "user", "content": "What is the time in Rome?"}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Return the time in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "its name"}},
            "required": ["city"],
        },
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "get_time", "arguments": {"city": "Rome"}}}],
}
CONVERSATIONS: dict[str, tuple[Conversation, Reply]] = {
    "one turn": (Conversation("Good morning!"), "Hello, friend."),
    "lines": (Conversation([USER]), "def f(x):\n    return x\n\n\nSo it is."),
    "several turns": (
        Conversation([USER, {"role": "assistant", "content": "Noon."}, {"role": "user", "content": "Sure?"}]),
        "Quite sure.",
    ),
    "system": (Conversation([{"role": "system", "content": "Be kind."}, USER]), "It is noon."),
    "tools": (Conversation([USER], [TOOL]), "I do not know."),
    "call": (Conversation([USER], [TOOL]), CALL),
    "result": (Conversation([USER, CALL, {"role": "tool", "name": "get_time", "content": "12:00"}], [TOOL]), "Noon."),
    "reasoning": (Conversation([USER]), {"role": "assistant", "content": "Noon.", "reasoning_content": "The sun."}),
    "reasoning as text": (Conversation([USER]), "<think>\nThe sun is high.\n</think>\n\nIt is noon."),
    "prefill": (Conversation([USER, {"role": "assistant", "content": "It is"}]), " noon."),
}


@pytest.fixture(scope="module")
def tokenizer_of(tiny, tmp_path_factory):
    """Return the tokenizer of the tiny model with a template of TRL, its control tokens, and a date."""

    def load(name: str) -> Tokenizer:
        folder = tmp_path_factory.mktemp(name) / "model"
        shutil.copytree(tiny.folder, folder)
        template = (TEMPLATES / f"{name}.jinja").read_text()
        inner = AutoTokenizer.from_pretrained(folder)
        marks = sorted(set(CONTROL_TOKENS.findall(template)))
        inner.add_tokens([AddedToken(mark, special=True) for mark in marks])
        inner.add_tokens(["<think>", "</think>", "\n\n"])  # real vocabularies have a token of two line ends
        inner.chat_template = template
        inner.save_pretrained(folder)
        config = folder / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {TEMPLATE_OPTIONS: {"date": DATE}}))
        return Tokenizer(Model(folder, name))

    return load


def reference_ids(tokenizer: Tokenizer, conversation: Conversation, reply: Reply) -> list[list[int]]:
    """Return the ids of prompt and reply as transformers renders them, reasoning under each key that templates use."""
    content = conversation.content
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    message = {"role": "assistant", "content": reply} if isinstance(reply, str) else dict(reply)
    if messages[-1]["role"] == "assistant":
        message["content"] = messages[-1]["content"] + message["content"]
        messages = messages[:-1]
    variants = [message]
    thought = message.get("reasoning_content")
    if message["content"].startswith("<think>"):
        thought, _, answer = message["content"].removeprefix("<think>").partition("</think>")
        message = message | {"content": answer.strip()}
    if thought:
        bare = {key: value for key, value in message.items() if key != "reasoning_content"}
        variants += [bare | {key: thought.strip()} for key in ("reasoning_content", "reasoning", "thinking")]
    results = []
    for variant in variants:
        for parts in (False, True):
            chat = [*messages, variant]
            if parts:
                chat = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in chat]
            try:
                text = tokenizer.inner.apply_chat_template(
                    chat, tools=conversation.tools, tokenize=False, strftime_now=date.fromisoformat(DATE).strftime
                )
            except Exception:
                continue
            results.append(tokenizer.encode(text))
    return results


def test_prompt_and_response_are_what_the_template_renders_of_both(tokenizer_of):
    """ids(prompt) + ids(response) begin ids(template(prompt + reply)), whose rest is no part of the turn.

    The prompt's ids do not depend on the reply, and are those that ask for one as far as any answer follows them. The
    last id is one that the sampler stops at. What the template does not render is rejected with the reason.
    """
    wrong, refused = [], {}
    for name in NAMES:
        tokenizer, template = tokenizer_of(name), (TEMPLATES / f"{name}.jinja").read_text()
        for kind, (conversation, reply) in CONVERSATIONS.items():
            try:
                with warnings.catch_warnings(record=True) as notes:
                    warnings.simplefilter("always")
                    prompt = tokenizer.prompt_ids(conversation)
                    response = tokenizer.response_ids(conversation, reply)
            except ValueError as error:
                refused[name, kind] = str(error)
                continue
            assert bool(notes) == (name.startswith("deepseek") and kind != "prefill"), (name, notes)
            # phi-3 and glm-4 write the token that ends a conversation only after its last answer, or never.
            ids, eos = prompt + response, tokenizer.inner.eos_token_id
            rests = [
                [*whole, eos][len(ids) :]
                for whole in reference_ids(tokenizer, conversation, reply)
                if [*whole, eos][: len(ids)] == ids
            ]
            in_turn = {token for token in response[:-1] if token in tokenizer.stop[:1]}
            after = [tokenizer.rendered([token for token in rest if token != eos]).strip() for rest in rests]
            if response[-1] not in tokenizer.stop or in_turn or after[:1] != [""]:
                wrong.append((name, kind, tokenizer.rendered(prompt), tokenizer.rendered(response)))
        assert ((name, "tools") in refused) == ("tools" not in template), name
        if "tool_calls" not in template:
            assert {(name, "call"), (name, "result")} <= refused.keys(), name
    assert not wrong
    assert {kind for _, kind in refused} <= {"system", "tools", "call", "result", "reasoning", "reasoning as text"}
    assert all("template" in reason or "do not begin" in reason for reason in refused.values()), refused


def test_templates_with_a_date_read_the_models_own(tokenizer_of):
    """The same ids on any day; without a date in the model's folder the template is refused, and so is the plan."""
    tokenizer = tokenizer_of("llama3_2")
    assert "31 Jan 2026" in tokenizer.rendered(tokenizer.prompt_ids("Hi"))
    tokenizer.template_options = {}
    with pytest.raises(WinnowError, match=r"today's date.*`date: 2026-01-31`"):
        tokenizer.prompt_ids("Good morning")
    path = ModelPath(str(tokenizer.folder))
    options = dict(path=path, adapter=None, save_dtype="float32", date=None, chat_template_kwargs=None)
    check = signature_of(stages.entries["model"]).check
    assert check(options, {}) == []  # a folder of a store has its day
    config = tokenizer.folder / "tokenizer_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({name: value for name, value in content.items() if name != TEMPLATE_OPTIONS}))
    assert "date: 2026-01-31" in " ".join(check(options, {}))
    assert check(options | {"date": DATE}, {}) == []
    assert check(options | {"chat_template_kwargs": {"date_string": "26 Jul 2024"}}, {}) == []


def test_options_of_the_template_stay_with_the_model(tiny, tmp_path, ctx):
    """`chat_template_kwargs` of stage `model` reach every rendering, named templates included."""
    folder = Path(shutil.copytree(tiny.folder, tmp_path / "qwen3"))
    shutil.copyfile(TEMPLATES / "qwen3.jinja", folder / "chat_template.jinja")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}{{ messages }}")
    source = Tokenizer(Model(folder, "qwen3"))
    copy = Tokenizer(model(ctx, path=ModelPath(str(folder)), chat_template_kwargs={"enable_thinking": False}))
    end = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert copy.rendered(copy.prompt_ids("Hi")).endswith(end)
    assert not source.rendered(source.prompt_ids("Hi")).endswith(end)
    assert "get_time" in copy.rendered(copy.prompt_ids(Conversation("Hi", [TOOL])))
