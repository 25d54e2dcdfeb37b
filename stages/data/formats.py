"""Formats of preference data, each a reader. To add a format, add a function here.

A reader takes one row and returns a `PreferencePair`, or raises ValueError with the reason for the rejects table. A row
with more than two responses gives a list, in which a ValueError stands for a pair that is none. `columns` names the
columns that it needs (options in braces), so that a file without them is refused with their names; `optional` those
that it reads where a file has them; `variants` are options under which it reads public data. With `together: COLUMN`, a
reader takes consecutive rows that are equal in that column: two at a time, or all of them with `together_rows: None`.
Ties and empty responses are rejected, each with its reason. More formats are in
comparison_formats.py (two responses with a verdict), ranking_formats.py (more than two), trainer_formats.py.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any, Literal, NotRequired

from pipeline import Bound, Registry
from schemas import WinnowError
from schemas.ids import Message
from stages.data.rows import Row
from stages.data.texts import (
    Prompt,
    Reply,
    as_messages,
    as_prompt,
    messages_of,
    number_of,
    prompt_of,
    prompt_with,
    reply_of,
    shared_prefix_length,
    text_of,
    with_chat_keys,
)

COLUMNS: dict[str, Any] = dict(
    columns=tuple[str, ...], optional=NotRequired[tuple[str, ...]], variants=NotRequired[list[dict[str, str]]]
)
preference_reader = Registry(
    "reader", "row", **COLUMNS, together=NotRequired[str], together_rows=NotRequired[int | None]
)

IDENTICAL = "identical responses"  # reason to reject a pair
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ASSISTANT = "\n\nAssistant:"
HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
ROLES = {"Human": "user", "User": "user", "Assistant": "assistant"}
SAFERLHF_LABELS = {"helpful": "better_response_id", "safer": "safer_response_id"}
# Scores of both sides, as the data sets name them.
SCORES = [
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
]
SCORE_COLUMNS = tuple(name for names in SCORES for name in names)
# Columns in which the prompt usually is. Texts beside one that do not begin with it share no prompt, but their first
# words.
PROMPT_COLUMNS = (
    "prompt", "question", "query", "instruction", "input", "messages", "conversation", "conversations", "dialogue",
    "history",
)  # fmt: skip
# Data sets published beside preference data that hold no pairs, by columns that identify them.
NOT_PAIRS = [
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
    chosen: Reply
    rejected: Reply
    plain: str | None = None  # the prompt for a tokenizer without chat template; a response follows after a space
    # Of a format that has them elsewhere than in a column `tools` of schemas.
    tools: list[dict[str, Any]] | None = field(default=None, kw_only=True)


@preference_reader(
    columns=("{prompt}", "{chosen}", "{rejected}", "{system}", "{input}"),
    optional=SCORE_COLUMNS,
    variants=[{"prompt": name} for name in PROMPT_COLUMNS if name != "prompt"],
    version=2,
)
def columns(
    row: Row,
    *,
    prompt: str = "prompt",
    chosen: str = "chosen",
    rejected: str = "rejected",
    system: str | None = None,
    input: str | None = None,
    check_scores: bool = True,
) -> PreferencePair:
    """Read a column each, as text or as messages: TRL's preference format with explicit prompt.

    Turns that chosen and rejected share, before or after the prompt, belong to the prompt. The text in `input` follows
    the prompt on a new line, as in Alpaca's format; that in `system` becomes the system message. Empty ones add
    nothing. `check_scores`: reject rows whose chosen response has no higher score than the rejected one, where the file
    has both (score_chosen and score_rejected, chosen_score, chosen_rating, chosen-rating).
    """
    if check_scores:
        _require_higher_score(row)
    content, shared = prompt_with(row, prompt, system=system, input=input), []
    if isinstance(row.get(chosen), list) and isinstance(row.get(rejected), list):
        shared = shared_turns(messages_of(row, chosen), messages_of(row, rejected))
    if not shared:
        return PreferencePair(content, reply_of(row, chosen, content), reply_of(row, rejected, content))
    turns = as_messages(content)
    repeated = any(shared[n : n + len(turns)] == turns for n in range(len(shared)))
    if not repeated and shared[0]["role"] in ("system", "user"):  # another conversation, and not how this one goes on
        raise ValueError(f"{prompt} is not among the turns that {chosen} and {rejected} share")
    return PreferencePair(
        as_prompt(shared if repeated else [*turns, *shared]),
        reply_of(row, chosen, shared),
        reply_of(row, rejected, shared),
    )


@preference_reader(columns=("chosen", "rejected"), optional=(*SCORE_COLUMNS, *PROMPT_COLUMNS), version=3)
def implicit_prompt(row: Row, *, check_scores: bool = True) -> PreferencePair:
    """Read TRL's preference format with implicit prompt, in which both sides begin with it.

    In messages, the prompt is the turns that both share. In text, it is the characters that both share, back to a white
    space, so that no word is cut; responses that begin with the same words lose these to the prompt. Rejected are
    transcripts of hh-rlhf, which reader `hh` reads, and texts that do not begin with the prompt in another column, such
    as `messages`. `check_scores` as in reader `columns`.
    """
    if isinstance(row.get("chosen"), list) or isinstance(row.get("rejected"), list):
        return ultrafeedback_binarized(row, check_scores=check_scores)  # turns are shared or not, as in that data set
    if check_scores:
        _require_higher_score(row)
    chosen, rejected = text_of(row, "chosen"), text_of(row, "rejected")
    if HH_ASSISTANT in chosen and HH_ASSISTANT in rejected:
        raise ValueError("a transcript, which reader hh reads")
    shared = chosen[: shared_prefix_length(chosen, rejected)]
    end = max((n for n, character in enumerate(shared) if character.isspace()), default=0)
    if not shared[:end].strip():
        raise ValueError("chosen and rejected share no prompt")
    for name in PROMPT_COLUMNS:
        if _last_question(row.get(name)) not in shared:
            raise ValueError(f"chosen and rejected do not begin with the prompt in {name}; reader {{name: columns, "
                             f"prompt: {name}}} reads it")  # fmt: skip
    replies = {"chosen": chosen[end:], "rejected": rejected[end:]}
    return PreferencePair(shared[:end], text_of(replies, "chosen"), text_of(replies, "rejected"))


@preference_reader(columns=("chosen", "rejected"), optional=SCORE_COLUMNS, version=2)
def ultrafeedback_binarized(row: Row, *, check_scores: bool = True) -> PreferencePair:
    """Read HuggingFaceH4/ultrafeedback_binarized (split train_prefs): both lists contain the prompt's turns.

    `check_scores` as in reader `columns`: in this data set, some rows have equal scores.
    """
    if check_scores:
        _require_higher_score(row)
    prompt = shared_turns(messages_of(row, "chosen"), messages_of(row, "rejected"))
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
    end = chosen.rfind(HH_ASSISTANT, 0, shared_prefix_length(chosen, rejected))
    if end < 0:
        raise ValueError("chosen and rejected share no Assistant turn")
    start = end + len(HH_ASSISTANT)
    prompt, plain = prompt_of_transcript(chosen[:start])
    replies = {"chosen": chosen[start:], "rejected": rejected[start:]}
    for name, reply in replies.items():
        if HH_TURN.search(reply):
            raise ValueError(f"{name} is not one assistant turn")
        replies[name] = text_of(replies, name).strip()
    return PreferencePair(prompt, replies["chosen"], replies["rejected"], plain=plain)


@preference_reader(columns=("info", "summaries", "choice"))
def summarize_from_feedback(row: Row) -> PreferencePair:
    """Read openai/summarize_from_feedback, subset comparisons, arXiv:2009.01325: Reddit posts and CNN/DM articles."""
    info, summaries = row.get("info"), row.get("summaries")
    if not isinstance(info, dict):
        raise ValueError("no info")
    choice = zero_or_one_of(row, "choice")
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
    chosen = zero_or_one_of(row, SAFERLHF_LABELS[prefer])
    responses = (text_of(row, f"response_{n}") for n in (chosen, 1 - chosen))
    return PreferencePair(text_of(row, "prompt"), *responses)


Rating = Literal["helpfulness", "correctness", "coherence", "complexity", "verbosity"]


@preference_reader(columns=("prompt", "response", "{by}"), together="prompt")
def helpsteer2(*rows: Row, by: Rating = "helpfulness") -> PreferencePair:
    """Read nvidia/HelpSteer2, arXiv:2406.08673: ratings by `by`; the two rows of a prompt follow each other."""
    if len(rows) == 1:
        raise ValueError("no second response to this prompt beside it")
    first, second = rows
    difference = finite_number_of(second, by) - finite_number_of(first, by)
    responses = text_of(first, "response"), text_of(second, "response")
    return pair_by_sign(_helpsteer_prompt(first), *responses, difference, by)


@preference_reader(columns=("prompt", "response_1", "response_2", "preference_strength"))
def helpsteer2_preference(row: Row) -> PreferencePair:
    """Read nvidia/HelpSteer2, subset preference, arXiv:2410.01257: below 0 the first response is better."""
    responses = text_of(row, "response_1"), text_of(row, "response_2")
    strength = finite_number_of(row, "preference_strength")
    return pair_by_sign(_helpsteer_prompt(row), *responses, strength, "preference_strength")


@preference_reader(columns=("context", "response1", "response2", "overall_preference"))
def helpsteer3(row: Row) -> PreferencePair:
    """Read nvidia/HelpSteer3, subset preference, arXiv:2505.11475: below 0 the first response is better."""
    responses = text_of(row, "response1"), text_of(row, "response2")
    strength = finite_number_of(row, "overall_preference")
    return pair_by_sign(prompt_of(row, "context"), *responses, strength, "overall_preference")


# Functions for stages that read such files


def columns_of(reader: Bound) -> list[str]:
    """Return the columns that a reader needs with its options."""
    try:
        return [name.format(**reader.options) for name in reader.metadata["columns"] if _is_used(name, reader)]
    except (LookupError, ValueError):
        raise WinnowError(
            f"{reader.entry.location()}: its decorator sets columns={reader.metadata['columns']!r}, in which braces "
            f"must hold an option; its options are {', '.join(reader.options) or 'none'}"
        ) from None


def optional_columns_of(reader: Bound) -> list[str]:
    """Return the columns that a reader reads where a file has them."""
    return [name.format(**reader.options) for name in reader.metadata.get("optional", ()) if _is_used(name, reader)]


def _is_used(name: str, reader: Bound) -> bool:
    """Return whether a column is none that an option names and that is not set."""
    return reader.options.get(name.strip("{}"), name) is not None


def pairs_of(reader: Bound, rows: list[Row]) -> list[PreferencePair | ValueError]:
    """Return the pairs of one call of a reader, with a ValueError, the reason to reject it, for what is no pair."""
    try:
        pairs = reader(*rows)
    except ValueError as error:  # of a plugin's reader, a WinnowError that says what it raised
        return [error.__cause__ if isinstance(error.__cause__, ValueError) else error]
    pairs = pairs if isinstance(pairs, list) else [pairs]
    return [_checked(reader, pair) for pair in pairs] if reader.entry.plugin else pairs


def _checked(reader: Bound, pair: Any) -> PreferencePair | ValueError:
    """Return the pair of a plugin's reader, or the reason why it cannot be used."""
    if isinstance(pair, ValueError):
        return pair
    if not isinstance(pair, PreferencePair):
        return reader.wrong_result(pair, "a PreferencePair, or a list of them")
    texts = {"chosen": pair.chosen, "rejected": pair.rejected}
    texts |= {} if pair.plain is None else {"plain": pair.plain}
    try:
        for name in (name for name, text in texts.items() if not isinstance(text, dict | list)):
            text_of(texts, name)
        prompt_of({"prompt": pair.prompt}, "prompt")
    except ValueError as error:
        return error
    return pair


