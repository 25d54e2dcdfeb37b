"""Queries that ship: jobs/queries/*.sql, each with a first line that says what it answers."""

import re
from pathlib import Path

from pipeline.registry import nearest
from schemas import WinnowError

HERE = Path(__file__).parent / "queries"
WORDS = ("describe", "show")  # statements of one word


def names() -> list[str]:
    return sorted(file.stem for file in HERE.glob("*.sql"))


def text(name: str) -> str:
    return (HERE / f"{name}.sql").read_text(encoding="utf-8")


def about(name: str) -> str:
    return text(name).splitlines()[0].removeprefix("-- ")


def statement(asked: str) -> str:
    """A shipped query where `asked` is its bare name, else `asked` itself; raises WinnowError for another bare word."""
    word = asked.strip().removesuffix(";").rstrip()
    if word in names():
        return text(word)
    if re.fullmatch(r"\w+", word) and word.lower() not in WORDS:
        raise WinnowError(f"sql: no query {word!r}; {nearest(word, names())}")
    return asked
