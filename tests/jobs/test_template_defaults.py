"""Give users of a policy's folder what it was trained with: defaults of its chat template, and the card."""

import json
import shutil
from datetime import date
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from jobs.models import copy_model, find_model
from pipeline.store.fingerprints import CARD, ModelPath, model_digest
from pipeline.store.store import Store
from schemas import Model
from stages.data.texts import Conversation
from stages.data.tokenizer import Tokenizer
from stages.network.models import model, write_template_defaults
from tests.families import TEMPLATES
from tests.stages.data.test_templates import TOOL, USER

DAY = "2026-01-31"
TEXT = 'say "hi" \\n {{ x }} %} 😀'
TEMPLATE = """
  {% if bos_token %}{{ bos_token }}{% endif %}
{%- macro mood() %}{{ style if style is defined else 'plain' }}{% endmacro %}
{{ mood() }}{% for name in names or [] %}[{{ name }}]{% endfor %}{% if limit is defined %}{{ limit + 1 }}{% endif %}
{%- if tools %}{{ tools | tojson }}{% endif %}{% if documents %}{{ documents | tojson }}{% endif %}
{% if deep is defined %}{{ deep.a is none }} {{ deep['b c'][1] is none }}{% endif %}
{% if strftime_now is defined %}{{ strftime_now("%d %b %Y") }} {{ strftime_now('%Y') }}{% endif %}
{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""
VALUES = {"style": TEXT, "names": ["a", "b"], "limit": -2.5, "bos_token": "<<", "deep": {"a": None, "b c": [1, None]}}
CONVERSATIONS = {
    "text": ([USER], None),
    "system": ([{"role": "system", "content": "Be brief."}, USER], None),
    "tools": ([USER], [TOOL]),
}


@pytest.fixture
def policy_of(tiny: Model, tmp_path: Path, ctx):
    """Return the tiny model by stage `model` with a chat template and options, and a folder as users get it."""

    def load(template: str, **options) -> tuple[Tokenizer, Path]:
        folder = Path(shutil.copytree(tiny.folder, tmp_path / "own"))
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        stored = model(ctx, path=ModelPath(str(folder)), **options)
        copy = Path(shutil.copytree(stored.folder, tmp_path / "copy"))
        write_template_defaults(copy)
        return Tokenizer(stored), copy

    return load


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3", {"chat_template_kwargs": {"enable_thinking": False}}),
        ("llama3_2", {"date": DAY}),
        (None, {"date": DAY, "chat_template_kwargs": VALUES}),
    ],
)
def test_plain_transformers_renders_a_copied_folder_as_it_was_trained(policy_of, name, options, kind):
    """And Winnow itself reads the copy as the model of the store."""
    trained, copy = policy_of((TEMPLATES / f"{name}.jinja").read_text() if name else TEMPLATE, **options)
    messages, tools = CONVERSATIONS[kind]
    expected = trained.prompt_ids(Conversation(messages, tools))
    plain = AutoTokenizer.from_pretrained(copy)
    assert plain.apply_chat_template(messages, tools=tools, add_generation_prompt=True)["input_ids"] == expected
    assert Tokenizer(Model(copy, "copy")).prompt_ids(Conversation(messages, tools)) == expected


def test_a_callers_keyword_outranks_the_defaults_of_a_copied_folder(policy_of):
    trained, copy = policy_of((TEMPLATES / "qwen3.jinja").read_text(), chat_template_kwargs={"enable_thinking": False})
    plain, arguments = AutoTokenizer.from_pretrained(copy), dict(add_generation_prompt=True, tokenize=False)
    thinking = plain.apply_chat_template([USER], enable_thinking=True, **arguments)
    assert thinking == trained.inner.apply_chat_template([USER], enable_thinking=True, **arguments)
    assert thinking != plain.apply_chat_template([USER], **arguments)


def test_documents_of_a_caller_reach_the_template_of_a_copied_folder(policy_of):
    trained, copy = policy_of(TEMPLATE, date=DAY, chat_template_kwargs=VALUES)
    arguments = dict(documents=[{"title": "T", "text": "D"}], tokenize=False)
    expected = trained.inner.apply_chat_template(
        [USER], strftime_now=date.fromisoformat(DAY).strftime, **VALUES, **arguments
    )
    assert AutoTokenizer.from_pretrained(copy).apply_chat_template([USER], **arguments) == expected


def test_named_templates_of_any_file_have_the_defaults_once(tiny: Model, tmp_path: Path, ctx):
    folder = Path(shutil.copytree(tiny.folder, tmp_path / "own"))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = folder / "tokenizer_config.json"
    text = (TEMPLATES / "qwen3.jinja").read_text()
    templates = [{"name": "default", "template": text}, {"name": "tool_use", "template": text}]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": templates}))
    stored = model(ctx, path=ModelPath(str(folder)), chat_template_kwargs={"enable_thinking": False})
    write_template_defaults(stored.folder)
    once = model_digest(stored.folder)
    write_template_defaults(stored.folder)
    assert model_digest(stored.folder) == once
    plain = AutoTokenizer.from_pretrained(stored.folder)
    for tools in (None, [TOOL]):
        rendered = plain.apply_chat_template([USER], tools=tools, add_generation_prompt=True, tokenize=False)
        assert rendered.endswith("<think>\n\n</think>\n\n")


def test_a_user_is_told_what_the_policy_was_trained_with(winnow, tiny: Model, data_dir: Path, tmp_path: Path):
    """At the end of the run and beside the store's folder, with the keywords; a copy has them, and its card."""
    folder = Path(shutil.copytree(tiny.folder, tmp_path / "own"))
    shutil.copyfile(TEMPLATES / "qwen3.jinja", tmp_path / "mine.jinja")
    options = {"path": str(folder), "chat_template": "mine.jinja", "chat_template_kwargs": {"enable_thinking": False}}
    config = {"sft": {"use": "model", "with": options}, "prompts": {"with": {"system_prompt": "Be kind."}}}
    config |= {"optimize": {"with": {"epochs": 1}}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config | {"target": "optimize"}))
    store = tmp_path / "store"
    configs = ["--config", data_dir / "demo.yaml", "--config", tmp_path / "own.yaml"]
    code, text = winnow("run", "raft", *configs, "--store", store)
    assert code == 0, text
    facts = ["enable_thinking=False", """--default-chat-template-kwargs '{"enable_thinking": false}'""", "Be kind."]
    facts.append("mine.jinja")
    name = next(iter(Store(store).runs()))
    shown = winnow("model", name, "--store", store)[1]
    for output in (text, shown):
        assert all(fact in output for fact in [*facts, "--to"]), output
    found = find_model(Store(store), name)
    copy_model(found, tmp_path / "copy")
    assert model_digest(found.folder) == found.manifest["model"]
    card = (tmp_path / "copy" / CARD).read_text()
    assert all(fact in card for fact in facts)
    rendered = AutoTokenizer.from_pretrained(tmp_path / "copy").apply_chat_template(
        [USER], add_generation_prompt=True, tokenize=False
    )
    assert rendered.endswith("<think>\n\n</think>\n\n")
