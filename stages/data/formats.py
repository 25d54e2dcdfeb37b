"""Formats of preference data, each a reader. To add a format, add a function here.

A reader is given one row and returns its Comparison, or raises ValueError with the reason for the rejects table.
`columns` names what it reads, options in braces, so that a file without them is refused by name. Where `together`
names a column, a reader is given two rows that follow each other and agree in it, or the one that has no such
neighbour. What is lost in a tie, an empty reply or a reply of several turns is counted with its reason.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from pipeline import Bound, Registry, StageContext
from schemas import WinnowError
from schemas.ids import Message
from stages.data.files import (
    MissingColumnError,
    Prompt,
    Row,
    Source,
    as_prompt,
    has_columns,
    messages_of,
    one_source,
    prompt_of,
    reply_of,
    text_of,
)

preference_reader = Registry("reader", "columns")

TURN = re.compile(r"\n\n(Human|Assistant):")
REPLY = "\n\nAssistant:"
STEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
ROLES = {"Human": "user", "User": "user", "Assistant": "assistant"}
SIDE = {"helpful": "better_response_id", "safer": "safer_response_id"}
# Data sets next to these that hold no pairs, by columns that tell them.
NOT_PAIRS = [
    (
        {"prompt", "completion", "label"},
        "TRL's unpaired format, which has no pairs; it is read by stage own_candidates, as candidates with rewards, "
        "with `response: completion, reward: label`",
    ),
    (
        {"transcript", "min_harmlessness_score_transcript"},
        "hh-rlhf's red-team-attempts, which are no preferences; take another folder of it, such as harmless-base",
    ),
    (
        {"info", "summary"},
        "summarize_from_feedback's axis, ratings of single summaries; take `subset: comparisons`",
    ),
]


@dataclass(frozen=True)
class Comparison:
    """One reply preferred to another."""

    prompt: Prompt  # its content is its id
    chosen: str
    rejected: str
    plain: str | None = None  # the prompt for a tokenizer without chat template; a reply follows after a space


@preference_reader(columns=("{prompt}", "{chosen}", "{rejected}"))
def columns(row: Row, *, prompt: str = "prompt", chosen: str = "chosen", rejected: str = "rejected") -> Comparison:
    """A column each, as text or as messages: TRL's preference format with explicit prompt."""
    asked = prompt_of(row, prompt)
    return Comparison(asked, reply_of(row, chosen, asked), reply_of(row, rejected, asked))


@preference_reader(columns=("chosen", "rejected"))
def implicit_prompt(row: Row) -> Comparison:
    """TRL's preference format with implicit prompt: both sides begin with it.

    Messages: the turns that both share. Text: the characters that both share, back to a white space, so that no
    word is cut; replies that begin with the same words lose these to the prompt. Transcripts are left to `hh`.
    """
    if isinstance(row.get("chosen"), list) or isinstance(row.get("rejected"), list):
        return _by_turns(row)
    chosen, rejected = text_of(row, "chosen"), text_of(row, "rejected")
    if REPLY in chosen and REPLY in rejected:
        raise ValueError("a transcript, which reader hh reads")
    shared = chosen[: _shared(chosen, rejected)]
    end = max((n for n, letter in enumerate(shared) if letter.isspace()), default=0)
    if not shared[:end].strip():
        raise ValueError("chosen and rejected share no prompt")
    return Comparison(shared[:end], _filled(chosen[end:], "chosen"), _filled(rejected[end:], "rejected"))


def _by_turns(row: Row) -> Comparison:
    chosen, rejected = messages_of(row, "chosen"), messages_of(row, "rejected")
    prompt = chosen[: min(_shared(chosen, rejected), len(chosen) - 1, len(rejected) - 1)]
    if not prompt:
        raise ValueError("chosen and rejected share no prompt")
    return Comparison(as_prompt(prompt), reply_of(row, "chosen", prompt), reply_of(row, "rejected", prompt))


@preference_reader(columns=("chosen", "rejected"))
def ultrafeedback_binarized(row: Row) -> Comparison:
    """HuggingFaceH4/ultrafeedback_binarized (part train_prefs): the user's turn and the reply in both lists."""
    return _by_turns(row)


