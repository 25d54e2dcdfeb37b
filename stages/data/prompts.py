"""Stage prompts: users' texts are tokenised once, here; every later stage reads the ids."""

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Any

import numpy as np
import pyarrow as pa

from pipeline import Bound, DataPath, InputStep, StageContext, stage
from pipeline.costs import Cost
from schemas import Model, Prompts, WinnowError, WinnowWarning, prompt_id, split_of
from schemas.tables import CANDIDATES, PROMPTS
from stages.data.chat_templates import planned_chat_template
from stages.data.files import DataSource, check_no_columns, check_reader, check_source
from stages.data.first_rows import pair_problems, prompt_problems, response_problems
from stages.data.formats import PreferencePair, first_pairs, preference_reader
from stages.data.rows import Row, imported_candidate, in_order_of_prompts
from stages.data.texts import (
    CHANGED,
    CHANGED_CURE,
    NO_USER,
    PREFILLED,
    PREFILLED_CURE,
    SYSTEM_ROLES,
    ChangedPromptError,
    Conversation,
    CurableError,
    Prompt,
    Reply,
    kept_fields,
    messages_of,
    prompt_with,
    readable,
    readable_reply,
    reject_detail,
    reply_json,
    reply_of,
    tools_of,
    with_system_prompt,
    without_answer,
    words_of_user,
)
from stages.limits import context_length
from stages.options import Count, HeldoutShareOrAll, PrefillOrOmit, TooLong, ValidationShare, share_problems
from stages.work import prompts_work

ROWS_AT_ONCE = 4096  # that are turned into columns
BATCH = 1024  # rows of a file whose texts are tokenised together


