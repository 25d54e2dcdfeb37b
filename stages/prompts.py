"""Room 1: prompts, from text to ids, once and for all."""

from typing import Annotated, Any

import pyarrow as pa

from pipeline import DataPath, Range, Workspace, stage
from schemas import Model, Prompts, prompt_id, split_of
from schemas.tables import PROMPTS
from stages.limits import context_length
from stages.sources import one_source, prompt_of, read_rows, text_of

Share = Annotated[float, Range(ge=0, lt=1)]


@stage(version=2, whole=True, check=one_source)
def prompts(
    tokenizer: Model,
    ws: Workspace,
    *,
    path: DataPath | None = None,
    dataset: str | None = None,
    revision: str | None = None,
    part: str = "train",
    prompt: str = "prompt",
    demonstration: str | None = None,
    heldout: Share = 0.2,
    max_tokens: Annotated[int, Range(gt=0)] = 1024,
) -> Prompts:
    """Read prompts (strings or chat messages) from column `prompt`, and responses to imitate from `demonstration`.

    A prompt is held out by hash of its id: with one `heldout` share it is on the same side in every file.
    Prompts longer than `max_tokens` or the model's context are left out. So is a demonstration that does not fit, for
    cut it would have no EOS; its prompt stays.
    """
    from stages.text import Tokenizer

    entry = PromptReader(Tokenizer(tokenizer), ws, heldout, max_tokens)
    columns = [prompt, *([demonstration] if demonstration else [])]
    rows: list[dict[str, Any]] = []
    for place, row in read_rows(ws, path, dataset, revision, part, columns):
        made = entry.read(place, row, prompt, demonstration)
        if made:
            rows.append(made)
    return pa.Table.from_pylist(sorted(rows, key=lambda row: row["prompt_id"]), schema=PROMPTS)


class PromptReader:
    """One row of somebody's file to one row of `prompts`, or to the rejects."""

    def __init__(self, tokenizer: Any, ws: Workspace, heldout: float, max_tokens: int) -> None:
        self.tokenizer, self.ws, self.heldout, self.max_tokens = tokenizer, ws, heldout, max_tokens
        self.context = context_length(tokenizer.folder)
        self.seen: set[str] = set()

    def read(self, place: str, row: dict[str, Any], column: str, demonstration: str | None) -> dict[str, Any] | None:
        try:
            made = self.prompt_row(row, column)
            text = text_of(row, demonstration) if demonstration else ""
            ids, finish = self.response_ids(made["token_ids"], text)
        except ValueError as error:
            self.ws.reject(str(error), place=place, detail=repr(row.get(column)))
            return None
        if made["prompt_id"] in self.seen:
            self.ws.reject("duplicate prompt", place=place, detail=made["text"], prompt=made["prompt_id"])
            return None
        self.seen.add(made["prompt_id"])
        if finish == "length":
            self.ws.reject("demonstration too long", place=place, detail=text, prompt=made["prompt_id"])
        elif text:
            made |= {"demonstration": text, "demonstration_ids": ids}
        return made

    def response_ids(self, prompt: list[int], text: str) -> tuple[list[int], str]:
        """Cut to max_tokens, and to what the model has room for after the prompt."""
        made: tuple[list[int], str] = self.tokenizer.response_ids(
            text, min(self.max_tokens, self.context - len(prompt))
        )
        return made

    def prompt_row(self, row: dict[str, Any], column: str) -> dict[str, Any]:
        """Raises ValueError with the reason to leave the row out."""
        from stages.text import readable

        content = prompt_of(row, column)
        ids = self.tokenizer.prompt_ids(content)
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
