"""Text to token ids: what the model's own tokenizer and chat template say, for prompts, responses and their ends."""

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from schemas import Model, WinnowError, WinnowWarning
from schemas.ids import Message
from stages.data.chat_templates import DELIMITER, literals
from stages.data.texts import (
    CONTENT_KEYS,
    REASONING,
    REASONING_KEYS,
    ROLES,
    TEMPLATE_OPTIONS,
    ChangedPromptError,
    Conversation,
    Prompt,
    as_messages,
    shared_prefix_length,
    unknown_role,
    unrendered,
)
from stages.model_config import FROM_FOLDER, GENERATION, json_object

THINK = ("<think>", "</think>")
OPENING_TOKENS = 6  # at the end of a prompt, that hold a `<think>` also where it is written in pieces
MAX_PROBES = 10_000  # that are kept
MAX_ENDS = 16  # that are kept: where no added token is behind the question, each prompt has an end of its own
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
        self.inner: Any = AutoTokenizer.from_pretrained(model.folder, **FROM_FOLDER)
        if self.inner.eos_token_id is None:
            raise WinnowError(f"model {model.digest[:12]}: its tokenizer has no EOS token, so no response could end")
        if self.inner.chat_template is None and (file := self.folder / "chat_template.json").is_file():
            self.inner.chat_template = json_object(file).get("chat_template")  # of a processor
        config = self.folder / "tokenizer_config.json"
        self.template_options = (json_object(config) if config.is_file() else {}).get(TEMPLATE_OPTIONS) or {}
        if unknown := self.template_options.keys() - {"date", "chat_template_kwargs"}:
            raise WinnowError(
                f"{config}: {TEMPLATE_OPTIONS} has {', '.join(sorted(unknown))}, as an earlier version wrote it; move "
                "them into an object `chat_template_kwargs` in it"
            )
        self._added_tokens = self.inner.added_tokens_decoder
        self._last_prompt: tuple[Conversation, list[int]] | None = None
        self._rendered_prompt: Conversation | None = None  # which the template renders, a response behind it
        self._ends: set[tuple[str, str]] = set()  # of prompts that an answer follows without a change, and its text
        self._probes: dict[Any, str] = {}  # what is rendered of one message with a probe for its content
        self._answered_probes: dict[tuple[str, str], str | None] = {}  # rendered prompts with a probe for their answer

    def prompt_ids(self, prompt: Conversation | Prompt) -> list[int]:
        """Return the ids of a prompt: of the chat template if the tokenizer has one, else of its plain form or text.

        Raise ValueError with the reason to reject it: special tokens in the text, messages or tools without a
        template, and what the template refuses or does not render. Raise ChangedPromptError, which has the ids that
        ask for an answer, for what it renders differently once one follows.
        """
        conversation = _conversation(prompt)
        last = self._last_prompt  # which another thread may replace meanwhile
        if last is None or last[0] != conversation:  # both responses of a pair ask for it
            last = self._last_prompt = conversation, self._prompt_ids(conversation)
        return list(last[1])

    def _prompt_ids(self, conversation: Conversation) -> list[int]:
        if self.inner.chat_template is None:
            return self.with_bos(self.encode(self._plain_text(conversation)))
        messages = self._messages(conversation)
        mode = "continue_final_message" if messages[-1]["role"] == "assistant" else "add_generation_prompt"
        text = self._render(messages, conversation.tools, **{mode: True})
        self._check_rendered(conversation, text, range(len(messages)), **{mode: True})
        ids = self.encode(text)
        if messages[-1]["role"] == "assistant":
            return ids
        answer = self._render([*messages, _assistant(PROBE)], conversation.tools)
        rest = answer.removeprefix(text)
        if rest != answer and any(rest == continuation and text.endswith(end) for end, continuation in self._ends):
            return ids
        shared = ids[: shared_prefix_length(ids, self.encode(answer))]
        if len(shared) == len(ids):
            # Texts with this end have the same ids with `rest` behind them, if the end begins with an added token: that
            # is cut out before anything else is tokenised, and what is before it does not matter behind it.
            added = [self._added_tokens[token] for token in ids if token in self._added_tokens]
            cuts = added and not added[-1].single_word and not added[-1].lstrip and added[-1].content in text
            if cuts and len(self._ends) < MAX_ENDS:
                self._ends.add((text[text.rindex(added[-1].content) :], rest))
            return ids
        # Where they part, only what follows the last message may be left out, which the text of another shows.
        changed = [*messages[:-1], messages[-1] | {"content": PROBE}]
        _, probe, behind = self._render(changed, conversation.tools, **{mode: True}).rpartition(PROBE)
        if probe and len(self.rendered(ids[len(shared) :])) > len(behind):
            raise ChangedPromptError(ids)
        if any(token in self._added_tokens for token in ids[len(shared) :]):
            rest = self.rendered(ids[len(shared) :])
            message = (
                f"prompts end before {rest!r}: the chat template asks for answers with it and renders them without"
            )
            warnings.warn(message, WinnowWarning, stacklevel=2)
        return shared

    def rendered(self, ids: list[int]) -> str:
        """Return ids as text with all special tokens: the prompt or response as the model reads it."""
        if self._backend is not None and type(self.inner)._decode is PreTrainedTokenizerFast._decode:
            return str(self._backend.decode(ids, skip_special_tokens=False))
        return str(self.inner.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def response_ids(
        self, prompt: Conversation | Prompt, reply: str | Message, prompt_ids: list[int] | None = None
    ) -> list[int]:
        """Return the ids of a response to a prompt, the token that ends it included.

        They are those that follow the prompt's in the ids of both together, so that no space is added and no token
        lies across. `prompt_ids` are the prompt's where they are known, and need not be computed again. Raise
        ValueError with the reason to reject the response, as the method `prompt_ids` does, and where the ids of both do
        not begin with those of the prompt.
        """
        conversation = _conversation(prompt)
        prompt_ids = self.prompt_ids(conversation) if prompt_ids is None else prompt_ids
        return self.response_ids_of(self.encode(self.response_text(conversation, reply)), prompt_ids)

    def response_text(self, conversation: Conversation, reply: str | Message) -> str:
        """Return the text of a prompt and its response together, whose ids `response_ids_of` reads.

        Raise ValueError with the reason to reject the response.
        """
        text = reply if isinstance(reply, str) else str(reply["content"])
        while text.endswith(self.inner.eos_token):  # some data sets contain it as text
            text = text.removesuffix(self.inner.eos_token).rstrip()
        message = _assistant(text) if isinstance(reply, str) else reply | {"content": text}
        self._refuse_special_tokens(Conversation([message]))
        if self.inner.chat_template is None:
            if not isinstance(reply, str):
                raise ValueError("a message with more than text, and the tokenizer has no chat template")
            space = " " if conversation.plain is not None else ""
            return self._plain_text(conversation) + space + text
        messages = self._messages(conversation)
        if messages[-1]["role"] == "assistant":  # the response continues it
            *messages, prefill = messages
            message = prefill | message | {"content": str(prefill["content"]) + text}
        answered = [*messages, message]
        rendered = self._render(answered, conversation.tools)
        self._check_rendered(Conversation(answered, conversation.tools), rendered, [len(messages)])
        return rendered

    def response_ids_of(self, ids: list[int], prompt_ids: list[int]) -> list[int]:
        """Return the ids of a response from those of the text that `response_text` returns; raise as `response_ids`."""
        if self.inner.chat_template is None:
            ids = self.with_bos(ids)
        if ids[: len(prompt_ids)] != prompt_ids:
            raise ValueError("the ids of prompt and response together do not begin with those of the prompt")
        ids = ids[len(prompt_ids) :]
        if self._end_of_turn is None:
            return ids if ids[-1:] == [self.inner.eos_token_id] else [*ids, self.inner.eos_token_id]
        # What follows the end is the next turn's. A call may end in a token of its own, as `<|call|>` of gpt-oss.
        ends = [self._end_of_turn] if self._end_of_turn in ids else self.stop
        length = next((n for n in range(len(ids), 0, -1) if ids[n - 1] in ends), 0)
        if not length:
            raise ValueError("the chat template does not end the response")
        return ids[:length]

    def conversation_ids(
        self, prompt: Conversation | Prompt, reply: str | Message | list[Message], *, after_end: bool = False
    ) -> list[int]:
        """Return the ids of a prompt and its response as one text: those of `apply_chat_template` of both together.

        They need not begin with the ids of the prompt alone: a token may lie across the two. They end with the end of
        the response; after_end: with all that the template writes, such as a line end behind it. Raise ValueError with
        the reason to reject them: special tokens in the text, and what the template refuses or does not render.
        """
        conversation = _conversation(prompt)
        if self.inner.chat_template is None:
            if isinstance(reply, list):
                raise ValueError("a response of several turns, and the tokenizer has no chat template")
            return self.response_ids_of(self.encode(self.response_text(conversation, reply)), [])
        messages, tools = self._messages(conversation), conversation.tools
        if conversation != self._rendered_prompt:  # responses to a prompt follow each other
            answered = messages if messages[-1]["role"] == "assistant" else [*messages, _assistant(PROBE)]
            text = self._render(answered, tools)
            self._check_rendered(Conversation(answered, tools), text, range(len(messages)))
            self._rendered_prompt = conversation
        if isinstance(reply, list):
            if messages[-1]["role"] == "assistant":
                raise ValueError("a response of several turns cannot continue a turn of the prompt")
            self._refuse_special_tokens(Conversation(reply))
            answered = [*messages, *reply]
            text = self._render(answered, tools)
            self._check_rendered(Conversation(answered, tools), text, range(len(messages), len(answered)))
        else:
            text = self.response_text(conversation, reply)
        ids = self.encode(text)
        return ids if after_end else self.response_ids_of(ids, [])

    @cached_property
    def after_end(self) -> list[int]:
        """Return what the template writes behind the end of the last turn, such as a line end."""
        if self._end_of_turn is None:
            return []
        ids = self.encode(self._answered[0].rpartition(PROBE)[2])
        return ids[ids.index(self._end_of_turn) + 1 :]

    def turns_ids(self, prompt: Conversation | Prompt, turns: list[Message]) -> tuple[list[int], list[bool]]:
        """Return the ids of a response of several turns, and which of them the assistant wrote.

        What it wrote in a turn is what `response_ids` says of that turn after all before it: the mask has the ids of
        every turn with its end, and nothing of the headers, users and tools between them. Raise ValueError with the
        reason to reject it, as `response_ids` does, and where the template renders a turn differently once others
        follow (as some do, which leave out earlier reasoning): no mask would then be of what the assistant wrote.
        """
        conversation = _conversation(prompt)
        if self.inner.chat_template is None:
            raise ValueError("a response of several turns, and the tokenizer has no chat template")
        history, tools = as_messages(conversation.content), conversation.tools
        if history[-1]["role"] == "assistant":
            raise ValueError("a response of several turns cannot continue a turn of the prompt")
        prompt_ids = self.prompt_ids(conversation)
        messages = [*self._messages(conversation), *turns]
        ids = self.encode(self._render(messages, tools))
        mask = [False] * len(ids)
        end = 0
        for n in range(len(history), len(messages)):
            if messages[n]["role"] != "assistant":
                continue
            if messages[n - 1]["role"] == "assistant":
                raise ValueError("two turns of the assistant follow each other")
            before = Conversation(messages[:n], tools)
            start = len(begin := self.prompt_ids(before))
            end = start + len(turn := self.response_ids(before, messages[n]))
            if ids[:end] != begin + turn:
                raise ValueError("the chat template renders a turn differently once others follow")
            mask[start:end] = [True] * len(turn)
        if ids[: len(prompt_ids)] != prompt_ids:
            raise ValueError("the ids of prompt and response together do not begin with those of the prompt")
        return ids[len(prompt_ids) : end], mask[len(prompt_ids) : end]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without the special tokens that the tokenizer would add."""
        if self._backend is not None:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        return list(self.inner(text, add_special_tokens=False, verbose=False)["input_ids"])

    @cached_property
    def _backend(self) -> Any:
        """Return the tokenizer of the library `tokenizers` where transformers only passes texts to it, else None.

        Its own call takes half of the time.
        """
        kind = type(self.inner)
        is_plain = isinstance(self.inner, PreTrainedTokenizerFast) and not self.inner.split_special_tokens
        if not is_plain or kind._encode_plus is not PreTrainedTokenizerFast._encode_plus:
            return None
        backend = self.inner.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return backend

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Return `encode` of every text: on all cores, without Python's lock, where the tokenizer is in Rust."""
        if not texts:
            return []
        ids: list[list[int]] = self.inner(
            texts, add_special_tokens=False, verbose=False, return_attention_mask=False, return_token_type_ids=False
        )["input_ids"]
        return ids

    def split_point(self, conversation: Conversation, prompt_ids: list[int]) -> tuple[str, int]:
        """Return a text with which what is rendered of the prompt begins, and the number of its ids.

        What follows it has the same ids by itself as behind it: it ends before a special token, at which tokenizers in
        Rust cut a text before anything else is done to it. Empty where there is none.
        """
        splitting = self._splitting_tokens
        n = next((n for n in range(len(prompt_ids) - 1, 0, -1) if prompt_ids[n] in splitting), 0)
        if not n:
            return "", 0
        mode = "continue_final_message" if as_messages(conversation.content)[-1]["role"] == "assistant" else None
        text = self._render(self._messages(conversation), conversation.tools, **{mode or "add_generation_prompt": True})
        token, end = splitting[prompt_ids[n]], -1
        for _ in range(prompt_ids[: n + 1].count(prompt_ids[n])):  # texts of users have no special token
            end = text.find(token, end + 1)
        return (text[:end], n) if end > 0 and self.encode(text[:end]) == prompt_ids[:n] else ("", 0)

    @cached_property
    def _splitting_tokens(self) -> dict[int, str]:
        """Return the special tokens at which every text is cut, whatever is around them, by their ids."""
        if self.inner.chat_template is None or not self.inner.is_fast:
            return {}
        contents = [token.content for token in self._added_tokens.values()]
        return {
            number: token.content
            for number, token in self._added_tokens.items()
            if token.special
            and not (token.normalized or token.single_word or token.lstrip)
            and sum(token.content in content for content in contents) == 1
        }

    def decode(self, ids: list[int], *, special_tokens: bool = False) -> str:
        """Return the text of ids, with special tokens or without them, as it stands."""
        if not special_tokens:
            ids = [token for token in ids if token not in self.special_tokens]
        # A tokenizer's own setting may join "a ." to "a.", and a program that reads the text would judge another.
        return str(self.inner.decode(ids, skip_special_tokens=not special_tokens, clean_up_tokenization_spaces=False))

    def decode_before(self, ids: list[int], stop: Sequence[str], *, special_tokens: bool = False) -> tuple[str, str]:
        """Return the text of ids before the stop string that their last token completes, and what is after it.

        Raise ValueError if it completes none.
        """

        text = self.decode(ids, special_tokens=special_tokens)
        before = self.decode(ids[:-1], special_tokens=special_tokens).rstrip("\ufffd")  # without half a character
        starts = [(text.find(item, max(0, len(before) - len(item) + 1)), len(item)) for item in stop]
        matches = [(start, start + size) for start, size in starts if start >= 0]
        if not matches:
            raise ValueError("no stop string at the end of the text")
        start, end = min(matches, key=lambda match: match[1])  # of those that end at once, the first of `stop`
        return text[:start], text[end:]

    @cached_property
    def longest_token(self) -> int:
        """Return the number of characters of the longest token, or more: of bytes, where tokens are bytes."""
        return max(map(len, self.inner.get_vocab()))

    def label(self, text: str) -> int:
        """Return the single token of a label; raise WinnowError if it takes more."""
        ids = self.encode(text)
        if len(ids) != 1:
            raise WinnowError(f"label {text!r} is {len(ids)} tokens in this tokenizer; a ranker needs one")
        return ids[0]

    def with_bos(self, ids: list[int]) -> list[int]:
        """Return ids of a text that no template renders with one BOS, if tokenizer or template begin with it."""
        bos = self.inner.bos_token_id
        if bos is None or not self._adds_bos:
            return ids
        while ids[:1] == [bos]:
            ids = ids[1:]
        return [bos, *ids]

    @cached_property
    def special_tokens(self) -> dict[int, str]:
        """Return the control tokens by id: those flagged special, the ends of a response, and delimiters of turns.

        Delimiters are added tokens that the chat template writes, as `<|im_end|>` where it was added without a flag.
        Those of which it writes a pair `<x>`, `</x>` inside a message, such as `<think>` and `<tool_call>`, are text,
        which people and models write; so are words that were added for their own sake.
        """
        special = {number for number, token in self._added_tokens.items() if token.special or number in self.stop}
        special |= {number for number in self._delimiters if self._added_tokens[number].content not in THINK}
        return {number: self._added_tokens[number].content for number in sorted(special)}

    @cached_property
    def _special_beginning(self) -> str:
        """Return the text with which all special tokens begin: what has none of it is searched once, not for each."""
        first, *others = self.special_tokens.values()
        return first[: min((shared_prefix_length(first, token) for token in others), default=len(first))]

    @cached_property
    def _delimiters(self) -> set[int]:
        """Return the added tokens that the template writes around turns, or anywhere and not in pairs like HTML's."""
        if self.inner.chat_template is None:
            return set()
        candidates = {n: t.content for n, t in self._added_tokens.items() if DELIMITER.fullmatch(t.content)}
        templates = self.inner.chat_template
        texts = [
            text
            for template in (templates.values() if isinstance(templates, dict) else [templates])
            for text in literals(template)
        ]
        names = set(candidates.values())
        pairs = {f"<{name[2:]}" for name in names if name.startswith("</")} & names
        pairs |= {f"</{name[1:]}" for name in pairs}
        written = {n for n, token in candidates.items() if token not in pairs and any(token in text for text in texts)}
        return written | candidates.keys() & {token for text in self._answered for token in self.encode(text)}

    @cached_property
    def stop(self) -> tuple[int, ...]:
        """Return the ids that end a response: of the template's assistant turn, EOS, and those of the folder's config.

        The first is the one that responses from files end with.
        """
        ends = [] if self._end_of_turn is None else [self._end_of_turn]
        # As transformers and vLLM do: of generation_config.json, or without one of config.json.
        configured = None
        if (self.folder / GENERATION).is_file():
            configured = json_object(self.folder / GENERATION).get("eos_token_id")
        elif (self.folder / "config.json").is_file():
            config = AutoConfig.from_pretrained(self.folder, **FROM_FOLDER)
            configured = GenerationConfig.from_model_config(config).eos_token_id
        configured = configured if isinstance(configured, list) else [] if configured is None else [configured]
        return tuple(dict.fromkeys([*ends, int(self.inner.eos_token_id), *configured]))

    @cached_property
    def lead(self) -> list[int]:
        """Return what the template writes between a question and its answer, such as an empty `<think>`."""
        if self.inner.chat_template is None:
            return []
        first, second = (self.response_ids([*self._shape[0], _user(OTHER_PROBE)], text) for text in ("A", "B"))
        return first[: shared_prefix_length(first, second)]

    def thought_opened_by(self, prompt_ids: Sequence[int]) -> str:
        r"""Return `<think>\n` if a prompt ends in `<think>`, the line end with it or in the response; else nothing."""
        tail = str(self.inner.decode(list(prompt_ids[-OPENING_TOKENS:]), clean_up_tokenization_spaces=False))
        return f"{THINK[0]}\n" if tail.rstrip().endswith(THINK[0]) else ""

    @cached_property
    def _end_of_turn(self) -> int | None:
        """Return the token with which the template ends an assistant turn; None if it ends in text, or with nothing.

        After the last answer stands what ends it, then perhaps what ends the conversation (phi-3: EOS). After an
        answer in the middle stands what ends it, then the next turn. The last token that both have ends the turn; if
        they have none in common (gpt-oss: `<|return|>` at the end, `<|end|>` in the middle), the first after the last.
        """
        if self.inner.chat_template is None:
            return None
        after_last, after_middle = (self.encode(text.rpartition(PROBE)[2]) for text in self._answered)
        shared = after_last[: shared_prefix_length(after_last, after_middle)]
        # A line end that was added as a token is none of them.
        added = {
            token for token in after_last if token in self._added_tokens and self._added_tokens[token].content.strip()
        }
        return next((token for token in (*reversed(shared), *after_last) if token in added), None)

    @cached_property
    def _answered(self) -> tuple[str, str]:
        """Return what the template renders of a question and an answer, and of both before another question.

        Raise WinnowError if it refuses them: what it refuses is our own, and no row can be blamed for it.
        """
        question = _user(OTHER_PROBE)
        turns = [*self._shape[0], question, _assistant(PROBE)]
        try:
            return self._render(turns, None), self._render([*turns, question], None)
        except ValueError as error:
            raise WinnowError(f"model in {self.folder.name}: a question and an answer: {error}") from None

    @cached_property
    def _shape(self) -> tuple[list[Message], bool]:
        """Return the turns that the template needs before a user's, and whether it reads contents as lists of parts.

        Some templates refuse a conversation without a system message, and those of models for images read parts only.
        Raise WinnowError if the template refuses a question in all of these shapes.
        """
        accepted: list[tuple[list[Message], bool]] = []
        refusals = []
        for opening in ([], [{"role": "system", "content": OTHER_PROBE}]):
            for parts in (False, True):
                messages = [*opening, {"role": "user", "content": PROBE}]
                try:
                    text = self._apply(_in_parts(messages) if parts else messages, None)
                except ValueError as error:
                    refusals.append(error)
                    continue
                accepted.append((opening, parts))
                if PROBE in text:
                    return opening, parts
        if not accepted:
            raise WinnowError(
                f"model in {self.folder.name}: a question, with a system message and without: {refusals[0]}"
            )
        return accepted[0]

    @cached_property
    def _adds_bos(self) -> bool:
        """Return whether the tokenizer or its chat template starts a sequence with BOS."""
        if self.inner("x")["input_ids"][:1] == [self.inner.bos_token_id]:
            return True
        if self.inner.chat_template is None:
            return False
        return self._answered[0].startswith(self.inner.bos_token)

    @cached_property
    def _reasoning_key(self) -> str | None:
        """Return the key of a message under which the template reads reasoning."""
        access = r"""(\.|\[['"]|get\(['"])"""
        template = str(self.inner.chat_template)
        return next((key for key in REASONING_KEYS if re.search(rf"{access}{key}\b", template)), None)

    def _plain_text(self, conversation: Conversation) -> str:
        """Return the text of a prompt for a tokenizer without chat template."""
        text = conversation.content if conversation.plain is None else conversation.plain
        if not isinstance(text, str):
            raise ValueError("chat messages, and the tokenizer has no chat template")
        if conversation.tools:
            raise ValueError("tools, and the tokenizer has no chat template")
        text = text.removeprefix(self.inner.bos_token or "")  # some data sets contain it as text
        self._refuse_special_tokens(Conversation(text))
        return text

    def _messages(self, conversation: Conversation) -> list[Message]:
        content = conversation.content
        if isinstance(content, str):
            content = [_user(content.removeprefix(self.inner.bos_token or ""))]
        self._refuse_special_tokens(Conversation(content, conversation.tools))
        return content

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
            rendered.append(fields)
        return self._apply(_in_parts(rendered) if self._shape[1] else rendered, tools, **kwargs)

    def _render_once(self, messages: list[Message], tools: list[dict[str, Any]] | None, **kwargs: Any) -> str:
        """Return what `_render` does, without rendering a probe alone for every row."""
        if tools or len(messages) > 1 or messages[0].get("content") not in (PROBE, OTHER_PROBE):
            return self._render(messages, tools, **kwargs)
        if messages[0].keys() != {"role", "content"}:
            return self._render(messages, tools, **kwargs)
        key = (messages[0]["role"], messages[0]["content"], *kwargs.items())
        if key not in self._probes:
            self._probes[key] = self._render(messages, tools, **kwargs)
        return self._probes[key]

    def _apply(self, messages: list[Message], tools: list[dict[str, Any]] | None, **kwargs: Any) -> str:
        day, options = (self.template_options.get(name) for name in ("date", "chat_template_kwargs"))

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
                messages, tools=tools, tokenize=False, strftime_now=strftime_now, **(options or {}), **kwargs
            )
        except WinnowError:
            raise
        except Exception as error:  # a template is a program: 1 // 0, [][0], a call of itself without end
            name = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            raise ValueError(f"chat template refuses the messages: {name}{error}") from None
        return str(text)

    def _check_rendered(self, conversation: Conversation, text: str, indices: Iterable[int], **kwargs: Any) -> None:
        """Raise ValueError for a tool, or a content, call or reasoning of `indices`, that the template does not render.

        It is left out or changed: if the rendered text stays as it was, it is no part of it. To look for it there would
        prove nothing, since a `7` may stand anywhere. The reasoning of earlier answers may be left out, as most
        templates that know it do.
        """
        messages = as_messages(conversation.content)

        def is_same(messages: list[Message], tools: list[dict[str, Any]] | None) -> bool:
            # One question and an answer of our own, which stands against each of the responses to it.
            is_probe = len(messages) == 2 and messages[1] in (_assistant(PROBE), _assistant(OTHER_PROBE))
            key = None
            if is_probe and not (tools or kwargs) and messages[0].keys() == {"role", "content"}:
                key = f"{messages[0]['role']} {messages[0]['content']}", messages[1]["content"]
                if key in self._answered_probes:
                    return self._answered_probes[key] == text
            try:
                rendered = self._render_once(messages, tools, **kwargs)
            except ValueError:  # the template misses it
                rendered = None
            if key:
                if len(self._answered_probes) == MAX_PROBES:
                    self._answered_probes.clear()
                self._answered_probes[key] = rendered
            return rendered == text

        def is_same_with(n: int, key: str, value: Any) -> bool:
            message = {name: item for name, item in messages[n].items() if name != key}
            message |= {} if value is None else {key: value}
            return is_same([*messages[:n], message, *messages[n + 1 :]], conversation.tools)

        if any(is_same(messages, tools) for tools in _each_left_out(conversation.tools or [])):
            raise ValueError("the chat template does not render tools")
        for n in indices:
            message, role, is_last = messages[n], messages[n]["role"], n == len(messages) - 1
            reasoning, thinks, answer = "", "", str(message["content"])
            if role == "assistant":
                reasoning, thinks, answer = answer.rpartition(THINK[1])
            other = OTHER_PROBE if PROBE in message["content"] else PROBE
            if answer.strip() and is_same_with(n, "content", reasoning + thinks + other):
                raise ValueError(unrendered(role))
            if role not in ROLES:
                warnings.warn(unknown_role(role), WinnowWarning, stacklevel=2)
            thought = reasoning.strip().removeprefix(THINK[0]).strip()
            if is_last and thought and is_same_with(n, "content", THINK[0] + other + thinks + answer):
                raise ValueError("the chat template does not render the reasoning of a response")
            for key in CONTENT_KEYS:
                if key in message and not (key == REASONING and self._reasoning_key and not is_last):
                    items = _each_left_out(message[key]) if isinstance(message[key], list) else [None]
                    if any(is_same_with(n, key, value) for value in items):
                        raise ValueError(f"the chat template does not render {key}")

    def _refuse_special_tokens(self, conversation: Conversation) -> None:
        """Raise ValueError if a control token is written in any text of it: it would be encoded as a control token."""
        texts = [
            (value, THINK if message["role"] == "assistant" and key in ("content", REASONING) else (), key)
            for message in as_messages(conversation.content)
            for key, item in message.items()
            for value in _strings(item)
        ]
        texts += [(value, (), "tools") for value in _strings(conversation.tools)]
        for text, allowed, key in texts:
            if self._special_beginning not in text:
                continue
            for token in self.special_tokens.values():
                if token in text and token not in allowed:
                    raise ValueError(f"special token {token} in the {'text' if key == 'content' else key}")

    def has_special_token(self, text: str) -> bool:
        """Return whether a special token is written in the text: it would be encoded as a control token."""
        return any(token in text for token in self.special_tokens.values())


def _strings(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value, the keys of its objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _each_left_out(items: list[Any]) -> list[list[Any] | None]:
    """Return a list without its first item, without its second, and so on; None for an empty one."""
    return [items[:n] + items[n + 1 :] or None for n in range(len(items))]


def _in_parts(messages: list[Message]) -> list[Message]:
    return [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _conversation(prompt: Conversation | Prompt) -> Conversation:
    return prompt if isinstance(prompt, Conversation) else Conversation(prompt)