def _column_problems(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    reader, demonstration = options["reader"], options["demonstration"]
    if demonstration is not None and demonstration == options["prompt"] and options["prefill"] != "omit":
        return [
            f"demonstration: {demonstration!r} is the column of the prompt; "
            "set `prefill: omit` if the demonstration is the last turn there"
        ]
    if reader is None:
        columns = [options[name] for name in ("prompt", "demonstration", "system", "input") if options[name]]
        return check_system_prompt(options, inputs) + check_source(options, [*columns, *options["keep"]])
    if options["keep"]:
        return ["keep: with a `reader`, rows are read by its own columns alone; unset it"]
    if others := check_no_columns(options, prompt="prompt", system=None, input=None):
        return others
    if demonstration not in (None, "chosen"):
        return [f"demonstration: with a reader it is the chosen response; set chosen or null (got {demonstration!r})"]
    return check_system_prompt(options, inputs) + check_reader(options)


def _demonstration_problems(options: Mapping[str, Any]) -> list[str]:
    """Return why all demonstrations of a file would be rejected, by its first rows. Warn if some of them would be."""
    demonstration, prompt = options["demonstration"], options["prompt"]
    if demonstration is None:
        return []

    def read(rows: Iterator[tuple[str, Row]]) -> Iterator[tuple[str, ValueError | None]]:
        for location, row in rows:
            try:
                content = prompt_with(row, prompt, system=options["system"], input=options["input"])
                content = without_answer(content) if options["prefill"] == "omit" else content
            except ValueError:  # `prompt_problems` counts it
                continue
            try:
                _demonstration_of(row, demonstration, prompt, content)
            except ValueError as error:
                yield location, error
            else:
                yield location, None

    return response_problems(options, read, called="demonstrations")


def _demonstration_of(row: Row, demonstration: str, prompt: str, content: Prompt) -> Reply:
    """Return the demonstration of a row to a prompt of this content; raise ValueError with the reason to reject it."""
    if demonstration != prompt:
        return reply_of(row, demonstration, content)
    last = messages_of(row, prompt)[-1:]
    if last[0]["role"] != "assistant":
        raise ValueError(f"{prompt} does not end with an assistant turn, which is the demonstration")
    return reply_of({prompt: last}, prompt)


def check_system_prompt(options: Mapping[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    """Return at plan time why a `system_prompt` would be in no prompt: it is empty, or there is no chat template."""
    text = options["system_prompt"]
    if text is None:
        return []
    if not text.strip():
        return ["system_prompt: an empty one adds nothing; unset it"]
    if "tokenizer" in inputs and planned_chat_template(inputs["tokenizer"]) == "":
        return [
            "system_prompt: the tokenizer has no chat template to render it; set `chat_template` of its step of stage "
            "`model` to a Jinja file, or unset it"
        ]
    return []


# The id of a prompt is of its content, wherever that was read.
@stage(
    version=8,
    unsharded=True,
    check=lambda options, inputs: (
        share_problems(options)
        + (
            _column_problems(options, inputs)
            or prompt_problems(options, inputs, answered=options["demonstration"] is not None)
            or (
                pair_problems(options, compared=False)
                if options["reader"] is not None
                else _demonstration_problems(options)
            )
        )
    ),
    cost=Cost(work=prompts_work),
    which_rows=(
        "path",
        "dataset",
        "revision",
        "subset",
        "dataset_split",
        "prompt",
        "system",
        "input",
        "demonstration",
        "keep",
        "heldout",
        "validation",
        "max_tokens",
    ),
)
def prompts(
    tokenizer: Model,
    ctx: StageContext,
    *,
    path: DataPath | None = None,
    dataset: str | None = None,
    revision: str | None = None,
    subset: str | None = None,
    dataset_split: str = "train",
    prompt: str = "prompt",
    system: str | None = None,
    system_prompt: str | None = None,
    input: str | None = None,
    demonstration: str | None = None,
    keep: list[str] = [],  # noqa: B006
    reader: Annotated[Bound, preference_reader] | None = None,
    heldout: HeldoutShareOrAll = 0.2,
    validation: ValidationShare = 0.0,
    max_tokens: Count = 1024,
    prefill: PrefillOrOmit = "reject",
) -> Prompts:
    """Read prompts (strings or chat messages) from column `prompt`, and responses to imitate from `demonstration`.

    The text in column `input` follows the prompt on a new line, as in Alpaca's format, and that in `system` becomes its
    system message; empty ones add nothing. `system_prompt` is the text of a system message for prompts that have none;
    it does not decide whether a prompt is held out. With a `reader`, prompts are those of pairs in its format, and
    `demonstration: chosen` their chosen responses. A column `tools` holds the JSON schemas of tools that may be called.
    Columns in `keep` stay with the prompt, as text or JSON, for programs that score responses by them, such as
    `math_answer`; a row without one of them is rejected.
    A prompt is held out by hash of what users say in it: with one `heldout` share it is in the same split in every
    file, and so is a copy of it in another case or spacing, or under another system prompt; 1 holds out all prompts of
    a file. `validation` is the share that is held out apart, in the same way, for evaluations during training: what
    chooses a policy is then not what judges it.

    Ids are what the tokenizer's chat template says. What it does not render (a role, a tool call) is rejected, and so
    are prompts longer than `max_tokens` or the model's context, and prompts that end with an assistant turn, unless
    `prefill: continue` lets the response continue it or `prefill: omit` leaves it out. With `demonstration` the column
    of `prompt`, as in data for SFT (`messages`), what is left out is the demonstration. Of a prompt that it renders
    differently once an answer follows, the ids are those that ask for one: a response that is drawn follows them, a
    demonstration would not, and is rejected. A demonstration that cannot be kept is rejected, because cutting it would
    remove its end, and so is one that is missing; its prompt stays.
    """
    source = DataSource(path, dataset, revision, subset, dataset_split)
    data = DataTables(
        tokenizer, heldout, max_tokens, validation=validation, prefill=prefill, system_prompt=system_prompt,
        answered=False,
    )  # fmt: skip
    results: Iterator[tuple[str, Row, PreferencePair | ValueError | None]]
    if reader is None:
        columns = [name for name in (prompt, demonstration, system, input, *keep) if name]
        results = ((location, row, None) for location, row in source.rows(ctx, columns))
    else:
        results = source.reader_results(ctx, preference_reader.bind(reader), first_pairs)

    # Rows as columns, some thousand at a time: as Python's own objects they would take five times the memory.
    tables, rows, seen = [PROMPTS.empty_table()], list[Row](), set[str]()
    undemonstrated: dict[str, Row] = {}  # by id of a prompt whose demonstration was rejected
    for location, source_row, pair in results:
        try:
            # The row's texts, in the format of its file.
            if isinstance(pair, ValueError):
                raise pair
            if pair is None:
                content, plain = prompt_with(source_row, prompt, system=system, input=input), None
            else:
                content, plain = pair.prompt, pair.plain
            if prefill == "omit":
                content = without_answer(content)

            # Their ids, by the rules of the model's tokenizer.
            tools = pair.tools if pair and pair.tools else tools_of(source_row)
            conversation = Conversation(content, tools, plain)
            row = data.prompt_row(conversation) | {"fields": kept_fields(source_row, keep)}
        except ValueError as error:
            ctx.reject(str(error), place=location, detail=reject_detail(error, source_row))
            continue
        name = row["prompt_id"]
        if name in seen:
            ctx.reject("duplicate prompt", place=location, detail=row["text"], prompt=name)
            continue
        if demonstration:
            text = None
            try:
                response = pair.chosen if pair else _demonstration_of(source_row, demonstration, prompt, content)
                text = readable_reply(response)
                ids, mask, finish_reason = data.response_ids(conversation, row["token_ids"], response)
                if mask is not None:
                    raise ValueError("demonstration of several turns, of which all would be imitated")
                if finish_reason == "length":
                    raise ValueError("demonstration too long")
                row |= {"demonstration": text, "demonstration_ids": ids}
            except ValueError as error:
                detail = reject_detail(error, source_row) if text is None else text
                ctx.reject(str(error), place=location, detail=detail, prompt=name)
                undemonstrated.setdefault(name, row)  # unless a later row of this prompt has one that can be kept
                continue
            undemonstrated.pop(name, None)
        seen.add(name)
        rows.append(row)
        if len(rows) == ROWS_AT_ONCE:
            tables.append(pa.Table.from_pylist(rows, PROMPTS))
            rows.clear()
    tables.append(pa.Table.from_pylist([*rows, *undemonstrated.values()], PROMPTS))
    seen |= undemonstrated.keys()
    if changed := len(seen & data.changed):
        message = (
            f"{CHANGED}, for {changed} of {len(seen)} prompts: their ids are those that ask for an answer, after which "
            f"responses are drawn, and trained on{'; their demonstrations are rejected' if demonstration else ''}. If "
            f"that is not as meant, {CHANGED_CURE}"
        )
        warnings.warn(message, WinnowWarning, stacklevel=2)
    return in_order_of_prompts(pa.concat_tables(tables))


def chat_json(content: Prompt, tools: list[dict[str, Any]] | None) -> str:
    """Return chat messages and tools as the JSON of the column `chat`."""
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    return json.dumps({"messages": messages, "tools": tools}, ensure_ascii=False)


@dataclass(frozen=True)
class RenderedResponse:
    """Response that was rendered and checked. Its ids, and those of what is before it, are yet to be computed.

    prompt: row of its prompt. text: what to tokenise, of prompt and response together without the first `skipped` ids.
    turns: ids and mask of a response of several turns, which has no such text. is_cut: the text ends before the reply's
    own end, behind all the ids that there is room for.
    """

    prompt: Row
    reply: Reply
    text: str = ""
    skipped: int = 0
    turns: tuple[list[int], list[bool]] | None = None
    is_cut: bool = False


@dataclass
class SourceRow:
    """Row of a file with what was read of it, or why it is rejected, and the rejects of lines before it."""

    location: str
    row: Any
    error: ValueError | None = None
    prompt: str = ""
    responses: list[RenderedResponse] = field(default_factory=list)
    value: Any = None  # what else its stage reads of it
    rejects_before: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


class LateRejects:
    """Rejects of a file's reader, kept until the rows before them are tokenised: they stand in the file's order."""

    def __init__(self) -> None:
        self._rejects: list[tuple[str, dict[str, Any]]] = []

    def reject(self, reason: str, **where: Any) -> None:
        self._rejects.append((reason, where))

    def take(self) -> list[tuple[str, dict[str, Any]]]:
        """Return those since the last call."""
        rejects, self._rejects = self._rejects, []
        return rejects


class DataTables:
    """Prompts and responses of a user's file as rows with token ids, each once, however many rows it occurs in.

    The ids keep to the limits of a step and of the model's context. answered: the responses are those of the file. If
    not, they will be drawn after the prompt's ids, whatever the template renders once an answer follows. Methods raise
    ValueError with the reason to reject a row of the file.
    """

    def __init__(
        self,
        model: Model,
        heldout: float,
        max_tokens: int,
        *,
        validation: float = 0.0,
        too_long: TooLong = "reject",
        prefill: PrefillOrOmit = "reject",
        system_prompt: str | None = None,
        answered: bool = True,
    ) -> None:
        from stages.data.tokenizer import PROBE, Tokenizer

        self.tokenizer = Tokenizer(model)
        self.answered = answered
        self.changed: set[str] = set()  # ids of prompts that the template renders differently once an answer follows
        self.system_prompt = system_prompt
        if system_prompt is not None:
            try:  # here: else every row would be rejected
                self._prompt_ids(with_system_prompt(Conversation(PROBE), system_prompt))
            except ValueError as error:
                raise WinnowError(
                    f"system_prompt: it cannot be read ({error}); unset it, or set `chat_template` of the tokenizer's "
                    "step of stage `model` to a template with system messages"
                ) from None
        self.context = context_length(model.folder)
        self.heldout, self.validation = heldout, validation
        self.max_tokens, self.too_long, self.prefill = max_tokens, too_long, prefill
        # A text of more characters is too long without being tokenised, which takes a second and 100 MB per million.
        # Four for each that a token can stand for: a normaliser may leave some out.
        self.max_characters = 4 * self.tokenizer.longest_token * min(max_tokens, self.context)
        self.prompts_by_id: dict[str, Row] = {}
        self.rows_by_content: dict[tuple[str, str | None], Row] = {}  # by id of the file's prompt, and its plain form
        self.split_points: dict[tuple[str, str | None], tuple[str, int]] = {}  # of these prompts
        self.candidates_by_id: dict[str, Row] = {}
        self.counts: Counter[str] = Counter()  # responses per prompt

    def prompt_row(self, conversation: Conversation) -> Row:
        """Return the row of a prompt, without a demonstration."""
        # By what users say: a question is no test where it is trained on under another system prompt.
        split = split_of(words_of_user(conversation.content), self.heldout, self.validation)
        conversation = with_system_prompt(conversation, self.system_prompt)
        content, tools = conversation.content, conversation.tools
        if len(readable(content, tools)) > self.max_characters:
            raise ValueError("prompt too long")
        if not isinstance(content, str) and content[-1]["role"] == "assistant" and self.prefill != "continue":
            raise CurableError(PREFILLED, PREFILLED_CURE)
        ids, is_changed = self._prompt_ids(conversation)
        if len(ids) > min(self.max_tokens, self.context - 1):  # room for one token of a response
            raise ValueError("prompt too long")
        if not isinstance(content, str) and all(message["role"] in SYSTEM_ROLES for message in content):
            warnings.warn(NO_USER, WinnowWarning, stacklevel=2)
        name = prompt_id(content, tools)
        if is_changed:
            self.changed.add(name)
        return {
            "prompt_id": name,
            "text": readable(content, tools),
            "chat": None if isinstance(content, str) and not tools else chat_json(content, tools),
            "token_ids": ids,
            "rendered": self.tokenizer.rendered(ids),
            "split": split,
            "demonstration": None,
            "demonstration_ids": None,
        }

    def _prompt_ids(self, conversation: Conversation) -> tuple[list[int], bool]:
        """Return a prompt's ids, and whether the template renders it differently once an answer follows."""
        try:
            return self.tokenizer.prompt_ids(conversation), False
        except ChangedPromptError as error:
            if self.answered:
                raise
            return list(error.ids), True

    def response_ids(
        self, conversation: Conversation, prompt_ids: list[int], reply: Reply
    ) -> tuple[list[int], list[bool] | None, str]:
        """Return ids, mask (None for one turn) and "stop", or what fits and "length".

        Room is for max_tokens, and for what the context leaves.
        """
        if len(readable_reply(reply)) > self.max_characters:
            raise ValueError("response too long")
        conversation, mask = with_system_prompt(conversation, self.system_prompt), None
        if isinstance(reply, list):
            ids, mask = self.tokenizer.turns_ids(conversation, reply)
        else:
            ids = self.tokenizer.response_ids(conversation, reply, prompt_ids)
        return self._cut(ids, mask, prompt_ids)

    def _cut(
        self, ids: list[int], mask: list[bool] | None, prompt_ids: list[int]
    ) -> tuple[list[int], list[bool] | None, str]:
        limit = min(self.max_tokens, self.context - len(prompt_ids))
        return (ids, mask, "stop") if len(ids) <= limit else (ids[:limit], mask and mask[:limit], "length")

    def add_prompt(self, conversation: Conversation) -> str:
        """Add a prompt unless it is there already; return its id.

        It is rendered and tokenised once, however many rows of the file have it, in whatever order.
        """
        key = self._key_of(conversation)
        if (row := self.rows_by_content.get(key)) is None:
            row = self.rows_by_content[key] = self.prompt_row(conversation)
            self.prompts_by_id.setdefault(row["prompt_id"], row)
        return str(row["prompt_id"])

    def _key_of(self, conversation: Conversation) -> tuple[str, str | None]:
        return prompt_id(conversation.content, conversation.tools), conversation.plain

    def render_response(self, conversation: Conversation, reply: Reply) -> RenderedResponse:
        """Return a response to a prompt that was added, rendered by the chat template and checked."""
        is_cut = len(readable_reply(reply)) > self.max_characters
        if is_cut and (self.too_long == "reject" or not isinstance(reply, str)):
            raise ValueError("response too long")
        key = self._key_of(conversation)
        prompt, conversation = self.rows_by_content[key], with_system_prompt(conversation, self.system_prompt)
        if isinstance(reply, list):
            return RenderedResponse(prompt, reply, turns=self.tokenizer.turns_ids(conversation, reply))
        beginning = reply[: self.max_characters] if isinstance(reply, str) else reply
        text = self.tokenizer.response_text(conversation, beginning)
        if key not in self.split_points:
            self.split_points[key] = self.tokenizer.split_point(conversation, prompt["token_ids"])
        before, skipped = self.split_points[key]
        if not text.startswith(before):
            before, skipped = "", 0
        return RenderedResponse(prompt, reply, text[len(before) :], skipped, is_cut=is_cut)

    def add_response(self, response: RenderedResponse, ids: list[int], *, repeated: bool = False) -> str:
        """Add a response with the ids of its text; return the candidate's id.

        Equal texts of a prompt are one candidate, unless `repeated` makes each its own, as draws of a policy are.
        """
        prompt, prompt_ids = str(response.prompt["prompt_id"]), response.prompt["token_ids"]
        mask = None
        if response.turns:
            ids, mask = response.turns
        else:
            ids = self.tokenizer.response_ids_of([*prompt_ids[: response.skipped], *ids], prompt_ids)
        ids, mask, finish_reason = self._cut(ids, mask, prompt_ids)
        if finish_reason == "length" and self.too_long == "reject":
            raise ValueError("response too long")
        if response.is_cut and finish_reason != "length":  # a normaliser left out almost all of it
            raise ValueError("response too long")
        used_ids = self.candidates_by_id if repeated else ()
        text = readable_reply(response.reply)
        row = imported_candidate(
            prompt, ids, text, used_ids, k=self.counts[prompt], finish_reason=finish_reason, mask=mask,
            chat=reply_json(response.reply),
        )  # fmt: skip
        earlier_row = self.candidates_by_id.get(row["candidate_id"])
        if earlier_row is None:
            row["token_ids"] = np.array(ids, np.int32)  # an eighth of the memory of a list
            self.candidates_by_id[row["candidate_id"]] = row
            self.counts[prompt] += 1
        elif earlier_row["mask"] != mask:  # turns that a template renders alike, whoever takes them
            raise ValueError("its ids are those of another response, in which the assistant wrote others of them")
        return str(row["candidate_id"])

    def with_ids(self, rows: Iterable[SourceRow]) -> Iterator[tuple[SourceRow, list[list[int]]]]:
        """Yield rows with the ids of their responses' texts: while a batch is tokenised, the next one is rendered."""

        def encode(batch: list[SourceRow]) -> list[list[int]]:
            return self.tokenizer.encode_all([response.text for row in batch for response in row.responses])

        def joined(batch: list[SourceRow], ids: list[list[int]]) -> Iterator[tuple[SourceRow, list[list[int]]]]:
            remaining = iter(ids)
            return ((row, list(islice(remaining, len(row.responses)))) for row in batch)

        rows, before = iter(rows), None
        with ThreadPoolExecutor(1) as pool:
            while batch := list(islice(rows, BATCH)):
                ids = pool.submit(encode, batch)
                if before:
                    yield from joined(before[0], before[1].result())
                before = batch, ids
            if before:
                yield from joined(before[0], before[1].result())

    def tables(self) -> tuple[pa.Table, pa.Table]:
        """Return the tables `prompts` and `candidates`."""
        prompts = sorted(self.prompts_by_id.values(), key=lambda row: row["prompt_id"])
        candidates = sorted(self.candidates_by_id.values(), key=lambda row: (row["prompt_id"], row["k"]))
        return pa.Table.from_pylist(prompts, PROMPTS), pa.Table.from_pylist(candidates, CANDIDATES)
