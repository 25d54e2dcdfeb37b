"""Pairwise text-to-text ranker: which of two responses is better, as the next token, A or B.

Training and scoring read the same ids, which are formed here and nowhere else, in one of three formats:

* marks: `[CONTEXT] x [RESPONSE A] y1 [RESPONSE B] y2` (sec. 3.1 of arXiv:2309.06657), tokenised in pieces, so that
  equal prefixes have equal ids. The label is the next token.
* chat: a question to a chat model, as one user's turn of its chat template; the label begins the assistant's turn.
* rlhflow: that of the public model RLHFlow/pair-preference-model-LLaMA3-8B, as its model card has it: the turns of the
  prompt in plain marks, the text as one user's turn of the model's chat template, and no BOS.
"""

from array import array
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from schemas import Model, WinnowError
from schemas.ids import Message
from stages.data.texts import Conversation, as_messages, shared_prefix_length
from stages.data.tokenizer import Tokenizer
from stages.limits import SCORING_TOKENS_PER_PASS, context_length
from stages.network.device import prompts_per_call
from stages.network.forward import forward_rows, next_logits
from stages.network.load import compile_layers, load_network
from stages.network.packing import PromptGroup
from stages.options import Precision
from stages.ranking.base import (
    KEPT_ENCODINGS,
    QUESTION,
    SPECIAL_TOKEN,
    PairFormat,
    Question,
    Ranker,
    Reading,
    ReadingPair,
    Response,
    in_calls,
)

LABELS = ("A", "B")
PROBE = "Which one?"
RLHFLOW = "[CONTEXT] {prompt} [RESPONSE A] {a} [RESPONSE B] {b} \n"


class RankerPrompt:
    """Prompt of the ranker, from two texts to ids, with the ids of its answers in `labels`.

    format: by default chat if the tokenizer has a chat template and none of the marks as a token, else marks. Raises
    WinnowError if a format needs a template that the tokenizer lacks, or a label takes more than one token.
    """

    def __init__(self, model: Model, format: PairFormat | None = None) -> None:
        self.tokenizer = Tokenizer(model)
        # As arrays, which take a ninth of a list's memory.
        self._piece_ids = lru_cache(KEPT_ENCODINGS)(lambda text: array("i", self.tokenizer.encode(text)))
        self._question_ids = lru_cache(KEPT_ENCODINGS)(lambda text: array("i", self.tokenizer.prompt_ids(text)))
        has_template = self.tokenizer.inner.chat_template is not None
        has_marks = "[RESPONSE A]" in self.tokenizer.special_tokens.values()
        self.format = format or ("chat" if has_template and not has_marks else "marks")
        if self.format != "marks" and not has_template:
            raise WinnowError(
                f"ranker: format {self.format} is rendered by a chat template, and the tokenizer of model "
                f"{model.digest[:12]} has none; set `format: marks`, or give a model with a template"
            )
        self.lead: list[
            int
        ] = []  # what the template renders between the prompt and an answer, such as an empty <think>
        if self.format != "chat":
            self.labels = tuple(self.tokenizer.label(label) for label in LABELS)
            return
        # As the template renders them: some tokenizers have one A after a space or a line and another elsewhere.
        first, second = (self.tokenizer.response_ids(PROBE, label) for label in LABELS)
        shared = shared_prefix_length(first, second)
        if first[shared + 1 :] != second[shared + 1 :]:
            raise WinnowError(f"ranker: the labels {LABELS} are not single tokens of model {model.digest[:12]}")
        self.lead, self.labels = first[:shared], (first[shared], second[shared])

    def can_read(self, text: str) -> bool:
        """Return whether no special token (as [RESPONSE B]) is written in the text: it would be a control token."""
        return not self.tokenizer.has_special_token(text)

    def context(self, text: str, conversation: Conversation | None, *responses: Message | list[Message] | None) -> str:
        """Return the prompt as `ids` reads it; raise ValueError if the format cannot hold it, or responses to it."""
        if self.format != "rlhflow":
            return text
        if any(isinstance(response, list) for response in responses):
            raise ValueError("format rlhflow holds responses of one turn")
        messages = as_messages(text if conversation is None else conversation.content)
        alternating = all(message["role"] == ("user", "assistant")[n % 2] for n, message in enumerate(messages))
        if not alternating or (conversation and conversation.tools):
            raise ValueError("format rlhflow holds only turns of user and assistant")
        return "\n" + "".join(f"\n<turn> {message['role']}\n {message['content']}" for message in messages) + "\n"

    def ids(self, context: str, first: str, second: str) -> list[int]:
        """Return the ids before the label. Raise ValueError where the chat template does not render the texts.

        A piece, or a whole question to a chat model, that was read lately is not encoded again.
        """
        if self.format == "marks":
            pieces = (f"[CONTEXT] {context}", f" [RESPONSE A] {first}", f" [RESPONSE B] {second}")
            return self.tokenizer.with_bos([token for piece in pieces for token in self._piece_ids(piece)])
        template = QUESTION if self.format == "chat" else RLHFLOW
        ids = list(self._question_ids(template.format(prompt=context, a=first, b=second)))
        if self.format == "rlhflow" and ids[:1] == [self.tokenizer.inner.bos_token_id]:
            ids = ids[1:]
        return ids + self.lead


