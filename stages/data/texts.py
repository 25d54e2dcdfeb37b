"""Values of a row that a user brings: each function returns one, or raises ValueError with the reason to reject it."""

import ast
import json
import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from schemas import WinnowWarning
from schemas.ids import Message
from stages.data.rows import Row

Prompt = str | list[Message]
# Text; an assistant message with more than a content, such as a tool call; or several turns, of which the assistant has
# the first and the last.
Reply = str | Message | list[Message]

# Keys of a message that a chat template must render, or the row is rejected, and keys that it may leave out.
REASONING = "reasoning_content"
REASONING_KEYS = (REASONING, "reasoning", "thinking")  # what data sets and templates call it; here it is the first
CONTENT_KEYS = (REASONING, "tool_calls", "function_call", "images", "image", "videos", "audio", "documents")
CALL_KEYS = ("tools", "tool_calls", "function_call")  # whose values are JSON of any keys
LABEL_KEYS = ("name", "tool_call_id")
# Key of tokenizer_config.json with the options of stage `model` for the chat template: they stay with every model that
# is trained from it, and prompts, responses and reward models are all rendered alike.
TEMPLATE_OPTIONS = "winnow_chat_template"
NUMERAL = re.compile(r"\s*[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?\s*", re.ASCII)
INVISIBLE = ("Cc", "Cf")  # categories of characters: of control, and of format, such as a zero-width space
# What role a message has: a word that templates write beside it as it is, and not text that would be a turn.
ROLE = re.compile(r"\w[\w .-]{0,63}")
CHANGED = "the chat template renders the prompt differently once an answer follows"
CHANGED_CURE = (
    "set `chat_template` of the tokenizer's step of stage `model` to a Jinja file that renders both alike (where the "
    "model's own writes the system text only `if loop.last`, that is `if message == user_messages[-1]`)"
)
PREFILLED = "prompt ends with an assistant turn"
PREFILLED_CURE = (
    "set `prefill: continue` if responses are to continue that turn, or `prefill: omit` (of stage prompts) to leave it "
    "out and have it answered anew"
)
NO_USER = "a prompt has no turn of the user, so that responses answer its system turn alone"
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
SYSTEM_ROLES = ("system", "developer")
# Roles of which templates of public models have turns. Most write any other as it stands, as no model was trained on.
ROLES = (*SYSTEM_ROLES, "user", "assistant", "tool", "function", "ipython", "observation")
WRITTEN_MESSAGES = re.compile(r"\s*(\[\s*)?\{\s*(['\"])(role|content|from)\2\s*:")


class CurableError(ValueError):
    """Reason to reject a row, with what can be set so that such rows are read."""

    def __init__(self, reason: str, cure: str) -> None:
        super().__init__(reason)
        self.cure = cure


class ChangedPromptError(CurableError):
    """Prompt that the chat template renders differently once an answer follows, with the ids that ask for one."""

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__(CHANGED, CHANGED_CURE)
        self.ids = ids


def reject_detail(error: ValueError, row: Any) -> str:
    """Return the detail of a rejected row: before it the cure of the reason, if it has one."""
    return f"{error.cure}; the row: {row!r}" if isinstance(error, CurableError) else repr(row)


@dataclass(frozen=True)
class Conversation:
    """Prompt as a chat template renders it: text or messages, with the tools that the assistant may call."""

    content: Prompt
    tools: list[dict[str, Any]] | None = None
    plain: str | None = None  # the prompt for a tokenizer without chat template; a response follows after a space


def conversation_of(prompt: Row) -> Conversation | None:
    """Return the messages and tools of a row of the table `prompts`; None for a prompt of one text."""
    if prompt["chat"] is None:
        return None
    chat = json.loads(prompt["chat"])
    return Conversation(chat["messages"], chat["tools"])


def is_continued(prompt: Row) -> bool:
    """Return whether a row of the table `prompts` ends in an assistant turn, which its responses go on with."""
    conversation = conversation_of(prompt)
    return conversation is not None and as_messages(conversation.content)[-1]["role"] == "assistant"