def first_pairs(reader: Bound, rows: list[Row]) -> list[PreferencePair | ValueError]:
    """Return `pairs_of` without further pairs of the same prompt."""
    prompts: list[Prompt] = []
    first: list[PreferencePair | ValueError] = []
    for pair in pairs_of(reader, rows):
        if isinstance(pair, ValueError) or pair.prompt not in prompts:
            first.append(pair)
        if not isinstance(pair, ValueError):
            prompts.append(pair.prompt)
    return first


def couple_neighbours(
    rows: Iterator[tuple[str, Row]], column: str, most: int | None = 2
) -> Iterator[tuple[str, list[Row]]]:
    """Yield consecutive rows that are equal in `column`, at most `most` of them at a time, and any other row alone."""
    for _, group in groupby(rows, key=lambda item: item[1].get(column)):
        while couple := list(islice(group, most)):
            yield couple[0][0], [row for _, row in couple]


def row_groups(rows: Iterator[tuple[str, Row]], reader: Bound) -> Iterator[tuple[str, list[Row]]]:
    """Yield the rows of each call of a reader, one or those that it takes together, with the location of the first."""
    together = reader.metadata.get("together")
    if together is None:
        return ((location, [row]) for location, row in rows)
    return couple_neighbours(rows, together, reader.metadata.get("together_rows", 2))


