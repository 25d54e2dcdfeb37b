"""Rows of a table by prompt: the unit that every room thinks in."""

from collections.abc import Iterator
from itertools import groupby
from statistics import mean
from typing import Any

import pyarrow as pa

from schemas import WinnowError

Row = dict[str, Any]
LEAST = 2.0**-150  # a weight that is not above it is 0 as float32, which `examples` keeps


def by_prompt(table: pa.Table) -> Iterator[tuple[str, list[Row]]]:
    """Groups in order of prompt id; within one, the table's order."""
    rows = sorted(table.to_pylist(), key=lambda row: str(row["prompt_id"]))
    for prompt, group in groupby(rows, key=lambda row: str(row["prompt_id"])):
        yield prompt, list(group)


def texts_of(table: pa.Table, name: str) -> dict[str, str]:
    """Id to text."""
    return column_by(table, name, "text")


class ById(dict[str, Any]):
    """Values by id; an id that is not there means that a recipe wired tables of different origin."""

    def __missing__(self, name: str) -> Any:
        raise WinnowError(f"no row has the id {name}: wire the inputs of this step to tables of one origin")


def column_by(table: pa.Table, name: str, column: str) -> ById:
    """One column by an id column."""
    return ById(zip(table.column(name).to_pylist(), table.column(column).to_pylist(), strict=True))


def cutoff(group: list[Row], threshold: float | None) -> float:
    """The reward that parts good from bad: the threshold, or the group's mean (exact: equal rewards do meet it)."""
    return mean(row["reward"] for row in group) if threshold is None else threshold
