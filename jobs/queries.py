"""Queries that ship: jobs/queries/*.sql, each with a comment in its first line that says what it answers."""

import re
from pathlib import Path

import pyarrow as pa

from pipeline.registry import nearest
from schemas import WinnowError

FOLDER = Path(__file__).parent / "queries"
STATEMENTS = ("describe", "show")  # statements of one word


def names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.sql"))


def text(name: str) -> str:
    return (FOLDER / f"{name}.sql").read_text(encoding="utf-8")


def about(name: str) -> str:
    """Return what a query answers."""
    return text(name).splitlines()[0].removeprefix("-- ")


def table() -> pa.Table:
    """Return all queries with what they answer."""
    return pa.Table.from_pylist([{"query": name, "answers": about(name)} for name in names()])


def statement(typed: str) -> str:
    """Return the SQL of a shipped query if its name is typed, else the text. Raise WinnowError for any other word."""
    word = typed.strip().removesuffix(";").rstrip()
    if word in names():
        return text(word)
    if re.fullmatch(r"\w+", word) and word.lower() not in STATEMENTS:
        raise WinnowError(f"sql: no query {word!r}; {nearest(word, names())}")
    return typed
