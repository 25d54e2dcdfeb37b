"""Stage preferences: pairs of human preference data as pairs of ids, with the prompts and responses they consist of."""

from collections.abc import Iterator
from typing import Annotated

import pyarrow as pa

from pipeline import Bound, DataPath, StageContext, stage
from pipeline.costs import Cost
from schemas import Candidates, Model, Pairs, Prompts
from schemas.tables import PAIRS
from stages.data.files import DataSource, check_reader
from stages.data.first_rows import pair_problems, prompt_problems
from stages.data.formats import IDENTICAL, pairs_of, preference_reader
from stages.data.prompts import DataTables, LateRejects, SourceRow, check_system_prompt
from stages.data.rows import Row
from stages.data.texts import Conversation, readable_reply, reject_detail, tools_of, without_repeated_prompt
from stages.options import Count, HeldoutShare, Prefill, TooLong, ValidationShare, share_problems
from stages.work import preferences_work


@stage(
    version=7,
    unsharded=True,
    check=lambda options, inputs: (
        share_problems(options)
        + check_system_prompt(options, inputs)
        + (check_reader(options) or prompt_problems(options, inputs) or pair_problems(options))
    ),
    cost=Cost(work=preferences_work),
)
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
    system_prompt: str | None = None,
    heldout: HeldoutShare = 0.2,
    validation: ValidationShare = 0.0,
    max_tokens: Count = 1024,
    too_long: TooLong = "reject",
    prefill: Prefill = "reject",
) -> tuple[Prompts, Candidates, Pairs]:
    """Read pairs in the format that `reader` names (stages/data/formats.py); a prompt may have several pairs.

    A row with a ranking of more than two responses gives the pairs that the reader's option `pairs` names. `subset` is
    a configuration of the data set, or a folder in it. Rows that are no pair are rejected with a reason. So are
    responses longer than `max_tokens`: one that is cut is not what was preferred, and has no end (`too_long: cut`
    keeps it). Ids, `system_prompt`, `prefill` and `validation` are as in stage
    `prompts`.

    A response may be several turns, with calls and results of tools: the column `mask` says which ids the assistant
    wrote, and they alone are trained on and scored. Rejected are those whose turns the chat template renders
    differently once others follow.
    """
    reader = preference_reader.bind(reader)
    data = DataTables(
        tokenizer, heldout, max_tokens, validation=validation, too_long=too_long, prefill=prefill,
        system_prompt=system_prompt,
    )  # fmt: skip
    late, source = LateRejects(), DataSource(path, dataset, revision, subset, dataset_split)

    def read() -> Iterator[SourceRow]:
        for location, row, pair in source.reader_results(late, reader, pairs_of):
            item = SourceRow(location, row, rejects_before=late.take())
            try:
                if isinstance(pair, ValueError):
                    raise pair
                item.value = pair
                conversation = Conversation(pair.prompt, pair.tools or tools_of(row), pair.plain)
                replies = without_repeated_prompt(pair.prompt, (pair.chosen, pair.rejected))
                item.prompt = data.add_prompt(conversation)
                for reply in replies:  # the first is a candidate even if the second is rejected
                    item.responses.append(data.render_response(conversation, reply))
            except ValueError as error:
                item.error = error
            yield item

    pairs: list[Row] = []
    for item, ids in data.with_ids(read()):
        for reason, where in item.rejects_before:
            ctx.reject(reason, **where)
        try:
            added = [data.add_response(*response) for response in zip(item.responses, ids, strict=True)]
            if item.error:
                raise item.error
        except ValueError as error:
            ctx.reject(str(error), place=item.location, detail=reject_detail(error, item.row))
            continue
        chosen, rejected = added
        prompt = item.prompt
        if chosen == rejected:
            ctx.reject(
                IDENTICAL,
                place=item.location,
                detail=readable_reply(item.value.chosen),
                prompt=prompt,
                candidate=chosen,
            )
            continue
        pairs.append(dict(prompt_id=prompt, chosen_id=chosen, rejected_id=rejected, gap=None, weight=1.0, rule="label"))
    for reason, where in late.take():
        ctx.reject(reason, **where)
    pairs.sort(key=lambda row: (row["prompt_id"], row["chosen_id"], row["rejected_id"]))
    return *data.tables(), pa.Table.from_pylist(pairs, schema=PAIRS)