@preference_reader(columns=("chosen", "rejected"))
def hh(row: Row) -> Comparison:
    r"""Anthropic/hh-rlhf, arXiv:2204.05862: transcripts of `\n\nHuman: ` and `\n\nAssistant: ` turns.

    The prompt ends at the last `\n\nAssistant:` that both share, for the longest shared prefix runs into the reply
    where both begin alike. It becomes chat messages; a tokenizer without chat template reads the transcript as it is.
    """
    chosen, rejected = text_of(row, "chosen"), text_of(row, "rejected")
    end = chosen.rfind(REPLY, 0, _shared(chosen, rejected))
    if end < 0:
        raise ValueError("chosen and rejected share no Assistant turn")
    before, *turns = TURN.split(chosen[:end])
    if before.strip() or not turns:
        raise ValueError("the transcript does not begin with a turn")
    start = end + len(REPLY)
    winner, loser = _one_turn(chosen[start:], "chosen"), _one_turn(rejected[start:], "rejected")
    return Comparison(as_prompt(_turns(turns)), winner, loser, plain=chosen[:start])


@preference_reader(columns=("info", "summaries", "choice"))
def summarize_from_feedback(row: Row) -> Comparison:
    """openai/summarize_from_feedback, subset comparisons, arXiv:2009.01325: Reddit posts, and CNN/DM articles."""
    info, summaries, choice = _fields(row, "info"), row.get("summaries"), _index(row, "choice")
    if not isinstance(summaries, list) or len(summaries) != 2:
        raise ValueError("summaries are not two")
    chosen, rejected = (_text_after_space(summaries[n]) for n in (choice, 1 - choice))
    title = f"TITLE: {text_of(info, 'title')}"
    if info.get("article"):
        prompt = f"{title}\n\n{text_of(info, 'article')}\n\nTL;DR:"
    else:
        prompt = f"SUBREDDIT: r/{text_of(info, 'subreddit')}\n\n{title}\n\nPOST: {text_of(info, 'post')}\n\nTL;DR:"
    return Comparison(prompt, chosen, rejected, plain=prompt)


@preference_reader(
    columns=("prompt", "response_0", "response_1", "better_response_id", "safer_response_id"),
)
def pku_saferlhf(row: Row, *, prefer: Literal["helpful", "safer"]) -> Comparison:
    """PKU-Alignment/PKU-SafeRLHF, arXiv:2406.15513: two labels a row, of which `prefer` says whose pairs are meant."""
    best = _index(row, SIDE[prefer])
    sides = (text_of(row, f"response_{n}") for n in (best, 1 - best))
    return Comparison(text_of(row, "prompt"), *sides)


Rating = Literal["helpfulness", "correctness", "coherence", "complexity", "verbosity"]


@preference_reader(columns=("prompt", "response", "{by}"), together="prompt")
def helpsteer2(*rows: Row, by: Rating = "helpfulness") -> Comparison:
    """nvidia/HelpSteer2, arXiv:2406.08673: ratings; the two rows of a prompt follow each other."""
    if len(rows) == 1:
        raise ValueError("no second response to this prompt beside it")
    first, second = rows
    gap = _number(second, by) - _number(first, by)
    return _by_sign(_steer_prompt(first), text_of(first, "response"), text_of(second, "response"), gap, by)


@preference_reader(columns=("prompt", "response_1", "response_2", "preference_strength"))
def helpsteer2_preference(row: Row) -> Comparison:
    """nvidia/HelpSteer2, subset preference, arXiv:2410.01257: below 0 the first response is better."""
    sides = text_of(row, "response_1"), text_of(row, "response_2")
    return _by_sign(_steer_prompt(row), *sides, _number(row, "preference_strength"), "preference_strength")


@preference_reader(columns=("context", "response1", "response2", "overall_preference"))
def helpsteer3(row: Row) -> Comparison:
    """nvidia/HelpSteer3, subset preference, arXiv:2505.11475: below 0 the first response is better."""
    sides = text_of(row, "response1"), text_of(row, "response2")
    return _by_sign(prompt_of(row, "context"), *sides, _number(row, "overall_preference"), "overall_preference")


