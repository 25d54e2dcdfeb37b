"""Interface of rankers: `Ranker` compares two responses, `Scorer` scores one alone."""

import math
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import StageContext
from schemas import COMMAND, WinnowError, WinnowWarning
from schemas.ids import Message
from stages.data.rows import Row, fields_of
from stages.data.texts import Conversation, conversation_of, reply_of_candidate

# What a ranker reads of a response, hashable and sortable: its text, unless `Ranker.read` says otherwise.
Reading = Any
ReadingPair = tuple[Reading, Reading]
Question = tuple[str, Sequence[ReadingPair]]  # a prompt as text, and pairs of responses to it
Logits = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # of pairs: mean, read as they stand, read the other way
T = TypeVar("T")
Prepared = TypeVar("Prepared")
PairFormat = Literal["marks", "chat", "rlhflow"]  # of the pairwise ranker's prompt (stages/ranking/pairwise.py)
KEPT_ENCODINGS = 4096  # texts whose ids a ranker keeps: those of two times eight prompts with 64 responses, twice
# Asked about at once where an engine or a server has a batch of its own to fill: with 8 votes on each of 4 pairs, four
# times what is in vLLM's queue; of 64 responses, ids of some 300 MB.
PROMPTS_OF_ENGINE = 128
TOO_LONG, CANNOT_READ, NO_VERDICT = "does not fit the ranker", "the ranker cannot read it: ", "no verdict"
MIN_ANSWERS = 32  # fewer say too little about a judge to refuse it
EXAMPLES = 3  # of answers without a verdict that the refusal shows
RESPONSE_TABLES = ("candidates", "baseline", "selections")  # places of rejected responses; others are of comparisons
MANY_CUT = 0.10  # share of a part's responses, of which a stage warns
MANY_LOST = 0.05  # share of a part's responses, or comparisons, of which a stage warns
SPECIAL_TOKEN = "a special token of its own is written in the text"  # it would be read as a control token
# What to do about responses that are rejected, by words of the reason; the first that occur in it count.
CURES = {
    TOO_LONG: "give a ranker with a longer context, or lower `max_tokens` of `sample`",
    NO_VERDICT: "ask for a plain verdict in `by.template`, or give another judge",
    "not finite": "set `by.dtype: float32`, or give another ranker",
    "special token": "leave out prompts that have it, have `bad_words` of `sample` keep the policy from writing it, or "
    "give a ranker that has no such token",
    "no chat template": "set `chat_template` in the ranker's step of stage `model`, or give a ranker that has one",
    "chat template": "set `chat_template` in the ranker's step of stage `model` to one that does, or leave those out",
    "cut at max_tokens": "raise `max_tokens` of `sample`",
    "format rlhflow": "set another `by.format`, or give another ranker",
    CANNOT_READ: "correct it in the data file, or leave such prompts out",
}
QUESTION = """\
Which of two responses to a prompt is better?

[PROMPT]
{prompt}

[RESPONSE A]
{a}

[RESPONSE B]
{b}

Answer with one letter, A or B."""


