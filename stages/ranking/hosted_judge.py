"""Judge on a server that speaks OpenAI's chat completions: log-probs of its one-token answers, and no local files."""

import math
from collections.abc import Sequence

import numpy as np

from pipeline import StageContext
from schemas import WinnowError
from stages.endpoint import ChatChoice, Endpoint, EndpointClient
from stages.ranking.base import PROMPTS_OF_ENGINE, Question, Ranker, Verdicts

LABELS = ("A", "B")
TOP = 20  # tokens whose log-probs are asked for: the most that OpenAI's servers and vLLM give


class HostedJudge(Ranker):
    """Judge that is asked by chat messages, which the server renders by its own template.

    template: the question, with {prompt}, {a} and {b}. No verdict is an answer with neither label among its likeliest
    tokens.
    """

    abstains = True
    prompts_at_once = PROMPTS_OF_ENGINE  # the server's batch stays full

    def __init__(self, endpoint: Endpoint, template: str, max_without_verdict: float) -> None:
        self.endpoint, self.template = endpoint, template
        self.client = EndpointClient(endpoint)
        self.verdicts = Verdicts("answers", max_without_verdict)
        self.bounded = 0  # answers of one label since the last `finish_part`

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

        def read(choices: list[ChatChoice]) -> dict[str, float]:
            positions = choices[0].logprobs.content if choices and choices[0].logprobs else None
            if not positions or not positions[0].top_logprobs:
                raise WinnowError(
                    f"{self.endpoint}: {self.endpoint.model} answers without log-probs of its tokens (`logprobs`, "
                    "`top_logprobs`), which are what this judge reads: serve it with vLLM, or have `llm_judge` sample "
                    "its votes from a local folder"
                )
            return {item.token: item.logprob for item in positions[0].top_logprobs}

        unique = [(n, pair) for n, (_, pairs) in enumerate(questions) for pair in sorted(set(pairs))]

        def question(index: int) -> str:
            n, (a, b) = unique[index]
            return self.template.format(prompt=questions[n][0], a=a, b=b)

        # At temperature 1, log-probs after temperature, as some servers give, are the model's own.
        options = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "logprobs": True, "top_logprobs": TOP}
        tops = self.client.ask_all(question, [options] * len(unique), read)
        logit_by_pair = {key: self._logit(top) for key, top in zip(unique, tops, strict=True)}
        return [
            np.array([logit_by_pair[n, pair] for pair in pairs], dtype=np.float64)
            for n, (_, pairs) in enumerate(questions)
        ]

    def _logit(self, top: dict[str, float]) -> float:
        """Return log P(A) - log P(B) of the likeliest tokens; nan if neither is among them.

        A label may be several tokens (`A`, ` A`), whose probabilities add up. One that is not among them is at most as
        likely as the last that is, which then stands for it: the logit is too small rather than too large.
        """
        by_label = {label: [logp for token, logp in top.items() if token.strip() == label] for label in LABELS}
        self.verdicts.add(max(top, key=lambda token: top[token]), is_clear=any(by_label.values()))
        if not any(by_label.values()):
            return float("nan")
        self.bounded += not all(by_label.values())
        first, second = (
            float(np.logaddexp.reduce(logps)) if logps else min(top.values()) for logps in by_label.values()
        )
        return first - second if math.isfinite(first - second) else float("nan")

    def finish_part(self, ctx: StageContext) -> None:
        """Count the answers; raise WinnowError if too many have no verdict, with examples of what was answered."""
        self.verdicts.finish_part(
            ctx,
            lambda number, examples: (
                f"hosted_judge: {number} answers have no verdict, more than the share {self.verdicts.limit} that "
                f"`by.max_without_verdict` allows. They begin, for example, with {examples}. A verdict is A or B as "
                "the first token: ask for it in `by.template`, or use another judge (one that reasons first cannot be "
                "read so; `llm_judge` with a local folder can)"
            ),
        )
        ctx.count(answers_of_one_label=self.bounded)
        self.bounded = 0
