"""LLM as judge, by the AutoSxS protocol: several sampled votes per pair, half of them with the order flipped."""

import math
import re
from collections.abc import Sequence

import numpy as np

from schemas import Model, WinnowError, seed_for
from stages.data.tokenizer import Tokenizer
from stages.limits import context_length
from stages.ranking.base import Ranker, TextPair
from stages.sampling.engines import Engine, Request, Sampling

LETTER = re.compile(r"(?<!\w)[AB](?!\w)")


class LlmJudge(Ranker):
    """LLM judge in memory. Its votes depend on the set of two texts, so the other order gives the same votes.

    template: the question of a vote, with {prompt}, {a} and {b}.
    """

    symmetric = True

    def __init__(
        self, model: Model, engine: Engine, template: str, votes: int, threshold: float, temperature: float,
        max_tokens: int, seed: int,
    ) -> None:  # fmt: skip
        self.tokenizer, self.engine = Tokenizer(model), engine
        self.template, self.votes, self.threshold, self.seed = template, votes, threshold, seed
        self.max_prompt_tokens = context_length(model.folder) - max_tokens
        self.sampling = Sampling(temperature, 0, max_tokens, self.tokenizer.stop)

    def questions(self, context: str, low: str, high: str) -> list[list[int]]:
        """Return the ids of the question in both orders; raise ValueError if a text has a special token."""
        orders = ((low, high), (high, low))
        return [self.tokenizer.prompt_ids(self.template.format(prompt=context, a=a, b=b)) for a, b in orders]

    def fits(self, context: str, first: str, second: str) -> bool:
        """Return whether both orders are short enough, and free of special tokens (read as control tokens)."""
        try:
            return all(len(ids) <= self.max_prompt_tokens for ids in self.questions(context, first, second))
        except ValueError:
            return False

    def logits(self, context: str, pairs: Sequence[TextPair]) -> np.ndarray:
        """Return the log-odds of the votes for the first of each pair, nats, float64 [N].

        A pair is voted on once, in sorted order, whichever order it is asked in: so a swap flips the sign exactly.
        Equal texts tie without a vote.
        """
        # Every second vote has the order flipped. All are drawn in one call, which keeps the engine's batch full.
        unique = sorted({(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]})
        requests = []
        for low, high in unique:
            questions = self.questions(context, low, high)
            seeds = [seed_for(self.seed, "vote", context, low, high, n) for n in range(self.votes)]
            requests += [Request(questions[n % 2], seed) for n, seed in enumerate(seeds)]
        completions = self.engine.generate(requests, self.sampling) if requests else []
        if any(not math.isfinite(completion.logp) for completion in completions):
            raise WinnowError(
                "llm_judge: the log-prob of an answer is not finite, so that it says nothing: the judge's weights or "
                "its activations in this `dtype` are not finite; give another `ranker`, or set `by.dtype: float32`"
            )
        answers = iter(completions)

        logit_by_pair: dict[TextPair, float] = {}
        for low, high in unique:
            texts = [self.tokenizer.decode(next(answers).token_ids) for _ in range(self.votes)]
            wins = sum(win_share(text, flipped=n % 2 == 1) for n, text in enumerate(texts))
            logit_by_pair[low, high] = vote_logit(wins, self.votes, self.threshold)
            logit_by_pair[high, low] = -logit_by_pair[low, high]
        return np.array([logit_by_pair.get(pair, 0.0) for pair in pairs], dtype=np.float64)

    def close(self) -> None:
        self.engine.close()


def win_share(answer: str, flipped: bool) -> float:
    """Return 1 if the answer votes for the first text (the second if flipped), 0 if not, 1/2 if undecided.

    Its vote is the single letter A or B on the last line, as a word; both or neither is undecided.
    """
    lines = answer.strip().splitlines()
    letters = set(LETTER.findall(lines[-1])) if lines else set()
    return 0.5 if len(letters) != 1 else float(("A" in letters) != flipped)


def vote_logit(wins: float, votes: int, threshold: float) -> float:
    """Return log (wins + 1/2) / (losses + 1/2), finite for any count; 0 for a share of wins within threshold of 1/2."""
    if abs(wins / votes - 0.5) <= threshold:
        return 0.0
    return float(np.log(wins + 0.5) - np.log(votes - wins + 0.5))
