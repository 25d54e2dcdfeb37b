"""Ids of prompts and responses are those of the chat template applied to both, for every template that TRL ships."""

import json
import shutil
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from pipeline.stage import InputStep, signature_of, stages
from pipeline.store.fingerprints import DataPath, ModelPath, TemplatePath, model_digest
from schemas import Model, WinnowError, WinnowWarning, prompt_id
from stages.data.chat_templates import changes_with_answer, chat_templates
from stages.data.first_rows import template_error
from stages.data.own_candidates import own_candidates
from stages.data.preferences import preferences
from stages.data.prompts import check_system_prompt, prompts
from stages.data.texts import TEMPLATE_OPTIONS, Conversation, as_messages
from stages.data.tokenizer import MAX_ENDS, Tokenizer
from stages.network.load import load_network, save_network
from stages.network.models import model
from stages.sampling.draws import draw_texts
from stages.sampling.engines import Completion
from tests.conftest import write_jsonl
from tests.families import CONTROL_TOKENS, TEMPLATES
from tests.stages.ranking.test_planned_prompts import SYSTEM_IN_LAST

NAMES = sorted(file.stem for file in TEMPLATES.glob("*.jinja") if not file.stem.endswith("_training"))
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
CONVERSATIONS: dict[str, tuple[Conversation, str | dict[str, Any]]] = {
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


def reference_ids(tokenizer: Tokenizer, conversation: Conversation, reply: str | dict[str, Any]) -> list[list[int]]:
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
    last id is one that the sampler stops at. What the template does not render is rejected with the reason, and a plan
    refuses the same: what it cannot tell, such as calls of tools, it does not refuse.
    """
    wrong, refused, planned = [], {}, {}
    for name in NAMES:
        tokenizer, template = tokenizer_of(name), (TEMPLATES / f"{name}.jinja").read_text()
        for kind, (conversation, reply) in CONVERSATIONS.items():
            roles = tuple(message["role"] for message in as_messages(conversation.content))
            if error := template_error(template, roles, has_tools=bool(conversation.tools)):
                planned[name, kind] = str(error)
            try:
                with warnings.catch_warnings(record=True) as notes:
                    warnings.simplefilter("always")
                    prompt = tokenizer.prompt_ids(conversation)
                    response = tokenizer.response_ids(conversation, reply)
            except ValueError as error:
                refused[name, kind] = str(error)
                continue
            assert bool(notes) == (name.startswith("deepseek") and kind != "prefill"), (name, notes)
            assert kind == "prefill" or not changes_with_answer(template, roles, has_tools=bool(conversation.tools))
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
    assert planned.keys() <= refused.keys()
    assert {key for key in refused if key[1] in ("system", "several turns", "tools")} <= planned.keys()
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
    names = ("adapter", "date", "chat_template", "chat_template_kwargs")
    options = dict(path=path, save_dtype="float32") | dict.fromkeys(names)
    check_model = signature_of(stages.entries["model"]).check

    def check(options):  # the template has tokens for which the tiny network has no embedding: not what is tested
        return [problem for problem in check_model(options, {}) if "embeddings" not in problem]

    assert check(options) == []  # a folder of a store has its day
    config = tokenizer.folder / "tokenizer_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({name: value for name, value in content.items() if name != TEMPLATE_OPTIONS}))
    assert "date: 2026-01-31" in " ".join(check(options))
    assert check(options | {"date": DATE}) == []
    assert check(options | {"chat_template_kwargs": {"date_string": "26 Jul 2024"}}) == []


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


# Options of stage `model` and of the stages that read data


@pytest.fixture
def policy_with(tiny, tmp_path, ctx):
    """Return the tiny model by stage `model`, with a template of TRL by option and others in its folder."""

    def load(name: str, **options) -> Model:
        folder = Path(shutil.copytree(tiny.folder, tmp_path / name))
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 'of the folder' }}")
        return model(
            ctx, path=ModelPath(str(folder)), chat_template=TemplatePath(str(TEMPLATES / f"{name}.jinja")), **options
        )

    return load


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", ["qwen3", "llama3_2"])
def test_a_template_from_a_file_replaces_those_of_the_folder(policy_with, name, conversation):
    """The ids are those that transformers' apply_chat_template gives with the text of the file, tools included."""
    policy = policy_with(name, date=DATE)
    tokenizer, template = Tokenizer(policy), (TEMPLATES / f"{name}.jinja").read_text()
    content, tools = CONVERSATIONS[conversation][0].content, CONVERSATIONS[conversation][0].tools
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    is_prefix = messages[-1]["role"] == "assistant"
    text = tokenizer.inner.apply_chat_template(
        messages, tools=tools, chat_template=template, tokenize=False, strftime_now=date.fromisoformat(DATE).strftime,
        add_generation_prompt=not is_prefix, continue_final_message=is_prefix,
    )  # fmt: skip
    assert tokenizer.rendered(tokenizer.prompt_ids(CONVERSATIONS[conversation][0])) == text
    assert AutoTokenizer.from_pretrained(policy.folder).chat_template == template


def test_a_template_from_a_file_stays_with_what_is_trained_and_is_part_of_the_digest(policy_with, tmp_path):
    policy = policy_with("qwen3")
    trained = save_network(load_network(policy), policy, tmp_path / "trained")
    (template,) = chat_templates(trained.folder).values()
    assert template.strip() == (TEMPLATES / "qwen3.jinja").read_text().strip()
    digest = model_digest(policy.folder)
    assert digest != model_digest(policy_with("qwen2_5").folder)


@pytest.mark.parametrize(
    ("text", "words"), [("{% if %}", "line 1"), ("{{ messages[0].missing.content }}", "chat template refuses")]
)
def test_a_file_that_is_no_template_is_refused(tiny, tmp_path, ctx, text, words):
    """A template is refused for its syntax in the plan, for what it cannot render by the first step."""
    file = tmp_path / "template.jinja"
    file.write_text(text)
    with pytest.raises((ValueError, WinnowError), match=words):
        model(ctx, path=ModelPath(str(tiny.folder)), chat_template=TemplatePath(str(file)))


def test_a_system_prompt_is_rendered_where_a_row_has_none(tiny, tmp_path, ctx):
    """The ids are apply_chat_template's with that message; a system message of the row's own stays."""
    own = [{"role": "system", "content": "Be brief."}, USER]
    file = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Hello!"}, {"prompt": [USER]}, {"prompt": own}])
    rows = prompts(tiny, ctx, path=DataPath(str(file)), system_prompt="Be kind.").to_pylist()
    inner = Tokenizer(tiny).inner
    system = {"role": "system", "content": "Be kind."}
    expected = [[system, {"role": "user", "content": "Hello!"}], [system, USER], own]
    rendered = [inner.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in expected]
    assert sorted(row["token_ids"] for row in rows) == sorted(rendered)
    assert {row["prompt_id"] for row in rows} == {prompt_id(chat) for chat in expected}


def test_a_prompt_without_a_turn_of_the_user_is_read_with_a_word(tiny, tmp_path, ctx):
    file = write_jsonl(tmp_path / "p.jsonl", [{"prompt": [{"role": "system", "content": "Be brief."}]}])
    with pytest.warns(WinnowWarning, match="no turn of the user"):
        assert prompts(tiny, ctx, path=DataPath(str(file))).num_rows == 1


def test_a_system_prompt_reaches_preferences_and_responses_follow_it(tiny, tmp_path, ctx):
    """The id of a prompt is then that of stage `prompts` with the same option, and a response's ids do not change."""
    rows = [{"prompt": "Hello!", "chosen": "Hi there.", "rejected": "No.", "response": "Yes.", "reward": 1.0}]
    path = DataPath(str(write_jsonl(tmp_path / "p.jsonl", rows)))
    by_prompts = prompts(tiny, ctx, path=path, system_prompt="Be kind.")
    by_preferences, candidates, _ = preferences(tiny, ctx, path=path, system_prompt="Be kind.")
    by_candidates, *_ = own_candidates(
        tiny, ctx, path=path, response="response", reward="reward", system_prompt="Be kind."
    )
    assert by_prompts["token_ids"].to_pylist() == by_preferences["token_ids"].to_pylist()
    assert by_prompts["prompt_id"] == by_preferences["prompt_id"] == by_candidates["prompt_id"]
    assert candidates["token_ids"].to_pylist() == preferences(tiny, ctx, path=path)[1]["token_ids"].to_pylist()


def test_a_system_prompt_does_not_decide_what_is_held_out(tiny, tmp_path, ctx):
    path = DataPath(str(write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"Ask {n}."} for n in range(40)])))
    tables = [prompts(tiny, ctx, path=path, heldout=0.5, system_prompt=text) for text in (None, "Be kind.", "Rhyme.")]
    splits = [{row["text"].split("Ask ")[1]: row["split"] for row in table.to_pylist()} for table in tables]
    assert splits[0] == splits[1] == splits[2]
    assert set(splits[0].values()) == {"train", "heldout"}


