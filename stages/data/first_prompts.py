"""First prompts of a local file, read when a plan is made: what its options and the tokenizer will do with them."""

import warnings
from collections.abc import Mapping
from typing import Any

from pipeline import InputStep
from schemas import WinnowError, WinnowWarning
from stages.data.chat_templates import planned_chat_template
from stages.data.files import DataSource
from stages.data.formats import columns_of, first_pairs, optional_columns_of
from stages.data.texts import Conversation, prompt_with, tools_of, with_system_prompt

ROWS = 1000
READ_PROMPTS = ("prompts", "preferences", "own_candidates")  # stages whose prompts are read here


def first_conversations(options: Mapping[str, Any]) -> list[Conversation]:
    """Return the first prompts of a step that reads a local file; those that cannot be read are left out."""
    reader = options.get("reader")
    if options.get("path") is None:
        return []
    source = DataSource(options["path"], None, None, options["subset"], options["dataset_split"])
    parts = {name: options.get(name) or None for name in ("prompt", "system", "input")}  # columns of a prompt's parts
    columns = [*parts.values()] if reader is None else [*columns_of(reader), *optional_columns_of(reader)]
    try:
        rows = source.head([name for name in columns if name], ROWS)
    except (WinnowError, OSError):  # which the step's own check reports
        return []
    conversations = []
    for row in rows:
        try:
            if reader is None:
                content = prompt_with(row, str(parts["prompt"]), system=parts["system"], input=parts["input"])
                conversations.append(Conversation(content, tools_of(row)))
            else:
                # Of a candidate reader, labelled responses, whose prompts have no plain form.
                results: list[Any] = [item for item in first_pairs(reader, [row]) if not isinstance(item, ValueError)]
                conversations += [
                    Conversation(item.prompt, item.tools or tools_of(row), getattr(item, "plain", None))
                    for item in results
                ]
        except (ValueError, WinnowError):
            continue
    system_prompt = options.get("system_prompt") or None
    return [with_system_prompt(conversation, system_prompt) for conversation in conversations]


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
