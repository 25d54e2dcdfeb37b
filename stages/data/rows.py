"""Rows of a table by prompt and by id, for the stages that treat one prompt at a time."""

from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import count, groupby
from statistics import mean
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import StageContext
from schemas import WinnowError, candidate_id, combine_chunks

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Row = dict[str, Any]
Texts: TypeAlias = pa.Array | Sequence[str] | str | None
LABELS = {0.5: {0.0, 1.0}, 0.0: {-1.0, 1.0}}  # by what separates them
ALL_WRONG = "all labelled wrong"  # reason to reject a prompt
SMALLEST_WEIGHT = 2.0**-150  # a weight of at most this is 0 as float32, the type of weights in `examples`


class RowsById(dict[str, Any]):
    """Values by id; a missing id means that a recipe combines tables of different origin."""

    def __missing__(self, name: str) -> Any:
        raise WinnowError(
            f"no row has the id {name}, which another input of the step has: its inputs must be tables of one origin; "
            "set each under `from` to a step that the same prompts, and the same responses, are behind"
        )


def rows_by_prompt(table: pa.Table) -> Iterator[tuple[str, list[Row]]]:
    """Yield (prompt id, its rows in the table's order), in order of prompt id."""
    rows = sorted(table.to_pylist(), key=lambda row: str(row["prompt_id"]))
    for prompt, group in groupby(rows, key=lambda row: str(row["prompt_id"])):
        yield prompt, list(group)


def in_order_of_prompts(table: pa.Table) -> pa.Table:
    """Return the table in order of prompt id, rows of one prompt as they were; the same table if it is so already."""
    table = combine_chunks(table)
    if table.num_rows:
        prompts = table.column("prompt_id").combine_chunks()
        if not pc.all(pc.less_equal(prompts[:-1], prompts[1:])).as_py():
            return combine_chunks(table.take(pc.sort_indices(prompts)))  # a stable sort
    return table


def starts_of_prompts(prompts: pa.Array) -> tuple[pa.Array, Ints]:
    """Return the prompts of ids in order, [G], and where the rows of each begin and the last one's end, [G + 1]."""
    if not len(prompts):
        return prompts, np.zeros(1, np.int64)
    runs = pc.run_end_encode(prompts, run_end_type=pa.int64())
    return runs.values, np.append(0, runs.run_ends.to_numpy())


def column_of(table: pa.Table, name: str) -> pa.Array:
    """Return a column as one array."""
    return table.column(name).combine_chunks()


def numbers_of(table: pa.Table, name: str) -> NDArray[Any]:
    """Return a column of numbers; nan where there is none."""
    return column_of(table, name).to_numpy(zero_copy_only=False)


def positions_of(ids: pa.Array, among: pa.ChunkedArray) -> Ints:
    """Return the row of each id among those of a table, the last one that has it, or -1."""
    # A hash table of the ids that are looked up, which are the fewer: a join with the larger table takes twice as long.
    rows = np.flatnonzero(pc.is_in(among, value_set=ids).to_numpy())[::-1]
    index = pc.index_in(ids, value_set=among.take(pa.array(rows)).combine_chunks())
    positions: Ints = np.append(rows, -1)[pc.fill_null(index, len(rows)).to_numpy()]
    return positions


def require_ids(ids: pa.Array, positions: Ints) -> None:
    """Raise WinnowError that names the first id without a row."""
    if (positions < 0).any():
        RowsById()[ids[int((positions < 0).argmax())].as_py()]


class RejectedRows:
    """Rejects of a stage that treats all prompts at once, recorded as if it had treated one after the other."""

    def __init__(self) -> None:
        self.numbers: list[Ints] = []
        self.columns: list[dict[str, pa.Array]] = []  # of `StageContext.reject_rows`

    def add(self, numbers: Ints, *, place: str, reason: Texts, detail: Texts = "", candidates: Texts = None) -> None:
        """Add rows of the prompts of these numbers; of each column a value per row, or one value for all."""
        if len(numbers):
            texts = dict(candidates=candidates, place=place, reason=reason, detail=detail)
            self.numbers.append(numbers)
            self.columns.append({
                name: pa.repeat(pa.scalar(text, pa.string()), len(numbers)) if text is None or isinstance(text, str)
                else pa.array(text, pa.string()) for name, text in texts.items()
            })  # fmt: skip

    def record(self, ctx: StageContext, prompts: pa.Array) -> None:
        """Record the rows in order of their prompts, those of a prompt in the order in which they were added."""
        if self.numbers:
            numbers = np.concatenate(self.numbers)
            order = np.argsort(numbers, kind="stable")
            columns = {
                name: pa.concat_arrays([part[name] for part in self.columns]).take(pa.array(order))
                for name in self.columns[0]
            }
            ctx.reject_rows(prompts.take(pa.array(numbers[order])), **columns)


def column_by_id(table: pa.Table, name: str, column: str) -> RowsById:
    """Return {value of the id column `name`: value of `column`}."""
    return RowsById(zip(table.column(name).to_pylist(), table.column(column).to_pylist(), strict=True))


def fields_of(prompt: Row) -> dict[str, str]:
    """Return the columns of the data file that were kept with a row of the table `prompts`, as text by name."""
    return dict(prompt.get("fields") or ())


