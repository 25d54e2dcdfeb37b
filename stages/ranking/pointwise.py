"""Pointwise reward model: one score per response, so that P(a beats b) is the logistic of a difference."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from schemas import Model
from stages.data.texts import Conversation
from stages.data.tokenizer import Tokenizer
from stages.limits import SCORING_TOKENS_PER_PASS, context_length
from stages.network.device import prompts_per_call
from stages.network.forward import completion_scores, forward_rows
from stages.network.load import load_network
from stages.options import Precision
from stages.ranking.base import Response, Scorer, in_calls

IdRow = tuple[tuple[int, ...], tuple[int, ...]]


class PointwiseRanker(Scorer):
    """Reward model in memory, which reads a prompt and a response as the ids that it was trained on."""

    reads_ahead = True

    def __init__(self, model: Model, dtype: Precision, budget: int = SCORING_TOKENS_PER_PASS) -> None:
        self.open_tokenizer(model)
        self.network = load_network(model, dtype)
        self.dtype, self.budget = dtype, budget
        self.prompts_at_once = prompts_per_call(self.network.device)

    def open_tokenizer(self, model: Model) -> None:
        """Open what `read` and `fits` need."""
        self.tokenizer = Tokenizer(model)
        self.context = context_length(model.folder)
        self._plain_ids = lru_cache(1)(self._encode_again)  # responses to a prompt follow each other

    def close(self) -> None:
        """Free the network."""
        self.network.close()

    def read(self, context: str, response: Response) -> IdRow:
        """Return prompt and response ids: the policy's where its tokenizer and template are this model's too.

        Else those of the texts, the prompt's turns by this model's own template. Raise ValueError with the reason if a
        text has a special token of the model written out, which would be read as a control token, or the template does
        not render it.
        """
        conversation = response.prompt or Conversation(context)
        if self.tokenizer.inner.chat_template is None:
            prompt = self._plain_ids(response.prompt_ids)
            if prompt != response.prompt_ids:
                conversation = Conversation(context)
                prompt = tuple(self.tokenizer.prompt_ids(conversation))
        else:
            prompt = tuple(self.tokenizer.prompt_ids(conversation))
        # The ids of a response that a stop string ended hold that string, which is not part of the response.
        if response.token_ids and prompt == response.prompt_ids and response.finish_reason != "stop_string":
            return prompt, response.token_ids
        return prompt, tuple(self._response_ids(conversation, response))

    def fits(self, context: str, first: IdRow, second: IdRow) -> bool:
        return all(len(prompt) + len(response) <= self.context for prompt, response in (first, second))

    def score(self, context: str, texts: Sequence[IdRow]) -> np.ndarray:
        (scores,) = self.score_by_prompt([(context, texts)])
        return scores

    def score_by_prompt(self, questions: Sequence[tuple[str, Sequence[IdRow]]]) -> list[np.ndarray]:
        """Return one score per row of each prompt, float64 [N] each; on a CPU, a pass is of one prompt."""
        rows_by_prompt = [texts for _, texts in questions]
        return in_calls(self._scores, rows_by_prompt, of_one=self.prompts_at_once == 1)

    def _scores(self, texts: Sequence[IdRow]) -> np.ndarray:
        rows = [(list(prompt), list(response)) for prompt, response in texts]
        return forward_rows(completion_scores, self.network, rows, self.dtype, self.budget).astype(np.float64)

    def _encode_again(self, prompt_ids: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.tokenizer.with_bos(self.tokenizer.encode(self.tokenizer.decode(list(prompt_ids)))))

    def _response_ids(self, conversation: Conversation, response: Response) -> list[int]:
        """Return the drawn ids if this tokenizer has the same text for them, else those of the text; then its own end.

        The policy's end may be another token of this vocabulary. Text that was cut at the limit has no end after it:
        the policy did not write one. Where the template writes something before an answer, it renders the text.
        """
        is_cut = response.finish_reason == "length"
        if response.messages is not None:  # a call or several turns, which are no text
            if is_cut:
                raise ValueError("a call or several turns, cut at max_tokens, of which its template renders no part")
            if isinstance(response.messages, list):
                return self.tokenizer.turns_ids(conversation, response.messages)[0]
            return self.tokenizer.response_ids(conversation, response.messages)
        body = list(response.token_ids if is_cut else response.token_ids[:-1])
        is_drawn_text = response.finish_reason != "stop_string" and not self.tokenizer.lead
        if is_drawn_text and body and max(body) < len(self.tokenizer.inner):
            texts = (self.tokenizer.decode(body), self.tokenizer.decode(body, special_tokens=True))
            if response.text.strip() in texts:
                return body if is_cut else [*body, self.tokenizer.stop[0]]
        encoded = self.tokenizer.response_ids(conversation, response.text)
        return encoded[:-1] if is_cut else encoded