# What a stage does with a reader


def columns_of(reader: Bound) -> list[str]:
    return [name.format(**reader.options) for name in reader.metadata["columns"]]


def read(ctx: StageContext, source: Source, reader: Bound) -> Iterator[tuple[str, list[Row]]]:
    """The rows that the reader is given at once, with the place of the first."""
    rows, together = read_columns(ctx, source, columns_of(reader)), reader.metadata.get("together")
    return ((place, [row]) for place, row in rows) if together is None else _couples(rows, together)


def read_columns(ctx: StageContext, source: Source, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """`source.rows` with advice."""
    with _advice():
        yield from source.rows(ctx, columns)


def check_source(options: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """Plan-time check of a stage that reads people's data: one source, and if it is a file, one with these columns."""
    try:
        with _advice():
            return one_source(options, {}) or has_columns(options, columns)
    except WinnowError as error:
        return list(error.problems)


@contextmanager
def _advice() -> Iterator[None]:
    """Where a column is missing: what the file may be, and the next move."""
    try:
        yield
    except MissingColumnError as error:
        raise WinnowError(f"{error}{_next_move(set(error.have))}") from None


def _next_move(have: set[str]) -> str:
    for tell, what in NOT_PAIRS:
        if tell <= have:
            return f". This is {what}"
    bounds = (Bound(entry, _defaults(entry.options)) for entry in preference_reader.entries.values())
    fitting = [bound.name for bound in bounds if set(columns_of(bound)) <= have]
    return f"; `reader` can be {' or '.join(fitting)} for these" if fitting else ""


def _defaults(options: Any) -> dict[str, Any]:
    return {name: field.default for name, field in options.model_fields.items()}


def _couples(rows: Iterator[tuple[str, Row]], name: str) -> Iterator[tuple[str, list[Row]]]:
    """Two by two where neighbours agree in a column, else one."""
    held: tuple[str, Row] | None = None
    for place, row in rows:
        if held is None:
            held = place, row
        elif held[1].get(name) == row.get(name):
            yield held[0], [held[1], row]
            held = None
        else:
            yield held[0], [held[1]]
            held = place, row
    if held is not None:
        yield held[0], [held[1]]


# What readers share; each raises ValueError


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the longest shared prefix."""
    unequal = (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(unequal, min(len(one), len(other)))


def _turns(parts: list[str]) -> list[Message]:
    """Names and texts in turn."""
    turns = [{"role": ROLES[name], "content": text.strip()} for name, text in zip(parts[::2], parts[1::2], strict=True)]
    if not all(turn["content"] for turn in turns):
        raise ValueError("empty turn in the prompt")
    return turns


def _one_turn(text: str, name: str) -> str:
    if TURN.search(text):
        raise ValueError(f"{name} is not one assistant turn")
    return _filled(text, name).strip()


def _filled(text: str, name: str) -> str:
    return text_of({name: text}, name)


def _steer_prompt(row: Row) -> Prompt:
    """HelpSteer2 writes the turns of a long prompt into one text, the first without a mark."""
    prompt = text_of(row, "prompt")
    return as_prompt(_turns(["User", *STEER_TURN.split(prompt)])) if STEER_TURN.search(prompt) else prompt


def _text_after_space(summary: Any) -> str:
    if not isinstance(summary, dict):
        raise ValueError("summaries are not two")
    return text_of(summary, "text").strip()


def _fields(row: Row, name: str) -> Row:
    value = row.get(name)
    if not isinstance(value, dict):
        raise ValueError(f"no {name}")
    return value


def _index(row: Row, name: str) -> int:
    value = _number(row, name)
    if value not in (0, 1):
        raise ValueError(f"{name} is neither 0 nor 1")
    return int(value)


def _number(row: Row, name: str) -> float:
    try:
        value = float(row.get(name))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} is not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{name} is not a number")
    return value


def _by_sign(prompt: Prompt, first: str, second: str, sign: float, name: str) -> Comparison:
    """Below 0 the first is better; a tie has no better side."""
    if sign == 0:
        raise ValueError(f"tie in {name}")
    return Comparison(prompt, *((first, second) if sign < 0 else (second, first)))
