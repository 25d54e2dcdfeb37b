"""Read an engine's completions as text: for stage `sample`, and for evaluations during training."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stages.sampling.engines import Completion

if TYPE_CHECKING:
    from stages.data.tokenizer import Tokenizer


def known_ids_of(tokenizer: "Tokenizer") -> set[int]:
    """Return the ids that the tokenizer has a token for: not all that a padded vocabulary, or a server, can give."""
    return {*tokenizer.inner.get_vocab().values()}


def ids_before_end(completion: Completion) -> list[int]:
    """Return the ids of a draw without the one that ends it."""
    return completion.token_ids[:-1] if completion.finish_reason == "stop" else completion.token_ids


def draw_texts(
    tokenizer: "Tokenizer", completion: Completion, stop: Sequence[str], continues: bool
) -> tuple[str, str | None, str]:
    """Return a draw as text, as text with special tokens if it has any, and what its last token has after a stop text.

    What the template itself writes before every answer, such as an empty `<think>` of Qwen3, is no part of the text: a
    response from a file has the same ids and is without it. continues: the prompt ends with an assistant turn. Raise
    ValueError with the reason if no stop text is found where one ended the draw.
    """
    ids = ids_before_end(completion)
    lead = [] if continues else tokenizer.lead
    if lead and ids[: len(lead)] == lead:
        ids = ids[len(lead) :]
    is_special = not tokenizer.special_tokens.keys().isdisjoint(ids)
    if completion.finish_reason != "stop_string":
        raw_text = tokenizer.decode(ids, special_tokens=True, continues=continues) if is_special else None
        return tokenizer.decode(ids, continues=continues), raw_text, ""
    text, rest = tokenizer.decode_before(ids, stop, continues=continues)
    raw_text = None
    if is_special:
        raw_text, _ = tokenizer.decode_before(ids, stop, special_tokens=True, continues=continues)
    return text, raw_text, rest