def number_of(row: Row, name: str, called: str | None = None) -> float:
    """Return the number in a column, which may be infinite or NaN; the reason names the column as `called`.

    Text must be a decimal numeral: Python's float also reads `1_0` as 10, digits of other scripts, and true as 1.
    """
    value: Any = row.get(name)
    try:
        if isinstance(value, bool) or (isinstance(value, str) and not NUMERAL.fullmatch(value)):
            raise ValueError
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
    if is_blank(value):
        raise ValueError(f"empty {name}")
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can write and no tokenizer reads
        raise ValueError(f"{name} is not valid Unicode") from None
    return value


def is_blank(text: str) -> bool:
    """Return whether no character of a text can be seen: white space, zero-width and control characters only."""
    return all(character.isspace() or unicodedata.category(character) in INVISIBLE for character in text)


def messages_of(row: Row, name: str) -> list[Message]:
    """Return the chat messages in a column, each with a role, a content, and what else a chat template may render.

    Turns of ShareGPT's form have `from` and `value` in their place. `None` and empty lists, with which tables fill up
    keys that a message lacks, count as absent. Keys that no template is known to render, such as a language or a score,
    are left out, with a warning.
    """
    values = row.get(name)
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{name} is not text" if values is not None else f"no {name}")
    if not values:
        raise ValueError(f"empty {name}")
    return [_message(value, name) for value in with_chat_keys(values)]


