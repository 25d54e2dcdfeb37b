"""Room 1: prompts, from text to ids, once and for all."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Annotated, Any

import pyarrow as pa

from pipeline import Bound, DataPath, InputStep, Range, StageContext, stage
from schemas import Model, Prompts, prompt_id, split_of
from schemas.tables import PROMPTS
from stages.data.files import Prompt, Row, Source, prompt_of, reply_of
from stages.data.formats import check_source, columns_of, preference_reader, read, read_columns
from stages.limits import context_length

Share = Annotated[float, Range(ge=0, lt=1)]
Rows = Iterator[tuple[str, list[Row]]]  # the place of the first, and all that are read at once
PromptGroup = tuple[Prompt, str | None, str]  # the prompt, its plain form, and a demonstration
Ask = Callable[..., PromptGroup]


def _check(options: dict[str, Any], wired: Mapping[str, InputStep]) -> list[str]:
    reader, shown = options["reader"], options["demonstration"]
    if reader is not None and shown not in (None, "chosen"):
        return [f"demonstration: with a reader it is the chosen reply; set it to chosen, or to null (got {shown!r})"]
    return check_source(options, columns_of(reader) if reader else _columns(options["prompt"], shown))


@stage(version=3, unsharded=True, check=_check)
def prompts(
    tokenizer: Model,
    ctx: StageContext,
    *,
    path: DataPath | None = None,
    dataset: str | None = None,
    revision: str | None = None,
    subset: str | None = None,
    part: str = "train",
    prompt: str = "prompt",
    demonstration: str | None = None,
    reader: Annotated[Bound, preference_reader] | None = None,
    heldout: Share = 0.2,
    max_tokens: Annotated[int, Range(gt=0)] = 1024,
) -> Prompts:
    """Read prompts (strings or chat messages) from column `prompt`, and responses to imitate from `demonstration`.

    With a `reader`, they are the prompts of pairs in its format, and `demonstration: chosen` their chosen replies.
    A prompt is held out by hash of its id: with one `heldout` share it is on the same side in every file.
    Prompts longer than `max_tokens` or the model's context are left out. So is a demonstration that does not fit, for
    cut it would have no EOS; its prompt stays.
    """
    from stages.data.tokenizer import Tokenizer

    entry = PromptReader(Tokenizer(tokenizer), ctx, heldout, max_tokens)
    source = Source(path, dataset, revision, subset, part)
    if reader is None:
        rows: Rows = ((place, [row]) for place, row in read_columns(ctx, source, _columns(prompt, demonstration)))
        ask: Ask = partial(_ask_columns, prompt=prompt, demonstration=demonstration)
    else:
        form = preference_reader.bind(reader)
        rows, ask = read(ctx, source, form), partial(_ask_reader, form, demonstration)
    found = (entry.read(place, group, ask) for place, group in rows)
    made = sorted(filter(None, found), key=lambda row: row["prompt_id"])
    return pa.Table.from_pylist(made, schema=PROMPTS)


def _columns(prompt: str, demonstration: str | None) -> list[str]:
    return [prompt, *([demonstration] if demonstration else [])]


def _ask_columns(row: Row, *, prompt: str, demonstration: str | None) -> PromptGroup:
    content = prompt_of(row, prompt)
    return content, None, reply_of(row, demonstration, content) if demonstration else ""


def _ask_reader(reader: Bound, demonstration: str | None, *rows: Row) -> PromptGroup:
    made = reader(*rows)
    return made.prompt, made.plain, made.chosen if demonstration else ""


class PromptReader:
    """Rows of somebody's file to a row of `prompts`, or to the rejects."""

    def __init__(self, tokenizer: Any, ctx: StageContext, heldout: float, max_tokens: int) -> None:
        self.tokenizer, self.ctx, self.heldout, self.max_tokens = tokenizer, ctx, heldout, max_tokens
        self.context = context_length(tokenizer.folder)
        self.seen: set[str] = set()

    def read(self, place: str, rows: list[Row], ask: Ask) -> dict[str, Any] | None:
        try:
            content, plain, text = ask(*rows)
            made = self.prompt_row(content, plain)
            ids, finish = self.response_ids(made["token_ids"], text, plain=plain is not None)
        except ValueError as error:
            self.ctx.reject(str(error), place=place, detail=repr(rows[0]))
            return None
        if made["prompt_id"] in self.seen:
            self.ctx.reject("duplicate prompt", place=place, detail=made["text"], prompt=made["prompt_id"])
            return None
        self.seen.add(made["prompt_id"])
        if finish == "length":
            self.ctx.reject("demonstration too long", place=place, detail=text, prompt=made["prompt_id"])
        elif text:
            made |= {"demonstration": text, "demonstration_ids": ids}
        return made

    def response_ids(self, prompt: list[int], text: str, *, plain: bool = False) -> tuple[list[int], str]:
        """Cut to max_tokens, and to what the model has room for after the prompt."""
        most = min(self.max_tokens, self.context - len(prompt))
        made: tuple[list[int], str] = self.tokenizer.response_ids(text, most, plain=plain)
        return made

    def prompt_row(self, content: Prompt, plain: str | None = None) -> dict[str, Any]:
        """`plain` is read where there is no chat template. Raises ValueError with the reason to leave the row out."""
        from stages.data.tokenizer import readable

        ids = self.tokenizer.prompt_ids(content, plain)
        if len(ids) > min(self.max_tokens, self.context - 1):
            raise ValueError("prompt too long")
        name = prompt_id(content)
        return {
            "prompt_id": name,
            "text": readable(content),
            "token_ids": ids,
            "split": split_of(name, self.heldout),
            "demonstration": None,
            "demonstration_ids": None,
        }
