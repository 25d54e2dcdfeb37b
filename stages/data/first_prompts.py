"""First prompts of a local file, read when a plan is made: what its options and the tokenizer will do with them."""

import warnings
from collections.abc import Mapping
from typing import Any

from pipeline import Bound, InputStep
from schemas import WinnowError, WinnowWarning
from stages.data.chat_templates import planned_chat_template
from stages.data.files import DataSource
from stages.data.formats import columns_of, first_pairs, optional_columns_of
from stages.data.rows import Row
from stages.data.texts import Conversation, as_messages, prompt_with, tools_of

ROWS = 1000
SYSTEM_ROLES = ("system", "developer")
READ_PROMPTS = ("prompts", "preferences")  # stages whose prompts are read here


def first_conversations(options: Mapping[str, Any]) -> list[Conversation]:
    """Return the first prompts of a step that reads a local file; those that cannot be read are left out."""
    reader = options.get("reader")
    if options.get("path") is None:
        return []
    source = DataSource(options["path"], None, None, options["subset"], options["dataset_split"])
    columns = [options.get(name) for name in ("prompt", "system", "input")]
    if reader is not None:
        columns = [*columns_of(reader), *optional_columns_of(reader)]
    try:
        rows = source.head([name for name in columns if name], ROWS)
    except (WinnowError, OSError):  # which the step's own check reports
        return []
    conversations = []
    for row in rows:
        try:
            conversations.append(_conversation(row, options, reader))
        except (ValueError, WinnowError):
            continue
    system = options.get("system_prompt")
    return [_with_system(conversation, system) if system else conversation for conversation in conversations]


def chat_problems(options: Mapping[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    """Return why all prompts of a file would be rejected: they are chats, and the tokenizer has no chat template.

    Warn if some of the first ones are: what is left over to train on would be the prompts of one turn alone.
    """
    if "tokenizer" not in inputs or planned_chat_template(inputs["tokenizer"]) != "":
        return []
    prompts = first_conversations(options)
    chats = sum(prompt.plain is None and not isinstance(prompt.content, str) for prompt in prompts)
    if not chats:
        return []
    problem = (
        f"path: {chats} of the first {len(prompts)} prompts of {options['path']} are chats with a system turn or "
        "several turns, and the tokenizer has no chat template; set `chat_template` of its step of stage `model` to a "
        "Jinja file"
    )
    if chats == len(prompts):
        return [problem]
    warnings.warn(f"{problem}, else these rows will be rejected", WinnowWarning, stacklevel=2)
    return []


def _conversation(row: Row, options: Mapping[str, object], reader: Bound | None) -> Conversation:
    if reader is None:
        names = {name: str(options[name]) if options.get(name) else None for name in ("system", "input")}
        return Conversation(prompt_with(row, str(options["prompt"]), **names), tools_of(row))
    pair = first_pairs(reader, [row])[0]
    if isinstance(pair, ValueError):
        raise pair
    return Conversation(pair.prompt, pair.tools or tools_of(row))


def _with_system(conversation: Conversation, text: str) -> Conversation:
    messages = as_messages(conversation.content)
    if messages[0]["role"] in SYSTEM_ROLES:
        return conversation
    return Conversation([{"role": "system", "content": text}, *messages], conversation.tools)
