"""Human preference pairs: they enter the pipeline as pairs of ids, beside the prompts and responses they came with."""

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any

import pyarrow as pa

from pipeline import Bound, DataPath, InputStep, Range, StageContext, stage
from schemas import Candidates, Model, Pairs, Prompts, candidate_id
from schemas.tables import CANDIDATES, PAIRS, PROMPTS
from stages.data.files import Prompt, Source
from stages.data.formats import check_source, columns_of, preference_reader, read
from stages.data.prompts import PromptReader, Share


def _check(options: dict[str, Any], wired: Mapping[str, InputStep]) -> list[str]:
    return check_source(options, columns_of(options["reader"]))


@stage(version=2, unsharded=True, check=_check)
def preferences(
    tokenizer: Model,
    ctx: StageContext,
    *,
    path: DataPath | None = None,
    dataset: str | None = None,
    revision: str | None = None,
    subset: str | None = None,
    part: str = "train",
    reader: Annotated[Bound, preference_reader] = "columns",  # type: ignore[assignment]
    heldout: Share = 0.2,
    max_tokens: Annotated[int, Range(gt=0)] = 1024,
) -> tuple[Prompts, Candidates, Pairs]:
    """Read pairs in the format that `reader` names (stages/data/formats.py); a prompt may stand in several.

    subset: a configuration of the data set, or a folder in it. What is no pair is left out with its reason.
    """
    from stages.data.tokenizer import Tokenizer

    form = preference_reader.bind(reader)
    pool = Pool(PromptReader(Tokenizer(tokenizer), ctx, heldout, max_tokens))
    pairs: list[dict[str, Any]] = []
    for place, rows in read(ctx, Source(path, dataset, revision, subset, part), form):
        try:
            made = form(*rows)
            name = pool.prompt(made.prompt, made.plain)
            winner, loser = (
                pool.response(name, text, plain=made.plain is not None) for text in (made.chosen, made.rejected)
            )
        except ValueError as error:
            ctx.reject(str(error), place=place, detail=repr(rows[0]))
            continue
        if winner == loser:
            ctx.reject("identical responses", place=place, detail=made.chosen, prompt=name, candidate=winner)
        else:
            pairs.append(dict(prompt_id=name, chosen_id=winner, rejected_id=loser, gap=None, weight=1.0, rule="label"))
    ordered = sorted(pairs, key=lambda pair: (pair["prompt_id"], pair["chosen_id"], pair["rejected_id"]))
    return *pool.tables(), pa.Table.from_pylist(ordered, schema=PAIRS)


class Pool:
    """Prompts and responses of somebody's file, each once, whatever number of rows they stand in."""

    def __init__(self, reader: PromptReader) -> None:
        self.reader = reader
        self.prompts: dict[str, dict[str, Any]] = {}
        self.candidates: dict[str, dict[str, Any]] = {}
        self.draws: Counter[str] = Counter()

    def prompt(self, content: Prompt, plain: str | None = None) -> str:
        made = self.reader.prompt_row(content, plain)
        name: str = made["prompt_id"]
        self.prompts.setdefault(name, made)
        return name

    def response(self, prompt: str, text: str, *, again: bool = False, plain: bool = False) -> str:
        """The id of a response; an equal text is the same candidate, unless `again` counts it as another draw."""
        ids, finish = self.reader.response_ids(self.prompts[prompt]["token_ids"], text, plain=plain)
        copy = 0
        while again and candidate_id(prompt, ids, copy) in self.candidates:
            copy += 1
        name = candidate_id(prompt, ids, copy)
        if name not in self.candidates:
            self.candidates[name] = {
                "prompt_id": prompt,
                "candidate_id": name,
                "k": self.draws[prompt],
                "token_ids": ids,
                "text": text,
                "logp": None,
                "logp_kind": "none",
                "n_tokens": len(ids),
                "finish_reason": finish,
                "seed": None,
            }
            self.draws[prompt] += 1
        return name

    def tables(self) -> tuple[pa.Table, pa.Table]:
        prompts = sorted(self.prompts.values(), key=lambda row: row["prompt_id"])
        candidates = sorted(self.candidates.values(), key=lambda row: (row["prompt_id"], row["k"]))
        return pa.Table.from_pylist(prompts, PROMPTS), pa.Table.from_pylist(candidates, CANDIDATES)
