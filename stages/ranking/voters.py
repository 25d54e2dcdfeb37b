"""Votes of a language model on two responses, with three answers: A, B and same; and who gives them."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipeline import StageContext
from schemas import WinnowError, seed_for
from stages.data.rows import Row
from stages.data.tokenizer import Tokenizer
from stages.endpoint import Endpoint, EndpointClient
from stages.ranking.base import SPECIAL_TOKEN, Ranker, Response, Verdicts
from stages.ranking.llm_judge import vote_logit
from stages.sampling.engines import Engine, Request, Sampling

CHOICE = re.compile(r"^\W*[Cc]hoice\W*?(?P<label>[AB]|[Ss]ame|SAME)(?!\w)", re.MULTILINE)
WORD = re.compile(r"(?<!\w)(?:[AB]|[Ss]ame|SAME)(?!\w)")
SCORES = {"A": 1.0, "B": 0.0, "SAME": 0.5}  # of the response that is shown first
TextPair = tuple[str, str]


class Voter(Protocol):
    """Model that answers questions, a text each with its own seed."""

    def fits(self, question: str) -> bool: ...
    def ask(self, questions: Sequence[str], seeds: Sequence[int]) -> list[str]: ...
    def close(self) -> None: ...


@dataclass
class LocalVoter:
    """Voter that an engine runs on this machine; a question is a user's turn of its chat template, if it has one."""

    tokenizer: Tokenizer
    engine: Engine
    sampling: Sampling
    max_prompt_tokens: int

    def fits(self, question: str) -> bool:
        """Return whether a question is short enough; raise ValueError with the reason if it cannot be rendered."""
        return len(self.tokenizer.prompt_ids(question)) <= self.max_prompt_tokens

    def ask(self, questions: Sequence[str], seeds: Sequence[int]) -> list[str]:
        ids = {question: self.tokenizer.prompt_ids(question) for question in dict.fromkeys(questions)}
        requests = [Request(ids[question], seed) for question, seed in zip(questions, seeds, strict=True)]
        completions = self.engine.generate(requests, self.sampling)
        if any(not math.isfinite(completion.logp) for completion in completions):
            raise WinnowError(
                "autosxs: the log-prob of an answer is not finite, so that it says nothing: the model's weights or its "
                "activations in this `dtype` are not finite; give another `ranker`, or set `by.dtype: float32`"
            )
        return [self.tokenizer.decode(completion.token_ids).strip() for completion in completions]

    def close(self) -> None:
        self.engine.close()


@dataclass
class HostedVoter:
    """Voter behind an OpenAI-compatible server, which renders the question, one user's message, by its own template."""

    endpoint: Endpoint
    temperature: float
    max_tokens: int

    def __post_init__(self) -> None:
        self.client = EndpointClient(self.endpoint)

    def fits(self, question: str) -> bool:
        """Return True: the tokenizer is the server's, which refuses what is too long, and the step then ends."""
        return True

    def ask(self, questions: Sequence[str], seeds: Sequence[int]) -> list[str]:
        sampling = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        options = [sampling | {"seed": seed} for seed in seeds]
        return self.client.ask_all(
            questions.__getitem__, options, lambda choices: (choices[0].message.content if choices else None) or ""
        )

    def close(self) -> None:
        self.client.close()


class AutoSxs(Ranker):
    """Judge with three answers. Its votes depend on the set of two texts, so the other order gives the same votes.

    template: the question of a vote, with {prompt}, {a} and {b}.
    """

    symmetric = True
    abstains = True

    def __init__(
        self, voter: Voter, template: str, votes: int, threshold: float, max_without_verdict: float, seed: int
    ) -> None:
        self.voter, self.template, self.votes, self.threshold, self.seed = voter, template, votes, threshold, seed
        self.verdicts = Verdicts("votes", max_without_verdict)
        self.answered: dict[TextPair, list[tuple[str, float | None]]] = {}  # of the last call, by texts in order

    def read(self, context: str, response: Response) -> str:
        if isinstance(self.voter, LocalVoter) and any(
            map(self.voter.tokenizer.has_special_token, (context, response.text))
        ):
            raise ValueError(SPECIAL_TOKEN)
        return response.text

    def questions(self, context: str, low: str, high: str) -> list[str]:
        """Return the question in both orders."""
        return [self.template.format(prompt=context, a=a, b=b) for a, b in ((low, high), (high, low))]

    def fits(self, context: str, first: str, second: str) -> bool:
        return all(map(self.voter.fits, self.questions(context, first, second)))

    def logits(self, context: str, pairs: Sequence[TextPair]) -> np.ndarray:
        """Return the log-odds of the votes for the first of each pair, nats, float64 [N].

        A pair is voted on once, in sorted order; equal texts tie without a vote, and nan is a pair without a verdict.
        """
        unique = sorted({(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]})
        questions, seeds = [], []
        for low, high in unique:
            orders = self.questions(context, low, high)
            questions += [orders[n % 2] for n in range(self.votes)]
            seeds += [seed_for(self.seed, "vote", context, low, high, n) for n in range(self.votes)]
        answers = iter(self.voter.ask(questions, seeds) if questions else [])
        self.answered = {}
        logits: dict[TextPair, float] = {}
        for low, high in unique:
            texts = [next(answers) for _ in range(self.votes)]
            votes = [choice_vote(text, flipped=n % 2 == 1) for n, text in enumerate(texts)]
            self.answered[low, high] = list(zip(texts, votes, strict=True))
            for text, vote in self.answered[low, high]:
                self.verdicts.add(text, is_clear=vote is not None)
            logits[low, high] = vote_logit(votes, self.threshold)
            logits[high, low] = -logits[low, high]
        return np.array([logits.get(pair, 0.0) for pair in pairs], dtype=np.float64)

    def votes_on(self, candidate: str, opponent: str) -> list[Row]:
        """Return the votes of the last call on two texts as rows of `votes`, without ids."""
        is_low = candidate < opponent
        rows = []
        for n, (answer, vote) in enumerate(self.answered.get((min(candidate, opponent), max(candidate, opponent)), [])):
            first = "candidate" if is_low == (n % 2 == 0) else "baseline"
            value = vote if is_low or vote is None else 1 - vote
            rows.append(dict(voter=str(n), first=first, answer=answer, vote=value))
        return rows

    def finish_part(self, ctx: StageContext) -> None:
        """Count the votes; raise WinnowError if too many cannot be read, with examples of what was answered."""
        self.verdicts.finish_part(
            ctx,
            lambda number, examples: (
                f"autosxs: {number} answers name none of (A), (B) and same, more than the share {self.verdicts.limit} "
                f"of `max_without_verdict`. The model wrote, for example, {examples}. Ask in `template` for a last "
                "line such as `Choice: (A)`, raise `by.max_tokens` if answers are cut, or use another model"
            ),
        )

    def close(self) -> None:
        self.voter.close()


def choice_vote(answer: str, flipped: bool) -> float | None:
    """Return 1 if the answer is for the first text (the second if flipped), 0 for the other, 1/2 for `same`, else None.

    It is read from the first line that begins with `Choice`, in whatever marks, or else from the last line, which must
    have one of A, B and same, as words.
    """
    lines = answer.strip().splitlines()
    choice = CHOICE.search(answer)
    labels = (
        {choice["label"].upper()} if choice else {word.upper() for word in WORD.findall(lines[-1] if lines else "")}
    )
    if len(labels) != 1:
        return None
    score = SCORES[labels.pop()]
    return 1 - score if flipped else score