# Helpers of readers; each raises ValueError with the reason for the rejects table


def prompt_of_transcript(transcript: str) -> tuple[Prompt, str]:
    r"""Return the turns of a transcript that ends with `\n\nAssistant:`, and the transcript up to there."""
    plain = transcript.rstrip()
    if not plain.endswith(HH_ASSISTANT):
        raise ValueError("the transcript does not end with an open Assistant turn")
    before, *turns = HH_TURN.split(plain.removesuffix(HH_ASSISTANT))
    if before.strip() or not turns:
        raise ValueError("the transcript does not begin with a turn")
    return as_prompt(_messages(turns)), plain


def shared_turns(first: list[Message], second: list[Message]) -> list[Message]:
    """Return the turns with which both begin, except that the last turn of either is always its response.

    Equal lists thus share all but their last turn, and the pair is then rejected as identical. What follows begins with
    a turn of the assistant: an answer that both share belongs to the responses if a user or a tool answers it in two
    ways.
    """
    longest = min(shared_prefix_length(first, second), len(first) - 1, len(second) - 1)
    lengths = range(longest, -1, -1)
    begins = (n for n in lengths if all(turns[n]["role"] == "assistant" for turns in (first, second)))
    return first[: next(begins, longest)]


def _require_higher_score(row: Row) -> None:
    """Raise ValueError if the row has scores of both sides and the chosen one's is not the higher."""
    for chosen, rejected in SCORES:
        if row.get(chosen) is None or row.get(rejected) is None:
            continue
        if finite_number_of(row, chosen) <= finite_number_of(row, rejected):
            raise ValueError(f"{chosen} is not above {rejected}")