def test_a_system_prompt_that_the_template_lacks_is_refused(tiny, tmp_path, ctx, tokenizer_of):
    """When the plan is made if there is no template, else before the first row: every row would be rejected."""
    bare = Path(shutil.copytree(tiny.folder, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    path = DataPath(str(write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Hello!"}])))
    options = {"path": ModelPath(str(bare)), "adapter": None, "chat_template": None}
    inputs = {"tokenizer": InputStep("model", options)}
    (problem,) = check_system_prompt({"system_prompt": "Be kind."}, inputs)
    assert "`chat_template`" in problem
    template = TemplatePath(str(TEMPLATES / "qwen3.jinja"))
    inputs = {"tokenizer": InputStep("model", options | {"chat_template": template})}
    assert check_system_prompt({"system_prompt": "Be kind."}, inputs) == []
    gemma = tokenizer_of("gemma")
    with pytest.raises(WinnowError, match="system_prompt: "):
        prompts(Model(gemma.folder, ""), ctx, path=path, system_prompt="Be kind.")


def test_ends_of_prompts_are_few_where_each_prompt_has_its_own(tiny, tmp_path):
    """Llama-2's template writes no token behind the question: every prompt would be compared with all before it."""
    folder = Path(shutil.copytree(tiny.folder, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} "
        "[/INST]{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = Tokenizer(Model(folder, ""))
    ids = [tokenizer.prompt_ids(f"Question {n}") for n in range(MAX_ENDS + 5)]
    assert ids == [tokenizer.encode(f"{tokenizer.inner.bos_token}[INST] Question {n} [/INST]") for n in range(len(ids))]
    assert len(tokenizer._ends) == MAX_ENDS


@pytest.fixture
def changing(tiny, tmp_path) -> Model:
    """A model whose template writes the system text only while no answer follows."""
    folder = Path(shutil.copytree(tiny.folder, tmp_path / "changing"))
    (folder / "chat_template.jinja").write_text(SYSTEM_IN_LAST)
    return Model(folder, "")


def test_responses_are_drawn_after_prompts_that_change_once_an_answer_follows(changing, tmp_path, ctx):
    """Their ids are those of add_generation_prompt; a demonstration, which does not follow them, is rejected."""
    system = {"role": "system", "content": "Be kind."}
    rows = [{"prompt": [system, USER], "answer": "Noon."}, {"prompt": [USER], "answer": "Noon."}]
    path = DataPath(str(write_jsonl(tmp_path / "p.jsonl", rows)))
    with pytest.warns(WinnowWarning, match=r"1 of 2 prompts.*`chat_template`.*user_messages\[-1\]"):
        table = prompts(changing, ctx, path=path, demonstration="answer").to_pylist()
    ids = {row["prompt_id"]: (row["token_ids"], row["demonstration"]) for row in table}
    inner = Tokenizer(changing).inner
    for messages, demonstration in (([system, USER], None), ([USER], "Noon.")):
        expected = inner.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        content = messages if len(messages) > 1 else USER["content"]
        assert ids[prompt_id(content)] == (expected, demonstration)
    assert [row["reason"] for row in ctx.rejects.to_pylist()] == [
        "the ids of prompt and response together do not begin with those of the prompt"
    ]
    with pytest.warns(WinnowWarning, match="1 of 1 prompts"):
        (row,) = prompts(
            changing, ctx, path=DataPath(str(write_jsonl(tmp_path / "one.jsonl", rows[1:]))), system_prompt="Be kind."
        ).to_pylist()
    assert "Be kind." in row["rendered"]


def test_responses_of_a_file_to_such_prompts_are_rejected_with_the_cure(changing, tmp_path, ctx):
    rows = [{"prompt": [{"role": "system", "content": "Be kind."}, USER], "chosen": "Noon.", "rejected": "No."}]
    path = DataPath(str(write_jsonl(tmp_path / "p.jsonl", rows)))
    assert [len(table) for table in preferences(changing, ctx, path=path)] == [0, 0, 0]
    (reject,) = ctx.rejects.to_pylist()
    assert "once an answer follows" in reject["reason"]
    assert "user_messages[-1]" in reject["detail"]


def test_turns_of_sharegpt_are_read_as_the_messages_that_they_are(tiny, tmp_path, ctx):
    turns = [("system", "Be kind."), ("human", "Hello!"), ("gpt", "Hi."), ("human", "A boat?")]
    names = {"human": "user", "gpt": "assistant"}
    rows = [[{"from": role, "value": text} for role, text in turns]]
    rows += [[{"role": names.get(role, role), "content": text} for role, text in turns]]
    tables = []
    for n, row in enumerate(rows):
        path = DataPath(str(write_jsonl(tmp_path / f"{n}.jsonl", [{"conversations": row}])))
        tables.append(prompts(tiny, ctx, path=path, prompt="conversations").to_pylist())
    assert len(tables[0]) == 1
    assert tables[0] == tables[1]


def drawn_text(tokenizer: Tokenizer, conversation: Conversation, ids: list[int]) -> tuple[str, str | None]:
    row = {"token_ids": tokenizer.prompt_ids(conversation), "chat": None}
    text, raw_text, _ = draw_texts(tokenizer, Completion(ids, 0.0, "stop"), (), row)
    return text, raw_text


@pytest.mark.parametrize("name", ["glm4moe", "gptoss", "nemotron_3_nano", "qwen3", "qwen3_5_think", "smolvlm"])
def test_a_draw_has_the_text_of_a_response_from_a_file_with_the_same_ids(tokenizer_of, name):
    """Without what the template writes before every answer (an empty <think>, a channel): judges would compare two
    texts of one response."""
    tokenizer = tokenizer_of(name)
    assert tokenizer.lead
    conversation, reply = CONVERSATIONS["one turn"]
    ids = tokenizer.response_ids(conversation, reply)
    assert drawn_text(tokenizer, conversation, ids) == (reply, None)
    assert drawn_text(tokenizer, conversation, [*tokenizer.lead, ids[-1]])[0] == ""


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "qwen3_8"])
def test_the_text_of_a_draw_begins_with_the_thought_that_its_prompt_opens(tokenizer_of, name):
    """As a response from a file does, whether the template writes <think> into the prompt (the last two) or not."""
    tokenizer = tokenizer_of(name)
    conversation, reply = CONVERSATIONS["reasoning as text"]
    ids = tokenizer.response_ids(conversation, reply)
    assert drawn_text(tokenizer, conversation, ids) == (reply, None)


@pytest.mark.parametrize(
    ("drawn", "text"),
    [
        ("    return [ 1 , 2 ]\n  # it 's .\n\n", "    return [ 1 , 2 ]\n  # it 's ."),
        ("\n\tx", "\n\tx"),
        (" It is.", "It is."),
        (" \n", ""),
    ],
)
def test_the_text_of_a_draw_has_the_white_space_that_a_program_reads(tiny, drawn, text):
    """But for its end and for the one space that parts a word from its prompt."""
    tokenizer = Tokenizer(tiny)
    assert drawn_text(tokenizer, Conversation("Write it:"), [*tokenizer.encode(drawn), tokenizer.stop[0]]) == (
        text,
        None,
    )
