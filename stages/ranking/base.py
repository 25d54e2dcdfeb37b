"""Interface of rankers: `Ranker` compares two responses, `Scorer` scores one alone."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from pipeline import StageContext
from schemas import WinnowError
from schemas.ids import Message
from stages.data.rows import Row, fields_of
from stages.data.texts import Conversation, conversation_of, reply_of_candidate

# What a ranker reads of a response, hashable and sortable: its text, unless `Ranker.read` says otherwise.
Reading = Any
ReadingPair = tuple[Reading, Reading]
PairFormat = Literal["marks", "chat", "rlhflow"]  # of the pairwise ranker's prompt (stages/ranking/pairwise.py)
SPECIAL_TOKEN = "a special token of its own is written in the text"  # it would be read as a control token
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
    """Response that a ranker cannot read, with the reason to reject it."""

    reason: str = "does not fit the ranker"


class Ranker(ABC):
    """Ranker of two responses to one prompt.

    symmetric: reading a pair in the other order gives the same answer, so it is read in one order only.
    abstains: a logit may be nan, which means that the ranker has no verdict on that pair.
    """

    symmetric = False
    abstains = False

    def read(self, context: str, response: Response) -> Reading | None:
        """Return what the other methods take as a response: its text, by default.

        None, or ValueError with the reason, if it cannot be read.
        """
        return response.text

    @abstractmethod
    def fits(self, context: str, first: Reading, second: Reading) -> bool:
        """Return whether the ranker can read prompt and responses together."""

    @abstractmethod
    def logits(self, context: str, pairs: Sequence[ReadingPair]) -> np.ndarray:
        """Return logit P(first beats second) of each pair, nats, float64 [N]."""

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

    def scores(self, context: str, texts: Sequence[Reading]) -> dict[Reading, float]:
        """Return scores by reading. Equal ones are scored once, in sorted order, so that their order has no effect."""
        unique = sorted(set(texts))
        return dict(zip(unique, self.score(context, unique).tolist(), strict=True))

    def logits(self, context: str, pairs: Sequence[ReadingPair]) -> np.ndarray:
        score_by_text = self.scores(context, [text for pair in pairs for text in pair])
        return np.array([score_by_text[first] - score_by_text[second] for first, second in pairs], dtype=np.float64)


def text_of(candidate: Row, special_tokens: bool) -> str:
    """Return a response as rankers of text read it, with the special tokens inside it if they are to see them."""
    use_raw = special_tokens and candidate["raw_text"] is not None
    return str(candidate["raw_text"] if use_raw else candidate["text"])


def read_candidates(
    ranker: Ranker, prompt: Row, candidates: Sequence[Row], special_tokens: bool
) -> dict[str, Reading | Unreadable]:
    """Return what the ranker reads of each candidate of a prompt, by candidate id.

    A Scorer reads each response alone, so that whether one fits depends on no other. special_tokens: rankers of text
    see the special tokens inside the responses.
    """
    readings: dict[str, Reading | Unreadable] = {}
    conversation, fields = conversation_of(prompt), fields_of(prompt)
    for row in candidates:
        response = Response(
            text_of(row, special_tokens), tuple(row["token_ids"]), row["finish_reason"], tuple(prompt["token_ids"]),
            conversation, reply_of_candidate(row), fields,
        )  # fmt: skip
        try:
            reading = ranker.read(prompt["text"], response)
        except WinnowError:
            raise
        except ValueError as error:
            reading = Unreadable(f"the ranker cannot read it: {error}")
        if isinstance(ranker, Scorer) and reading is not None and not isinstance(reading, Unreadable):
            reading = reading if ranker.fits(prompt["text"], reading, reading) else None
        readings[row["candidate_id"]] = Unreadable() if reading is None else reading
    return readings


def fits_or_reject(
    ranker: Ranker, context: str, pair: ReadingPair, ctx: StageContext, *, place: str, prompt: str, candidate: str
) -> bool:
    """Return whether the ranker can read the pair; if not, record the candidate in the `rejects` table."""
    unreadable = [reading for reading in pair if isinstance(reading, Unreadable)]
    if not unreadable and ranker.fits(context, *pair):
        return True
    reason = unreadable[0].reason if unreadable else Unreadable.reason
    ctx.reject(reason, place=place, prompt=prompt, candidate=candidate)
    return False


def reads_per_pair(ranker: Ranker, orders: str) -> int:
    """Return how often the network reads a pair: twice in both orders, unless the order says nothing."""
    return 1 if orders == "one" or ranker.symmetric else 2


def both_orders(
    ranker: Ranker, context: str, pairs: Sequence[ReadingPair], orders: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return logit P(first beats second): the mean of both orders, read as (first, second), and as (second, first).

    The second order is read only for `orders` "both" and a ranker that is not symmetric; else the last is None.
    """
    forward = ranker.logits(context, pairs)
    if reads_per_pair(ranker, orders) == 1:
        return forward, forward, None
    backward = -ranker.logits(context, [(second, first) for first, second in pairs])
    # The mean of logits, not of probabilities: it cancels a position bias exactly.
    return (forward + backward) / 2, forward, backward
