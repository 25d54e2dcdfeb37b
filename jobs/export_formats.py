"""Formats of other trainers, one function each. To add one, add a function here and name it in FORMATS.

Formats of token ids hold every pair. A text stands for token ids only if its reader makes the same ids of it, so every
text is decoded from the ids, and a pair that a format of texts cannot express is rejected, with the reason.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pyarrow as pa

from schemas import prompt_id

if TYPE_CHECKING:
    from stages.data.tokenizer import Tokenizer

Row = dict[str, Any]
FormatName = Literal["trl-ids", "trl", "openai-messages", "jsonl"]
SIDES = ("chosen", "rejected")
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
REFS = ("ref_chosen_logps", "ref_rejected_logps")
MASKS = ("chosen_mask", "rejected_mask")
IDS = ("prompt_id", "chosen_id", "rejected_id")
CUT = "cut at max_tokens"
OTHER_END = "ends with another end token than most"
OTHER_TOKENS = "its text is tokenised differently"
HIDDEN_TOKENS = "special tokens inside, which its text cannot show"
NO_TEXT = "its tokens are no valid text"
SAME_TEXT = "both texts are the same"
EMPTY = "empty text"
SEVERAL_TURNS = "several turns, of which only the assistant's are trained on"
UNKNOWN_MESSAGES = "its messages are not in the table prompts"
REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no UTF-8, such as half a character


class Reject(NamedTuple):
    """Reason why a pair is not in the file, and the value that caused it."""

    reason: str
    detail: str


@dataclass(frozen=True)
class PairFormat:
    """Suffixes of the file, function that makes its rows, and what is in these.

    `columns` are those of a Parquet file, apart from reference log-probs. `complete` is the format that holds the pairs
    which this one rejects; None if it rejects none. `note` is what a reader of the file must know.
    """

    suffixes: tuple[str, ...]
    convert: Callable[[list[Row], "Tokenizer"], Iterator[Row | Reject]]
    columns: Mapping[str, pa.DataType] = field(default_factory=dict)
    complete: FormatName | None = None
    references: bool = True
    weights: bool = False
    masks: bool = False
    note: str = ""


def trl_ids(rows: list[Row], tokenizer: "Tokenizer") -> Iterator[Row | Reject]:
    """Yield the token ids prompt_ids, chosen_ids and rejected_ids, as TRL's DPOTrainer has them after tokenising."""
    for row in rows:
        yield {name: row[name] for name in ID_COLUMNS} | _references(row)


