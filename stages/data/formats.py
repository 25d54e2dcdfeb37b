"""Formats of preference data, each a reader. To add a format, add a function here.

A reader takes one row and returns a `PreferencePair`, or raises ValueError with the reason for the rejects table.
`columns` names the columns it needs (options in braces), so that a file without them is refused with their names. With
`together: COLUMN`, a reader takes two consecutive rows that are equal in that column, or one row without such a
neighbour. Ties, empty responses and responses of several turns are rejected, each with its reason.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Literal, NotRequired

from pipeline import Bound, Registry
from schemas import WinnowError
from schemas.ids import Message
from stages.data.rows import Row
from stages.data.texts import Prompt, as_prompt, messages_of, number_of, prompt_of, reply_of, text_of

preference_reader = Registry("reader", "row", columns=tuple[str, ...], together=NotRequired[str])

HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ASSISTANT = "\n\nAssistant:"
HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
ROLES = {"Human": "user", "User": "user", "Assistant": "assistant"}
SAFERLHF_LABELS = {"helpful": "better_response_id", "safer": "safer_response_id"}
# Data sets published beside preference data that hold no pairs, by columns that identify them.
NOT_PAIRS = [
    (
        {"prompt", "completion", "label"},
        "TRL's unpaired format, which has no pairs; stage own_candidates reads it as candidates with rewards: set "
        "`response: completion, reward: label`",
    ),
    (
        {"transcript", "min_harmlessness_score_transcript"},
        "hh-rlhf's red-team-attempts, which has no preferences; use another folder of it, such as harmless-base",
    ),
    (
        {"info", "summary"},
        "summarize_from_feedback's axis, ratings of single summaries; set `subset: comparisons`",
    ),
]


@dataclass(frozen=True)
class PreferencePair:
    """Two responses to a prompt, one of them preferred."""

    prompt: Prompt  # its id is a hash of this content
    chosen: str
    rejected: str
    plain: str | None = None  # the prompt for a tokenizer without chat template; a response follows after a space


@preference_reader(columns=("{prompt}", "{chosen}", "{rejected}"))
def columns(row: Row, *, prompt: str = "prompt", chosen: str = "chosen", rejected: str = "rejected") -> PreferencePair:
    """Read a column each, as text or as messages: TRL's preference format with explicit prompt."""
    content = prompt_of(row, prompt)
    return PreferencePair(content, reply_of(row, chosen, content), reply_of(row, rejected, content))


@preference_reader(columns=("chosen", "rejected"))
def implicit_prompt(row: Row) -> PreferencePair:
    """Read TRL's preference format with implicit prompt, in which both sides begin with it.

    In messages, the prompt is the turns that both share. In text, it is the characters that both share, back to a white
    space, so that no word is cut; responses that begin with the same words lose these to the prompt. Transcripts of
    hh-rlhf are rejected; reader `hh` reads them.
    """
    if isinstance(row.get("chosen"), list) or isinstance(row.get("rejected"), list):
        return ultrafeedback_binarized(row)  # turns are shared or not, as in that data set
    chosen, rejected = text_of(row, "chosen"), text_of(row, "rejected")
    if HH_ASSISTANT in chosen and HH_ASSISTANT in rejected:
        raise ValueError("a transcript, which reader hh reads")
    shared = chosen[: _shared_prefix_length(chosen, rejected)]
    end = max((n for n, character in enumerate(shared) if character.isspace()), default=0)
    if not shared[:end].strip():
        raise ValueError("chosen and rejected share no prompt")
    replies = {"chosen": chosen[end:], "rejected": rejected[end:]}
    return PreferencePair(shared[:end], text_of(replies, "chosen"), text_of(replies, "rejected"))


@preference_reader(columns=("chosen", "rejected"))
def ultrafeedback_binarized(row: Row) -> PreferencePair:
    """Read HuggingFaceH4/ultrafeedback_binarized (split train_prefs): both lists contain the prompt's turns."""
    chosen, rejected = messages_of(row, "chosen"), messages_of(row, "rejected")
    # Where the lists are equal, the last turn is still the response: the pair is then rejected as identical.
    prompt = chosen[: min(_shared_prefix_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)]
    if not prompt:
        raise ValueError("chosen and rejected share no prompt")
    return PreferencePair(as_prompt(prompt), reply_of(row, "chosen", prompt), reply_of(row, "rejected", prompt))


