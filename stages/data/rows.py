"""Rows of a table by prompt and by id, for the stages that treat one prompt at a time."""

from collections.abc import Container, Iterable, Iterator
from itertools import count, groupby
from statistics import mean
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import StageContext
from schemas import WinnowError, candidate_id

Row = dict[str, Any]
LABELS = {0.5: {0.0, 1.0}, 0.0: {-1.0, 1.0}}  # by what separates them
ALL_WRONG = "all labelled wrong"  # reason to reject a prompt
SMALLEST_WEIGHT = 2.0**-150  # a weight of at most this is 0 as float32, the type of weights in `examples`


class RowsById(dict[str, Any]):
    """Values by id; a missing id means that a recipe combines tables of different origin."""

    def __missing__(self, name: str) -> Any:
        raise WinnowError(f"no row has the id {name}: the inputs of this step must be tables of one origin")


def rows_by_prompt(table: pa.Table) -> Iterator[tuple[str, list[Row]]]:
    """Yield (prompt id, its rows in the table's order), in order of prompt id."""
    rows = sorted(table.to_pylist(), key=lambda row: str(row["prompt_id"]))
    for prompt, group in groupby(rows, key=lambda row: str(row["prompt_id"])):
        yield prompt, list(group)


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


def equal_rewards(group: list[Row]) -> str | None:
    """Return why rewards order no two of a prompt's candidates, as a reason to reject it; None if they do."""
    if len({row["reward"] for row in group}) > 1:
        return None
    threshold = group[0].get("label_threshold")
    if threshold is not None:
        return "all labelled right" if group[0]["reward"] > threshold else ALL_WRONG
    return "one candidate" if len(group) == 1 else "all rewards equal"


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
    for row in table.filter(pc.invert(finite)).to_pylist():
        ids = dict(prompt=row["prompt_id"], candidate=row[candidate])
        ctx.reject(f"{column} is not finite", place=place, detail=str(row), **ids)
    return table.filter(finite)
