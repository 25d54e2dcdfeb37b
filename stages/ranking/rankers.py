"""Which of two responses is better, and by how much. To add a ranker, add a function here.

A ranker is a function from the model that the step is wired to (None, where it reads none) to a `Ranker`;
or, with `@verifiable`, a program from prompt and response to a score. What has a score for each response
alone is a `Scorer`; others compare. Options are its keyword-only parameters.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import numpy as np

from pipeline import Bound, InputStep, Range, Registry
from schemas import Model, WinnowError
from stages.limits import BUDGET

if TYPE_CHECKING:
    from pydantic_core import CoreSchema

Texts = tuple[str, str]
Precision = Literal["float32", "bfloat16"]
ranker = Registry("ranker", "reads_model")
verifiable = ranker(reads_model=False, program=True, version=2)


class Ranker(Protocol):
    """What a stage asks of a ranker. symmetric: the other order says nothing new, so it is not read."""

    symmetric: bool

    def fits(self, context: str, first: str, second: str) -> bool: ...

    def logits(self, context: str, pairs: Sequence[Texts]) -> np.ndarray:
        """logit P(first beats second) of each pair, nats, float64 [N]."""
        ...

    def close(self) -> None: ...


class Scorer(ABC):
    """A ranker with a score for each response alone: the logit of two is the difference of theirs."""

    symmetric = True

    @abstractmethod
    def reads(self, context: str, text: str) -> bool:
        """Can it be scored?"""

    @abstractmethod
    def score(self, context: str, texts: Sequence[str]) -> np.ndarray:
        """One score a text, float64 [N]."""

    def fits(self, context: str, first: str, second: str) -> bool:
        return self.reads(context, first) and self.reads(context, second)

    def scores(self, context: str, texts: Sequence[str]) -> dict[str, float]:
        """By text; equal texts are scored once, and in an order of their own, so that no order changes a bit."""
        each = sorted(set(texts))
        return dict(zip(each, self.score(context, each).tolist(), strict=True))

    def logits(self, context: str, pairs: Sequence[Texts]) -> np.ndarray:
        of = self.scores(context, [text for pair in pairs for text in pair])
        return np.array([of[first] - of[second] for first, second in pairs], dtype=np.float64)

    def close(self) -> None: ...  # noqa: B027 - a program holds nothing


@dataclass(frozen=True)
class Valid:
    """A test of an option's value, which raises ValueError with the cause: `Annotated[str, Valid(regex)]`."""

    test: Callable[[Any], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> "CoreSchema":
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self._tested, handler(source))

    def _tested(self, value: Any) -> Any:
        self.test(value)
        return value


def _even(votes: int) -> None:
    if votes % 2:
        raise ValueError("must be even, so that half of the votes have the order flipped")


def _regex(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}") from None


def _template(text: str) -> None:
    named = [name for _, name, _, _ in Formatter().parse(text) if name is not None]
    if sorted(named) != ["a", "b", "prompt"]:
        raise ValueError("must name {prompt}, {a} and {b} once each, and write other braces twice")


@ranker(reads_model=True)
def pairwise(model: Model, *, dtype: Precision = "float32") -> Ranker:
    """Text to text: reads both responses and answers with the token A or B. Sec. 3.1 of arXiv:2309.06657."""
    from stages.ranking.pairwise import PairwiseRanker

    return PairwiseRanker(_ends_in(model, "vocabulary", "pairwise"), dtype, BUDGET)


@ranker(reads_model=True, version=2)
def pointwise(model: Model, *, dtype: Precision = "float32") -> Ranker:
    """A reward model (`reward_head`, trained with the objective `sigmoid`): its score is the reward, the difference
    of two the logit.

    It reads the text of the prompt as one turn of a user, whatever turns it came in.
    """
    from stages.ranking.pointwise import PointwiseRanker

    return PointwiseRanker(_ends_in(model, "score", "pointwise"), dtype, BUDGET)


QUESTION = """\
Which of two responses to a prompt is better?

[PROMPT]
{prompt}

[RESPONSE A]
{a}

[RESPONSE B]
{b}

Answer with one letter, A or B."""