class PairwiseRanker(Ranker):
    """Trained pairwise ranker in memory. budget: tokens in a forward pass."""

    reads_ahead = True

    def __init__(
        self,
        model: Model,
        dtype: Precision,
        budget: int = SCORING_TOKENS_PER_PASS,
        format: PairFormat | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        self.prompt = RankerPrompt(model, format)
        self.network = load_network(model, dtype)
        if compiled:
            compile_layers(self.network)
        self.context = context_length(model.folder)
        self.dtype, self.budget = dtype, budget
        self.prompts_at_once = prompts_per_call(self.network.device)

    def close(self) -> None:
        """Free the network."""
        self.network.close()

    def read(self, context: str, response: Response) -> str | tuple[str, str]:
        """Return the text, after the prompt in the format's own form if it has one."""
        prompt = self.prompt.context(context, response.prompt, response.messages)
        if not (self.prompt.can_read(context) and self.prompt.can_read(response.text)):
            raise ValueError(SPECIAL_TOKEN)
        return response.text if prompt == context else (prompt, response.text)

    def fits(self, context: str, first: Reading, second: Reading) -> bool:
        return len(self._ids(context, (first, second))) <= self.context

    def logits(self, context: str, pairs: Sequence[ReadingPair]) -> np.ndarray:
        (logits,) = self.logits_by_prompt([(context, pairs)])
        return logits

    def logits_by_prompt(self, questions: Sequence[Question]) -> list[np.ndarray]:
        """Return logit P(first beats second) of each prompt's pairs, nats, float64 [N] each.

        The prefix that all pairs of a question share (the context; and the baseline, if it is read first) goes through
        the network once. On a CPU, a pass holds pairs of one question only, so that a number does not depend on what
        else was scored; on a GPU it does, by rounding.
        """

        def label_logits(network: PreTrainedModel, groups: Sequence[PromptGroup], dtype: str) -> Tensor:
            logits = next_logits(network, groups, dtype)
            return logits[:, a] - logits[:, b]

        a, b = self.prompt.labels
        split_rows = []
        for context, pairs in questions:
            rows = [self._ids(context, pair) for pair in pairs]
            shared = common_prefix_length(rows)
            split_rows.append([(row[:shared], row[shared:]) for row in rows])
        return in_calls(
            lambda rows: forward_rows(label_logits, self.network, rows, self.dtype, self.budget).astype(np.float64),
            split_rows,
            of_one=self.prompts_at_once == 1,
        )

    def _ids(self, context: str, pair: ReadingPair) -> list[int]:
        (prompt, first), (_, second) = ((context, item) if isinstance(item, str) else item for item in pair)
        return self.prompt.ids(prompt, first, second)


def common_prefix_length(rows: Sequence[list[int]]) -> int:
    """Return the length of the longest common prefix that leaves every row at least one token."""
    if not rows:
        return 0
    # In lexicographic order, a prefix of the least and the greatest row is one of all.
    low, high = min(rows), max(rows)
    longest = min(len(row) for row in rows) - 1
    return next((n for n in range(longest) if low[n] != high[n]), longest)