@preference_reader(columns=("chosen", "rejected"))
def hh(row: Row) -> PreferencePair:
    r"""Read Anthropic/hh-rlhf, arXiv:2204.05862: transcripts of `\n\nHuman: ` and `\n\nAssistant: ` turns.

    The prompt ends at the last `\n\nAssistant:` that both share, because the longest shared prefix would run into
    responses that begin alike. It becomes chat messages; a tokenizer without chat template gets the transcript itself.
    """
    chosen, rejected = text_of(row, "chosen"), text_of(row, "rejected")
    end = chosen.rfind(HH_ASSISTANT, 0, _shared_prefix_length(chosen, rejected))
    if end < 0:
        raise ValueError("chosen and rejected share no Assistant turn")
    before, *turns = HH_TURN.split(chosen[:end])
    if before.strip() or not turns:
        raise ValueError("the transcript does not begin with a turn")
    start = end + len(HH_ASSISTANT)
    replies = {"chosen": chosen[start:], "rejected": rejected[start:]}
    for name, reply in replies.items():
        if HH_TURN.search(reply):
            raise ValueError(f"{name} is not one assistant turn")
        replies[name] = text_of(replies, name).strip()
    return PreferencePair(as_prompt(_messages(turns)), **replies, plain=chosen[:start])


@preference_reader(columns=("info", "summaries", "choice"))
def summarize_from_feedback(row: Row) -> PreferencePair:
    """Read openai/summarize_from_feedback, subset comparisons, arXiv:2009.01325: Reddit posts and CNN/DM articles."""
    info, summaries = row.get("info"), row.get("summaries")
    if not isinstance(info, dict):
        raise ValueError("no info")
    choice = _index(row, "choice")
    if not isinstance(summaries, list) or len(summaries) != 2 or not all(isinstance(item, dict) for item in summaries):
        raise ValueError("summaries are not two")
    chosen, rejected = (text_of(summaries[n], "text").strip() for n in (choice, 1 - choice))
    title = f"TITLE: {text_of(info, 'title')}"
    if info.get("article"):
        prompt = f"{title}\n\n{text_of(info, 'article')}\n\nTL;DR:"
    else:
        prompt = f"SUBREDDIT: r/{text_of(info, 'subreddit')}\n\n{title}\n\nPOST: {text_of(info, 'post')}\n\nTL;DR:"
    return PreferencePair(prompt, chosen, rejected, plain=prompt)


@preference_reader(columns=("prompt", "response_0", "response_1", "better_response_id", "safer_response_id"))
def pku_saferlhf(row: Row, *, prefer: Literal["helpful", "safer"]) -> PreferencePair:
    """Read PKU-Alignment/PKU-SafeRLHF, arXiv:2406.15513: each row has two labels, and `prefer` selects one of them."""
    chosen = _index(row, SAFERLHF_LABELS[prefer])
    responses = (text_of(row, f"response_{n}") for n in (chosen, 1 - chosen))
    return PreferencePair(text_of(row, "prompt"), *responses)


Rating = Literal["helpfulness", "correctness", "coherence", "complexity", "verbosity"]


@preference_reader(columns=("prompt", "response", "{by}"), together="prompt")
def helpsteer2(*rows: Row, by: Rating = "helpfulness") -> PreferencePair:
    """Read nvidia/HelpSteer2, arXiv:2406.08673: ratings by `by`; the two rows of a prompt follow each other."""
    if len(rows) == 1:
        raise ValueError("no second response to this prompt beside it")
    first, second = rows
    difference = _number(second, by) - _number(first, by)
    responses = text_of(first, "response"), text_of(second, "response")
    return _pair_by_sign(_helpsteer_prompt(first), *responses, difference, by)


