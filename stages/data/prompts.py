"""Stage prompts: users' texts are tokenised once, here; every later stage reads the ids."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import pyarrow as pa

from pipeline import Bound, DataPath, InputStep, StageContext, stage
from schemas import Model, Prompts, prompt_id, split_of
from schemas.tables import CANDIDATES, PROMPTS
from stages.data.files import DataSource, check_source
from stages.data.formats import columns_of, preference_reader, read_pair
from stages.data.rows import Row, imported_candidate
from stages.data.texts import Prompt, prompt_of, reply_of
from stages.limits import context_length
from stages.options import Count, HeldoutShare


def _check_prompts(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    reader, demonstration = options["reader"], options["demonstration"]
    if reader is None:
        return check_source(options, [options["prompt"], *([demonstration] if demonstration else [])])
    if demonstration not in (None, "chosen"):
        return [f"demonstration: with a reader it is the chosen response; set chosen or null (got {demonstration!r})"]
    return check_source(options, columns_of(reader))


@stage(version=3, unsharded=True, check=_check_prompts)
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
    demonstration: str | None = None,
    reader: Annotated[Bound, preference_reader] | None = None,
    heldout: HeldoutShare = 0.2,
    max_tokens: Count = 1024,
) -> Prompts:
    """Read prompts (strings or chat messages) from column `prompt`, and responses to imitate from `demonstration`.

    With a `reader`, they are the prompts of pairs in its format, and `demonstration: chosen` their chosen responses.
    A prompt is held out by hash of its id: with one `heldout` share it is in the same split in every file.
    Prompts longer than `max_tokens` or the model's context are rejected. So is a demonstration that does not fit,
    because cutting it would remove its EOS; its prompt stays.
    """
    source = DataSource(path, dataset, revision, subset, dataset_split)
    data = DataTables(tokenizer, heldout, max_tokens)
    if reader is None:
        columns = [prompt, *([demonstration] if demonstration else [])]
        groups: Iterator[tuple[str, list[Row]]] = ((location, [row]) for location, row in source.rows(ctx, columns))
    else:
        reader = preference_reader.bind(reader)
        groups = source.reader_rows(ctx, reader)

    for location, rows in groups:
        try:
            # The row's texts, in the format of its file.
            if reader is None:
                content, plain = prompt_of(rows[0], prompt), None
                response = reply_of(rows[0], demonstration, content) if demonstration else None
            else:
                pair = read_pair(reader, rows)
                content, plain = pair.prompt, pair.plain
                response = pair.chosen if demonstration else None

            # Their ids, by the rules of the model's tokenizer.
            row = data.prompt_row(content, plain)
            if response is not None:
                ids, finish_reason = data.response_ids(row["token_ids"], response, plain=plain is not None)
        except ValueError as error:
            ctx.reject(str(error), place=location, detail=repr(rows[0]))
            continue

        name = row["prompt_id"]
        if name in data.prompts_by_id:
            ctx.reject("duplicate prompt", place=location, detail=row["text"], prompt=name)
            continue
        if response is not None and finish_reason == "length":
            ctx.reject("demonstration too long", place=location, detail=response, prompt=name)
        elif response is not None:
            row |= {"demonstration": response, "demonstration_ids": ids}
        data.prompts_by_id[name] = row
    return data.tables()[0]


class DataTables:
    """Prompts and responses of a user's file as rows with token ids, each once, however many rows it occurs in.

    The ids keep to the limits of a step and of the model's context. Methods raise ValueError with the reason to
    reject a row of the file.
    """

    def __init__(self, model: Model, heldout: float, max_tokens: int) -> None:
        from stages.data.tokenizer import Tokenizer

        self.tokenizer = Tokenizer(model)
        self.context = context_length(model.folder)
        self.heldout, self.max_tokens = heldout, max_tokens
        self.prompts_by_id: dict[str, Row] = {}
        self.candidates_by_id: dict[str, Row] = {}
        self.counts: Counter[str] = Counter()  # responses per prompt

    def prompt_row(self, content: Prompt, plain: str | None = None) -> Row:
        """Return the row of a prompt, without a demonstration. plain: for a tokenizer without chat template."""
        from stages.data.tokenizer import readable

        ids = self.tokenizer.prompt_ids(content, plain)
        if len(ids) > min(self.max_tokens, self.context - 1):  # room for one token of a response
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

    def response_ids(self, prompt_ids: list[int], text: str, *, plain: bool = False) -> tuple[list[int], str]:
        """Return (ids, finish_reason), cut to max_tokens and to what the model has room for after the prompt."""
        limit = min(self.max_tokens, self.context - len(prompt_ids))
        return self.tokenizer.response_ids(text, limit, plain=plain)

    def add_prompt(self, content: Prompt, plain: str | None = None) -> str:
        """Add a prompt unless it is there already; return its id."""
        row = self.prompt_row(content, plain)
        self.prompts_by_id.setdefault(row["prompt_id"], row)
        return str(row["prompt_id"])

    def add_response(self, prompt: str, text: str, *, repeated: bool = False, plain: bool = False) -> str:
        """Add a response to the prompt of this id; return the candidate's id.

        Equal texts of a prompt are one candidate, unless `repeated` makes each its own, as draws of a policy are.
        """
        ids, finish_reason = self.response_ids(self.prompts_by_id[prompt]["token_ids"], text, plain=plain)
        used_ids = self.candidates_by_id if repeated else ()
        row = imported_candidate(prompt, ids, text, used_ids, k=self.counts[prompt], finish_reason=finish_reason)
        if row["candidate_id"] not in self.candidates_by_id:
            self.candidates_by_id[row["candidate_id"]] = row
            self.counts[prompt] += 1
        return str(row["candidate_id"])

    def tables(self) -> tuple[pa.Table, pa.Table]:
        """Return the tables `prompts` and `candidates`."""
        prompts = sorted(self.prompts_by_id.values(), key=lambda row: row["prompt_id"])
        candidates = sorted(self.candidates_by_id.values(), key=lambda row: (row["prompt_id"], row["k"]))
        return pa.Table.from_pylist(prompts, PROMPTS), pa.Table.from_pylist(candidates, CANDIDATES)
