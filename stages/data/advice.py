"""Advice of a plan about a file whose columns do not fit, and about columns that nobody reads.

A reader is advised only if it reads the file's first rows, and the columns of its prompt with them.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from types import MappingProxyType
from typing import Any, get_args

from pipeline import Bound, Registry
from schemas import WinnowError, WinnowWarning

# Also for what they register: every reader that can be advised.
from stages.data import comparison_formats, ranking_formats  # noqa: F401
from stages.data.formats import (
    NOT_PAIRS,
    PROMPT_COLUMNS,
    columns_of,
    optional_columns_of,
    pairs_of,
    preference_reader,
    row_groups,
)
from stages.data.rows import Row
from stages.data.texts import with_chat_keys
from stages.data.trainer_formats import candidate_reader

# Columns of public data sets that are part of what the model reads. Not `messages`: where there is a prompt as well,
# it repeats the prompt and a response.
PROMPT_PARTS = {
    "system", "system_prompt", "system_message", "instruction", "instructions", "input", "inputs", "context",
    "contexts", "history", "document", "documents", "tools", "functions", "image", "images", "video", "videos", "audio",
    "audios",
}  # fmt: skip
# Options that add a text to the prompt -> columns that such texts are usually in.
OPTIONS = {
    "system": {"system", "system_prompt", "system_message"},
    "input": {"input", "inputs", "context", "contexts", "document"},
}


MAY_BE_UNSET = ("demonstration", "system", "input")  # options that name a column, and need not


def require_columns(
    names: Sequence[str],
    columns: Sequence[str],
    file: str,
    head: Callable[[], list[Row]],
    options: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Raise WinnowError for missing columns, with what the file may be, or the readers that read its first rows.

    options: column -> the option that names it, which the message says.
    """
    missing = [column for column in columns if column not in names]
    if not missing:
        return
    lacking = ", ".join(f"{name!r}" + (f" (option `{options[name]}`)" if name in options else "") for name in missing)
    existing = ", ".join(map(repr, names))
    problem = f"{file}: no column {lacking}; it has {existing}"
    if unneeded := [f"`{name}: null`" for column in missing if (name := options.get(column, "")) in MAY_BE_UNSET]:
        problem += (
            f"; set {', '.join(unneeded)} for a file without it"  # a step may have it from the one that it is like
        )
    for signature, description in NOT_PAIRS:
        if signature <= set(names):
            raise WinnowError(f"{problem}. This is {description}")
    advice = _advice(names, head())
    if not advice and [options.get(column) for column in missing] == ["prompt"] and "chosen" not in options.values():
        advice = _prompt_advice(names, head())
    raise WinnowError(problem + advice)


def require_readable(
    reader: Bound, rows: list[Row], file: str, head: Callable[[], tuple[Sequence[str], list[Row]]]
) -> None:
    """Raise WinnowError if a reader reads none of the first rows, with the most frequent reason and readers that do."""
    results = _results(reader, rows)
    reasons = Counter(str(result) for result in results if isinstance(result, ValueError))
    if not results or len(results) > sum(reasons.values()):
        return
    (reason, _), *_ = reasons.most_common(1)
    problem = f"{file}: reader {reader.name} reads none of its first {len(rows)} rows ({reason})"
    raise WinnowError(problem + _advice(*head()))


def warn_of_unread(parts: Sequence[str], rows: list[Row], file: str, *, complete: bool) -> None:
    """Warn of unread parts of the prompt, unless the rows, which are then all of the file, have none of them."""
    unread = [name for name in parts if not complete or _has_content(rows, name)]
    if unread:
        listed, are = ", ".join(map(repr, unread)), "is" if len(unread) == 1 else "are"
        options = [f"`{option}: {name}`" for name in unread for option, named in OPTIONS.items() if name in named]
        cure = "; set {} of prompts, own_candidates or the reader `columns` to read it".format(" or ".join(options))
        message = f"{file}: {listed} may be part of the prompt, and {are} not read{cure if options else ''}"
        warnings.warn(message, WinnowWarning, stacklevel=2)


def unread_parts(names: Sequence[str], read: Sequence[str]) -> list[str]:
    """Return the columns that look like part of the prompt and are not read."""
    return [name for name in names if name in PROMPT_PARTS and name not in read]


def _has_content(rows: list[Row], name: str) -> bool:
    return any(row.get(name) not in (None, "", [], {}) for row in rows)


def _advice(names: Sequence[str], rows: list[Row]) -> str:
    """Return the end of a message that names the readers which read the rows best, or nothing if none does."""
    pairs, labels = (_best_readers(registry, names, rows) for registry in (preference_reader, candidate_reader))
    if pairs:
        return f"; in stage preferences or prompts, set `reader` to {' or '.join(pairs)} for these"
    if labels:
        return f"; these are responses with a label and no pairs: in stage own_candidates, set `reader` to {labels[0]}"
    return ""


def _prompt_advice(names: Sequence[str], rows: list[Row]) -> str:
    """Return the end of a message that names the column in which the prompt may be, and options to read it with."""
    column = next((name for name in PROMPT_COLUMNS if name in names), None)
    if column is None:
        return ""
    options = [f"`prompt: {column}`"]
    if column == "instruction" and "input" in names:
        options.append("`input: input`")
    chats = [row[column] for row in rows if isinstance(row.get(column), list) and row[column]]
    if chats and all(with_chat_keys(turns)[-1].get("role") == "assistant" for turns in chats):  # data for SFT
        options.append("`prefill: omit`")
    return f"; set {' and '.join(options)}"


def _best_readers(registry: Registry, names: Sequence[str], rows: list[Row]) -> list[str]:
    """Return the readers, with options, that leave fewest parts of the prompt unread, and of these read most rows.

    A reader that reads less than half as many rows as another is left out.
    """
    # Each reader with each choice of its required options, and with options that it declares as `variants`.
    variants = []
    for entry in registry.entries.values():
        required = {name: get_args(f.annotation) for name, f in entry.options.model_fields.items() if f.is_required()}
        choices = [dict(zip(required, values, strict=True)) for values in product(*required.values())]
        for set_options in [*choices, *entry.metadata.get("variants", ())]:
            variants.append((Bound(entry, entry.validate(set_options, "")), set_options))
    candidates = []
    for reader, set_options in variants:
        if set(columns_of(reader)) <= set(names):
            words = ", ".join(f"{name}: {value}" for name, value in {"name": reader.name, **set_options}.items())
            count = sum(not isinstance(result, ValueError) for result in _results(reader, rows))
            unread = unread_parts(names, [*columns_of(reader), *optional_columns_of(reader)])
            lost = sum(_has_content(rows, name) for name in unread)
            candidates.append((f"{{{words}}}" if set_options else reader.name, count, lost))
    most = max((count for _, count, _ in candidates), default=0)
    candidates = [(words, -lost, count) for words, count, lost in candidates if count and 2 * count >= most]
    best = max((score for _, *score in candidates), default=None)
    return [words for words, *score in candidates if score == best]


def _results(reader: Bound, rows: list[Row]) -> list[Any]:
    """Return what a reader makes of the rows: pairs or labelled responses, and a ValueError for what is none."""
    groups = row_groups((("", row) for row in rows), reader)
    return [result for _, group in groups for result in pairs_of(reader, group)]