def trl(rows: list[Row], tokenizer: "Tokenizer") -> Iterator[Row | Reject]:
    """Yield strings prompt, chosen and rejected, which TRL's DPOTrainer reads as the ids that were scored.

    The prompt has its chat template's tokens written out. With messages, the trainer would apply the template around
    the response, which many templates end with more than one token (a newline), and those are not the sampled ids. The
    trainer ends a response with its tokenizer's EOS token, so that must be what the responses here end with.
    """
    inner, eos = tokenizer.inner, tokenizer.inner.eos_token

    def once(items: list[Any], convert: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """Convert each distinct item once: a prompt is in several pairs, and so may a response be."""
        unique = list(dict.fromkeys(items))
        converted = dict(zip(unique, convert(unique), strict=True))
        return [converted[item] for item in items]

    def encode(texts: list[str]) -> list[list[int]]:
        """Tokenise as TRL does: the whole text at once, with the special tokens that the tokenizer adds."""
        flags = {"return_attention_mask": False, "return_token_type_ids": False}
        return once(texts, lambda unique: inner(text=unique, verbose=False, **flags)["input_ids"])

    def decode(many: list[list[int]]) -> list[str]:
        """Write special tokens out, except the BOS that the tokenizer adds by itself."""
        without_bos = [tuple(ids[1:] if adds_bos and ids[:1] == [inner.bos_token_id] else ids) for ids in many]
        return once(without_bos, lambda unique: inner.batch_decode(unique, clean_up_tokenization_spaces=False))

    adds_bos = inner.bos_token_id is not None and encode(["x"])[0][:1] == [inner.bos_token_id]
    prompts = decode([row["prompt_ids"] for row in rows])
    prompts_read = encode(prompts)

    # Texts of the responses, and the ids of prompt + response as the trainer reads them, which adds EOS if it lacks.
    texts: dict[str, list[str]] = {}
    ids_read: dict[str, list[list[int]]] = {}
    for side in SIDES:
        full = decode([row["prompt_ids"] + row[f"{side}_ids"] for row in rows])
        texts[side] = [text[len(prompt) :].removesuffix(eos) for prompt, text in zip(prompts, full, strict=True)]
        ended = [text if text.endswith(eos) else text + eos for text in texts[side]]
        ids_read[side] = encode([prompt + text for prompt, text in zip(prompts, ended, strict=True)])

    for n, row in enumerate(rows):
        reject = None
        for side in SIDES:
            text, last = texts[side][n], row[f"{side}_ids"][-1:]
            if last != [inner.eos_token_id]:
                reject = Reject(OTHER_END if last and last[0] in tokenizer.stop else CUT, f"{side}: {text}")
            elif ids_read[side][n] != row["prompt_ids"] + row[f"{side}_ids"]:
                reject = Reject(OTHER_TOKENS, f"{side}: {text}")
            if reject:
                break
        if not reject and prompts_read[n] != row["prompt_ids"]:
            reject = Reject(OTHER_TOKENS, f"prompt: {row['text']}")
        yield reject or {"prompt": prompts[n], **{side: texts[side][n] for side in SIDES}, **_references(row)}


def openai_messages(rows: list[Row], tokenizer: "Tokenizer") -> Iterator[Row | Reject]:
    """Yield OpenAI's rows for preference fine-tuning: input.messages, preferred_output, non_preferred_output.

    The messages of a prompt are those that were read, with its tools and their calls. White space around a response is
    left out, and so is the token that ends it.
    """
    for row in rows:
        prompt, texts = prompt_input(row), {}
        reject = None if prompt is not None else Reject(UNKNOWN_MESSAGES, row["text"])
        for side in SIDES:
            ids = row[f"{side}_ids"]
            has_end = bool(ids) and ids[-1] in tokenizer.stop
            ids = ids[:-1] if has_end else ids
            text = texts[side] = tokenizer.decode(ids).strip()
            if reject:
                continue
            if not text:
                reject = Reject(EMPTY, side)
            elif not has_end:
                reject = Reject(CUT, f"{side}: {text}")
            elif (decoded := tokenizer.decode(ids, special_tokens=True).strip()) != text:
                reject = Reject(HIDDEN_TOKENS, f"{side}: {decoded}")
            elif REPLACEMENT in text:
                reject = Reject(NO_TEXT, f"{side}: {text}")
        if not reject and texts["chosen"] == texts["rejected"]:
            reject = Reject(SAME_TEXT, texts["chosen"])
        yield reject or {
            "input": prompt,
            "preferred_output": [{"role": "assistant", "content": texts["chosen"]}],
            "non_preferred_output": [{"role": "assistant", "content": texts["rejected"]}],
        }


def prompt_input(row: Row) -> Row | None:
    """Return the messages and tools of a prompt as the table `prompts` holds them; None if it holds another prompt's.

    OpenAI writes the arguments of a tool call as JSON.
    """
    chat = json.loads(row["chat"] or "{}")
    messages, tools = chat.get("messages", row["text"]), chat.get("tools")
    one_text = not isinstance(messages, list) or [message.keys() for message in messages] == [{"role", "content"}]
    text = messages if isinstance(messages, str) else messages[0]["content"]
    if row["prompt_id"] not in {prompt_id(messages, tools), *([prompt_id(text, tools)] if one_text else [])}:
        return None
    messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    for message in messages:
        for call in message.get("tool_calls", []):
            function = call.get("function", call)
            if isinstance(function.get("arguments"), dict):
                function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return {"messages": messages} | ({"tools": tools} if tools else {})


def jsonl(rows: list[Row], tokenizer: "Tokenizer") -> Iterator[Row | Reject]:
    """Yield every column of every pair; the texts are for people, the ids are what was trained on."""
    for row in rows:
        texts = {side: tokenizer.decode(row[f"{side}_ids"]).strip() for side in SIDES}
        unmasked = [name for name in MASKS if row[name] is None]
        others = {name: value for name, value in row.items() if name not in (*IDS, *REFS, "text", "chat", *unmasked)}
        yield {**{name: row[name] for name in IDS}, "prompt": row["text"], **texts, **others, **_references(row)}


def without_turns(row: Row) -> Reject | None:
    """Return why a format without masks cannot hold a pair, None if it can: its trainer would train on every id."""
    sides = [side for side in SIDES if row[f"{side}_mask"] is not None]
    return Reject(SEVERAL_TURNS, " and ".join(sides)) if sides else None


def _references(row: Row) -> Row:
    """Return the cached log-probs, in nats, summed over the response and its EOS; nothing if none were cached."""
    return {name: row[name] for name in REFS if row[name] is not None}


FORMATS: dict[FormatName, PairFormat] = {
    "trl-ids": PairFormat(
        (".parquet", ".jsonl"),
        trl_ids,
        dict.fromkeys(ID_COLUMNS, pa.list_(pa.int32())),
        complete="jsonl",
        note="TRL's DPOTrainer tokenises text unless _prepare_dataset is overridden, and its RewardTrainer expects the "
        "prompt in chosen_ids and rejected_ids: see jobs/README.md",
    ),
    "trl": PairFormat((".parquet", ".jsonl"), trl, dict.fromkeys(("prompt", *SIDES), pa.string()), complete="trl-ids"),
    "openai-messages": PairFormat((".jsonl",), openai_messages, complete="jsonl", references=False),
    "jsonl": PairFormat((".jsonl",), jsonl, weights=True, masks=True),
}
