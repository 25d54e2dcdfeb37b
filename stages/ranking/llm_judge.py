"""LLM as judge, by the AutoSxS protocol: several sampled votes per pair, half of them with the order flipped."""

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import cache

import numpy as np

from pipeline import StageContext
from schemas import Model, WinnowError, seed_for
from stages.data.tokenizer import Tokenizer
from stages.ranking.base import PROMPTS_OF_ENGINE, SPECIAL_TOKEN, Question, Ranker, Response, Verdicts
from stages.sampling.engines import Engine, Request, Sampling

TextPair = tuple[str, str]
LETTER = re.compile(r"(?<!\w)[AB](?!\w)")


class LlmJudge(Ranker):
    """LLM judge in memory. Its votes depend on the set of two texts, so the other order gives the same votes.

    template: the question of a vote, with {prompt}, {a} and {b}.
    """

    symmetric = True
    abstains = True
    prompts_at_once = PROMPTS_OF_ENGINE  # which keeps the engine's batch full

    def __init__(
        self, model: Model, engine: Engine, template: str, votes: int, threshold: float, max_without_verdict: float,
        temperature: float, max_tokens: int, seed: int, max_prompt_tokens: int,
    ) -> None:  # fmt: skip
        self.tokenizer, self.engine = Tokenizer(model), engine
        self._question_ids = cache(self.tokenizer.prompt_ids)  # until the pairs that fit are asked about
        self.template, self.votes, self.threshold, self.seed = template, votes, threshold, seed
        self.verdicts = Verdicts("votes", max_without_verdict)
        self.max_prompt_tokens = max_prompt_tokens
        self.sampling = Sampling(temperature, 0, max_tokens, self.tokenizer.stop)

    def read(self, context: str, response: Response) -> str:
        if any(map(self.tokenizer.has_special_token, (context, response.text))):
            raise ValueError(SPECIAL_TOKEN)
        return response.text

    def questions(self, context: str, low: str, high: str) -> list[list[int]]:
        """Return the ids of the question in both orders; raise ValueError if a text has a special token.

        One that was asked whether it fits is not encoded again.
        """
        orders = ((low, high), (high, low))
        return [self._question_ids(self.template.format(prompt=context, a=a, b=b)) for a, b in orders]

    def fits(self, context: str, first: str, second: str) -> bool:
        """Return whether both orders are short enough; raise ValueError as `questions` does."""
        return all(len(ids) <= self.max_prompt_tokens for ids in self.questions(context, first, second))

    def logits(self, context: str, pairs: Sequence[TextPair]) -> np.ndarray:
        (logits,) = self.logits_by_prompt([(context, pairs)])
        return logits

    def logits_by_prompt(self, questions: Sequence[Question]) -> list[np.ndarray]:
        """Return the log-odds of the votes for the first of each pair, nats, float64 [N] of each prompt.

        A pair is voted on once, in sorted order, whichever order it is asked in: so a swap flips the sign exactly.
        Equal texts tie without a vote; nan is a pair without a verdict.
        """
        # Every second vote has the order flipped. All are drawn in one call, which keeps the engine's batch full.
        unique_by_prompt = [
            (context, sorted({(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]}))
            for context, pairs in questions
        ]
        requests = []
        for context, unique in unique_by_prompt:
            for low, high in unique:
                ids = self.questions(context, low, high)
                seeds = [seed_for(self.seed, "vote", context, low, high, n) for n in range(self.votes)]
                requests += [Request(ids[n % 2], seed) for n, seed in enumerate(seeds)]
        self._question_ids.cache_clear()
        completions = self.engine.generate(requests, self.sampling) if requests else []
        if any(not math.isfinite(completion.logp) for completion in completions):
            raise WinnowError(
                "llm_judge: the log-prob of an answer is not finite, so that it says nothing: the judge's weights or "
                "its activations in this `dtype` are not finite; give another `ranker`, or set `by.dtype: float32`"
            )
        answers = iter(completions)

        logits = []
        for (_, pairs), (_, unique) in zip(questions, unique_by_prompt, strict=True):
            logit_by_pair: dict[TextPair, float] = {}
            for low, high in unique:
                texts = [self.tokenizer.decode(next(answers).token_ids).strip() for _ in range(self.votes)]
                votes = [letter_vote(text, flipped=n % 2 == 1) for n, text in enumerate(texts)]
                for text, vote in zip(texts, votes, strict=True):
                    self.verdicts.add(text, is_clear=vote is not None)
                logit_by_pair[low, high] = vote_logit(votes, self.threshold)
                logit_by_pair[high, low] = -logit_by_pair[low, high]
            logits.append(np.array([logit_by_pair.get(pair, 0.0) for pair in pairs], dtype=np.float64))
        return logits

    def finish_part(self, ctx: StageContext) -> None:
        """Count the votes; raise WinnowError if too many have no verdict, with examples of what was answered."""
        self.verdicts.finish_part(
            ctx,
            lambda number, examples: (
                f"llm_judge: {number} votes have no verdict, more than the share {self.verdicts.limit} that "
                f"`by.max_without_verdict` allows. The judge wrote, for example, {examples}. A verdict is the one "
                "letter A or B on the last line: ask for it in `by.template`, raise `by.max_tokens` if answers are "
                "cut, or use another judge"
            ),
        )

    def close(self) -> None:
        self.engine.close()


def letter_vote(answer: str, flipped: bool) -> int | None:
    """Return 1 if the answer votes for the first text (the second if flipped), 0 if not, None without a verdict.

    A verdict is the single letter A or B on the last line, as a word; both or neither is none.
    """
    lines = answer.strip().splitlines()
    letters = set(LETTER.findall(lines[-1])) if lines else set()
    return None if len(letters) != 1 else int(("A" in letters) != flipped)


def vote_logit(votes: Sequence[float | None], threshold: float) -> float:
    """Return log (wins + 1/2) / (losses + 1/2), finite for any count; 0 for a share of wins within threshold of 1/2.

    Votes of both orders alternate, 1 for a win, 1/2 for neither. The share of wins is the mean of the shares in both
    orders, so that a bias to a position cancels although one order has more verdicts; without a verdict in one of them
    it is nan.
    """
    verdicts = [[vote for vote in votes[order::2] if vote is not None] for order in (0, 1)]
    if not all(verdicts):
        return float("nan")
    first, second = (Fraction(sum(side)) / len(side) for side in verdicts)
    share = (first + second) / 2  # exact: a tie is one half
    if abs(share - Fraction(1, 2)) <= threshold:
        return 0.0
    n = sum(map(len, verdicts))
    wins = float(n * share)
    return float(np.log(wins + 0.5) - np.log(n - wins + 0.5))
