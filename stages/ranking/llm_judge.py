"""LLM as judge, by the AutoSxS protocol: several sampled votes per pair, half of them with the order flipped."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from schemas import Model, seed_for
from stages.data.tokenizer import Tokenizer
from stages.limits import context_length
from stages.ranking.base import TextPair
from stages.sampling.engines import Engine, Request, Sampling

LETTER = re.compile(r"(?<!\w)[AB](?!\w)")


@dataclass(frozen=True)
class Vote:
    """Question for one vote, the seed of its draw, and whether the second text of the pair stands first in it."""

    question: str
    seed: int
    flipped: bool


@dataclass(frozen=True)
class VotingPrompt:
    """Prompt and rules of a vote on a pair of texts. template: a text with {prompt}, {a} and {b}."""

    template: str
    votes: int
    threshold: float
    seed: int

    def votes_on(self, context: str, low: str, high: str) -> list[Vote]:
        """Return all votes on the pair; every second one has the order flipped."""
        votes = []
        for n in range(self.votes):
            flipped = n % 2 == 1
            a, b = (high, low) if flipped else (low, high)
            question = self.template.format(prompt=context, a=a, b=b)
            votes.append(Vote(question, seed_for(self.seed, "vote", context, low, high, n), flipped))
        return votes

    def logit(self, wins: float) -> float:
        """Return log (wins + 1/2) / (losses + 1/2), finite for any count; 0 for a tie within the threshold."""
        if abs(wins / self.votes - 0.5) <= self.threshold:
            return 0.0
        return float(np.log(wins + 0.5) - np.log(self.votes - wins + 0.5))


class LlmJudge:
    """LLM judge in memory. Its votes depend on the set of two texts, so the other order gives the same votes."""

    symmetric = True

    def __init__(self, model: Model, engine: Engine, prompt: VotingPrompt, temperature: float, max_tokens: int) -> None:
        self.tokenizer = Tokenizer(model)
        self.engine, self.prompt = engine, prompt
        self.max_prompt_tokens = context_length(model.folder) - max_tokens
        self.sampling = Sampling(temperature, 0, max_tokens, self.tokenizer.stop)

    def fits(self, context: str, first: str, second: str) -> bool:
        """Return whether both orders are short enough, and free of special tokens (read as control tokens)."""
        questions = [vote.question for vote in self.prompt.votes_on(context, first, second)[:2]]
        try:
            return all(len(self.tokenizer.prompt_ids(question)) <= self.max_prompt_tokens for question in questions)
        except ValueError:
            return False

    def logits(self, context: str, pairs: Sequence[TextPair]) -> np.ndarray:
        """Return the log-odds of the votes for the first of each pair, nats, float64 [N].

        A pair is voted on once, in sorted order, whichever order it is asked in: so a swap flips the sign exactly.
        Equal texts tie without a vote.
        """
        unique = sorted({(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]})
        votes_by_pair = [self.prompt.votes_on(context, low, high) for low, high in unique]
        # All votes are drawn in one call, which keeps the engine's batch full.
        requests = [
            Request(self.tokenizer.prompt_ids(vote.question), vote.seed) for votes in votes_by_pair for vote in votes
        ]
        answers = iter(self.engine.generate(requests, self.sampling) if requests else [])

        logit_by_pair: dict[TextPair, float] = {}
        for (low, high), votes in zip(unique, votes_by_pair, strict=True):
            wins = sum(win_share(self.tokenizer.decode(next(answers).token_ids), vote.flipped) for vote in votes)
            logit_by_pair[low, high] = self.prompt.logit(wins)
            logit_by_pair[high, low] = -logit_by_pair[low, high]
        return np.array([logit_by_pair.get(pair, 0.0) for pair in pairs], dtype=np.float64)

    def close(self) -> None:
        self.engine.close()


def verdict(answer: str) -> str | None:
    """Return A or B, the one letter that stands alone on the last line. Both, or neither, is no verdict."""
    lines = answer.strip().splitlines()
    letters = set(LETTER.findall(lines[-1])) if lines else set()
    return letters.pop() if len(letters) == 1 else None


def win_share(answer: str, flipped: bool) -> float:
    """Return 1 if the answer votes for the text that stands first (second if flipped), 0 if not, 1/2 if undecided."""
    letter = verdict(answer)
    return 0.5 if letter is None else float((letter == "A") != flipped)
