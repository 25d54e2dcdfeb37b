"""First prompts of a local file, read when a plan is made: what its options and the tokenizer will do with them."""

import warnings
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from pipeline import InputStep
from schemas import WinnowError, WinnowWarning
from stages.data.chat_templates import changes_with_answer, planned_chat_templates
from stages.data.files import DataSource
from stages.data.formats import columns_of, first_pairs, optional_columns_of
from stages.data.texts import (
    CHANGED,
    CHANGED_CURE,
    PREFILLED,
    PREFILLED_CURE,
    Conversation,
    CurableError,
    as_messages,
    kept_fields,
    prompt_with,
    tools_of,
    with_system_prompt,
)

ROWS = 1000
READ_PROMPTS = ("prompts", "preferences", "own_candidates")  # stages whose prompts are read here


def first_conversations(options: Mapping[str, Any]) -> list[Conversation]:
    """Return the first prompts of a step that reads a local file; those that cannot be read are left out."""
    return [result for result in _first_results(options) if isinstance(result, Conversation)]


def _first_results(options: Mapping[str, Any]) -> list[Conversation | ValueError]:
    """Return the prompts of a local file's first rows, and without a reader a ValueError for a row that has none."""
    reader = options.get("reader")
    if options.get("path") is None:
        return []
    source = DataSource(options["path"], None, None, options["subset"], options["dataset_split"])
    parts = {name: options.get(name) or None for name in ("prompt", "system", "input")}  # columns of a prompt's parts
    keep = options.get("keep") or []
    columns = [*parts.values(), *keep] if reader is None else [*columns_of(reader), *optional_columns_of(reader)]
    try:
        rows = source.head([name for name in columns if name], ROWS)
    except (WinnowError, OSError):  # which the step's own check reports
        return []
    system_prompt = options.get("system_prompt") or None
    results: list[Conversation | ValueError] = []
    for row in rows:
        try:
            if reader is None:
                content = prompt_with(row, str(parts["prompt"]), system=parts["system"], input=parts["input"])
                conversations = [Conversation(content, tools_of(row))]
                kept_fields(row, keep)
            else:
                # Of a candidate reader, labelled responses, whose prompts have no plain form.
                items: list[Any] = [item for item in first_pairs(reader, [row]) if not isinstance(item, ValueError)]
                conversations = [
                    Conversation(item.prompt, item.tools or tools_of(row), getattr(item, "plain", None))
                    for item in items
                ]
        except WinnowError:
            continue
        except ValueError as error:
            if reader is None:
                results.append(error)
            continue
        results += [with_system_prompt(conversation, system_prompt) for conversation in conversations]
    return results


def prompt_problems(options: Mapping[str, Any], inputs: Mapping[str, InputStep], *, answered: bool = True) -> list[str]:
    """Return why all prompts of a file would be rejected, by its first rows. Warn if only some of them would be.

    What would be left over to train on may be the prompts of one turn alone. answered: the responses are those of the
    file, which the chat template must render behind the same prompt.
    """
    results = _first_results(options)
    templates = planned_chat_templates(inputs["tokenizer"]) if "tokenizer" in inputs else None
    template = templates[0] if answered and templates is not None and len(templates) == 1 else None
    is_changed = lru_cache(None)(changes_with_answer)

    def error_of(result: Conversation | ValueError) -> ValueError | None:
        """Return why a prompt would be rejected; None if nothing is known against it."""
        if isinstance(result, ValueError):
            return result
        roles = tuple(str(message["role"]) for message in as_messages(result.content))
        is_continued = roles[-1] == "assistant"
        if is_continued and options.get("prefill") == "reject":
            return CurableError(PREFILLED, PREFILLED_CURE)
        if templates == [] and result.plain is None and not isinstance(result.content, str):
            return CurableError(
                "chats with a system turn or several turns, and the tokenizer has no chat template",
                "set `chat_template` of its step of stage `model` to a Jinja file",
            )
        if template and not is_continued and is_changed(template, roles, has_tools=bool(result.tools)):
            return CurableError(CHANGED, CHANGED_CURE)
        return None

    errors = [error for error in map(error_of, results) if error is not None]
    problems = []
    for (reason, cure), count in Counter((str(error), getattr(error, "cure", "")) for error in errors).items():
        rejected = f"{count} of the first {len(results)} prompts of {options['path']}"
        rejected = f"responses to {rejected}" if reason == CHANGED else rejected
        problems.append(f"path: {rejected} will be rejected: {reason}" + (f"; {cure}" if cure else ""))
    if len(errors) == len(results):
        return problems
    for problem in problems:
        warnings.warn(problem, WinnowWarning, stacklevel=2)
    return []
