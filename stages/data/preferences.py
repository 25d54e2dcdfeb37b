"""Stage preferences: pairs of human preference data as pairs of ids, with the prompts and responses they consist of."""

from typing import Annotated

import pyarrow as pa

from pipeline import Bound, DataPath, StageContext, stage
from schemas import Candidates, Model, Pairs, Prompts
from schemas.tables import PAIRS
from stages.data.files import DataSource, check_source
from stages.data.formats import columns_of, preference_reader, read_pair
from stages.data.prompts import DataTables
from stages.data.rows import Row
from stages.options import Count, HeldoutShare


@stage(version=2, unsharded=True, check=lambda options, inputs: check_source(options, columns_of(options["reader"])))
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
    max_tokens: Count = 1024,
) -> tuple[Prompts, Candidates, Pairs]:
    """Read pairs in the format that `reader` names (stages/data/formats.py); a prompt may have several pairs.

    `subset` is a configuration of the data set, or a folder in it. Rows that are no pair are rejected with a reason.
    """
    reader = preference_reader.bind(reader)
    data = DataTables(tokenizer, heldout, max_tokens)
    pairs: list[Row] = []
    for location, rows in DataSource(path, dataset, revision, subset, dataset_split).reader_rows(ctx, reader):
        try:
            pair = read_pair(reader, rows)
            prompt = data.add_prompt(pair.prompt, pair.plain)
            chosen, rejected = (
                data.add_response(prompt, text, plain=pair.plain is not None) for text in (pair.chosen, pair.rejected)
            )
        except ValueError as error:
            ctx.reject(str(error), place=location, detail=repr(rows[0]))
            continue
        if chosen == rejected:
            ctx.reject("identical responses", place=location, detail=pair.chosen, prompt=prompt, candidate=chosen)
            continue
        pairs.append(dict(prompt_id=prompt, chosen_id=chosen, rejected_id=rejected, gap=None, weight=1.0, rule="label"))
    pairs.sort(key=lambda row: (row["prompt_id"], row["chosen_id"], row["rejected_id"]))
    return *data.tables(), pa.Table.from_pylist(pairs, schema=PAIRS)
