"""Pointwise reward model: one score per response, so that P(a beats b) is the logistic of a difference."""

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache

import numpy as np

from schemas import Model
from stages.data.texts import Conversation, shared_prefix_length
from stages.data.tokenizer import Tokenizer
from stages.limits import SCORING_TOKENS_PER_PASS, context_length
from stages.model_config import SCORED_AT_END, ModelConfig
from stages.network.device import prompts_per_call
from stages.network.forward import completion_scores, forward_rows
from stages.network.load import compile_layers, load_network
from stages.options import Precision
from stages.ranking.base import Response, Scorer, in_calls

IdRow = tuple[tuple[int, ...], tuple[int, ...]]


class RewardModelReader:
    """Tokenizer of a reward model, which reads a prompt and a response as the ids that it was trained on."""

    def __init__(self, model: Model) -> None:
        self.tokenizer = Tokenizer(model)
        self.context = context_length(model.folder)
        self.reads_after_end = not ModelConfig(model.folder).content.get(SCORED_AT_END, False)
        self._plain_text = lru_cache(1)(self._text_of_same_ids)  # responses to a prompt follow each other

    def read(self, context: str, response: Response) -> IdRow:
        """Return the ids of prompt and response: the policy's if this model has the same for the prompt.

        Else those of the conversation as this model's own template renders it, prompt and response as one text, of
        which some ids may lie across the two. What the template writes behind the last turn is read, too, unless Winnow
        trained the model. Raise ValueError with the reason if a text has a special token of the model written out,
        which would be read as a control token, or the template does not render it.
        """
        conversation = response.prompt or Conversation(context)
        prompt: tuple[int, ...] = ()
        if self.tokenizer.inner.chat_template is None:
            text = self._plain_text(response.prompt_ids)
            conversation = Conversation(context if text is None else text)
            prompt = tuple(self.tokenizer.prompt_ids(conversation)) if text is None else response.prompt_ids
        else:
            with suppress(ValueError):  # raised again below, if it is not only about the prompt alone
                prompt = tuple(self.tokenizer.prompt_ids(conversation))
        is_cut = response.finish_reason == "length"
        # The ids of a response that a stop string ended hold that string, which is not part of the response.
        if response.token_ids and prompt == response.prompt_ids and response.finish_reason != "stop_string":
            ends = self.reads_after_end and not is_cut and response.token_ids[-1] == self.tokenizer.stop[0]
            return prompt, response.token_ids + tuple(self.tokenizer.after_end if ends else ())
        if response.messages is not None and is_cut:
            raise ValueError("a call or several turns, cut at max_tokens, of which its template renders no part")
        reply = response.text if response.messages is None else response.messages
        ids = self.tokenizer.conversation_ids(conversation, reply, after_end=self.reads_after_end and not is_cut)
        if is_cut:  # the policy wrote no end
            ids = ids[:-1]
        start = min(max(1, shared_prefix_length(prompt, ids)), len(ids) - 1)  # neither part may be empty
        return tuple(ids[:start]), tuple(ids[start:])

    def fits(self, context: str, first: IdRow, second: IdRow) -> bool:
        return all(len(prompt) + len(response) <= self.context for prompt, response in (first, second))

    def _text_of_same_ids(self, prompt_ids: tuple[int, ...]) -> str | None:
        """Return the text of a prompt that has these ids in this tokenizer, too; None if they are another's."""
        text = self.tokenizer.decode(list(prompt_ids))
        same = prompt_ids and tuple(self.tokenizer.with_bos(self.tokenizer.encode(text))) == prompt_ids
        return text if same else None


class PointwiseRanker(RewardModelReader, Scorer):
    """Reward model in memory."""

    reads_ahead = True
    scores_at_end = True

    def __init__(
        self, model: Model, dtype: Precision, budget: int = SCORING_TOKENS_PER_PASS, *, compiled: bool = False
    ) -> None:
        super().__init__(model)
        self.network = load_network(model, dtype)
        if compiled:
            compile_layers(self.network)
        self.dtype, self.budget = dtype, budget
        self.prompts_at_once = prompts_per_call(self.network.device)

    def close(self) -> None:
        """Free the network."""
        self.network.close()

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