def mask_of(candidate: Row) -> tuple[bool, ...] | None:
    """Return which ids of a candidate count, as the key of a dict; None if all do."""
    return None if candidate["mask"] is None else tuple(candidate["mask"])


def text_by_id(table: pa.Table, name: str) -> dict[str, str]:
    """Return {value of the id column `name`: text}."""
    return column_by_id(table, name, "text")


def label_threshold(rewards: Iterable[float]) -> float | None:
    """Return what separates right from wrong if all rewards are labels, 0 or 1 (0.5), or -1 or 1 (0); else None."""
    values = set(rewards)
    return next((threshold for threshold, labels in LABELS.items() if values and values <= labels), None)


def cutoff(group: list[Row], threshold: float | None) -> float:
    """Return the reward that separates good from bad: the threshold, that of labels, or else the prompt's mean.

    Labels say themselves what is good, where all of a prompt's responses may be. The mean is exact: equal rewards do
    meet it.
    """
    if threshold is None:
        threshold = group[0].get("label_threshold")
    return mean(row["reward"] for row in group) if threshold is None else threshold


def cutoffs(rewards: Floats, starts: Ints, thresholds: Floats, threshold: float | None) -> Floats:
    """Return `cutoff` of every prompt, [G]. rewards, thresholds: [N], nan where no threshold of labels is known.

    Where no reward is near the mean, any number as near to it separates the same: only the others' mean is exact.
    """
    n_prompts, sizes, firsts = len(starts) - 1, np.diff(starts), starts[:-1]
    if threshold is not None or not n_prompts:
        return np.full(n_prompts, np.nan if threshold is None else threshold)
    levels = np.add.reduceat(rewards, firsts) / sizes
    # The error of a sum of n numbers is below n times the sum of their sizes, in units of rounding.
    error = np.add.reduceat(np.abs(rewards), firsts) * np.finfo(float).eps * 2
    is_near = np.logical_or.reduceat(np.abs(rewards - np.repeat(levels, sizes)) <= np.repeat(error, sizes), firsts)
    for n in np.flatnonzero(is_near):
        levels[n] = mean(rewards[starts[n] : starts[n + 1]].tolist())
    return np.where(np.isnan(thresholds[firsts]), levels, thresholds[firsts])


def equal_rewards(group: list[Row]) -> str | None:
    """Return why rewards order no two of a prompt's candidates, as a reason to reject it; None if they do."""
    if len({row["reward"] for row in group}) > 1:
        return None
    threshold = group[0].get("label_threshold")
    if threshold is not None:
        return "all labelled right" if group[0]["reward"] > threshold else ALL_WRONG
    return "one candidate" if len(group) == 1 else "all rewards equal"


def equal_rewards_by_prompt(rows: pa.Table, starts: Ints) -> NDArray[np.str_]:
    """Return `equal_rewards` of every prompt, [G]; empty text where rewards order two of its candidates."""
    if len(starts) == 1:
        return np.zeros(0, dtype="<U1")
    rewards, thresholds = numbers_of(rows, "reward"), numbers_of(rows, "label_threshold")
    first, threshold = rewards[starts[:-1]], thresholds[starts[:-1]]
    differ = np.maximum.reduceat(rewards, starts[:-1]) > np.minimum.reduceat(rewards, starts[:-1])
    cases = [differ, first > threshold, ~np.isnan(threshold), np.diff(starts) == 1]
    return np.select(cases, ["", "all labelled right", ALL_WRONG, "one candidate"], "all rewards equal")


def imported_candidate(
    prompt: str,
    ids: list[int],
    text: str,
    used_ids: Container[str] = (),
    *,
    k: int = 0,
    finish_reason: str = "given",
    mask: list[bool] | None = None,
    chat: str | None = None,
) -> Row:
    """Return the row of a candidate that no policy drew here: it has neither log-prob nor seed.

    Its id counts the copies of its tokens: it is the first one that is not in `used_ids`.
    """
    copies = (candidate_id(prompt, ids, copy) for copy in count())
    return {
        "prompt_id": prompt,
        "candidate_id": next(copy for copy in copies if copy not in used_ids),
        "k": k,
        "token_ids": ids,
        "mask": mask,
        "text": text,
        "chat": chat,
        "raw_text": None,
        "logp": None,
        "logp_kind": "none",
        "model": None,
        "dtype": None,
        "n_tokens": len(ids),
        "finish_reason": finish_reason,
        "seed": None,
    }


def reject_not_finite(
    table: pa.Table, column: str, ctx: StageContext, *, place: str, candidate: str = "candidate_id"
) -> pa.Table:
    """Return the rows in which `column` is finite or null; the others are rejected with their values as detail."""
    finite = pc.fill_null(pc.is_finite(table[column]), True)
    rejected = table.filter(pc.invert(finite))
    ctx.reject_rows(
        column_of(rejected, "prompt_id"),
        candidates=column_of(rejected, candidate),
        reason=f"{column} is not finite",
        place=place,
        detail=[str(row) for row in rejected.to_pylist()],
        phase=1,
    )
    return table.filter(finite)
