"""Pointwise reward model: one score per response, so that P(a beats b) is the logistic of a difference."""

import re
from collections.abc import Sequence

import numpy as np

from schemas import Model
from schemas.ids import Message
from stages.data.texts import Prompt
from stages.data.tokenizer import Tokenizer
from stages.limits import SCORING_TOKENS_PER_PASS, context_length
from stages.network.forward import completion_scores, forward_rows
from stages.network.load import load_network
from stages.ranking.base import Response, Scorer

ROLE = re.compile(r"^(system|user|assistant|tool): ", re.MULTILINE)
IdRow = tuple[tuple[int, ...], tuple[int, ...]]


class PointwiseRanker(Scorer):
    """Reward model in memory, which reads a prompt and a response as the ids that it was trained on."""

    def __init__(self, model: Model, dtype: str, budget: int = SCORING_TOKENS_PER_PASS) -> None:
        self.tokenizer = Tokenizer(model)
        self.network = load_network(model)
        self.context = context_length(model.folder)
        self.dtype, self.budget = dtype, budget

    def read(self, context: str, response: Response) -> IdRow | None:
        """Return prompt and response ids: the policy's where its tokenizer is this model's, else those of the texts.

        None if a text has a special token of the model written out, which would be read as a control token.
        """
        if response.token_ids and self._renders(context, list(response.prompt_ids)):
            return response.prompt_ids, response.token_ids
        try:
            return tuple(self.tokenizer.prompt_ids(context)), tuple(self._response_ids(response))
        except ValueError:
            return None

    def fits(self, context: str, first: IdRow, second: IdRow) -> bool:
        return all(len(prompt) + len(response) <= self.context for prompt, response in (first, second))

    def score(self, context: str, texts: Sequence[IdRow]) -> np.ndarray:
        rows = [(list(prompt), list(response)) for prompt, response in texts]
        return forward_rows(completion_scores, self.network, rows, self.dtype, self.budget).astype(np.float64)

    def _renders(self, context: str, policy_ids: list[int]) -> bool:
        """Return whether this model's tokenizer and chat template give the policy's ids of a prompt.

        A prompt of several turns reached us as text, from which its turns are read back: equal ids prove them right.
        """
        if self.tokenizer.inner.chat_template is None:
            return self.tokenizer.with_bos(self.tokenizer.encode(self.tokenizer.decode(policy_ids))) == policy_ids
        prompts: list[Prompt] = [context]
        if turns := messages_in(context):
            prompts.append(turns)
        for prompt in prompts:
            try:
                if self.tokenizer.prompt_ids(prompt) == policy_ids:
                    return True
            except ValueError:  # special tokens in the text, or turns that the template refuses
                continue
        return False

    def _response_ids(self, response: Response) -> list[int]:
        """Return the drawn ids if this tokenizer has the same text for them, else those of the text.

        Text that was cut at the limit has no EOS after it: the policy did not write one.
        """
        ids = list(response.token_ids)
        known = bool(ids) and max(ids) < len(self.tokenizer.inner)
        body = ids[:-1] if response.finish_reason == "stop" else ids
        texts = (self.tokenizer.decode(ids), self.tokenizer.decode(body, special_tokens=True)) if known else ()
        if response.text.strip() in texts:
            return ids
        encoded = self.tokenizer.response_ids(response.text, self.context)[0]
        return self.tokenizer.encode(response.text) if response.finish_reason == "length" else encoded


def messages_in(text: str) -> list[Message]:
    """Return the turns of a prompt's text, which `readable` writes as lines `role: content`; none if it has none."""
    before, *parts = ROLE.split(text)
    if before or not parts:
        return []
    contents = [part.removesuffix("\n") for part in parts[1::2]]
    contents[-1] = parts[-1]
    return [{"role": role, "content": content} for role, content in zip(parts[::2], contents, strict=True)]