@dataclass(frozen=True)
class Response:
    """Response to a prompt: its text, and the ids that the policy read and drew; length: it was cut at the limit.

    prompt: the prompt's chat messages and tools; None if it is one text, the context. messages: the response's own, if
    they are more than one text. fields: the columns of the data file that were kept with the prompt.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str = "given"
    prompt_ids: tuple[int, ...] = ()
    prompt: Conversation | None = None
    messages: Message | list[Message] | None = field(default=None, hash=False)
    fields: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Unreadable:
    """Response, or two of them, that a ranker cannot read: the reason to reject it, and a detail of it."""

    reason: str = TOO_LONG
    detail: str = ""


class Ranker(ABC):
    """Ranker of two responses to one prompt.

    symmetric: reading a pair in the other order gives the same answer, so it is read in one order only.
    abstains: a logit may be nan, which means that the ranker has no verdict on that pair.
    prompts_at_once: how many prompts of a part `logits_by_prompt` is asked about in one call.
    reads_ahead: `read` and `fits` may be called in a thread while `logits_by_prompt` is running.
    scores_at_end: a response is scored at its last token, which the network knows as an end.
    """

    symmetric = False
    abstains = False
    prompts_at_once = 1
    reads_ahead = False
    scores_at_end = False

    def read(self, context: str, response: Response) -> Reading | None:
        """Return what the other methods take as a response: its text, by default.

        None, or ValueError with the reason, if it cannot be read.
        """
        return response.text

    @abstractmethod
    def fits(self, context: str, first: Reading, second: Reading) -> bool:
        """Return whether prompt and responses are short enough; raise ValueError with the reason for anything else."""

    @abstractmethod
    def logits(self, context: str, pairs: Sequence[ReadingPair]) -> np.ndarray:
        """Return logit P(first beats second) of each pair, nats, float64 [N]."""

    def logits_by_prompt(self, questions: Sequence[Question]) -> list[np.ndarray]:
        """Return the logits of each prompt's pairs: those of `logits`, one prompt after the other, by default."""
        return [self.logits(context, pairs) for context, pairs in questions]

    def finish_part(self, ctx: StageContext) -> None:  # noqa: B027 - optional
        """Count what was read since the last call, and raise WinnowError if it is of no use: nothing, by default."""


class Scorer(Ranker):
    """Ranker with a score for each response alone: the logit of a pair is the difference of its scores."""

    symmetric = True

    @abstractmethod
    def score(self, context: str, texts: Sequence[Reading]) -> np.ndarray:
        """Return one score per reading (a text, unless `read` says otherwise), float64 [N]."""

    def fits(self, context: str, first: Reading, second: Reading) -> bool:
        return True

    def score_by_prompt(self, questions: Sequence[tuple[str, Sequence[Reading]]]) -> list[np.ndarray]:
        """Return the scores of each prompt's readings: those of `score`, one prompt after the other, by default."""
        return [self.score(context, texts) for context, texts in questions]

    def scores(self, questions: Sequence[tuple[str, Sequence[Reading]]]) -> list[dict[Reading, float]]:
        """Return scores by reading, of each prompt. Equal ones are scored once, in sorted order."""
        unique = [(context, sorted(set(texts))) for context, texts in questions]
        scored = zip(unique, self.score_by_prompt(unique), strict=True)
        return [dict(zip(texts, scores.tolist(), strict=True)) for (_, texts), scores in scored]

    def logits(self, context: str, pairs: Sequence[ReadingPair]) -> np.ndarray:
        (logits,) = self.logits_by_prompt([(context, pairs)])
        return logits

    def logits_by_prompt(self, questions: Sequence[Question]) -> list[np.ndarray]:
        scored = self.scores([(context, [text for pair in pairs for text in pair]) for context, pairs in questions])
        return [
            np.array([scores[first] - scores[second] for first, second in pairs], dtype=np.float64)
            for (_, pairs), scores in zip(questions, scored, strict=True)
        ]


class Verdicts:
    """Counts of a judge's answers, and of those without a verdict, which refuse a judge that has too many of these.

    unit: what an answer is called in counters. limit: the share of answers that may be without a verdict.
    """

    def __init__(self, unit: str, limit: float) -> None:
        self.unit, self.limit = unit, limit
        self.answers = self.unclear = 0  # since the last `finish_part`
        self.seen = self.seen_unclear = 0  # since the last check, of finished parts
        self.examples: dict[str, None] = {}  # different answers without a verdict since then

    def add(self, answer: str, *, is_clear: bool) -> None:
        """Count an answer."""
        self.answers += 1
        if not is_clear:
            self.unclear += 1
            if len(self.examples) < EXAMPLES:
                self.examples[answer] = None

    def finish_part(self, ctx: StageContext, refusal: Callable[[str, str], str]) -> None:
        """Count the part's answers in `ctx`; raise WinnowError if too many have no verdict.

        Its message is `refusal` of their number (`40 of 64`) and examples. Parts with few answers, which say too little
        about a judge, are checked together with the next.
        """
        ctx.count(**{self.unit: self.answers, f"{self.unit}_without_verdict": self.unclear})
        self.seen, self.seen_unclear = self.seen + self.answers, self.seen_unclear + self.unclear
        self.answers = self.unclear = 0
        if self.seen < MIN_ANSWERS:
            return
        if self.seen_unclear > self.limit * self.seen:
            examples = ", ".join(repr(answer[-200:]) for answer in self.examples)
            raise WinnowError(refusal(f"{self.seen_unclear} of {self.seen}", examples))
        self.seen = self.seen_unclear = 0
        self.examples.clear()


