"""Judge on a server that speaks OpenAI's chat completions: log-probs of its one-token answers, and no local files."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from pydantic import BaseModel

from pipeline import StageContext
from schemas import WinnowError
from stages.endpoint import Endpoint, EndpointClient
from stages.ranking.base import PROMPTS_OF_ENGINE, Question, Ranker

PATH = "/chat/completions"
LABELS = ("A", "B")
TOP = 20  # tokens whose log-probs are asked for: the most that OpenAI's servers and vLLM give
MIN_ANSWERS = 32  # fewer say too little about a judge to refuse it
EXAMPLES = 3  # of answers without a verdict that the refusal shows


class _Token(BaseModel):
    token: str
    logprob: float


class _Position(_Token):
    top_logprobs: list[_Token]


class _Logprobs(BaseModel):
    content: list[_Position] | None = None


class _Choice(BaseModel):
    logprobs: _Logprobs | None = None


class _Answer(BaseModel):
    choices: list[_Choice]


class HostedJudge(Ranker):
    """Judge that is asked by chat messages, which the server renders by its own template.

    template: the question, with {prompt}, {a} and {b}. No verdict is an answer with neither label among its likeliest
    tokens.
    """

    abstains = True
    prompts_at_once = PROMPTS_OF_ENGINE  # the server's batch stays full

    def __init__(self, endpoint: Endpoint, template: str, max_without_verdict: float) -> None:
        self.endpoint, self.template, self.max_without_verdict = endpoint, template, max_without_verdict
        self.client = EndpointClient(endpoint)
        self.answers = self.bounded = 0  # since the last `finish_part`
        self.unclear: list[str] = []  # likeliest tokens of the answers without a verdict since then
        self.seen = 0  # answers since a check for too few verdicts
        self.seen_unclear: list[str] = []

    def close(self) -> None:
        self.client.close()

    def fits(self, context: str, first: str, second: str) -> bool:
        """Return True: the tokenizer is the server's, which refuses what is too long, and the step then ends."""
        return True

    def logits(self, context: str, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        (logits,) = self.logits_by_prompt([(context, pairs)])
        return logits

    def logits_by_prompt(self, questions: Sequence[Question]) -> list[np.ndarray]:
        """Return log P(A) - log P(B) of the first token of each answer, nats, float64 [N] of each prompt.

        Without a verdict it is nan. A question that is asked twice of a prompt has one answer.
        """

        def body(n: int, pair: tuple[str, str]) -> dict[str, Any]:
            question = self.template.format(prompt=questions[n][0], a=pair[0], b=pair[1])
            return {
                "model": self.endpoint.model,
                "messages": [{"role": "user", "content": question}],
                "max_tokens": 1,
                "temperature": 1.0,  # with which log-probs after temperature, as some servers give, are the model's own
                "top_p": 1.0,
                "logprobs": True,
                "top_logprobs": TOP,
            }

        def read(n: int, answer: Any) -> dict[str, float]:
            parsed = self.client.parse(_Answer, answer)
            positions = parsed.choices[0].logprobs.content if parsed.choices and parsed.choices[0].logprobs else None
            if not positions or not positions[0].top_logprobs:
                raise WinnowError(
                    f"{self.endpoint}: {self.endpoint.model} answers without log-probs of its tokens (`logprobs`, "
                    "`top_logprobs`), which are what this judge reads: serve it with vLLM, or have `llm_judge` sample "
                    "its votes from a local folder"
                )
            return {item.token: item.logprob for item in positions[0].top_logprobs}

        unique = [(n, pair) for n, (_, pairs) in enumerate(questions) for pair in sorted(set(pairs))]
        tops = self.client.post_all(PATH, [partial(body, *asked) for asked in unique], read)
        logit_by_pair = {asked: self._logit(top) for asked, top in zip(unique, tops, strict=True)}
        return [
            np.array([logit_by_pair[n, pair] for pair in pairs], dtype=np.float64)
            for n, (_, pairs) in enumerate(questions)
        ]

    def _logit(self, top: dict[str, float]) -> float:
        """Return log P(A) - log P(B) of the likeliest tokens; nan if neither is among them.

        A label may be several tokens (`A`, ` A`), whose probabilities add up. One that is not among them is at most as
        likely as the last that is, which then stands for it: the logit is too small rather than too large.
        """
        self.answers += 1
        by_label = {label: [logp for token, logp in top.items() if token.strip() == label] for label in LABELS}
        if not any(by_label.values()):
            self.unclear.append(max(top, key=lambda token: top[token]))
            return float("nan")
        self.bounded += not all(by_label.values())
        first, second = (
            float(np.logaddexp.reduce(logps)) if logps else min(top.values()) for logps in by_label.values()
        )
        return first - second if math.isfinite(first - second) else float("nan")

    def finish_part(self, ctx: StageContext) -> None:
        """Count the answers; raise WinnowError if too many have no verdict, with examples of what was answered.

        Parts with few answers are checked together with the next.
        """
        ctx.count(answers=self.answers, answers_without_verdict=len(self.unclear), answers_of_one_label=self.bounded)
        self.seen, self.seen_unclear = self.seen + self.answers, [*self.seen_unclear, *self.unclear]
        self.answers, self.bounded, self.unclear = 0, 0, []
        if self.seen < MIN_ANSWERS:
            return
        if len(self.seen_unclear) > self.max_without_verdict * self.seen:
            examples = ", ".join(repr(token) for token in islice(dict.fromkeys(self.seen_unclear), EXAMPLES))
            raise WinnowError(
                f"hosted_judge: {len(self.seen_unclear)} of {self.seen} answers have no verdict, more than the share "
                f"{self.max_without_verdict} that `by.max_without_verdict` allows. They begin, for example, with "
                f"{examples}. A verdict is A or B as the first token: ask for it in `by.template`, or use another "
                "judge (one that reasons first cannot be read so; `llm_judge` with a local folder can)"
            )
        self.seen, self.seen_unclear = 0, []
