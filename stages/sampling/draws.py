"""Read an engine's completions as text: for stage `sample`, and for evaluations during training."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stages.data.rows import Row
from stages.data.texts import is_continued
from stages.sampling.engines import Completion

if TYPE_CHECKING:
    from stages.data.tokenizer import Tokenizer

SPACE_BEFORE_WORD = re.compile(r" (?!\s)")


def known_ids_of(tokenizer: "Tokenizer") -> set[int]:
    """Return the ids that the tokenizer has a token for: not all that a padded vocabulary, or a server, can give."""
    return {*tokenizer.inner.get_vocab().values()}


def ids_before_end(completion: Completion) -> list[int]:
    """Return the ids of a draw without the one that ends it."""
    return completion.token_ids[:-1] if completion.finish_reason == "stop" else completion.token_ids


def draw_texts(
    tokenizer: "Tokenizer", completion: Completion, stop: Sequence[str], prompt: Row
) -> tuple[str, str | None, str]:
    """Return a draw as text, as text with special tokens if it has any, and what its last token has after a stop text.

    It is the text that a response from a file with the same ids has: without what the template itself writes before
    every answer, such as an empty `<think>` of Qwen3, and with a `<think>` that the template has written at the end of
    the prompt. White space at its end is left out, and so is one space before its first word, unless it continues a
    turn of the prompt; the indentation of code stays. prompt: its row of PROMPTS. Raise ValueError with the reason if
    no stop text is found where one ended the draw.
    """
    ids, continues = ids_before_end(completion), is_continued(prompt)
    lead = tokenizer.lead
    is_after_lead = not continues and bool(lead) and ids[: len(lead)] == lead
    if is_after_lead:
        ids = ids[len(lead) :]
    opened = "" if continues or is_after_lead else tokenizer.thought_opened_by(prompt["token_ids"])
    is_special = not tokenizer.special_tokens.keys().isdisjoint(ids)
    texts, rest = list[str](), ""
    for special_tokens in (False, True)[: 1 + is_special]:
        if completion.finish_reason == "stop_string":
            text, rest = tokenizer.decode_before(ids, stop, special_tokens=special_tokens)
        else:
            text = tokenizer.decode(ids, special_tokens=special_tokens)
        text = text.rstrip()
        if is_after_lead or opened:
            text = text.lstrip()
        elif not continues and SPACE_BEFORE_WORD.match(text):
            text = text[1:]
        texts.append(opened + text if text else text)
    return texts[0], texts[1] if is_special else None, rest