def candidate_text(candidate: Row, special_tokens: bool) -> str:
    """Return a response as rankers of text read it, with the special tokens inside it if they are to see them."""
    use_raw = special_tokens and candidate["raw_text"] is not None
    return str(candidate["raw_text"] if use_raw else candidate["text"])


def response_of(prompt: Row, candidate: Row, *, special_tokens: bool = False) -> Response:
    """Return what rankers are given of a row of `candidates` to a row of `prompts`."""
    return Response(
        candidate_text(candidate, special_tokens), tuple(candidate["token_ids"]), candidate["finish_reason"],
        tuple(prompt["token_ids"]), conversation_of(prompt), reply_of_candidate(candidate), fields_of(prompt),
    )  # fmt: skip


def read_candidates(
    ranker: Ranker, prompt: Row, candidates: Sequence[Row], special_tokens: bool
) -> dict[str, Reading | Unreadable]:
    """Return what the ranker reads of each candidate of a prompt, by candidate id.

    A Scorer reads each response alone, so that whether one fits depends on no other. special_tokens: rankers of text
    see the special tokens inside the responses.
    """
    readings: dict[str, Reading | Unreadable] = {}
    for row in candidates:
        response = response_of(prompt, row, special_tokens=special_tokens)
        too_long = Unreadable(
            detail=f"{row['n_tokens']:,} tokens after {len(prompt['token_ids']):,} of the prompt, in the policy's count"
        )
        try:
            reading = ranker.read(prompt["text"], response)
            if reading is not None and isinstance(ranker, Scorer) and not ranker.fits(prompt["text"], reading, reading):
                reading = None
        except WinnowError:
            raise
        except ValueError as error:
            reading = Unreadable(f"{CANNOT_READ}{error}")
        readings[row["candidate_id"]] = too_long if reading is None else reading
    return readings


def reading_problem(ranker: Ranker, context: str, pair: ReadingPair) -> Unreadable | None:
    """Return why the ranker cannot read the pair, None if it can."""
    for reading in pair:
        if isinstance(reading, Unreadable):
            return reading
    try:
        return None if ranker.fits(context, *pair) else Unreadable()
    except WinnowError:
        raise
    except ValueError as error:
        return Unreadable(f"{CANNOT_READ}{error}")


def warn_of_part(stage: str, ctx: StageContext, ranker: Ranker, responses: pa.Table, comparisons: int = 0) -> None:
    """Warn of many responses or comparisons of a part that have no rank, and of many that were scored without an end.

    responses: rows of `candidates` that the ranker was to read. comparisons: how many of two of them it was asked for.
    Count the responses without an end. Warnings have no numbers: all parts then say the same, which is shown once.
    """
    rejects = [row for row in ctx.rejects.to_pylist() if any(words in row["reason"] for words in CURES)]
    of_responses = [row for row in rejects if row["place"] in RESPONSE_TABLES]
    of_comparisons = [row for row in rejects if row["place"] not in RESPONSE_TABLES]
    for what, lost, count in (
        ("responses", of_responses, responses.num_rows),
        ("comparisons", of_comparisons, comparisons),
    ):
        if len(lost) > MANY_LOST * count:
            reason = Counter(row["reason"] for row in lost).most_common(1)[0][0]
            cure = next(cure for words, cure in CURES.items() if words in reason)
            warnings.warn(
                f"{stage}: more than {100 * MANY_LOST:.0f} % of a part's {what} cannot be ranked, mostly for this: "
                f"{reason.removeprefix(CANNOT_READ)}; {cure}. `{COMMAND} sql rejects` counts all reasons",
                WinnowWarning,
                stacklevel=2,
            )
    if not ranker.scores_at_end:
        return
    unread = pa.array([row["candidate_id"] for row in of_responses], pa.string())
    is_read = pc.invert(pc.is_in(responses["candidate_id"], unread))
    cut = pc.sum(pc.and_(is_read, pc.equal(responses["finish_reason"], "length"))).as_py() or 0
    ctx.count(cut_responses=cut)
    # By two standard errors, since a part of a small run has the responses of two or three prompts.
    chance = 2 * math.sqrt(MANY_CUT * (1 - MANY_CUT) * responses.num_rows)
    if cut > MANY_CUT * responses.num_rows + chance:
        others = ", or leave them out of pairs by `finished: true` of `select` or `pair`"
        cure = "raise `max_tokens` of stage `sample`" + (others if stage in ("reward", "compare") else "")
        warnings.warn(
            f"{stage}: more than {100 * MANY_CUT:.0f} % of a part's responses were cut at max_tokens. A reward model "
            "scores them at their last token, without the end that it was trained with, and its scores of them may say "
            f"nothing; {cure}. Their number is cut_responses of the table `steps`",
            WinnowWarning,
            stacklevel=2,
        )


