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