def _last_question(prompt: Any) -> str:
    """Return a text, or the last turn of the user in messages, without surrounding white space; "" if it is neither."""
    if isinstance(prompt, list) and all(isinstance(turn, dict) for turn in prompt):
        turns = [turn.get("content") for turn in with_chat_keys(prompt) if turn.get("role") == "user"]
        prompt = turns[-1] if turns else None
    return prompt.strip() if isinstance(prompt, str) else ""


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


def finite_number_of(row: Row, name: str) -> float:
    """Return the number in a column; infinite and NaN are none."""
    value = number_of(row, name)
    if not math.isfinite(value):
        raise ValueError(f"{name} is not a number")
    return value


def zero_or_one_of(row: Row, name: str) -> int:
    """Return 0 or 1, of which false and true are other names."""
    value = row.get(name)
    value = value if isinstance(value, bool) else finite_number_of(row, name)
    if value not in (0, 1):
        raise ValueError(f"{name} is neither 0 nor 1")
    return int(value)


def pair_by_sign(prompt: Prompt, first: str, second: str, sign: float, name: str) -> PreferencePair:
    """Return the pair whose first response is chosen where `sign` is below 0; a tie has no better side."""
    if sign == 0:
        raise ValueError(f"tie in {name}")
    return PreferencePair(prompt, *((first, second) if sign < 0 else (second, first)))