def with_chat_keys(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return turns of ShareGPT's form, with `from` and `value`, with the keys and roles of chat messages.

    Others stay as they are.
    """
    messages: list[dict[str, Any]] = []
    for turn in turns:
        rest = {key: item for key, item in turn.items() if key not in ("from", "value")}
        if turn.get("from") is None or turn.get("role") is not None:
            messages.append(turn)
        elif turn["from"] == "function_call":
            calls = function_calls(turn.get("value"))
            messages.append(rest | {"role": "assistant", "content": "", "tool_calls": calls})
        else:
            role = text_of(turn, "from")
            messages.append(rest | {"role": SHAREGPT_ROLES.get(role, role), "content": turn.get("value")})
    return messages


def prompt_of(row: Row, name: str) -> Prompt:
    """Return the prompt in a column, as a string or as chat messages."""
    return as_prompt(messages_of(row, name)) if isinstance(row.get(name), list) else _plain_text_of(row, name)


def as_prompt(messages: list[Message]) -> Prompt:
    """Return a single user message as its text: a chat template gives both the same tokens, so they are one prompt."""
    return messages[0]["content"] if len(messages) == 1 and _is_plain(messages[0], "user") else messages


def without_answer(prompt: Prompt) -> Prompt:
    """Return a prompt without the assistant turn at its end, if it has one; raise ValueError if it is nothing else."""
    if isinstance(prompt, str) or prompt[-1]["role"] != "assistant":
        return prompt
    if len(prompt) == 1:
        raise ValueError("no turn before that of the assistant")
    if prompt[-2]["role"] == "assistant":
        raise ValueError("two turns of the assistant follow each other")
    return as_prompt(prompt[:-1])


def reply_of(row: Row, name: str, prompt: Prompt | None = None) -> Reply:
    """Return the response in a column: text, or messages that begin and end with an assistant turn.

    Some data sets repeat the turns of `prompt` before it; these are removed.
    """
    if not isinstance(row.get(name), list):
        return _plain_text_of(row, name)
    messages = messages_of(row, name)
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    if messages[: len(before)] == before:
        messages = messages[len(before) :]
    if not messages or any(messages[n]["role"] != "assistant" for n in (0, -1)):
        raise ValueError(f"{name} does not begin and end with an assistant turn")
    if len(messages) > 1:
        return messages
    return messages[0]["content"] if _is_plain(messages[0], "assistant") else messages[0]


def without_repeated_prompt(prompt: Prompt, replies: tuple[Reply, ...]) -> tuple[Reply, ...]:
    """Return the responses without the text of the prompt where all of them begin with it.

    Short prompts, of fewer than four words, stay: both answers to "Hi" may well begin with it.
    """
    if not isinstance(prompt, str) or len(prompt.split()) < 4:
        return replies
    rest = [reply[len(prompt) :] for reply in replies if isinstance(reply, str) and reply.startswith(prompt)]
    if len(rest) < len(replies) or any(map(is_blank, rest)):
        return replies
    warnings.warn("responses that repeat the text of their prompt are read without it", WinnowWarning, stacklevel=2)
    return tuple(text.removeprefix(" ") for text in rest)


def tools_of(row: Row, name: str = "tools") -> list[dict[str, Any]] | None:
    """Return the JSON schemas of tools in a column, as a list or written as JSON; None if the row has none."""
    value = row.get(name)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"{name} is not JSON") from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError(f"{name} is not a list of JSON schemas")
    return value


def kept_fields(row: Row, names: list[str]) -> dict[str, str] | None:
    """Return columns as text, and values that are none as JSON. Raise ValueError for one that is missing or empty."""
    if not names:
        return None
    if missing := [name for name in names if row.get(name) in (None, "", [], {})]:
        raise ValueError(f"no {missing[0]}")
    return {name: value if isinstance(value := row[name], str) else json.dumps(value, default=str) for name in names}


def readable(prompt: Prompt, tools: list[dict[str, Any]] | None = None) -> str:
    """Return a prompt for people and rankers: the text, or the turns with their roles, after the tools if any."""
    if isinstance(prompt, str) and not tools:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if len(messages) == 1 and not tools and _is_plain(messages[0]):
        return str(messages[0]["content"])
    lines = [f"tools: {_compact(tools)}"] if tools else []
    return "\n".join([*lines, *(f"{message['role']}: {readable_reply(message)}" for message in messages)])


def words_of_user(prompt: Prompt) -> str:
    """Return what users say in a prompt, whatever a system message, tools and answers are beside it."""
    said = "\n".join(str(message["content"]) for message in as_messages(prompt) if message["role"] == "user")
    return said or readable(prompt)


def readable_reply(reply: Reply) -> str:
    """Return a response for people and rankers: its text, with reasoning before it and tool calls after it.

    Of several turns, each with its role.
    """
    if isinstance(reply, str):
        return reply
    if isinstance(reply, list):
        return readable(reply)
    texts = [str(reply[key]) for key in (REASONING, "content") if reply.get(key)]
    return "\n".join([*texts, *(f"{key}: {_compact(reply[key])}" for key in CONTENT_KEYS[1:] if key in reply)])


def reply_json(reply: Reply) -> str | None:
    """Return the messages of a response as the JSON of the column `chat`; None for one text."""
    if isinstance(reply, str):
        return None
    return json.dumps(reply if isinstance(reply, list) else [reply], ensure_ascii=False)


def reply_of_candidate(candidate: Row) -> Message | list[Message] | None:
    """Return the messages of a row of the table `candidates`; None for one text."""
    if candidate["chat"] is None:
        return None
    messages: list[Message] = json.loads(candidate["chat"])
    return messages if len(messages) > 1 else messages[0]


def shared_prefix_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return the number of items at the beginning of two sequences that are equal."""
    different = (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(different, min(len(first), len(second)))


def _is_plain(message: Message, role: str | None = None) -> bool:
    return message.keys() == {"role", "content"} and role in (None, message["role"])


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _plain_text_of(row: Row, name: str) -> str:
    text = text_of(row, name)
    if WRITTEN_MESSAGES.match(text):
        raise ValueError(f"{name} is messages written as text that cannot be parsed")
    return text


def _parsed(value: Any, name: str) -> Any:
    """Return messages that are written as text; any other value, and text that cannot be parsed, as it is."""
    if not isinstance(value, str) or not WRITTEN_MESSAGES.match(value):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            messages = parse(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(messages, list | dict):
            warnings.warn(f"{name}: messages that are written as text are parsed", WinnowWarning, stacklevel=2)
            return messages
    return value


def _message(value: dict[str, Any], name: str) -> Message:
    """Return a message with role and content, then those of its other keys that a template may render."""
    content = value.get("content")
    value = {key: item for key, item in value.items() if item is not None and item not in ("", [], {})}
    value.pop("content", None)
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"{name} has content of type {kind}, and only text is read")
        content = "".join(part["text"] for part in content)
    if reasoning := [value.pop(key) for key in REASONING_KEYS if key in value]:
        value[REASONING] = text_of({REASONING: reasoning[0]}, REASONING)
    if "tool_calls" in value:
        value["tool_calls"] = _tool_calls(value["tool_calls"])
    role = text_of(value, "role")
    if not ROLE.fullmatch(role):
        raise ValueError("role is no word")
    extra = {key: value[key] for key in (*CONTENT_KEYS, *LABEL_KEYS) if key in value}
    if content or not any(key in CONTENT_KEYS for key in extra):  # beside a call or reasoning it may be empty
        content = text_of({"content": content}, "content")
    if unread := sorted(value.keys() - extra - {"role"}):
        warnings.warn(f"{name}: keys of messages are not read: {', '.join(unread)}", WinnowWarning, stacklevel=2)
    return {"role": role, "content": content or "", **extra}


def unknown_role(role: str) -> str:
    """Return what is to be said of a message with a role that no public model knows, and that its template writes."""
    return (
        f"a message has the role {role!r}, which most chat templates write as it stands, and models do not know; "
        f"{known_roles(role)}"
    )


def notes_of_roles(roles: Iterable[str]) -> list[str]:
    """Return what is to be said of a prompt with messages of these roles: unknown ones, and none that asks."""
    different = dict.fromkeys(roles)
    notes = [unknown_role(role) for role in different if role not in ROLES]
    if different.keys() <= {*SYSTEM_ROLES}:
        notes.append(NO_USER)
    return notes


def unrendered(role: str) -> str:
    """Return the reason to reject a row with a message whose text its chat template leaves out."""
    return f"the chat template does not render the content of a message of role {role}"


def known_roles(role: str) -> str:
    """Return what to write in place of a role that no public model knows."""
    written = SHAREGPT_ROLES.get(role)
    return (f"write {written!r}; " if written else "") + f"the roles are {', '.join(ROLES)}"


def function_calls(text: Any) -> list[dict[str, Any]]:
    """Return the calls in the value of a function_call turn, the JSON of one call or of a list, as of chat messages."""
    try:
        calls = json.loads(text)
    except (TypeError, ValueError):
        raise ValueError("a function_call is not JSON") from None
    calls = calls if isinstance(calls, list) else [calls]
    return [{"type": "function", "function": call} for call in calls]


def _tool_calls(calls: Any) -> list[dict[str, Any]]:
    """Return tool calls with arguments as objects: OpenAI writes them as JSON, which templates would write twice.

    Null counts as absent beside the arguments, as beside a message's content, and as itself among them.
    """
    if isinstance(calls, str):
        try:
            calls = json.loads(calls)
        except (ValueError, RecursionError):
            raise ValueError("tool_calls is not JSON") from None
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError("tool_calls is not a list of calls")
    result = []
    for call in calls:
        call = {key: item for key, item in call.items() if item is not None}
        function = call.get("function", call)
        if function is not call and isinstance(function, dict):
            function = call["function"] = {key: item for key, item in function.items() if item is not None}
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"])
            except (ValueError, RecursionError):
                raise ValueError("arguments of a tool call are not JSON") from None
        result.append(call)
    return result


def without_filled_nulls(value: Any, *, inside: bool = False) -> Any:
    """Return a value of a table without the keys of tools and calls whose value is None.

    A table gives all structs of a column the same keys, and fills up with nulls those that one lacks: an argument that
    is null and one that is absent look alike. In JSON they do not, and both stay as they are.
    """
    if isinstance(value, dict):
        return {
            key: without_filled_nulls(item, inside=inside or key in CALL_KEYS)
            for key, item in value.items()
            if not (inside and item is None)
        }
    return [without_filled_nulls(item, inside=inside) for item in value] if isinstance(value, list) else value


def as_messages(prompt: Prompt) -> list[Message]:
    """Return a prompt as chat messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def with_system_prompt(conversation: Conversation, text: str | None) -> Conversation:
    """Return the conversation with a system message of this text before it, unless it has one itself.

    Without a text, it is as it was.
    """
    messages = as_messages(conversation.content)
    if text is None or messages[0]["role"] in SYSTEM_ROLES:
        return conversation
    return Conversation([{"role": "system", "content": text}, *messages], conversation.tools)


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
    return "" if value is None or (isinstance(value, str) and is_blank(value)) else text_of(row, name)


def with_message_lists(row: Row) -> Row:
    """Return a row in which messages that are written in another way are lists of messages.

    `datasets` (Sequence of a dict) and pandas have dicts of lists, {"role": [...], "content": [...]}; CSV files and
    pandas have lists as text, by `str` or `json.dumps`.
    """
    return {name: _as_message_list(_parsed(value, name)) for name, value in row.items()}


def _as_message_list(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if not ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys()):
        return {name: _as_message_list(item) for name, item in value.items()}
    if not all(isinstance(item, list) for item in value.values()) or len({len(item) for item in value.values()}) != 1:
        return value
    return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
