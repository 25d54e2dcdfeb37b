"""Reward of `winnow demo --real`: does a response follow the instruction at the end of its prompt?

The demo copies this file beside its data, where its config names it as a user's config names a file of theirs.
"""

import re
from collections.abc import Callable, Mapping

SENTENCE_END = re.compile(r"[.!?](?=\s|$)")

# The instructions, by what the column `check` of questions.jsonl says of a prompt.
CHECKS: dict[str, Callable[[str], bool]] = {
    "at_most_12_words": lambda text: len(text.split()) <= 12,
    "one_sentence": lambda text: _sentences(text) == 1,
    "two_sentences": lambda text: _sentences(text) == 2,
    "no_comma": lambda text: "," not in text,
    "says_because": lambda text: re.search(r"\bbecause\b", text, re.IGNORECASE) is not None,
    "says_you": lambda text: re.search(r"\byou\b", text, re.IGNORECASE) is not None,
}


def follows(prompt: str, response: str, fields: Mapping[str, str]) -> float:
    """Return 1 if the response is not empty and does what its prompt's column `check` says, else 0."""
    text = response.strip()
    return float(bool(text) and CHECKS[fields["check"]](text))


def _sentences(text: str) -> int:
    """Return the number of sentences; 0 if the last has no end, as where the response was cut at max_tokens."""
    return len(SENTENCE_END.findall(text)) if text[-1] in ".!?" else 0
