"""Values of a row that a user brings: each function returns one, or raises ValueError with the reason to reject it."""

from typing import Any

from schemas.ids import Message
from stages.data.rows import Row

Prompt = str | list[Message]


def number_of(row: Row, name: str, called: str | None = None) -> float:
    """Return the number in a column, which may be infinite or NaN; the reason names the column as `called`."""
    value: Any = row.get(name)
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{called or name} is not a number") from None


def text_of(row: Row, name: str) -> str:
    """Return the text in a column of the row."""
    value = row.get(name)
    if value is None:
        raise ValueError(f"no {name}")
    if not isinstance(value, str):
        raise ValueError(f"{name} is not text")
    if not value.strip():
        raise ValueError(f"empty {name}")
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can write and no tokenizer reads
        raise ValueError(f"{name} is not valid Unicode") from None
    return value


def messages_of(row: Row, name: str) -> list[Message]:
    """Return the chat messages in a column, each with a role and a content."""
    values = row.get(name)
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{name} is not text" if values is not None else f"no {name}")
    if not values:
        raise ValueError(f"empty {name}")
    return [{"role": text_of(message, "role"), "content": text_of(message, "content")} for message in values]


def prompt_of(row: Row, name: str) -> Prompt:
    """Return the prompt in a column, as a string or as chat messages."""
    return as_prompt(messages_of(row, name)) if isinstance(row.get(name), list) else text_of(row, name)


def as_prompt(messages: list[Message]) -> Prompt:
    """Return a single user message as its text: a chat template gives both the same tokens, so they are one prompt."""
    return messages[0]["content"] if [message["role"] for message in messages] == ["user"] else messages


def reply_of(row: Row, name: str, prompt: Prompt | None = None) -> str:
    """Return the response in a column: text, or messages that end in one assistant turn.

    Some data sets repeat the turns of `prompt` before it; these are removed.
    """
    if not isinstance(row.get(name), list):
        return text_of(row, name)
    messages = messages_of(row, name)
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    if messages[: len(before)] == before:
        messages = messages[len(before) :]
    if [message["role"] for message in messages] != ["assistant"]:
        raise ValueError(f"{name} is not one assistant turn")
    return messages[0]["content"]


def as_messages(prompt: Prompt) -> list[Message]:
    """Return a prompt as chat messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def prompt_with(row: Row, name: str, *, system: str | None = None, input: str | None = None) -> Prompt:
    """Return the prompt in a column, with the text of column `input` behind it and that of `system` before it.

    Empty cells add nothing. Instruction and input are joined by a new line, as LLaMA-Factory joins Alpaca's columns.
    """
    before, behind = (optional_text_of(row, column) if column else "" for column in (system, input))
    if behind and isinstance(row.get(name), list):
        raise ValueError(f"{input} beside chat messages")
    prompt: Prompt = "\n".join(filter(None, [optional_text_of(row, name), behind])) if behind else prompt_of(row, name)
    if not before:
        return prompt
    messages = as_messages(prompt)
    if messages[0]["role"] == "system":
        raise ValueError(f"a system message in {name} and one in {system}")
    return [{"role": "system", "content": before}, *messages]


def optional_text_of(row: Row, name: str) -> str:
    """Return the text in a column, which may be missing or empty."""
    value = row.get(name)
    return "" if value is None or (isinstance(value, str) and not value.strip()) else text_of(row, name)


def with_message_lists(row: Row) -> Row:
    """Return a row in which a dict of lists ({"role": [...], "content": [...]}) is the list of messages that it means.

    `datasets` (Sequence of a dict) and pandas write messages so.
    """
    return {name: _as_message_list(value) for name, value in row.items()}


def _as_message_list(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if not ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys()):
        return {name: _as_message_list(item) for name, item in value.items()}
    if not all(isinstance(item, list) for item in value.values()) or len({len(item) for item in value.values()}) != 1:
        return value
    return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
