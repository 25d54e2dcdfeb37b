"""Stage own_candidates: responses of another system, with a reward or a win probability each for `select`, or none."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

import pyarrow as pa

from pipeline import Bound, DataPath, InputStep, StageContext, stage
from schemas import Candidates, Model, Prompts, Rewards
from schemas.tables import REWARDS
from stages.data.files import DataSource, check_no_columns, check_reader, check_source
from stages.data.first_rows import prompt_problems, response_problems
from stages.data.formats import columns_of, optional_columns_of
from stages.data.prompts import DataTables, LateRejects, SourceRow, check_system_prompt
from stages.data.rows import Row, label_threshold
from stages.data.texts import Conversation, Reply, number_of, prompt_with, reject_detail, reply_of, tools_of
from stages.data.trainer_formats import candidate_reader
from stages.options import Count, HeldoutShare, Prefill, TooLong, ValidationShare, share_problems


def _check_own_candidates(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    reward, probability = options["reward"], options["probability"]
    if options["reader"] is not None:
        defaults = dict(prompt="prompt", response="response", reward=None, probability=None, system=None, input=None)
        problems = check_no_columns(options, **defaults) or check_system_prompt(options, inputs) + check_reader(options)
        problems = problems or prompt_problems(options, inputs)
        return share_problems(options) + (problems or _response_problems(options))
    problems = share_problems(options) + check_system_prompt(options, inputs)
    if reward is not None and probability is not None:
        problems.append(
            f"`reward` is {reward!r} and `probability` is {probability!r}, but only one of them can be read; unset the "
            "other, as in `--set own_candidates.probability=null`"
        )
    names = ("prompt", "response", "reward", "probability", "system", "input")
    problems += check_source(options, [options[name] for name in names if options[name]])
    return problems or prompt_problems(options, inputs) or _response_problems(options)


def _response_problems(options: Mapping[str, Any]) -> list[str]:
    """Return why all responses of a file would be rejected, by its first rows. Warn if only some of them would be."""
    reader: Bound | None = options["reader"]
    names = {name: options[name] for name in ("prompt", "response", "reward", "probability", "system", "input")}
    column = options["reward"] or options["probability"] or ""

    def read(rows: Iterator[tuple[str, Row]]) -> Iterator[tuple[str, ValueError | None]]:
        for location, row, error in _rows_of_lists(rows, "" if reader is not None else options["response"], column):
            if reader is None:
                try:
                    prompt_with(row, names["prompt"], system=names["system"], input=names["input"])
                except ValueError:  # `prompt_problems` counts it
                    continue
            try:
                if error is None:
                    _read_row(row, reader, **names)
            except ValueError as reason:
                error = reason
            yield location, error

    return response_problems(options, read, called="responses")


def _omitted_tables(options: Mapping[str, Any]) -> dict[str, str]:
    if any(options[name] for name in ("reward", "probability", "reader")):
        return {}
    return {
        "rewards": "name the column with the scores as `reward`, or as `probability` (of beating a fixed baseline); or "
        "score the candidates: write `reward: {from: {prompts: $source, candidates: $source}}` and "
        "`$reader: {from: {$item: reward}}`"
    }


@stage(version=8, unsharded=True, check=_check_own_candidates, omits=_omitted_tables)
def own_candidates(
    tokenizer: Model,
    ctx: StageContext,
    *,
    path: DataPath | None = None,
    dataset: str | None = None,
    revision: str | None = None,
    subset: str | None = None,
    dataset_split: str = "train",
    prompt: str = "prompt",
    response: str = "response",
    reward: str | None = None,
    probability: str | None = None,
    system: str | None = None,
    system_prompt: str | None = None,
    input: str | None = None,
    reader: Annotated[Bound, candidate_reader] | None = None,
    heldout: HeldoutShare = 0.0,
    validation: ValidationShare = 0.0,
    max_tokens: Count = 1024,
    too_long: TooLong = "reject",
    prefill: Prefill = "reject",
) -> tuple[Prompts, Candidates, Rewards]:
    """Read one candidate per row, or a list of them. A probability p becomes ln(p / (1 - p)), as in arXiv:2309.06657.

    Where `response` is a list of texts, or of lists of messages, they are as many candidates, and their rewards or
    probabilities are a list of the same length.

    The text in column `input` follows the prompt on a new line, as in Alpaca's format, and that in `system` becomes its
    system message; empty ones add nothing. With a `reader`, rows have a format of responses with labels
    (stages/data/trainer_formats.py): the reward is 1 for a desirable response, 0 for another.

    Rejected, with a reason: a reward that is not finite, a probability outside the open interval (0, 1)
    (its logit is infinite), an empty response, an empty or too long prompt, and a response longer than `max_tokens`,
    because its reward is that of all of it (`too_long: cut` keeps it). Ids, `system_prompt` and `prefill` are as in
    stage `prompts`. Equal responses to one prompt stay separate candidates: how often one occurs is an estimate of its
    probability under the sampling policy.

    Without `reward`, `probability` and `reader`, the candidates have no scores and the table of rewards is empty: a
    step of stage `reward` scores them with your ranker, as in recipe `own_completions`.

    If all rewards of the file are 0 or 1 (or false and true), or -1 or 1, they are labels: later stages take them for
    right and wrong by 0.5 or 0, and not by a prompt's mean. Responses of several turns are as in stage `preferences`.
    """
    column = reward or probability or ""
    source = DataSource(path, dataset, revision, subset, dataset_split)
    data = DataTables(
        tokenizer, heldout, max_tokens, validation=validation, too_long=too_long, prefill=prefill,
        system_prompt=system_prompt,
    )  # fmt: skip
    columns, optional = [name for name in (prompt, response, column, system, input) if name], list[str]()
    if reader is not None:
        reader = candidate_reader.bind(reader)
        columns, optional = columns_of(reader), optional_columns_of(reader)
    late = LateRejects()

    def read() -> Iterator[SourceRow]:
        rows = source.rows(late, columns, optional)
        for location, row, error in _rows_of_lists(rows, "" if reader is not None else response, column):
            item = SourceRow(location, row, rejects_before=late.take())
            try:
                if error:
                    raise error
                conversation, text, value = _read_row(
                    row, reader, prompt=prompt, response=response, reward=reward, probability=probability,
                    system=system, input=input,
                )  # fmt: skip
                item.prompt, item.value = data.add_prompt(conversation), value
                item.responses = [data.render_response(conversation, text)]
            except ValueError as error:
                item.error = error
            yield item

    rewards: list[Row] = []
    is_scored = reader is not None or bool(column)
    for item, ids in data.with_ids(read()):
        for reason, where in item.rejects_before:
            ctx.reject(reason, **where)
        try:
            if item.error:
                raise item.error
            candidate = data.add_response(item.responses[0], ids[0], repeated=True)
        except ValueError as error:
            detail = reject_detail(error, item.row if reader is not None else item.row.get(column))
            ctx.reject(str(error), place=item.location, detail=detail)
            continue
        if is_scored:
            rewards.append(dict(prompt_id=item.prompt, candidate_id=candidate, reward=item.value))
    for reason, where in late.take():
        ctx.reject(reason, **where)
    threshold = None if probability else label_threshold(row["reward"] for row in rewards)
    rewards = [row | {"label_threshold": threshold} for row in rewards]
    rewards.sort(key=lambda row: (row["prompt_id"], row["candidate_id"]))
    return *data.tables(), pa.Table.from_pylist(rewards, schema=REWARDS)


def _read_row(
    row: Row,
    reader: Bound | None,
    *,
    prompt: str,
    response: str,
    reward: str | None,
    probability: str | None,
    system: str | None,
    input: str | None,
) -> tuple[Conversation, Reply, float | None]:
    """Return the prompt of a row, its response and its reward, None without one. Raise ValueError with the reason."""
    if reader is not None:
        labelled = reader(row)
        return Conversation(labelled.prompt, labelled.tools or tools_of(row)), labelled.response, labelled.reward
    column = reward or probability
    value = _reward_of(row, column, is_probability=bool(probability)) if column else None
    content = prompt_with(row, prompt, system=system, input=input)
    return Conversation(content, tools_of(row)), reply_of(row, response, content), value


def _rows_of_lists(
    rows: Iterable[tuple[str, Row]], response: str, column: str
) -> Iterator[tuple[str, Row, ValueError | None]]:
    """Yield a row per response where a row has a list of them: the first of line 1 is at `in.jsonl:1[0]`."""
    for location, row in rows:
        texts, values = row.get(response), row.get(column) if column else None
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str | list) for text in texts):
            yield location, row, None
        elif column and (not isinstance(values, list) or len(values) != len(texts)):
            reason = f"{column} is not a list of as many values as {response} has responses"
            yield location, row, ValueError(reason)
        else:
            for n, text in enumerate(texts):
                yield (
                    f"{location}[{n}]",
                    row | {response: text} | ({column: values[n]} if isinstance(values, list) else {}),
                    None,
                )


def _reward_of(row: Row, column: str, *, is_probability: bool) -> float:
    """Return the reward in a row's column, the logit of a probability. Raise ValueError with the reason of a reject."""
    value = row.get(column)
    if isinstance(value, bool) and not is_probability:  # labels, as 0 and 1 are
        return float(value)
    value = number_of(row, column, called="reward")
    if not math.isfinite(value):
        raise ValueError("reward is not finite")
    if not is_probability:
        return value
    if value in (0.0, 1.0):
        raise ValueError(f"probability is exactly {value:.0f}")
    if not 0 < value < 1:
        raise ValueError("probability is not in (0, 1)")
    return math.log(value) - math.log1p(-value)
