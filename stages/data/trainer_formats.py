"""Formats of other trainers: LLaMA-Factory, OpenAI, and TRL's unpaired one; and responses with a label each.

A candidate reader takes one row and returns a `LabelledResponse`, or raises ValueError with the reason for the rejects
table; `columns`, `optional` and `variants` are as in preference readers (formats.py).
"""

from dataclasses import dataclass
from typing import Any

from pipeline import Registry
from schemas.ids import Message
from stages.data.formats import COLUMNS, PreferencePair, preference_reader, shared_turns, zero_or_one_of
from stages.data.rows import Row
from stages.data.texts import (
    REASONING,
    Prompt,
    Reply,
    as_messages,
    as_prompt,
    function_calls,
    messages_of,
    optional_text_of,
    prompt_of,
    prompt_with,
    reply_of,
    text_of,
    tools_of,
    with_chat_keys,
)

candidate_reader = Registry("candidate reader", "row", **COLUMNS)

LABELS = {"true": 1.0, "false": 0.0}
MEDIA = ("images", "videos", "audios")  # what a prompt of texts cannot hold
ALPACA_COLUMNS = ("input", "system", "history", "tools", *MEDIA)


@dataclass(frozen=True)
class LabelledResponse:
    """Response to a prompt with a reward, which is 1 or 0 where the file says only whether it is desirable."""

    prompt: Prompt  # its id is a hash of this content
    response: Reply
    reward: float
    tools: list[dict[str, Any]] | None = None


# Pairs


@preference_reader(columns=("instruction", "chosen", "rejected"), optional=ALPACA_COLUMNS, version=2)
def llama_factory_alpaca(row: Row) -> PreferencePair:
    """Read LLaMA-Factory's preference data in Alpaca's columns, `input`, `system` and `history` where there are any."""
    return PreferencePair(_alpaca_prompt(row), text_of(row, "chosen"), text_of(row, "rejected"), tools=_tools_of(row))


@preference_reader(columns=("conversations", "chosen", "rejected"), optional=("system", "tools", *MEDIA), version=2)
def llama_factory_sharegpt(row: Row) -> PreferencePair:
    """Read LLaMA-Factory's preference data in ShareGPT's form, such as llamafactory/DPO-En-Zh-20k.

    The prompt is the turns `from` system, human, gpt, function_call and observation, with a `value` each; a system turn
    takes the place of column `system`. Chosen and rejected are one turn each.
    """
    prompt = as_prompt(_sharegpt_prompt(row, "conversations", _sharegpt_messages(row, "conversations")))
    chosen, rejected = (reply_of({name: _sharegpt_messages(row, name)}, name) for name in ("chosen", "rejected"))
    return PreferencePair(prompt, chosen, rejected, tools=_tools_of(row))


@preference_reader(columns=("chosen_messages", "rejected_messages"), optional=("tools",), version=2)
def llama_factory_v1(row: Row) -> PreferencePair:
    """Read samples of LLaMA-Factory v1, messages of parts with a `type` and a `value`; both sides hold the prompt.

    Its converter `pair` reads data that reader `implicit_prompt` reads too.
    """
    _refuse_media(row)
    sides = {name: _v1_messages(row, name) for name in ("chosen_messages", "rejected_messages")}
    prompt = shared_turns(*(messages_of(sides, name) for name in sides))
    if not prompt:
        raise ValueError("chosen_messages and rejected_messages share no prompt")
    chosen, rejected = (reply_of(sides, name, prompt) for name in sides)
    return PreferencePair(as_prompt(prompt), chosen, rejected, tools=_tools_of(row))


@preference_reader(columns=("input", "preferred_output", "non_preferred_output"), version=2)
def openai(row: Row) -> PreferencePair:
    """Read OpenAI's format for direct preference optimization, which `export --format openai-messages` writes."""
    prompt = row.get("input")
    if not isinstance(prompt, dict):
        raise ValueError("input has no messages")
    _refuse_media(prompt)
    preferred, other = (reply_of(row, name) for name in ("preferred_output", "non_preferred_output"))
    return PreferencePair(as_prompt(messages_of(prompt, "messages")), preferred, other, tools=_tools_of(prompt))


# Responses with a label


@candidate_reader(columns=("prompt", "completion", "label"))
def unpaired(row: Row) -> LabelledResponse:
    """Read TRL's unpaired preference format: text or messages; the completion may repeat the messages of the prompt."""
    prompt = prompt_of(row, "prompt")
    return LabelledResponse(prompt, reply_of(row, "completion", prompt), _label_of(row, "label"))