@ranker(reads_model=True)
def llm_judge(
    model: Model,
    *,
    template: Annotated[str, Valid(_template)] = QUESTION,
    votes: Annotated[int, Range(gt=0), Valid(_even)] = 8,
    threshold: Annotated[float, Range(ge=0, lt=0.5)] = 0.0,
    temperature: Annotated[float, Range(gt=0, le=2)] = 0.7,
    max_tokens: Annotated[int, Range(gt=0)] = 8,
    engine: Literal["vllm", "transformers"] = "vllm",
    dtype: Precision = "float32",
    seed: int = 0,
) -> Ranker:
    """An instruction-tuned model votes 8 times, 4 with the order flipped (AutoSxS, as in arXiv:2309.06657).

    A vote is the one letter A or B on the last line of an answer; anything else is half a vote for each.
    Within `threshold` of one half the share of votes is a tie, logit 0. Its prompt is not public: `template`
    is ours. Let it reason before the letter by asking so, with more `max_tokens`.
    """
    from stages.data.tokenizer import Tokenizer
    from stages.ranking.llm_judge import Election, LlmJudge
    from stages.sampling.engines import open_engine

    folder = _ends_in(model, "vocabulary", "llm_judge").folder
    election = Election(template, votes, threshold, seed)
    election.readable_by(Tokenizer(model))
    return LlmJudge(model, open_engine(engine, folder, dtype), election, temperature, max_tokens)


@verifiable
def pattern(prompt: str, response: str, *, regex: Annotated[str, Valid(_regex)]) -> float:
    """1 if the regular expression is found in the response, else 0."""
    return float(re.search(regex, response) is not None)


@verifiable
def brevity(prompt: str, response: str, *, words: Annotated[int, Range(ge=0)]) -> float:
    """Minus the distance from a length, in words."""
    return -float(abs(len(response.split()) - words))


class Program(Scorer):
    """A program behind the seam."""

    def __init__(self, program: Bound) -> None:
        self.program = program

    def reads(self, context: str, text: str) -> bool:
        return True

    def score(self, context: str, texts: Sequence[str]) -> np.ndarray:
        return np.array([self.program(context, text) for text in texts], dtype=np.float64)


def open_ranker(by: Bound, model: Model | None) -> Ranker:
    """What `by` names, in memory; a stage holds it for all of its shards."""
    opened: Ranker = Program(by) if by.metadata.get("program") else by(model)
    return opened


def reads_its_model(options: dict[str, Any], wired: Mapping[str, InputStep]) -> list[str]:
    """The check of every stage that ranks `by` something."""
    by: Bound = options["by"]
    if by.metadata["reads_model"] and "ranker" not in wired:
        return [f"by {by.name} reads a model; wire `ranker` in `from`"]
    if not by.metadata["reads_model"] and "ranker" in wired:
        return [f"by {by.name} reads no model; set `ranker: null` in `from`"]
    return []


def _ends_in(model: Model, end: Literal["vocabulary", "score"], by: str) -> Model:
    """Refuse a model of the other kind, before any weight is loaded."""
    from stages.network.load import is_reward_model

    found = "score" if is_reward_model(model) else "vocabulary"
    if found != end:
        other = "pointwise" if found == "score" else "pairwise or llm_judge"
        raise WinnowError(f"ranker {model.digest[:12]} ends in a {found}, and {by} reads a {end}: set `by` to {other}")
    return model


def both_orders(
    opened: Ranker, context: str, pairs: Sequence[Texts], orders: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """logit P(first beats second) as read (first, second) and (second, first); None where the latter is not read."""
    forward = opened.logits(context, pairs)
    if orders == "one" or opened.symmetric:
        return forward, None
    return forward, -opened.logits(context, [(second, first) for first, second in pairs])


def averaged(forward: np.ndarray, backward: np.ndarray | None) -> np.ndarray:
    """Averaging two logits cancels any constant preference for a position exactly; probabilities would not."""
    return forward if backward is None else (forward + backward) / 2