@preference_reader(columns=("prompt", "response_1", "response_2", "preference_strength"))
def helpsteer2_preference(row: Row) -> PreferencePair:
    """Read nvidia/HelpSteer2, subset preference, arXiv:2410.01257: below 0 the first response is better."""
    responses = text_of(row, "response_1"), text_of(row, "response_2")
    strength = _number(row, "preference_strength")
    return _pair_by_sign(_helpsteer_prompt(row), *responses, strength, "preference_strength")


@preference_reader(columns=("context", "response1", "response2", "overall_preference"))
def helpsteer3(row: Row) -> PreferencePair:
    """Read nvidia/HelpSteer3, subset preference, arXiv:2505.11475: below 0 the first response is better."""
    responses = text_of(row, "response1"), text_of(row, "response2")
    strength = _number(row, "overall_preference")
    return _pair_by_sign(prompt_of(row, "context"), *responses, strength, "overall_preference")


# Functions for stages that read such files


def columns_of(reader: Bound) -> list[str]:
    """Return the columns that a reader needs with its options."""
    try:
        return [name.format(**reader.options) for name in reader.metadata["columns"]]
    except (LookupError, ValueError):
        raise WinnowError(
            f"{reader.entry.location()}: its decorator sets columns={reader.metadata['columns']!r}, in which braces "
            f"must hold an option; its options are {', '.join(reader.options) or 'none'}"
        ) from None


def read_pair(reader: Bound, rows: list[Row]) -> PreferencePair:
    """Return the pair that a reader makes of its rows; raise ValueError with the reason to reject them.

    That is the reader's own, what else a reader of a plugin raises, or what is wrong with its pair.
    """
    try:
        pair = reader(*rows)
    except WinnowError as error:
        reason = error.__cause__
        raise (reason if isinstance(reason, ValueError) else error) from None
    if not isinstance(pair, PreferencePair):
        raise reader.wrong_result(pair, "a PreferencePair")
    texts = {"chosen": pair.chosen, "rejected": pair.rejected}
    texts |= {} if pair.plain is None else {"plain": pair.plain}
    for name in texts:
        text_of(texts, name)
    prompt_of({"prompt": pair.prompt}, "prompt")
    return pair


def couple_neighbours(rows: Iterator[tuple[str, Row]], column: str) -> Iterator[tuple[str, list[Row]]]:
    """Yield consecutive rows two by two where they are equal in `column`, and any other row alone."""
    for _, group in groupby(rows, key=lambda item: item[1].get(column)):
        while couple := list(islice(group, 2)):
            yield couple[0][0], [row for _, row in couple]


# Helpers of readers; each raises ValueError with the reason for the rejects table


def _shared_prefix_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    different = (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(different, min(len(first), len(second)))


def _messages(parts: list[str]) -> list[Message]:
    """Return [role, text, role, text, ...] as messages."""
    messages = [
        {"role": ROLES[role], "content": text.strip()} for role, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    if not all(message["content"] for message in messages):
        raise ValueError("empty turn in the prompt")
    return messages


def _helpsteer_prompt(row: Row) -> Prompt:
    """Return the prompt; HelpSteer2 writes the turns of a long one into one text, the first without a marker."""
    prompt = text_of(row, "prompt")
    return as_prompt(_messages(["User", *HELPSTEER_TURN.split(prompt)])) if HELPSTEER_TURN.search(prompt) else prompt


def _number(row: Row, name: str) -> float:
    value = number_of(row, name)
    if not math.isfinite(value):
        raise ValueError(f"{name} is not a number")
    return value


def _index(row: Row, name: str) -> int:
    value = _number(row, name)
    if value not in (0, 1):
        raise ValueError(f"{name} is neither 0 nor 1")
    return int(value)


def _pair_by_sign(prompt: Prompt, first: str, second: str, sign: float, name: str) -> PreferencePair:
    """Return the pair whose first response is chosen where `sign` is below 0; a tie has no better side."""
    if sign == 0:
        raise ValueError(f"tie in {name}")
    return PreferencePair(prompt, *((first, second) if sign < 0 else (second, first)))
