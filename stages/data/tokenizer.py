"""Text to token ids, at the one place where data enters: chat template, BOS exactly once, EOS where a text ends."""

import json
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from schemas import Model, WinnowError
from stages.data.files import Prompt


class Tokenizer:
    """A model's tokenizer, with the few rules that training and sampling must agree on."""

    def __init__(self, model: Model) -> None:
        self.folder = model.folder
        self.inner: Any = AutoTokenizer.from_pretrained(model.folder, local_files_only=True)
        if self.inner.eos_token_id is None:
            raise WinnowError(f"model {model.digest[:12]}: its tokenizer has no EOS token, so no response could end")

    def prompt_ids(self, prompt: Prompt, plain: str | None = None) -> list[int]:
        """Chat template if the tokenizer has one, else `plain` where given; raises ValueError for messages without."""
        if plain is not None and self.inner.chat_template is None:
            prompt = plain
        if isinstance(prompt, str) and self.inner.bos_token:
            prompt = prompt.removeprefix(self.inner.bos_token)  # some data sets write it out
        for content in [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]:
            self._refuse_special(content)
        if self.inner.chat_template is None:
            if not isinstance(prompt, str):
                raise ValueError("chat messages, and the tokenizer has no chat template")
            return self.with_bos(self.encode(prompt))
        return self.with_bos(self.encode(self._templated(prompt)))

    def _templated(self, prompt: Prompt) -> str:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            return str(self.inner.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise ValueError(f"chat template refuses the messages: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Without special tokens of the tokenizer's own."""
        return list(self.inner(text, add_special_tokens=False, verbose=False)["input_ids"])

    def response_ids(self, text: str, most: int, *, plain: bool = False) -> tuple[list[int], str]:
        """Ids with EOS once; cut at the end to `most` tokens, and then without EOS, for the text goes on.

        plain: the prompt was given in a plain form, too, which ends in a mark: without a template, a space follows.
        """
        while text.endswith(self.inner.eos_token):  # some data sets write it out
            text = text.removesuffix(self.inner.eos_token).rstrip()
        self._refuse_special(text)
        lead = " " if plain and self.inner.chat_template is None else ""
        ids = [*self.encode(lead + text), self.inner.eos_token_id]
        return (ids, "stop") if len(ids) <= most else (ids[:most], "length")

    def _refuse_special(self, text: str) -> None:
        """A special token written out in data would become a control token: raises ValueError."""
        found = [token for token in self._special if token in text]
        if found:
            raise ValueError(f"special token {found[0]} in the text")

    @cached_property
    def _special(self) -> list[str]:
        return [token.content for token in self.inner.added_tokens_decoder.values() if token.special]

    @cached_property
    def stop(self) -> tuple[int, ...]:
        """Ids that end a response: the EOS that training appends, and those the model folder names."""
        own = self.folder / "generation_config.json"
        named = json.loads(own.read_text()).get("eos_token_id") if own.exists() else None
        others = named if isinstance(named, list) else [] if named is None else [named]
        return tuple(dict.fromkeys([int(self.inner.eos_token_id), *others]))

    def decode(self, ids: list[int]) -> str:
        return str(self.inner.decode(ids, skip_special_tokens=True)).strip()

    def label(self, text: str) -> int:
        """The one token of a label; raises WinnowError if it takes more."""
        ids = self.encode(text)
        if len(ids) != 1:
            raise WinnowError(f"label {text!r} is {len(ids)} tokens in this tokenizer; a ranker needs one")
        return ids[0]

    def with_bos(self, ids: list[int]) -> list[int]:
        """Templates often contain BOS and often do not; the model wants it once, if it was trained with one."""
        bos = self.inner.bos_token_id
        if bos is None or not self._adds_bos:
            return ids
        while ids[:1] == [bos]:
            ids = ids[1:]
        return [bos, *ids]

    @cached_property
    def _adds_bos(self) -> bool:
        """Does the tokenizer itself, or its template, start a sequence with BOS?"""
        if self.inner("x")["input_ids"][:1] == [self.inner.bos_token_id]:
            return True
        return self.inner.chat_template is not None and self._templated("x").startswith(self.inner.bos_token)


def readable(prompt: Prompt) -> str:
    """A prompt for people and rankers: the text, or the turns with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