def prepared_batches(
    ranker: Ranker, items: Iterable[T], prepare: Callable[[T], Prepared]
) -> Iterator[Sequence[Prepared]]:
    """Yield what `prepare` returns of each prompt, as many prompts at a time as the ranker is asked about at once.

    While a batch is with the caller, the next is prepared in a thread, if the ranker `reads_ahead`: texts are encoded
    while a device computes. There is one such thread, so that prompts are prepared in their order.
    """
    items, size = list(items), ranker.prompts_at_once
    batches = [items[start : start + size] for start in range(0, len(items), size)]
    if not ranker.reads_ahead or len(batches) < 2:
        yield from ([prepare(item) for item in batch] for batch in batches)
        return
    with ThreadPoolExecutor(1) as thread:

        def submit(batch: Sequence[T]) -> Callable[[], list[Prepared]]:
            return thread.submit(lambda: [prepare(item) for item in batch]).result

        upcoming = submit(batches[0])
        for batch in [*batches[1:], []]:
            prepared, upcoming = upcoming(), submit(batch)
            yield prepared


def in_calls(
    call: Callable[[Sequence[T]], np.ndarray], rows_by_prompt: Sequence[Sequence[T]], *, of_one: bool
) -> list[np.ndarray]:
    """Return the values of each prompt's rows: from a call for each prompt, or from one call for all of them."""
    if of_one:
        return [call(rows) for rows in rows_by_prompt]
    values = call([row for rows in rows_by_prompt for row in rows])
    ends = accumulate(map(len, rows_by_prompt))
    return [values[end - len(rows) : end] for rows, end in zip(rows_by_prompt, ends, strict=True)]


def reads_per_pair(ranker: Ranker, orders: str) -> int:
    """Return how often the network reads a pair: twice in both orders, unless the order says nothing."""
    return 1 if orders == "one" or ranker.symmetric else 2


def both_orders(ranker: Ranker, questions: Sequence[Question], orders: str) -> list[Logits]:
    """Return logit P(first beats second) of each prompt's pairs: the mean of both orders, and the logit in each.

    These are of pairs read as (first, second), and as (second, first). The second order is read only for `orders`
    "both" and a ranker that is not symmetric; else the last is None. All is asked in one call.
    """
    if reads_per_pair(ranker, orders) == 1:
        return [(logits, logits, None) for logits in ranker.logits_by_prompt(questions)]
    swapped = [(context, [(second, first) for first, second in pairs]) for context, pairs in questions]
    # A prompt's orders follow each other: they share its texts.
    both = ranker.logits_by_prompt([question for pair in zip(questions, swapped, strict=True) for question in pair])
    # The mean of logits, not of probabilities: it cancels a position bias exactly.
    return [
        ((forward - backward) / 2, forward, -backward) for forward, backward in zip(both[0::2], both[1::2], strict=True)
    ]
