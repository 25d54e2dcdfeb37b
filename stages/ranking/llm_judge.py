"""An LLM as judge, by the AutoSxS protocol: several sampled votes a pair, half of them with the order flipped."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from schemas import Model, WinnowError, seed_for
from stages.data.tokenizer import Tokenizer
from stages.limits import context_length
from stages.sampling.engines import Engine, Request, Sampling

LETTER = re.compile(r"(?<!\w)[AB](?!\w)")
Texts = tuple[str, str]


@dataclass(frozen=True)
class Election:
    """How a pair is put to the vote. template: a text with {prompt}, {a} and {b}."""

    template: str
    votes: int
    threshold: float
    seed: int

    def readable_by(self, tokenizer: Tokenizer) -> None:
        """Raises WinnowError if the template itself, whatever it asks about, would be refused."""
        try:
            tokenizer.prompt_ids(self.template)
        except ValueError as error:
            raise WinnowError(
                f"llm_judge: its model cannot read the template ({error}); set `by.template` to another wording"
            ) from None

    def ballots(self, context: str, low: str, high: str) -> Iterator[tuple[str, int, bool]]:
        """What each vote reads, its seed, and whether `high` stands first."""
        for n in range(self.votes):
            flipped = n % 2 == 1
            a, b = (high, low) if flipped else (low, high)
            yield (
                self.template.format(prompt=context, a=a, b=b),
                seed_for(self.seed, "vote", context, low, high, n),
                flipped,
            )

    def logit(self, wins: float) -> float:
        """log of the odds (wins + 1/2) : (losses + 1/2), finite for any count; 0 for a tie within the threshold."""
        if abs(wins / self.votes - 0.5) <= self.threshold:
            return 0.0
        return float(np.log(wins + 0.5) - np.log(self.votes - wins + 0.5))


class LlmJudge:
    """A judge in memory. The votes on two texts come from the texts alone: the other order is the same election."""

    symmetric = True

    def __init__(self, model: Model, engine: Engine, election: Election, temperature: float, max_tokens: int) -> None:
        self.tokenizer = Tokenizer(model)
        self.engine, self.election = engine, election
        self.room = context_length(model.folder) - max_tokens
        self.sampling = Sampling(temperature, 0, max_tokens, self.tokenizer.stop)

    def fits(self, context: str, first: str, second: str) -> bool:
        """Not either, if a text has a special token of the model written out: it would read a control token."""
        try:
            ballots = list(self.election.ballots(context, first, second))[:2]
            return all(len(self.tokenizer.prompt_ids(text)) <= self.room for text, _, _ in ballots)
        except ValueError:
            return False

    def logits(self, context: str, pairs: Sequence[Texts]) -> np.ndarray:
        """Log-odds of the votes for the first of each pair, nats, float64 [N]. Equal texts tie without a vote."""
        couples = sorted({(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]})
        of = dict(zip(couples, self._elections(context, couples), strict=True))
        signed = [of[a, b] if (a, b) in of else -of.get((b, a), 0.0) for a, b in pairs]
        return np.array(signed, dtype=np.float64)

    def _elections(self, context: str, couples: Sequence[Texts]) -> list[float]:
        """The logit for the first of each couple; all votes are drawn in one call of the engine."""
        ballots = [list(self.election.ballots(context, *couple)) for couple in couples]
        asked = [Request(self.tokenizer.prompt_ids(text), seed) for each in ballots for text, seed, _ in each]
        answers = iter(self.engine.generate(asked, self.sampling) if asked else [])
        wins = [
            sum(share(self.tokenizer.decode(next(answers).token_ids), flipped) for _, _, flipped in each)
            for each in ballots
        ]
        return [self.election.logit(count) for count in wins]

    def close(self) -> None:
        self.engine.close()


def verdict(answer: str) -> str | None:
    """A or B: the one letter that stands alone on the last line. Both, or none, is no verdict."""
    lines = answer.strip().splitlines()
    letters = set(LETTER.findall(lines[-1])) if lines else set()
    return letters.pop() if len(letters) == 1 else None


def share(answer: str, flipped: bool) -> float:
    """What one answer gives to the text that stood first, or second where flipped; half if it gives no verdict."""
    letter = verdict(answer)
    return 0.5 if letter is None else float((letter == "A") != flipped)
