"""Stage preferences: pairs of human preference data as pairs of ids, with the prompts and responses they consist of."""

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any

import pyarrow as pa

from pipeline import Bound, DataPath, InputStep, Range, StageContext, stage
from schemas import Candidates, Model, Pairs, Prompts, candidate_id
from schemas.tables import CANDIDATES, PAIRS, PROMPTS
from stages.data.files import DataSource, Prompt
from stages.data.formats import check_source, columns_of, preference_reader, read_with
from stages.data.prompts import DataEncoder, HeldoutShare
from stages.data.rows import Row


def _check_preferences(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    return check_source(options, columns_of(options["reader"]))


@stage(version=2, unsharded=True, check=_check_preferences)
def preferences(
    tokenizer: Model,
    ctx: StageContext,
    *,
    path: DataPath | None = None,
    dataset: str | None = None,
    revision: str | None = None,
    subset: str | None = None,
    dataset_split: str = "train",
    reader: Annotated[Bound, preference_reader] = "columns",  # type: ignore[assignment]
    heldout: HeldoutShare = 0.2,
    max_tokens: Annotated[int, Range(gt=0)] = 1024,
) -> tuple[Prompts, Candidates, Pairs]:
    """Read pairs in the format that `reader` names (stages/data/formats.py); a prompt may have several pairs.

    `subset` is a configuration of the data set, or a folder in it. Rows that are no pair are rejected with a reason.
    """
    reader = preference_reader.bind(reader)
    responses = ResponseTable(DataEncoder(tokenizer, heldout, max_tokens))
    pairs: list[Row] = []
    for location, rows in read_with(ctx, DataSource(path, dataset, revision, subset, dataset_split), reader):
        try:
            pair = reader(*rows)
            prompt = responses.add_prompt(pair.prompt, pair.plain)
            chosen, rejected = (
                responses.add_response(prompt, text, plain=pair.plain is not None)
                for text in (pair.chosen, pair.rejected)
            )
        except ValueError as error:
            ctx.reject(str(error), place=location, detail=repr(rows[0]))
            continue
        if chosen == rejected:
            ctx.reject("identical responses", place=location, detail=pair.chosen, prompt=prompt, candidate=chosen)
            continue
        pairs.append(dict(prompt_id=prompt, chosen_id=chosen, rejected_id=rejected, gap=None, weight=1.0, rule="label"))
    pairs.sort(key=lambda row: (row["prompt_id"], row["chosen_id"], row["rejected_id"]))
    return *responses.tables(), pa.Table.from_pylist(pairs, schema=PAIRS)


class ResponseTable:
    """Prompts and responses of a user's file, each once, however many rows of it they occur in."""

    def __init__(self, encoder: DataEncoder) -> None:
        self.encoder = encoder
        self.prompts_by_id: dict[str, Row] = {}
        self.candidates_by_id: dict[str, Row] = {}
        self.counts: Counter[str] = Counter()  # responses per prompt

    def add_prompt(self, content: Prompt, plain: str | None = None) -> str:
        """Return the id of the prompt; raise ValueError with the reason to reject the row."""
        row = self.encoder.prompt_row(content, plain)
        name: str = row["prompt_id"]
        self.prompts_by_id.setdefault(name, row)
        return name

    def add_response(self, prompt: str, text: str, *, repeated: bool = False, plain: bool = False) -> str:
        """Return the id of the candidate; raise ValueError with the reason to reject the row.

        Equal texts of a prompt are one candidate, unless `repeated` makes each its own, as draws of a policy are.
        """
        ids, finish_reason = self.encoder.response_ids(self.prompts_by_id[prompt]["token_ids"], text, plain=plain)
        copy = 0
        while repeated and candidate_id(prompt, ids, copy) in self.candidates_by_id:
            copy += 1
        name = candidate_id(prompt, ids, copy)
        if name not in self.candidates_by_id:
            self.candidates_by_id[name] = {
                "prompt_id": prompt,
                "candidate_id": name,
                "k": self.counts[prompt],
                "token_ids": ids,
                "text": text,
                "logp": None,
                "logp_kind": "none",
                "n_tokens": len(ids),
                "finish_reason": finish_reason,
                "seed": None,
            }
            self.counts[prompt] += 1
        return name

    def tables(self) -> tuple[pa.Table, pa.Table]:
        """Return the tables `prompts` and `candidates`."""
        prompts = sorted(self.prompts_by_id.values(), key=lambda row: row["prompt_id"])
        candidates = sorted(self.candidates_by_id.values(), key=lambda row: (row["prompt_id"], row["k"]))
        return pa.Table.from_pylist(prompts, PROMPTS), pa.Table.from_pylist(candidates, CANDIDATES)
