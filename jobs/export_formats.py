"""Rows of other trainers' formats, one function each. To add a format, add a function here and name it in FORMATS.

A text stands for token ids only if its reader makes the same ids of it, so every text is decoded from the ids; a pair
that a format cannot say is left out, with its reason.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from schemas import prompt_id

if TYPE_CHECKING:
    from stages.data.tokenizer import Tokenizer

Row = dict[str, Any]
Name = Literal["trl", "openai-messages", "jsonl"]
SIDES = ("chosen", "rejected")
REFS = ("ref_chosen_logps", "ref_rejected_logps")
IDS = ("prompt_id", "chosen_id", "rejected_id")
CUT = "cut at max_tokens"
END = "ended by another token than EOS"
OTHER = "its text is read as other tokens"
SAME = "the texts of both are the same"
EMPTY = "empty text"
UNTOLD = "its messages cannot be told from its text"
IDS_ALONE = {"return_attention_mask": False, "return_token_type_ids": False}
ROLES = re.compile(r"(?:^|\n)(system|developer|user|assistant|tool|function): ")


class Left(NamedTuple):
    """Why a pair is not in the file, and the value that was at fault."""

    reason: str
    detail: str


Write = Callable[[list[Row], "Tokenizer"], Iterator[Row | Left]]


@dataclass(frozen=True)
class Format:
    """What its file names end in, how its rows are made, and for what it has a place."""

    suffixes: tuple[str, ...]
    write: Write
    references: bool = True
    weighs: bool = False


def trl(rows: list[Row], tokens: "Tokenizer") -> Iterator[Row | Left]:
    """Strings prompt, chosen and rejected, which TRL's DPOTrainer reads as the ids that were scored.

    The prompt has its chat template's tokens written out. As messages, the trainer would put the template around
    the response, which many end by more than EOS (a newline), and those are not the ids that were sampled.
    """
    reader = Reader(tokens)
    prompts = reader.texts([row["prompt_ids"] for row in rows])
    asked = reader.ids(prompts)
    sides = {side: _completions(rows, prompts, side, reader) for side in SIDES}
    for n, row in enumerate(rows):
        texts = {side: sides[side][0][n] for side in SIDES}
        read = {"prompt_ids": asked[n]} | {f"{side}_ids": sides[side][1][n] for side in SIDES}
        yield _misread(row, read, texts, tokens) or {"prompt": prompts[n], **texts, **_references(row)}


def _completions(rows: list[Row], prompts: list[str], side: str, reader: "Reader") -> tuple[list[str], list[list[int]]]:
    """Texts of responses, and the ids of prompt and response as the trainer reads them: at once, and EOS at the end."""
    whole = reader.texts([row["prompt_ids"] + row[f"{side}_ids"] for row in rows])
    texts = [each[len(prompt) :].removesuffix(reader.eos) for prompt, each in zip(prompts, whole, strict=True)]
    ended = [text if text.endswith(reader.eos) else text + reader.eos for text in texts]
    return texts, reader.ids([prompt + text for prompt, text in zip(prompts, ended, strict=True)])


def _misread(row: Row, read: Row, texts: dict[str, str], tokens: "Tokenizer") -> Left | None:
    """Why the trainer would read other ids than those that were scored."""
    for side, text in texts.items():
        last = row[f"{side}_ids"][-1:]
        if last != [tokens.stop[0]]:
            return Left(END if last and last[0] in tokens.stop else CUT, f"{side}: {text}")
        if read[f"{side}_ids"] != row["prompt_ids"] + row[f"{side}_ids"]:
            return Left(OTHER, f"{side}: {text}")
    return None if read["prompt_ids"] == row["prompt_ids"] else Left(OTHER, f"prompt: {row['text']}")


class Reader:
    """TRL's way from text to ids, and back: the whole text at once, special tokens as the tokenizer adds them."""

    def __init__(self, tokens: "Tokenizer") -> None:
        self.inner, self.eos = tokens.inner, tokens.inner.eos_token
        self.bos = self.inner.bos_token_id if self.ids(["x"])[0][:1] == [self.inner.bos_token_id] else None

    def texts(self, many: list[list[int]]) -> list[str]:
        """Special tokens written out, but for the BOS that the tokenizer adds of itself."""
        bare = [tuple(ids[1:] if self.bos is not None and ids[:1] == [self.bos] else ids) for ids in many]
        return _each_once(bare, lambda every: self.inner.batch_decode(every, clean_up_tokenization_spaces=False))

    def ids(self, texts: list[str]) -> list[list[int]]:
        return _each_once(texts, lambda every: self.inner(text=every, verbose=False, **IDS_ALONE)["input_ids"])


def _each_once(many: list[Any], make: Callable[[list[Any]], list[Any]]) -> list[Any]:
    """A prompt stands in several pairs, and so may a response."""
    unique = list(dict.fromkeys(many))
    made = dict(zip(unique, make(unique), strict=True))
    return [made[each] for each in many]


def openai_messages(rows: list[Row], tokens: "Tokenizer") -> Iterator[Row | Left]:
    """OpenAI's preference fine-tuning: input.messages, preferred_output, non_preferred_output; text for any model."""
    for row in rows:
        messages = messages_of(row["prompt_id"], row["text"])
        texts = {side: tokens.decode(row[f"{side}_ids"]) for side in SIDES}
        yield _unsaid(row, messages, texts, tokens) or {
            "input": {"messages": messages},
            "preferred_output": [{"role": "assistant", "content": texts["chosen"]}],
            "non_preferred_output": [{"role": "assistant", "content": texts["rejected"]}],
        }


def _unsaid(row: Row, messages: Any, texts: dict[str, str], tokens: "Tokenizer") -> Left | None:
    """Why messages would not say what the ids do."""
    if messages is None:
        return Left(UNTOLD, row["text"])
    for side, text in texts.items():
        if not text:
            return Left(EMPTY, side)
        if row[f"{side}_ids"][-1] not in tokens.stop:
            return Left(CUT, f"{side}: {text}")
    return Left(SAME, texts["chosen"]) if texts["chosen"] == texts["rejected"] else None


@lru_cache(maxsize=1024)
def messages_of(name: str, text: str) -> list[dict[str, str]] | None:
    """A prompt's messages from its text for people: those of which its id is the hash, or None."""
    one = [{"role": "user", "content": text}]
    if name in (prompt_id(text), prompt_id(one)):
        return one
    _, *parts = ROLES.split(text)
    turns = [{"role": role, "content": said} for role, said in zip(parts[::2], parts[1::2], strict=True)]
    return turns if prompt_id(turns) == name else None


def plain(rows: list[Row], tokens: "Tokenizer") -> Iterator[Row | Left]:
    """Everything that is known of a pair; texts are for people, ids are what is trained on. No pair is left out."""
    for row in rows:
        texts = {side: tokens.decode(row[f"{side}_ids"]) for side in SIDES}
        known = {name: value for name, value in row.items() if name not in (*IDS, *REFS, "text")}
        yield {**{name: row[name] for name in IDS}, "prompt": row["text"], **texts, **known, **_references(row)}


def _references(row: Row) -> Row:
    """The cached log-probs, nats, summed over the response and its EOS; nothing where none were cached."""
    return {name: row[name] for name in REFS if row[name] is not None}


FORMATS: dict[Name, Format] = {
    "trl": Format((".parquet", ".jsonl"), trl),
    "openai-messages": Format((".jsonl",), openai_messages, references=False),
    "jsonl": Format((".jsonl",), plain, weighs=True),
}