@candidate_reader(
    columns=("instruction", "output", "{label}"),
    optional=ALPACA_COLUMNS,
    version=2,
    variants=[{"label": "label"}],
)
def llama_factory_kto_alpaca(row: Row, *, label: str = "kto_tag") -> LabelledResponse:
    """Read LLaMA-Factory's KTO data in Alpaca's columns, `input`, `system` and `history` where there are any."""
    return LabelledResponse(_alpaca_prompt(row), text_of(row, "output"), _label_of(row, label), _tools_of(row))


@candidate_reader(
    columns=("{messages}", "{label}"),
    optional=("system", "tools", *MEDIA),
    version=2,
    variants=[{"messages": name, "label": "label"} for name in ("messages", "completion", "conversations")],
)
def llama_factory_kto_sharegpt(
    row: Row, *, messages: str = "conversations", label: str = "kto_tag"
) -> LabelledResponse:
    """Read LLaMA-Factory's KTO data as conversations, with `from` and `value` or `role` and `content`.

    The last turn is the response. Its own examples have other names: `{messages: messages, label: label}` in
    kto_en_demo, `{messages: completion, label: label}` in argilla/kto-mix-15k.
    """
    turns = _sharegpt_messages(row, messages)
    prompt = as_prompt(_sharegpt_prompt(row, messages, turns[:-1]))
    return LabelledResponse(prompt, reply_of({messages: turns[-1:]}, messages), _label_of(row, label), _tools_of(row))


# Helpers of readers; each raises ValueError with the reason for the rejects table


def _alpaca_prompt(row: Row) -> Prompt:
    """Return the prompt of Alpaca's columns, after the turns of `history`, pairs of a prompt and a response."""
    _refuse_media(row)
    prompt = prompt_with(row, "instruction", input="input", system="system")
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in history):
        raise ValueError("history is not a list of prompts with their responses")
    turns = [
        {"role": role, "content": text_of({"history": text}, "history")}
        for turn in history
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    if not turns:
        return prompt
    messages = as_messages(prompt)
    return [*messages[:-1], *turns, messages[-1]]  # behind the system message


def _sharegpt_messages(row: Row, name: str) -> list[dict[str, Any]]:
    """Return the turns in a column, which may be a single one, with the keys and roles of chat messages."""
    values = row.get(name)
    values = [values] if isinstance(values, dict) else values
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{name} is not a list of turns")
    if not values:
        raise ValueError(f"empty {name}")
    return with_chat_keys(values)


def _sharegpt_prompt(row: Row, name: str, turns: list[dict[str, Any]]) -> list[Message]:
    """Return the messages of the turns, with the text of column `system` first unless they have a system turn."""
    _refuse_media(row)
    messages = messages_of({name: turns}, name)
    system = optional_text_of(row, "system")
    if system and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def _v1_messages(row: Row, name: str) -> list[dict[str, Any]]:
    """Return LLaMA-Factory v1's messages with a text as content, and their reasoning and tool calls beside it."""
    messages, values = [], row.get(name)
    for message in values if isinstance(values, list) else []:
        parts = message.get("content") if isinstance(message, dict) else None
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise ValueError(f"{name} is not a list of messages with parts")
        if others := sorted({str(part.get("type")) for part in parts} - {"text", "reasoning", "tool_call"}):
            raise ValueError(f"a part of type {', '.join(others)}")
        texts: dict[str, list[str]] = {"text": [], "reasoning": [], "tool_call": []}
        for part in parts:
            texts[part["type"]].append(text_of(part, "value"))
        calls = [call for text in texts["tool_call"] for call in function_calls(text)]
        messages.append(
            {"role": message.get("role"), "content": "".join(texts["text"])}
            | {REASONING: "".join(texts["reasoning"]), "tool_calls": calls}
        )
    return messages


def _refuse_media(row: Row) -> None:
    """Raise ValueError for images, videos and audios: without them, a prompt would be another."""
    for name in MEDIA:
        if row.get(name) not in (None, "", [], "[]"):
            raise ValueError(f"{name} in the prompt, which this reader does not read")


def _tools_of(row: Row) -> list[dict[str, Any]] | None:
    """Return the tools of a row as chat templates read them: LLaMA-Factory writes the functions alone."""
    tools = tools_of(row)
    return tools and [{"type": "function", "function": tool} if "name" in tool else tool for tool in tools]


def _label_of(row: Row, name: str) -> float:
    """Return 1 or 0; a rating, of which no value separates right from wrong, is none."""
    value = row.get(name)
    return LABELS[value.lower()] if isinstance(value, str) and value.lower() in LABELS else zero_or_one_of(row, name)
