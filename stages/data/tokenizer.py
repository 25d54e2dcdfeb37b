"""Text to token ids: chat template, BOS exactly once, EOS where a text ends."""

import json
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from schemas import Model, WinnowError
from stages.data.texts import Prompt


class Tokenizer:
    """Tokenizer of a model, with the rules that training, sampling and ranking must agree on."""

    def __init__(self, model: Model) -> None:
        self.folder = model.folder
        self.inner: Any = AutoTokenizer.from_pretrained(model.folder, local_files_only=True)
        if self.inner.eos_token_id is None:
            raise WinnowError(f"model {model.digest[:12]}: its tokenizer has no EOS token, so no response could end")
        added = self.inner.added_tokens_decoder.items()
        self.special_tokens = {index: token.content for index, token in added if token.special}

    def prompt_ids(self, prompt: Prompt, plain: str | None = None) -> list[int]:
        """Return the ids of a prompt: by the chat template if the tokenizer has one, else of `plain` or of the text.

        Raises ValueError for chat messages without a template, and for special tokens in the text.
        """
        if plain is not None and self.inner.chat_template is None:
            prompt = plain
        if isinstance(prompt, str) and self.inner.bos_token:
            prompt = prompt.removeprefix(self.inner.bos_token)  # some data sets contain it as text
        for text in [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]:
            self._refuse_special_tokens(text)
        if self.inner.chat_template is not None:
            return self.with_bos(self.encode(self._apply_template(prompt)))
        if not isinstance(prompt, str):
            raise ValueError("chat messages, and the tokenizer has no chat template")
        return self.with_bos(self.encode(prompt))

    def response_ids(self, text: str, most: int, *, plain: bool = False) -> tuple[list[int], str]:
        """Return (ids with one EOS, "stop"), or (the first `most` ids, "length"): truncated, without EOS.

        With `plain`, the prompt also has a form for tokenizers without chat template, which ends in a marker: without a
        template, the response follows it after a space. Raises ValueError for special tokens in the text.
        """
        while text.endswith(self.inner.eos_token):  # some data sets contain it as text
            text = text.removesuffix(self.inner.eos_token).rstrip()
        self._refuse_special_tokens(text)
        space = " " if plain and self.inner.chat_template is None else ""
        ids = [*self.encode(space + text), self.inner.eos_token_id]
        return (ids, "stop") if len(ids) <= most else (ids[:most], "length")

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without the special tokens that the tokenizer would add."""
        return list(self.inner(text, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(self, ids: list[int], *, special_tokens: bool = False) -> str:
        """Return the text of ids, with special tokens or without them, without surrounding white space."""
        return str(self.inner.decode(ids, skip_special_tokens=not special_tokens)).strip()

    def label(self, text: str) -> int:
        """Return the single token of a label; raise WinnowError if it takes more."""
        ids = self.encode(text)
        if len(ids) != 1:
            raise WinnowError(f"label {text!r} is {len(ids)} tokens in this tokenizer; a ranker needs one")
        return ids[0]

    def with_bos(self, ids: list[int]) -> list[int]:
        """Return ids with one BOS if the model was trained with one; chat templates often contain it, often not."""
        bos = self.inner.bos_token_id
        if bos is None or not self._adds_bos:
            return ids
        while ids[:1] == [bos]:
            ids = ids[1:]
        return [bos, *ids]

    @cached_property
    def stop(self) -> tuple[int, ...]:
        """Return the ids that end a response: the EOS that training appends, and those in the model folder's config."""
        file = self.folder / "generation_config.json"
        ids = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
        others = ids if isinstance(ids, list) else [] if ids is None else [ids]
        return tuple(dict.fromkeys([int(self.inner.eos_token_id), *others]))

    @cached_property
    def _adds_bos(self) -> bool:
        """Return whether the tokenizer or its chat template starts a sequence with BOS."""
        if self.inner("x")["input_ids"][:1] == [self.inner.bos_token_id]:
            return True
        return self.inner.chat_template is not None and self._apply_template("x").startswith(self.inner.bos_token)

    def _apply_template(self, prompt: Prompt) -> str:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            return str(self.inner.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise ValueError(f"chat template refuses the messages: {error}") from None

    def has_special_token(self, text: str) -> bool:
        """Return whether a special token is written in the text: it would be encoded as a control token."""
        return any(token in text for token in self.special_tokens.values())

    def _refuse_special_tokens(self, text: str) -> None:
        """Raise ValueError if a special token is written in the text: it would be encoded as a control token."""
        for token in self.special_tokens.values():
            if token in text:
                raise ValueError(f"special token {token} in the text")


def readable(prompt: Prompt) -> str:
    """Return a prompt for people and rankers: the text, or the turns with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
