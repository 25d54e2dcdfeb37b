"""Text to token ids: what the model's own tokenizer and chat template say, for prompts, responses and their ends."""

import json
import re
import warnings
from collections.abc import Sequence
from datetime import date
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from schemas import Model, WinnowError, WinnowWarning
from schemas.ids import Message
from stages.data.texts import (
    CONTENT_KEYS,
    REASONING,
    REASONING_KEYS,
    TEMPLATE_OPTIONS,
    Conversation,
    Prompt,
    Reply,
    shared_prefix_length,
)

THINK = ("<think>", "</think>")
PROBE, OTHER_PROBE = "Yes, certainly", "No, never"  # texts to find where a template writes the content of a message


class Tokenizer:
    """Tokenizer of a model, with the rules that training, sampling and ranking must agree on.

    With a chat template, a prompt and a response are two parts of what the template renders of both. The response
    begins where the generation prompt ends. Some templates render an answer otherwise than they ask for one (that of
    DeepSeek-R1 asks with an opened `<think>` and renders answers without): there, prompts end where the two part, for
    every use. A response ends with the token that ends an assistant turn.
    """

    def __init__(self, model: Model) -> None:
        self.folder = model.folder
        self.inner: Any = AutoTokenizer.from_pretrained(model.folder, local_files_only=True)
        if self.inner.eos_token_id is None:
            raise WinnowError(f"model {model.digest[:12]}: its tokenizer has no EOS token, so no response could end")
        if self.inner.chat_template is None and (file := self.folder / "chat_template.json").is_file():
            self.inner.chat_template = json.loads(file.read_text())["chat_template"]  # of a processor
        config = self.folder / "tokenizer_config.json"
        self.template_options = (json.loads(config.read_text()) if config.is_file() else {}).get(TEMPLATE_OPTIONS) or {}
        self._added_tokens = self.inner.added_tokens_decoder
        self.special_tokens = {number: token.content for number, token in self._added_tokens.items() if token.special}

    def prompt_ids(self, prompt: Conversation | Prompt) -> list[int]:
        """Return the ids of a prompt: of the chat template if the tokenizer has one, else of its plain form or text.

        Raise ValueError with the reason to reject it: special tokens in the text, messages or tools without a
        template, and what the template refuses, does not render, or renders differently once an answer follows.
        """
        conversation = _conversation(prompt)
        if self.inner.chat_template is None:
            return self.with_bos(self.encode(self._plain_text(conversation)))
        messages = self._messages(conversation)
        mode = "continue_final_message" if messages[-1]["role"] == "assistant" else "add_generation_prompt"
        text = self._render(messages, conversation.tools, **{mode: True})
        self._check_rendered(conversation, text, **{mode: True})
        ids = self._ids(text)
        if messages[-1]["role"] == "assistant":
            return ids
        answered = self._ids(self._render([*messages, _assistant(PROBE)], conversation.tools))
        shared = ids[: shared_prefix_length(ids, answered)]
        content = str(messages[-1]["content"]).strip()
        after_content = len(text) - text.rfind(content) - len(content) if content in text else len(text)
        if len(self.rendered(ids[len(shared) :])) > after_content:
            raise ValueError("the chat template renders the prompt differently once an answer follows")
        if any(token in self._added_tokens for token in ids[len(shared) :]):
            rest = self.rendered(ids[len(shared) :])
            message = (
                f"prompts end before {rest!r}: the chat template asks for answers with it and renders them without"
            )
            warnings.warn(message, WinnowWarning, stacklevel=2)
        return shared

    def rendered(self, ids: list[int]) -> str:
        """Return ids as text with all special tokens: the prompt or response as the model reads it."""
        return str(self.inner.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def response_ids(self, prompt: Conversation | Prompt, reply: Reply) -> list[int]:
        """Return the ids of a response to a prompt, the token that ends it included.

        They are those that follow the prompt's in the ids of both together, so that no space is added and no token
        lies across. Raise ValueError with the reason to reject the response, as `prompt_ids` does, and where the ids
        of both do not begin with those of the prompt.
        """
        conversation = _conversation(prompt)
        text = reply if isinstance(reply, str) else str(reply["content"])
        while text.endswith(self.inner.eos_token):  # some data sets contain it as text
            text = text.removesuffix(self.inner.eos_token).rstrip()
        message = _assistant(text) if isinstance(reply, str) else reply | {"content": text}
        self._refuse_special_tokens([message])
        prompt_ids = self.prompt_ids(conversation)
        if self.inner.chat_template is None:
            if not isinstance(reply, str):
                raise ValueError("a message with more than text, and the tokenizer has no chat template")
            space = " " if conversation.plain is not None else ""
            ids = self.with_bos(self.encode(self._plain_text(conversation) + space + text))
        else:
            messages = self._messages(conversation)
            if messages[-1]["role"] == "assistant":  # the response continues it
                *messages, prefill = messages
                message = prefill | message | {"content": str(prefill["content"]) + text}
            answered = [*messages, message]
            rendered = self._render(answered, conversation.tools)
            self._check_rendered(Conversation(answered, conversation.tools), rendered)
            ids = self._ids(rendered)
        if ids[: len(prompt_ids)] != prompt_ids:
            raise ValueError("the ids of prompt and response together do not begin with those of the prompt")
        ids = ids[len(prompt_ids) :]
        if self._end_of_turn is None:
            return ids if ids[-1:] == [self.inner.eos_token_id] else [*ids, self.inner.eos_token_id]
        # What follows the end is the next turn's. A call may end in a token of its own, as `<|call|>` of gpt-oss.
        ends = [self._end_of_turn] if self._end_of_turn in ids else self.stop
        length = max((n for n, token in enumerate(ids, 1) if token in ends), default=0)
        if not length:
            raise ValueError("the chat template does not end the response")
        return ids[:length]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without the special tokens that the tokenizer would add."""
        return list(self.inner(text, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(self, ids: list[int], *, special_tokens: bool = False) -> str:
        """Return the text of ids, with special tokens or without them, without surrounding white space."""
        return str(self.inner.decode(ids, skip_special_tokens=not special_tokens)).strip()

    def decode_before(self, ids: list[int], stop: Sequence[str], *, special_tokens: bool = False) -> tuple[str, str]:
        """Return the text of ids before the stop string that their last token completes, and what is after it.

        Raise ValueError if it completes none.
        """

        def text_of(part: list[int]) -> str:
            return str(
                self.inner.decode(part, skip_special_tokens=not special_tokens, clean_up_tokenization_spaces=False)
            )

        text = text_of(ids)
        length = len(text_of(ids[:-1]).rstrip("\ufffd"))  # before the last token, without half a character
        starts = [(text.find(item, max(0, length - len(item) + 1)), len(item)) for item in stop]
        matches = [(start, start + size) for start, size in starts if start >= 0]
        if not matches:
            raise ValueError("no stop string at the end of the text")
        start, end = min(matches, key=lambda match: match[1])  # of those that end at once, the first of `stop`
        return text[:start].strip(), text[end:]

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
        """Return the ids that end a response: of the template's assistant turn, EOS, and those of the folder's config.

        The first is the one that responses from files end with.
        """
        file = self.folder / "generation_config.json"
        ids = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
        others = ids if isinstance(ids, list) else [] if ids is None else [ids]
        end = [] if self._end_of_turn is None else [self._end_of_turn]
        return tuple(dict.fromkeys([*end, int(self.inner.eos_token_id), *others]))

    @cached_property
    def _end_of_turn(self) -> int | None:
        """Return the token with which the template ends an assistant turn; None if it ends in text, or with nothing.

        After the last answer stands what ends it, then perhaps what ends the conversation (phi-3: EOS). After an
        answer in the middle stands what ends it, then the next turn. The last token that both have ends the turn; if
        they have none in common (gpt-oss: `<|return|>` at the end, `<|end|>` in the middle), the first after the last.
        """
        if self.inner.chat_template is None:
            return None
        question = {"role": "user", "content": OTHER_PROBE}
        last = self._render([question, _assistant(PROBE)], None).rpartition(PROBE)[2]
        middle = self._render([question, _assistant(PROBE), question], None).rpartition(PROBE)[2]
        after_last, after_middle = self.encode(last), self.encode(middle)
        shared = after_last[: shared_prefix_length(after_last, after_middle)]
        ends = [token for token in reversed(shared) if token in self._added_tokens]
        return next(iter([*ends, *(token for token in after_last if token in self._added_tokens)]), None)

    @cached_property
    def _adds_bos(self) -> bool:
        """Return whether the tokenizer or its chat template starts a sequence with BOS."""
        if self.inner("x")["input_ids"][:1] == [self.inner.bos_token_id]:
            return True
        if self.inner.chat_template is None:
            return False
        return self._render([{"role": "user", "content": "x"}], None).startswith(self.inner.bos_token)

    @cached_property
    def _reasoning_key(self) -> str | None:
        """Return the key of a message under which the template reads reasoning."""
        reads = r"""(\.|\[['"]|get\(['"])"""
        template = str(self.inner.chat_template)
        return next((key for key in REASONING_KEYS if re.search(rf"{reads}{key}\b", template)), None)

    @cached_property
    def _reads_parts(self) -> bool:
        """Return whether the template reads contents as lists of parts only, as those of models for images do."""

        def reads(content: Any) -> bool:
            try:
                return PROBE in self._apply([{"role": "user", "content": content}], None)
            except ValueError:
                return False

        return not reads(PROBE) and reads([{"type": "text", "text": PROBE}])

    def _plain_text(self, conversation: Conversation) -> str:
        """Return the text of a prompt for a tokenizer without chat template."""
        text = conversation.content if conversation.plain is None else conversation.plain
        if not isinstance(text, str):
            raise ValueError("chat messages, and the tokenizer has no chat template")
        if conversation.tools:
            raise ValueError("tools, and the tokenizer has no chat template")
        text = text.removeprefix(self.inner.bos_token or "")  # some data sets contain it as text
        self._refuse_special_tokens([{"role": "user", "content": text}])
        return text

    def _messages(self, conversation: Conversation) -> list[Message]:
        content = conversation.content
        if isinstance(content, str):
            content = [{"role": "user", "content": content.removeprefix(self.inner.bos_token or "")}]
        self._refuse_special_tokens(content)
        return content

    def _ids(self, text: str) -> list[int]:
        return self.with_bos(self.encode(text))

    def _render(self, messages: list[Message], tools: list[dict[str, Any]] | None, **kwargs: Any) -> str:
        rendered = []
        for message in messages:
            fields = dict(message)
            # Reasoning under the name that the template reads; also where a data set writes it before the answer.
            if self._reasoning_key and fields["role"] == "assistant":
                before, thinks, answer = fields["content"].partition(THINK[1])
                if thinks and before.lstrip().startswith(THINK[0]) and REASONING not in fields:
                    fields[REASONING] = before.lstrip().removeprefix(THINK[0]).strip()
                    fields["content"] = answer.lstrip()
                if REASONING in fields:
                    fields[self._reasoning_key] = fields.pop(REASONING)
            if self._reads_parts:
                fields["content"] = [{"type": "text", "text": fields["content"]}]
            rendered.append(fields)
        return self._apply(rendered, tools, **kwargs)

    def _apply(self, messages: list[Message], tools: list[dict[str, Any]] | None, **kwargs: Any) -> str:
        options = dict(self.template_options)
        day = options.pop("date", None)

        def strftime_now(pattern: str) -> str:
            """Return the model's own date: the day on which a template is rendered must not change its ids."""
            if day is None:
                raise WinnowError(
                    f"model in {self.folder.name}: its chat template reads today's date, and its ids would differ from "
                    "day to day; set the option `date` of the step of stage `model`, as in `date: 2026-01-31`"
                )
            return date.fromisoformat(day).strftime(pattern)

        try:
            text = self.inner.apply_chat_template(
                messages, tools=tools, tokenize=False, strftime_now=strftime_now, **options, **kwargs
            )
        except WinnowError:
            raise
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"chat template refuses the messages: {error}") from None
        return str(text)

    def _check_rendered(self, conversation: Conversation, text: str, **kwargs: Any) -> None:
        """Raise ValueError for a content, tool, call or reasoning that the rendered text of a conversation lacks.

        What does not stand in it word for word (a tool's result may be written as JSON) is rendered if the text
        changes without it. The reasoning of earlier answers may be left out, as most templates that know it do.
        """
        messages = self._messages(conversation)

        def is_rendered(n: int | None = None, key: str = "tools", value: Any = None) -> bool:
            changed, tools = list(messages), None if n is None else conversation.tools
            if n is not None:
                changed[n] = {name: item for name, item in messages[n].items() if name != key}
                changed[n] |= {} if value is None else {key: value}
            try:
                return self._render(changed, tools, **kwargs) != text
            except ValueError:  # the template misses it
                return True

        if conversation.tools and not is_rendered():
            raise ValueError("the chat template does not render tools")
        for n, message in enumerate(messages):
            content, role, is_last = str(message["content"]), message["role"], n == len(messages) - 1
            reasoning, thinks, answer = content.rpartition(THINK[1]) if role == "assistant" else ("", "", content)
            if answer.strip() not in text and not is_rendered(n, "content", PROBE):
                raise ValueError(f"the chat template does not render the content of a message of role {role}")
            if is_last and thinks and reasoning.strip().removeprefix(THINK[0]).strip() not in text:
                raise ValueError("the chat template does not render the reasoning of a response")
            for key in CONTENT_KEYS:
                left_out = key == REASONING and self._reasoning_key and not is_last
                if key in message and not left_out and not is_rendered(n, key):
                    raise ValueError(f"the chat template does not render {key}")

    def _refuse_special_tokens(self, messages: list[Message]) -> None:
        """Raise ValueError if a special token is written in a text: it would be encoded as a control token."""
        for message in messages:
            thinking = THINK if message["role"] == "assistant" else ()
            for text in (message["content"], message.get(REASONING, "")):
                for token in self.special_tokens.values():
                    if token in text and token not in thinking:
                        raise ValueError(f"special token {token} in the text")

    def has_special_token(self, text: str) -> bool:
        """Return whether a special token is written in the text: it would be encoded as a control token."""
        return any(token in text for token in self.special_tokens.values())


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _conversation(prompt: Conversation | Prompt) -> Conversation:
    return prompt if isinstance(prompt, Conversation) else Conversation(prompt)
