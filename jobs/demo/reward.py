"""Reward of `winnow demo --real`: does a response follow the instruction at the end of its prompt?

The demo copies this file beside its data, where its config names it as a user's config names a file of theirs.
"""

import re
from collections.abc import Callable, Mapping

SENTENCE_END = re.compile(r"[.!?](?=\s|$)")

# The instructions, by what the column `check` of questions.jsonl says of a prompt.
CHECKS: dict[str, Callable[[str], bool]] = {
    "at_most_12_words": lambda text: len(text.split()) <= 12,
    "one_sentence": lambda text: len(SENTENCE_END.findall(text)) == 1 and text[-1] in ".!?",
    "no_comma": lambda text: "," not in text,
    "says_because": lambda text: re.search(r"\bbecause\b", text, re.IGNORECASE) is not None,
    "begins_with_well": lambda text: re.match(r"Well\b", text) is not None,
    "ends_with_thanks": lambda text: text.endswith("Thanks for asking."),
}


def follows(prompt: str, response: str, fields: Mapping[str, str]) -> float:
    """Return 1 if the response is not empty and does what its prompt's column `check` says, else 0."""
    text = response.strip()
    return float(bool(text) and CHECKS[fields["check"]](text))
